"""How many ranks a machine gets."""

import pytest

from megatron.config.load import config_from_flat
from megatron.errors import UserError
from megatron.launch import accelerators, devices, hostfile
from megatron.launch.accelerators import devices_of_slots, visible_gpus
from megatron.launch.devices import local_slots, planned_ranks
from megatron.launch.hostfile import read_hostfile, read_hosts

SHAPE = {"num_layers": 4, "hidden_size": 48, "num_attention_heads": 12, "seq_length": 8}


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """A machine of two cores without a GPU and without a hostfile, whatever this one has."""
    monkeypatch.setattr(devices, "cores", lambda: 2)
    monkeypatch.setattr(accelerators, "_torch_has_cuda", lambda: True)
    monkeypatch.setattr(hostfile, "USUAL_HOSTFILE", tmp_path / "no_hostfile")


CPU = {"CUDA_VISIBLE_DEVICES": ""}
GPUS = {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}


def devices_of(environment, script="train.py", **keys):
    """The device of each rank of this machine."""
    config = config_from_flat(SHAPE | keys)
    gpus = visible_gpus(environment, config.launcher.distributed_backend)
    return devices_of_slots(local_slots(config, script, environment), gpus)


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
    assert devices_of(CPU, script, **keys) == ("-1",) * ranks


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
    assert devices_of(GPUS, script, **keys) == tuple(chosen)


def test_gpus_are_left_alone_where_the_cpu_is_asked_for():
    assert devices_of(GPUS, distributed_backend="gloo") == ("-1", "-1")
    assert devices_of(GPUS | {"DS_ACCELERATOR": "cpu"}) == ("-1", "-1")


def test_a_torch_without_cuda_uses_no_gpu(monkeypatch):
    monkeypatch.setattr(accelerators, "_torch_has_cuda", lambda: False)
    assert devices_of(GPUS) == ("-1", "-1")


def test_what_the_installed_torch_was_built_for_is_read_from_its_files(monkeypatch):
    import torch

    monkeypatch.undo()
    assert accelerators._torch_has_cuda() == (torch.version.cuda is not None)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"num_gpus": 5}, "5 ranks are asked for, but 4 GPUs are visible"),
        ({"include": "localhost:4"}, "names device 4, but there are 4, counted from 0"),
        ({"include": "elsewhere:0"}, "names elsewhere, but this machine has localhost"),
        ({"include": "localhost:a"}, "must be hosts with or without slots"),
        ({"exclude": "localhost"}, "leaves no device"),
        ({"exclude": "0,1,2,3"}, "leaves no device"),
        ({"num_nodes": 2}, r"num_nodes \(2\): launcher local starts ranks on this machine only"),
        ({"hostfile": "no_such_file"}, "the hostfile no_such_file cannot be read"),
    ],
)
def test_devices_that_are_not_there_are_refused(keys, message):
    with pytest.raises(UserError, match=message):
        devices_of(GPUS, **keys)


def test_a_hostfile_of_one_host_gives_the_ranks_and_of_several_is_refused(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("# ours\nnode1 slots=3\n\n")
    two.write_text("node1 slots=3\nnode2 slots=3\n")
    assert len(devices_of(GPUS, hostfile=str(one))) == 3
    assert len(devices_of(CPU | {"DLTS_HOSTFILE": str(one)})) == 3
    assert len(devices_of(GPUS, hostfile=str(two), num_nodes=1)) == 4
    with pytest.raises(UserError, match="names 2 hosts"):
        devices_of(GPUS, hostfile=str(two))


THREE_HOSTS = "# a cluster\nnode1 slots=4\nnode2 slots=4  # the new one\n\nnode3 slots=2\n"


@pytest.mark.parametrize(
    ("keys", "slots"),
    [
        ({}, {"node1": (0, 1, 2, 3), "node2": (0, 1, 2, 3), "node3": (0, 1)}),
        ({"include": "node2@node1:0,2"}, {"node2": (0, 1, 2, 3), "node1": (0, 2)}),
        ({"exclude": "node1@node2:1"}, {"node2": (0, 2, 3), "node3": (0, 1)}),
        ({"num_nodes": 2}, {"node1": (0, 1, 2, 3), "node2": (0, 1, 2, 3)}),
        ({"num_gpus": 2, "num_nodes": 1}, {"node1": (0, 1)}),
    ],
)
def test_hosts_and_slots_are_chosen_as_with_deepspeed(tmp_path, keys, slots):
    (tmp_path / "hosts").write_text(THREE_HOSTS)
    found = read_hosts(config_from_flat(SHAPE | keys | {"hostfile": str(tmp_path / "hosts")}), {})
    assert found is not None
    assert list(found.items()) == list(slots.items())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"include": "node4"}, "names node4, but .*hosts has node1, node2, node3"),
        ({"exclude": "node3:2"}, "names device 2, but there are 2"),
        ({"include": "node1:"}, "must be hosts with or without slots"),
        ({"num_nodes": 4}, r"num_nodes \(4\) is more than the 3 hosts"),
        ({"num_gpus": 3}, r"num_gpus \(3\) is more than the 2 slots of node3"),
    ],
)
def test_hosts_and_slots_that_are_not_in_the_hostfile_are_refused(tmp_path, keys, message):
    (tmp_path / "hosts").write_text(THREE_HOSTS)
    with pytest.raises(UserError, match=message):
        read_hosts(config_from_flat(SHAPE | keys | {"hostfile": str(tmp_path / "hosts")}), {})


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
