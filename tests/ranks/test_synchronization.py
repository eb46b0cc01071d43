"""How often the host waits for the device in a step, from the samples to the vote on stopping, for each kind of engine.

A wait stalls the host until the device has run all that was launched, and then the device until the host has launched
more. `docs/profiling.md` has the numbers.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron.engine.distributed import start_layout
from megatron.engine.training import TrainingEngine
from megatron.model.gpt import gpt_layers
from megatron.training.batch import BatchBuilder
from megatron.training.stopping import StopRequest, StopVote
from tests import tiny
from tests.ranks.moves import allow_fp16_on_cpu
from tests.ranks.run import BACKEND, run_ranks
from tests.ranks.synchronizations import counted_waits, device_of_its_own

END = 3  # a token whose successor does not count
BF16 = {"precision": "bf16"}
TWO_LAYERS = {"num_layers": 2, "attention_kinds": ("global",) * 2}
OVERLAP = {"zero_options": {"overlap_comm": True}}
VOTE = {"stopping.py ends_run": 1}  # read in host memory
COUNTED = {"batch.py <genexpr>": 1, "grid.py sum_over_data": 1}  # labels, in host memory
# DeepSpeed asks after each micro-batch whether the gradients are reduced, and copies two constants for norms
STAGE_3 = {
    "stage3.py independent_gradient_partition_epilogue": 4,
    "stage3.py get_grad_norm_direct": 2,
    "partition_parameters.py _allgather_params_coalesced": 1,
}
ONE_MICRO_BATCH = {"stage3.py independent_gradient_partition_epilogue": 1}
EPILOGUE = "stage_1_and_2.py independent_gradient_partition_epilogue"

# name -> settings of the plan, and which waits a step has besides the vote
CASES: dict[str, tuple[dict, dict[str, int]]] = {
    "bf16": (BF16, {}),
    "bf16 x4": (BF16 | {"accumulation": 4}, {}),
    "masked": (BF16 | {"data": 2}, COUNTED),
    "fp32 zero1": ({"data": 2, "zero": 1}, {}),
    "zero1": (BF16 | {"data": 2, "zero": 1}, {}),
    "zero1 x4": (BF16 | {"data": 2, "zero": 1, "accumulation": 4}, {}),
    "zero1 overlapped": (BF16 | {"data": 2, "zero": 1} | OVERLAP, {EPILOGUE: 1}),
    "zero2 x4": (BF16 | {"data": 2, "zero": 2, "accumulation": 4}, {}),
    "zero2 x4 overlapped": (BF16 | {"data": 2, "zero": 2, "accumulation": 4} | OVERLAP, {EPILOGUE: 4}),
    "zero3 x4": (BF16 | {"data": 2, "zero": 3, "accumulation": 4}, STAGE_3),
    "fp16": ({"precision": "fp16", "data": 2}, {"stage_1_and_2.py has_overflow": 1}),
    "fp16 zero3": (
        {"precision": "fp16", "data": 2, "zero": 3},
        STAGE_3 | ONE_MICRO_BATCH | {"stage3.py has_overflow": 1},
    ),
    "pipeline": (BF16 | {"pipe": 2, "accumulation": 4}, {}),
    "pipeline zero1 x4": (BF16 | {"pipe": 2, "zero": 1, "accumulation": 4}, {}),
    "skip_update": (BF16 | {"optimizer": {"skip_update": 3.0, "skip_update_window": 8}}, {}),
    "tensor": (BF16 | {"tensor": 2}, {}),
}


class Steps:
    """An engine, and all of a step that runs without hooks."""

    def __init__(self, settings: dict, masked: bool) -> None:
        self.plan = tiny.plan(**settings, model=TWO_LAYERS)
        grid = start_layout(self.plan.layout)
        layers = gpt_layers(self.plan.model, grid, self.plan.engine.seed)
        self.engine = TrainingEngine(layers, grid, self.plan)
        self.builder = BatchBuilder(grid, END if masked else None)
        self.vote = StopVote(StopRequest(None), grid.host_group)

    def take(self, step: int) -> None:
        size, length = self.plan.batch.micro_size, tiny.SEQUENCE + 1
        samples = torch.randint(0, tiny.MODEL.vocab_size, (self.plan.batch.accumulation_steps, size, length)).unbind(0)
        self.vote.begin()
        self.output = self.engine.train_batch(self.builder.build(samples)[0], step=step, learning_rate=1e-3)
        assert not self.vote.ends_run()


def count(folder: str, names: list[str]) -> None:
    """The waits of the third step: the first exchanges shapes, and DeepSpeed's timer would begin with the third."""
    allow_fp16_on_cpu()
    with device_of_its_own():
        for name in names:
            steps = Steps(CASES[name][0], masked=name == "masked")
            for step in range(2):
                steps.take(step)
            with counted_waits() as waits:
                steps.take(2)
            Path(folder, f"{name}.{dist.get_rank()}").write_text(json.dumps(waits))


@pytest.fixture(scope="module")
def waits(tmp_path_factory):
    """By case, of each rank. One start of ranks for all cases of a size."""
    folder = tmp_path_factory.mktemp("waits")
    for world in (1, 2):
        names = [name for name, (settings, _) in CASES.items() if tiny.ranks_of(settings) == world]
        run_ranks(world, count, str(folder), names, timeout=200)
    return lambda name: [json.loads(path.read_text()) for path in sorted(folder.glob(f"{name}.[0-9]"))]


ON_A_CPU = pytest.mark.skipif(BACKEND == "nccl", reason="waits are counted on a CPU; on a GPU CUDA raises at each")


@ON_A_CPU
@pytest.mark.parametrize("name", CASES)
def test_the_host_waits_for_the_device_only_where_deepspeed_does(waits, name):
    settings, expected = CASES[name]
    assert waits(name) == [VOTE | expected] * tiny.ranks_of(settings)


def wait_in_every_way() -> None:
    with device_of_its_own():
        from deepspeed.accelerator import get_accelerator

        numbers = torch.ones(3)
        with counted_waits() as waits:
            float(numbers.sum())
            bool(numbers[0])
            numbers[numbers > 0] = 2.0
            numbers.tolist()
            numbers.cpu()
            torch.tensor(1.0, device="cpu")
            get_accelerator().synchronize()
            get_accelerator().current_stream().synchronize()
            numbers.nonzero()
        assert waits == {"test_synchronization.py wait_in_every_way": 9}


@ON_A_CPU
def test_what_makes_the_host_wait_is_counted():
    run_ranks(1, wait_in_every_way)


ON_A_GPU = ("bf16", "bf16 x4", "skip_update", "masked", "zero1", "zero1 x4", "zero2 x4")


def steps_on_a_gpu() -> None:
    """Each kind of engine on one GPU; CUDA raises where the host waits."""
    for name in ON_A_GPU:
        steps = Steps(CASES[name][0] | {"data": 1}, masked=name == "masked")
        assert steps.engine.grid.device.type == "cuda"
        for step in range(6):
            torch.cuda.set_sync_debug_mode("error" if step >= 3 else "default")
            steps.take(step)
        torch.cuda.set_sync_debug_mode("default")
        assert steps.output.grad_norm is not None, name
        print(f"{name}: three steps without a wait")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_steps_on_a_gpu_never_wait_for_it():
    """In a process of its own: the ranks of other tests tell DeepSpeed that there is no GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    command = [sys.executable, "-c", "from tests.ranks import test_synchronization as t; t.steps_on_a_gpu()"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, ended.stdout + ended.stderr
