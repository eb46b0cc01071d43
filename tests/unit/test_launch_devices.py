"""How many ranks a machine gets."""

import pytest

from megatron.config.load import config_from_flat
from megatron.errors import UserError
from megatron.launch import accelerators, devices, hosts
from megatron.launch.accelerators import devices_of_slots, visible_gpus
from megatron.launch.devices import local_slots
from megatron.launch.hosts import parse_filter, problem_with_host, read_hostfile, read_hosts
from megatron.launch.planning import planned_ranks
from megatron.launch.torch_build import TorchBuild, installed_torch

SHAPE = {"num_layers": 4, "hidden_size": 48, "num_attention_heads": 12, "seq_length": 8}


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """A machine of two cores without a GPU and without a hostfile, whatever this one has."""
    monkeypatch.setattr(devices, "cores", lambda: 2)
    monkeypatch.setattr(accelerators, "installed_torch", lambda: TorchBuild(tmp_path, "2.13.0", (13, 0)))
    monkeypatch.setattr(hosts, "USUAL_HOSTFILE", tmp_path / "no_hostfile")


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


def test_a_torch_without_cuda_uses_no_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(accelerators, "installed_torch", lambda: TorchBuild(tmp_path, "2.13.0+cpu", None))
    assert devices_of(GPUS) == ("-1", "-1")


def test_what_the_installed_torch_was_built_for_is_read_from_its_files():
    import torch

    build = installed_torch()
    assert build.version == torch.__version__
    assert (build.cuda and f"{build.cuda[0]}.{build.cuda[1]}") == torch.version.cuda
    assert build.has_nccl() == torch.distributed.is_nccl_available()


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
        ({"hostfile": "no_such_file"}, "hostfile .no_such_file. cannot be read: No such file"),
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


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_is_no_part_of_the_first_host(tmp_path, encoding):
    (tmp_path / "hosts").write_bytes("node1 slots=2\r\nnode2\tslots=3\r\n".encode(encoding))
    assert read_hostfile(tmp_path / "hosts") == {"node1": 2, "node2": 3}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("node1 slots=2 # Büro\n".encode("latin-1"), r"not UTF-8: byte 17 \(0xfc, line 1\).*iconv"),
        (b"\x1f\x8b\x08\x00rest", "is gzip data, not UTF-8 text"),
        (b"# nothing\n\n", 'names no host; write a line such as "node1 slots=8"'),
    ],
)
def test_a_hostfile_that_is_not_readable_text_is_refused_by_what_it_is(tmp_path, data, message):
    (tmp_path / "hosts").write_bytes(data)
    with pytest.raises(UserError, match=rf"hostfile \({tmp_path}/hosts\).*{message}"):
        read_hostfile(tmp_path / "hosts")


@pytest.mark.parametrize(
    "name", ["node1", "my_node-2", "a.b.example.org", "a.b.", "10.0.0.1", "fe80::1", "N1", "_x", "1"]
)
def test_names_and_addresses_that_machines_have_are_hosts(name):
    assert problem_with_host(name) is None


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("-oProxyCommand=true", 'not begin with "-"'),
        ("--version", 'not begin with "-"'),
        ("a;reboot", "it may have letters"),
        ("$(id)", "it may have letters"),
        ("a`id`", "it may have letters"),
        ("a,b", "it may have letters"),
        ("a..b", "it may have letters"),
        ("a" * 64, "it may have letters"),
        ("fe80::1%;id", "it may have letters"),
        ("b\u00fcro", "it may have letters"),
        ("me@node1", "put the user into ~/.ssh/config"),
        ("node[1-4]", "one line for each host"),
        ("node1:2222", "put the port of ssh into ~/.ssh/config"),
    ],
)
def test_words_that_ssh_would_take_for_something_else_are_refused_as_hosts(tmp_path, name, hint):
    (tmp_path / "hosts").write_text(f"node0 slots=1\n{name} slots=8\n")
    with pytest.raises(UserError, match=r"hosts:2: .* is not a host name or address; ") as refused:
        read_hostfile(tmp_path / "hosts")
    assert hint in str(refused.value)


@pytest.mark.parametrize("slots", ["0", "00", "4097", "1000000000", "1" + "0" * 5000])
def test_numbers_of_slots_that_no_machine_has_are_refused(tmp_path, slots):
    (tmp_path / "hosts").write_text(f"node1 slots={slots}\n")
    with pytest.raises(UserError, match=rf"hosts:1: slots \({slots}\) must be from 1 to 4,096"):
        read_hostfile(tmp_path / "hosts")


def test_a_host_that_comes_again_is_named_with_both_lines_in_any_case_of_letters(tmp_path):
    (tmp_path / "hosts").write_text("node1 slots=1\n\nNode1 slots=2\n")
    with pytest.raises(UserError, match="hosts:3: Node1 is in line 1 already"):
        read_hostfile(tmp_path / "hosts")


def test_of_a_file_that_is_no_hostfile_a_few_lines_are_shown(tmp_path):
    (tmp_path / "hosts").write_text("all happy families\n" * 1000)
    with pytest.raises(UserError) as refused:
        read_hostfile(tmp_path / "hosts")
    assert len(refused.value.problems) == 11
    assert refused.value.problems[-1].endswith("990 more lines are wrong")


@pytest.mark.parametrize("loopback", ["localhost", "LocalHost", "127.0.0.1", "::1"])
def test_a_loopback_address_names_another_machine_for_other_hosts(tmp_path, loopback):
    (tmp_path / "hosts").write_text(f"{loopback} slots=1\nnode2 slots=1\n")
    config = SHAPE | {"hostfile": str(tmp_path / "hosts")}
    with pytest.raises(UserError, match="alongside other hosts"):
        read_hosts(config_from_flat(config), {})
    assert read_hosts(config_from_flat(config | {"num_nodes": 1}), {}) == {loopback: (0,)}


def test_a_filter_understands_addresses_and_slots_of_this_machine():
    assert parse_filter("include", "fe80::1@10.0.0.1:0,2") == {"fe80::1": None, "10.0.0.1": (0, 2)}
    assert parse_filter("include", "[fe80::1]:1@:3") == {"fe80::1": (1,), "localhost": (3,)}
    for wrong in ("", "a@a", "a:0,", "a:-1", "a:b:0"):
        with pytest.raises(UserError, match="must be hosts with or without slots"):
            parse_filter("include", wrong)


@pytest.mark.parametrize("index", ["9" * 10, "9" * 5000])
def test_an_absurd_index_of_a_device_is_refused(index):
    with pytest.raises(UserError, match=f"names device {index}, more than any machine has"):
        parse_filter("exclude", f"node1:{index}")


def test_a_layout_for_more_ranks_than_a_machine_can_run_is_refused():
    with pytest.raises(UserError, match="needs 1000000000 ranks, which is more than the 4,096 ranks"):
        devices_of(CPU, "generate.py", num_attention_heads=10**9, hidden_size=10**9, model_parallel_size=10**9)


def planned(environment=GPUS, **keys):
    return planned_ranks(config_from_flat(SHAPE | keys), "train.py", environment)


def test_a_plan_may_be_for_other_machines_than_this_one():
    assert planned(num_gpus=8, num_nodes=12).ranks == 96
    assert planned().ranks == 4
    assert planned(num_nodes=2).ranks == 8


@pytest.mark.parametrize(
    ("keys", "ranks"),
    [
        ({}, 10),
        ({"num_nodes": 2}, 8),
        ({"num_nodes": 1}, 4),
        ({"num_gpus": 2}, 6),
        ({"include": "node3@node1:0,2"}, 4),
        ({"exclude": "node1@node2:1"}, 5),
        ({"launcher": "pdsh"}, 10),
        ({"launcher": "openmpi", "num_gpus": 1}, 3),
    ],
)
def test_a_plan_with_a_hostfile_has_its_ranks(tmp_path, keys, ranks):
    (tmp_path / "hosts").write_text(THREE_HOSTS)
    assert planned(hostfile=str(tmp_path / "hosts"), **keys).ranks == ranks
    assert planned(GPUS | {"DLTS_HOSTFILE": str(tmp_path / "hosts")}, **keys).ranks == ranks


def test_a_plan_is_refused_for_hosts_that_the_run_would_not_get(tmp_path):
    (tmp_path / "hosts").write_text(THREE_HOSTS)
    with pytest.raises(UserError, match=r"num_nodes \(4\) is more than the 3 hosts"):
        planned(hostfile=str(tmp_path / "hosts"), num_nodes=4)


@pytest.mark.parametrize("keys", [{}, {"num_nodes": 2}, {"num_gpus": 8}])
def test_a_plan_with_a_hostfile_that_is_not_here_says_how_to_plan_without_it(keys):
    with pytest.raises(UserError, match=r"hostfile \(gone\) cannot be read: .*; .*give both num_nodes and num_gpus"):
        planned(hostfile="gone", **keys)
    with pytest.raises(UserError, match=r"DLTS_HOSTFILE \(gone\) cannot be read: .*or unset DLTS_HOSTFILE"):
        planned(GPUS | {"DLTS_HOSTFILE": "gone"}, **keys)


def test_num_nodes_and_num_gpus_stand_in_for_a_hostfile_that_is_not_here():
    plan = planned(hostfile="gone", num_nodes=12, num_gpus=8)
    assert plan.ranks == 96
    assert "hostfile (gone) is not here" in plan.notes[0]


def test_a_plan_in_a_slurm_allocation_has_the_ranks_of_its_nodes():
    allocation = GPUS | {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "3", "SLURM_GPUS_ON_NODE": "8"}
    assert planned(allocation).ranks == 24
    assert planned(allocation, num_gpus=2, num_nodes=2).ranks == 4
    assert planned(allocation, num_nodes=1).ranks == 4
    assert planned(allocation, num_nodes=1, launcher="slurm").ranks == 8
    assert planned(allocation | {"SLURM_STEP_ID": "0"}).ranks == 4
