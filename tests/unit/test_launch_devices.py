"""How many ranks a machine gets."""

import pytest

from megatron.config.load import config_from_flat
from megatron.errors import UserError
from megatron.launch import devices
from megatron.launch.devices import Placement, place, planned_ranks, read_hostfile

SHAPE = {"num_layers": 4, "hidden_size": 48, "num_attention_heads": 12, "seq_length": 8}


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """A machine of two cores without a GPU and without a hostfile, whatever this one has."""
    monkeypatch.setattr(devices, "cores", lambda: 2)
    monkeypatch.setattr(devices, "_torch_has_cuda", lambda: True)
    monkeypatch.setattr(devices, "USUAL_HOSTFILE", tmp_path / "no_hostfile")


CPU = {"CUDA_VISIBLE_DEVICES": ""}
GPUS = {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}


def placement(environment, script="train.py", **keys):
    return place(config_from_flat(SHAPE | keys), script, environment)


@pytest.mark.parametrize(
    ("keys", "script", "ranks"),
    [
        ({}, "train.py", 2),
        ({"num_gpus": 3}, "train.py", 3),
        ({"model_parallel_size": 4}, "train.py", 4),
        ({"pipe_parallel_size": 3}, "train.py", 3),
        ({"model_parallel_size": 2, "pipe_parallel_size": 4}, "train.py", 8),
        ({}, "generate.py", 1),
        ({"model_parallel_size": 2, "pipe_parallel_size": 4}, "evaluate.py", 2),
        ({"num_gpus": 4}, "evaluate.py", 4),
    ],
)
def test_a_cpu_machine_gets_enough_ranks_for_the_layout_and_no_gpu(keys, script, ranks):
    assert placement(CPU, script, **keys) == Placement("cpu", ("-1",) * ranks)


@pytest.mark.parametrize(
    ("keys", "script", "chosen"),
    [
        ({}, "train.py", "4567"),
        ({"num_gpus": 2}, "train.py", "45"),
        ({"include": "localhost:0,2"}, "train.py", "46"),
        ({"exclude": "localhost:1"}, "train.py", "467"),
        ({}, "generate.py", "4"),
        ({"model_parallel_size": 2}, "generate.py", "45"),
    ],
)
def test_a_gpu_machine_gives_all_visible_gpus_or_those_asked_for(keys, script, chosen):
    assert placement(GPUS, script, **keys) == Placement("cuda", tuple(chosen))


def test_gpus_are_left_alone_where_the_cpu_is_asked_for():
    assert placement(GPUS, distributed_backend="gloo").accelerator == "cpu"
    assert placement(GPUS | {"DS_ACCELERATOR": "cpu"}).accelerator == "cpu"


def test_a_torch_without_cuda_uses_no_gpu(monkeypatch):
    monkeypatch.setattr(devices, "_torch_has_cuda", lambda: False)
    assert placement(GPUS).accelerator == "cpu"


def test_what_the_installed_torch_was_built_for_is_read_from_its_files(monkeypatch):
    import torch

    monkeypatch.undo()
    assert devices._torch_has_cuda() == (torch.version.cuda is not None)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"num_gpus": 5}, "5 ranks are asked for, but 4 GPUs are visible"),
        ({"include": "localhost:4"}, "names device 4, but there are 4, counted from 0"),
        ({"include": "elsewhere:0"}, "must list devices of this machine"),
        ({"exclude": "localhost"}, "must list devices of this machine"),
        ({"exclude": "0,1,2,3"}, "leaves no device"),
        ({"num_nodes": 2}, r"num_nodes \(2\): launcher local starts ranks on this machine only"),
        ({"hostfile": "no_such_file"}, "the hostfile no_such_file cannot be read"),
    ],
)
def test_devices_that_are_not_there_are_refused(keys, message):
    with pytest.raises(UserError, match=message):
        placement(GPUS, **keys)


def test_a_hostfile_of_one_host_gives_the_ranks_and_of_several_is_refused(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("# ours\nnode1 slots=3\n\n")
    two.write_text("node1 slots=3\nnode2 slots=3\n")
    assert len(placement(GPUS, hostfile=str(one)).devices) == 3
    assert len(placement(CPU | {"DLTS_HOSTFILE": str(one)}).devices) == 3
    assert len(placement(GPUS, hostfile=str(two), num_nodes=1).devices) == 4
    with pytest.raises(UserError, match="names 2 hosts"):
        placement(GPUS, hostfile=str(two))


@pytest.mark.parametrize("text", ["node1", "node1 slots=x", "node1 slots=0", "node1 slots=1\nnode1 slots=2"])
def test_a_line_of_a_hostfile_that_says_nothing_is_named(tmp_path, text):
    (tmp_path / "hosts").write_text("node0 slots=1\n" + text)
    with pytest.raises(UserError, match=r"hosts:[23]: "):
        read_hostfile(tmp_path / "hosts")


def test_a_plan_may_be_for_other_machines_than_this_one():
    def ranks(**keys):
        return planned_ranks(config_from_flat(SHAPE | keys), "train.py", GPUS)

    assert ranks(num_gpus=8, num_nodes=12, hostfile="no_such_file") == 96
    assert ranks() == 4
    assert ranks(num_nodes=2) == 8
