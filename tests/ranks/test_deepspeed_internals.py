"""Every attribute that `megatron/engine/deepspeed_internals.py` reads exists in the installed DeepSpeed and works."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from megatron.engine import deepspeed_internals, phases
from tests import tiny
from tests.ranks.moves import allow_fp16_on_cpu, engine_of
from tests.ranks.run import BACKEND, run_ranks

ZERO = {
    "DeepSpeedZeroOptimizer": {"zero": 2},
    "BF16_Optimizer": {"zero": 1, "precision": "bf16", "accumulation": 2},
    "DeepSpeedZeroOptimizer_Stage3": {"zero": 3, "precision": "bf16"},
}
TIED = {"pipe": 2, "model": {"tied_embeddings": True}}


def take_step(engine, plan) -> None:
    engine.train_batch(tiny.micro_batches(0, plan, engine.grid.rank("data")), step=0, learning_rate=1e-3)


def zero_optimizer(kind: str) -> None:
    engine, plan = engine_of(ZERO[kind])
    wrapped = engine._engine
    assert type(wrapped.optimizer).__name__ == kind
    take_step(engine, plan)
    norm = deepspeed_internals.zero_gradient_norm(wrapped.optimizer)
    assert float(norm) == float(wrapped.get_global_grad_norm()) > 0
    elements = sum(fragment.numel for fragment in engine.state.fragments())
    assert elements == engine.parameters_on_rank(), "one rank holds all elements"
    for fragment in engine.state.fragments():
        fragment.tensors["fp32"].fill_(2.0)
    engine.state.finish_loading()
    for parameter in wrapped.module.parameters():
        whole = parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter
        assert torch.all(whole == 2.0), "weights are copies of the masters"


@pytest.mark.parametrize("kind", ZERO)
def test_every_zero_optimizer_has_a_norm_and_partitions_that_reach_its_weights(kind):
    run_ranks(1, zero_optimizer, kind)


def adagrad(zero: int) -> None:
    engine, plan = engine_of({"zero": zero, "optimizer": {"kind": "adagrad"}})
    take_step(engine, plan)
    assert engine.state.updates == 1


@pytest.mark.parametrize("zero", [1, 3])
def test_an_optimizer_that_deepspeed_rebuilds_is_put_back(zero):
    run_ranks(1, adagrad, zero)


def dynamic_scale() -> None:
    allow_fp16_on_cpu()
    engine, _ = engine_of({"precision": "fp16"})
    scaler = deepspeed_internals.LossScaler(engine._engine.optimizer)
    assert scaler.state["cur_scale"] == 256.0 and len(scaler.state) == 4
    scaler.state = scaler.state | {"cur_scale": 64.0}
    assert engine._engine.optimizer.loss_scale == 64.0
    assert engine._engine.optimizer.loss_scaler.raise_error_at_min_scale is False


def test_the_dynamic_loss_scale_can_be_read_and_set():
    run_ranks(1, dynamic_scale)


def static_scale() -> None:
    engine, _ = engine_of({"zero": 1})
    scaler = deepspeed_internals.LossScaler(engine._engine.optimizer)
    assert scaler.state == {}
    scaler.state = {"cur_scale": 64.0}
    assert engine._engine.optimizer.loss_scale == 1.0


def test_without_a_dynamic_loss_scale_there_is_no_state():
    run_ranks(1, static_scale)


def pipeline() -> None:
    engine, plan = engine_of(TIED)
    named = {p.global_name: p for p in engine._engine.module.parameters()}
    last = engine.grid.is_last_stage
    assert deepspeed_internals.is_tied_copy(named["embedding.weight"]) == last
    assert engine._engine.enable_backward_allreduce is False, "there is one replica"
    assert engine._engine.pipeline_enable_backward_allreduce is False
    instructions = []
    deepspeed_internals.wrap_instructions(engine._engine, lambda name, function: instructions.append(name) or function)
    assert set(phases._OF_INSTRUCTION) <= set(instructions)
    take_step(engine, plan)


def test_a_pipeline_marks_tied_copies_and_has_every_instruction_that_is_timed():
    run_ranks(2, pipeline)


def tied_weights(settings) -> None:
    engine, plan = engine_of(TIED | settings)
    take_step(engine, plan)
    (weight,) = (p.detach() for p in engine._engine.module.parameters() if p.global_name == "embedding.weight")
    copies = [torch.empty_like(weight) for _ in range(2)]
    torch.distributed.all_gather(copies, weight.contiguous())
    assert torch.equal(*copies)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"zero": 1, "precision": "bf16"},
        {"zero": 1, "precision": "bf16", "zero_options": {"offload_optimizer": {"device": "cpu"}}},
        {"precision": "fp16", "engine": {"gradient_accumulation_dtype": "fp32"}},
    ],
    ids=str,
)
def test_both_stages_update_a_tied_weight_alike_whatever_gradients_are_summed_in(settings):
    run_ranks(2, tied_weights, {"accumulation": 2} | settings)


def no_extension_is_compatible() -> None:
    engine_of({})
    import deepspeed

    assert "__compatible_ops__" in vars(deepspeed.ops) and not deepspeed.ops.__compatible_ops__["anything"]


@pytest.mark.skipif(BACKEND == "nccl", reason="it is about a CPU")
def test_no_extension_counts_as_compatible_on_a_cpu():
    run_ranks(1, no_extension_is_compatible)


def test_a_parameter_that_deepspeed_has_not_seen_is_no_copy():
    assert not deepspeed_internals.is_tied_copy(nn.Parameter(torch.zeros(3, 2)))


PRIVATE = re.compile(r"\b(ds_\w+|_hp_mapping|_INSTRUCTION_MAP|__compatible_ops__|_global_grad_norm|loss_scaler)\b")


def test_no_other_file_reads_private_attributes_of_deepspeed():
    package = Path(deepspeed_internals.__file__).parents[1]
    found = {path.name for path in package.rglob("*.py") if PRIVATE.search(path.read_text(encoding="utf-8"))}
    assert found == {"deepspeed_internals.py"}
