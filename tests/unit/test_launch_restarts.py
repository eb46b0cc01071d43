"""When a run starts again, on which nodes and under which layout, without processes."""

from dataclasses import replace

import pytest

from megatron.config.load import config_from_flat
from megatron.config.schema.run_keys import CheckpointKeys
from megatron.errors import UserError
from megatron.events import EventLog
from megatron.launch.failure_report import Outcome, ending_of
from megatron.launch.launchers.launcher import LaunchSpec
from megatron.launch.node_checks import CheckResult, judged
from megatron.launch.planning import plan_of_ranks
from megatron.launch.protocol.attempt import ATTEMPT, Attempt
from megatron.launch.protocol.heartbeat import NOT_BEGUN, RankStatus
from megatron.launch.protocol.node_check import CANNOT_COMPUTE, CANNOT_CONNECT, CANNOT_TALK, MULTIPLYING, TALKING
from megatron.launch.protocol.records import NodeRecord, RankRecord, RankStacks
from megatron.launch.restarting import History, corrupted_ranks
from megatron.launch.rollcall import culprits
from megatron.launch.smaller_layout import keeping_the_batch
from megatron.training.start import keys_of_attempt

SHAPE = {"num_layers": 4, "hidden_size": 48, "num_attention_heads": 12, "seq_length": 8, "train_iters": 9}


def history(*steps, nodes=()):
    noted = History()
    for step in steps:
        noted.note(step, nodes)
    return noted


def test_the_wait_doubles_up_to_its_bound_until_the_run_gets_further():
    waits = [history(*[7] * failures).wait for failures in range(1, 12)]
    assert waits == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]
    assert history(7, 7, 5, 7).wait == 8
    assert history(7, 7, 7, 8).wait == 1
    assert history(0, 0, 0).wait == 4


def test_a_step_is_suspect_after_failures_in_a_row_but_not_the_time_before_the_first():
    assert [history(*[7] * failures).suspect_step(3) for failures in (1, 2, 3)] == [None, None, 7]
    assert history(7, 7, 6, 7).suspect_step(2) is None
    assert history(0, 0, 0).suspect_step(3) is None


def test_a_node_that_failed_twice_comes_last():
    noted = history(3, 9, nodes=["b"])
    noted.note(20, ["c"])
    assert noted.ordered(["a", "b", "c", "d"]) == ["a", "c", "d", "b"]


def test_the_same_launch_goes_on_with_other_nodes():
    launch = LaunchSpec(
        hosts=("a", "b"),
        slots=((0, 1), (0, 1)),
        start=lambda folder, hosts: [str(folder), *hosts],
        master="10.0.0.1",
        remote=True,
        settings={},
        spares={"c": (0,)},
    )
    assert launch.on(["a", "c"]).command("run") == ["run", "a", "c"]
    assert (launch.on(["a", "c"]).slots, launch.on(["a", "c"]).spares) == (((0, 1), (0,)), {"b": (0, 1)})
    assert (launch.on(["a", "c"]).master, launch.on(["b", "c"]).master) == ("10.0.0.1", None)


@pytest.mark.parametrize(
    ("keys", "ranks", "micro", "accumulation"),
    [
        ({"train_batch_size": 24, "train_micro_batch_size_per_gpu": 3}, 4, 3, 2),
        ({"train_batch_size": 24, "gradient_accumulation_steps": 1}, 4, 3, 2),
        ({"train_batch_size": 24, "train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 1}, 6, 2, 2),
        ({"train_micro_batch_size_per_gpu": 3}, 2, 3, 4),
        ({"train_batch_size": 24, "train_micro_batch_size_per_gpu": 3, "model_parallel_size": 2}, 4, 3, 4),
        ({"train_batch_size": 24, "pipe_parallel_size": 2}, 4, 6, 2),
    ],
)
def test_fewer_ranks_keep_the_batch_and_no_micro_batch_grows(keys, ranks, micro, accumulation):
    config = config_from_flat(SHAPE | keys)
    before = plan_of_ranks(config, "train.py", 8)
    after = plan_of_ranks(keeping_the_batch(config, before.batch, ranks), "train.py", ranks)
    assert (after.batch.global_size, before.batch.global_size) == (24, 24)
    assert (after.batch.micro_size, after.batch.accumulation_steps) == (micro, accumulation)
    assert (after.layout.pipe, after.layout.tensor) == (before.layout.pipe, before.layout.tensor)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        (6, r"6 ranks cannot hold .* model_parallel_size \(4\) = 4"),
        (12, r"train_batch_size \(8\) cannot be divided among 3 replicas"),
    ],
)
def test_a_layout_or_batch_that_cannot_be_kept_is_named(ranks, message):
    config = config_from_flat(SHAPE | {"train_batch_size": 8, "model_parallel_size": 4})
    with pytest.raises(UserError, match=message):
        keeping_the_batch(config, plan_of_ranks(config, "train.py", 16).batch, ranks)


def outcome(*nodes, **facts):
    usual = {"lost": (), "code": 1, "stopped_by": None, "at_once": False, "hung": False, "several_hosts": True}
    return Outcome(**{"world_size": len(nodes), "nodes": nodes} | usual | facts)


def node(number, code=None, text="", end="exit", **facts):
    rank = RankRecord(number, 100 + number, code, 5.0 + number, end, text)
    return NodeRecord(number, f"host{number}", ranks=(rank,), **facts)


def before_the_start(number):
    """A node whose rank has a status and no record yet."""
    return NodeRecord(number, f"host{number}", statuses=(RankStatus(number, 0, NOT_BEGUN, 901.0, None),))


CLOSED = "RuntimeError: Connection closed by peer [10.0.0.1]:4711"


@pytest.mark.parametrize(
    ("ended", "is_accident", "hosts"),
    [
        (outcome(node(0), node(1, gone=(RankRecord(1, 101, -9),))), True, ("host1",)),
        (outcome(node(0, 1, CLOSED), node(1, gone=(RankRecord(1, 101, -9),))), True, ("host1",)),
        (outcome(node(0), node(1, 1, "CUDA error: uncorrectable ECC", "exception")), True, ("host1",)),
        (outcome(node(0, 1, CLOSED), node(1, 1, "CUDA error: device-side assert", "exception")), True, ("host1",)),
        (outcome(node(0), node(1, 1, CLOSED, "exception")), True, ()),
        (outcome(node(0), node(1, 1, f"error: {CLOSED}")), True, ()),
        (outcome(node(0), node(1), lost=(("host1", "", True),)), True, ("host1",)),
        (outcome(node(0), node(1), hung=True, culprits=(1,)), True, ("host1",)),
        (outcome(node(0), before_the_start(1), hung=True, culprits=(1,)), True, ("host1",)),
        (outcome(node(0), node(1), hung=True), True, ()),
        (outcome(node(0), node(1), code=-9), True, ()),
        (outcome(node(0), node(1, 1, "error: the training has diverged")), False, ("host1",)),
        (outcome(node(0), node(1, 2, "data_path cannot be read")), False, ("host1",)),
        (outcome(node(0), node(1), at_once=True, stopped_by="SIGTERM"), False, ()),
        (outcome(world_size=2), False, ()),
    ],
)
def test_accidents_are_told_from_what_would_happen_again(ended, is_accident, hosts):
    ending = ending_of(ended)
    assert (ending.is_accident, ending.hosts, ending.code) == (
        is_accident,
        hosts,
        2 if "data_path" in ending.text else 1,
    )


def test_the_step_of_a_failure_is_that_of_its_rank_and_otherwise_the_furthest():
    ended = outcome(node(0, steps={"0": 8}), node(1, steps={"1": 7}))
    assert (ended.step_of(1), ended.step_of(None), ended.step_of(5)) == (7, 8, 8)
    assert outcome(node(0)).step_of(0) == 0


def test_those_on_whom_the_others_wait_are_the_culprits_of_a_hang():
    waits = '  File "/torch/distributed/distributed_c10d.py", line 1 in all_reduce\n'
    statuses = {rank: RankStatus(rank, 7, "training step", 9.0, 1.0) for rank in range(3)}
    stopped = [RankStacks(0, "S", waits), RankStacks(1, "T", ""), RankStacks(2, "S", waits)]
    assert culprits(statuses, stopped) == (1,)
    assert culprits(statuses, stopped[:1]) == (1, 2)  # which do not answer
    assert culprits(statuses, [RankStacks(rank, "S", waits) for rank in range(3)]) == ()
    assert culprits(statuses, []) == ()  # nobody answers: it cannot be told


def test_a_run_that_ends_itself_because_replicas_differ_met_an_accident_of_these_ranks(tmp_path):
    EventLog(tmp_path).record("start", "a random model")
    EventLog(tmp_path).record("replicas_differ", "replicas differ", 6, ranks=[3, 5])
    EventLog(tmp_path).record("checkpoint", "saved", 7)
    assert corrupted_ranks(tmp_path, 0) == corrupted_ranks(tmp_path, 1) == (3, 5)
    assert corrupted_ranks(tmp_path, 2) == corrupted_ranks(tmp_path, 9) == corrupted_ranks(None, 0) == ()


def test_rank_0_is_abandoned_until_its_node_says_that_it_ended():
    ended = outcome(node(0, machine="m0"), node(1, machine="m1"))
    assert ended.abandoned == (("m0", 100),)
    assert replace(ended, nodes=(replace(ended.nodes[0], code=-15), ended.nodes[1])).abandoned == ()
    assert outcome(node(0, 1, machine="m0")).abandoned == ()


def checking(number, phase):
    return node(number, statuses=(RankStatus(number, 0, phase, 299.0, None),))


def failed(*codes):
    return outcome(*(node(number, code, f"why {code}") for number, code in enumerate(codes)))


@pytest.mark.parametrize(
    ("ended", "unfit"),
    [
        (failed(0, 0, 0), {}),
        (failed(CANNOT_TALK, CANNOT_COMPUTE, CANNOT_CONNECT), {"host1": f"rank 1: why {CANNOT_COMPUTE}"}),
        (failed(CANNOT_TALK, 0, CANNOT_CONNECT), {"host2": f"rank 2: why {CANNOT_CONNECT}"}),
        (failed(CANNOT_TALK, CANNOT_CONNECT, CANNOT_CONNECT), {"host0": "no other node reaches it"}),
        (failed(CANNOT_TALK, CANNOT_CONNECT), {"host1": f"rank 1: why {CANNOT_CONNECT}"}),
        (outcome(node(0), node(1), lost=(("host1", "no ssh", False),)), {"host1": "does not answer (no ssh)"}),
        (outcome(node(0), node(1, problem="GPU 3 is gone")), {"host1": "GPU 3 is gone"}),
        (
            outcome(node(0), node(1, gone=(RankRecord(1, 101, -11),))),
            {"host1": "rank 1 on host1 was ended by SIGSEGV: a crash in compiled code"},
        ),
        (outcome(checking(0, TALKING), checking(1, MULTIPLYING), hung=True), {"host1": "rank 1 hangs: multiplying"}),
        (outcome(node(0, CANNOT_TALK), checking(1, NOT_BEGUN)), {"host1": "rank 1 hangs: before the start"}),
    ],
)
def test_a_check_names_the_nodes_that_are_not_fit(ended, unfit):
    assert judged(ended, "host0") == CheckResult(unfit)


@pytest.mark.parametrize(
    "ended",
    [
        failed(CANNOT_TALK, CANNOT_TALK),
        outcome(checking(0, TALKING), checking(1, TALKING), hung=True),
        outcome(checking(0, MULTIPLYING), checking(1, MULTIPLYING), hung=True),
        outcome(node(0, 1, "ImportError: no torch"), checking(1, NOT_BEGUN)),
        outcome(node(0, gone=(RankRecord(0, 100, -6),)), node(1, gone=(RankRecord(1, 101, -6),))),
    ],
)
def test_a_check_that_fails_everywhere_blames_nobody(ended):
    assert judged(ended, "host0") == CheckResult(problem=ending_of(ended).reason)


def test_a_rank_knows_its_attempt_and_its_logs(monkeypatch):
    monkeypatch.delenv(ATTEMPT, raising=False)
    assert Attempt.of_this_process() == Attempt()
    assert (Attempt().log_name(3), Attempt().stacks_name(3)) == ("rank_3.log", "stacks_rank_3.txt")
    third = Attempt(3, resumes=True, suspect_step=17, abandoned=(("vm", 7),))
    monkeypatch.setenv(ATTEMPT, third.environment()[ATTEMPT])
    assert Attempt.of_this_process() == third
    assert (third.log_name(0), third.stacks_name("*")) == ("rank_0_attempt_3.log", "stacks_rank_*_attempt_3.txt")


@pytest.mark.parametrize("load", [None, "other", "run"])
def test_a_restart_loads_what_the_run_has_saved_and_otherwise_what_it_began_with(load):
    keys = CheckpointKeys(save="run", load=load, finetune=load == "other", iteration=7 if load else None)
    assert keys_of_attempt(keys, Attempt(2)) == keys
    again = keys_of_attempt(keys, Attempt(2, resumes=True))
    assert (again.load, again.finetune, again.iteration, again.save) == ("run", False, None, "run")
    published = CheckpointKeys(save="run", load="hf:model")
    assert keys_of_attempt(published, Attempt(2, resumes=True)).load == "hf:model"
