"""16-bit training: the first update against torch's own AdamW, and what happens when gradients overflow."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from torch.utils._pytree import tree_map_only

from megatron.config.plan import LossScalePlan
from megatron.engine.distributed import be_deterministic, choose_matmul_precision, start_layout
from megatron.engine.modules import Sequential
from megatron.engine.training import TrainingEngine
from megatron.errors import UserError
from megatron.model.gpt import gpt_layers
from megatron.parallel.initial_values import initialise
from tests import tiny
from tests.ranks.moves import allow_fp16_on_cpu, engine_of
from tests.ranks.run import deterministic_on_gpu, run_ranks
from tests.ranks.together import run_together

RATE = 1e-3


def build(plan):
    grid = start_layout(plan.layout)
    return TrainingEngine(gpt_layers(plan.model, grid, plan.engine.seed), grid, plan)


def masters(engine) -> dict[str, torch.Tensor]:
    """The fp32 master of every parameter that this rank holds whole."""
    whole = [held for held in engine.state.fragments() if held.numel == math.prod(held.parameter.shard_shape)]
    return {held.parameter.global_name: held.tensors["fp32"].clone() for held in whole}


def first_update(precision: str, zero: int) -> None:
    plan = tiny.plan(precision=precision, zero=zero, optimizer={"gradient_clipping": 0.0})
    if precision == "fp16":
        allow_fp16_on_cpu()
    engine = build(plan)
    before = masters(engine)
    engine.train_batch(tiny.micro_batches(0, plan, 0), step=0, learning_rate=RATE)
    after = masters(engine)
    assert engine.state.updates == 1
    for fragment in engine.state.fragments():
        name = fragment.parameter.global_name
        gradient = fragment.tensors["exp_avg"] / (1 - plan.optimizer.betas[0])  # of the one step there was
        wanted = torch.nn.Parameter(before[name].clone())
        decay = plan.optimizer.weight_decay if len(fragment.parameter.shard_shape) > 1 else 0.0
        adamw = torch.optim.AdamW([wanted], lr=RATE, betas=plan.optimizer.betas, eps=1e-8, weight_decay=decay)
        wanted.grad = gradient
        adamw.step()
        # one step of size lr: rounding of the recovered gradient is 1e-7 of it. A wrong bias correction is 0.25 of it.
        assert_close(after[name], wanted.detach(), rtol=1e-6, atol=1e-4 * RATE, msg=lambda m, n=name: f"{n}: {m}")


def fp16_on_a_cpu() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"fp16.*not supported.*CPU.*bfloat16"):
            build(tiny.plan(precision="fp16"))


def test_fp16_on_a_cpu_is_refused_with_what_works():
    run_ranks(1, fp16_on_a_cpu)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_first_update_is_the_one_of_torch_adamw(request, precision, zero):
    run_together(request, first_update, lambda case: (case["precision"], case["zero"]), lambda _: 1)


def overflow(settings: dict) -> None:
    allow_fp16_on_cpu()
    scale = LossScalePlan(dynamic=True, initial=2.0**30, window=1000, hysteresis=1, minimum=1.0)
    plan = tiny.plan(precision="fp16", loss_scale=scale, **settings)
    engine = build(plan)
    before = masters(engine)
    seen = []
    for step in range(3):
        output = engine.train_batch(
            tiny.micro_batches(step, plan, engine.grid.rank("data")), step=step, learning_rate=RATE
        )
        seen.append((output.skipped, output.loss_scale))
    assert seen == [(True, 2.0**29), (True, 2.0**28), (True, 2.0**27)]
    assert all(torch.equal(before[name], value) for name, value in masters(engine).items())


@pytest.mark.parametrize(
    "settings",
    [
        {"data": 2},
        {"data": 2, "zero": 3},
        {"tensor": 2, "sequence_parallel": True},
        {"pipe": 2},
        {"context": 2, "zero": 2},
        {"data": 2, "zero": 1, "zero_options": {"offload_optimizer": {"device": "cpu"}}},
    ],
    ids=["data2", "zero3", "tensor2", "pipe2", "context2", "offloaded"],
)
def test_an_overflow_is_skipped_and_the_scale_halved_on_all_ranks_alike(request, settings):
    run_together(request, overflow, lambda case: (case["settings"],))


def bf16_losses(file: str, settings: dict) -> None:
    plan = tiny.plan(precision="bf16", **settings)
    plan = replace(plan, optimizer=replace(plan.optimizer, learning_rate=RATE))
    engine = build(plan)
    losses = [
        float(
            engine.train_batch(tiny.micro_batches(s, plan, engine.grid.rank("data")), step=s, learning_rate=RATE).loss
        )
        for s in range(6)
    ]
    if torch.distributed.get_rank() == 0:
        Path(file).write_text(json.dumps(losses))


@pytest.fixture(scope="module")
def bf16_alone(tmp_path_factory) -> list[float]:
    file = tmp_path_factory.mktemp("alone") / "losses"
    run_ranks(1, bf16_losses, str(file), {})
    return json.loads(file.read_text())


@pytest.mark.parametrize("settings", [{"data": 2}, {"tensor": 2}, {"pipe": 2}, {"data": 2, "zero": 3}], ids=str)
def test_bf16_layouts_stay_close_to_one_rank(tmp_path, bf16_alone, settings):
    """bf16 keeps 8 bits: each activation is off by 2**-9 = 0.002 of itself, and layouts round at other places."""
    run_ranks(2, bf16_losses, str(tmp_path / "losses"), settings)
    losses = json.loads((tmp_path / "losses").read_text())
    gap = max(abs(a - b) for a, b in zip(losses, bf16_alone, strict=True))
    assert gap < 0.01 and losses[-1] < losses[0]


def poisoned_step(precision: str, settings: dict) -> None:
    """Three steps; in the second, one replica's loss is no number."""
    engine, plan = engine_of({"precision": precision} | settings)
    data_rank = engine.grid.rank("data")
    seen, kept = [], []
    for step in range(3):
        batch = tiny.micro_batches(step, plan, data_rank)
        if step == 1 and data_rank == plan.layout.data - 1:
            batch[0][1][1][0, 0] = float("nan")
        before = {
            (r.parameter.global_name, k): t.clone() for r in engine.state.fragments() for k, t in r.tensors.items()
        }
        seen.append(engine.train_batch(batch, step=step, learning_rate=RATE).skipped)
        after = {(r.parameter.global_name, k): t for r in engine.state.fragments() for k, t in r.tensors.items()}
        kept.append(all(torch.equal(before[key], after[key]) for key in before))
    assert seen == kept == [False, True, False]
    assert engine.state.updates == 2


POISONED = [{"data": 2}, {"data": 2, "zero": 1}, {"data": 2, "zero": 3}, {"pipe": 2}, {"tensor": 2}]
OWN = [{"data": 2, "zero": 1, "optimizer": {"kind": "signs"}}, {"data": 2, "optimizer": {"kind": "adagrad"}}]
POISONED_QUICK = [("fp32", case) for case in POISONED] + [("bf16", POISONED[2]), ("fp16", POISONED[0])]


@pytest.mark.parametrize(
    ("precision", "settings"),
    POISONED_QUICK
    + [("fp32", case) for case in OWN]
    + [("bf16", OWN[1])]
    + [("bf16", {"data": 2, "zero": 1, "accumulation": 2})]
    + [
        pytest.param(precision, case, marks=pytest.mark.long)
        for precision in ("bf16", "fp16")
        for case in POISONED
        if (precision, case) not in POISONED_QUICK
    ],
    ids=str,
)
def test_a_step_whose_gradients_are_no_numbers_changes_nothing_on_any_rank(request, precision, settings):
    run_together(request, poisoned_step, lambda case: (case["precision"], case["settings"]))


def clipped_gradients(kind: str, moment: str, settings: dict) -> None:
    """The norm of the gradients that the optimizer saw, from what it keeps of the first ones."""
    engine, plan = engine_of(
        {"precision": "bf16", "optimizer": {"kind": kind, "gradient_clipping": 0.01}, "engine": settings}
    )
    output = engine.train_batch(tiny.micro_batches(0, plan, 0), step=0, learning_rate=RATE)
    assert output.grad_norm is not None and output.grad_norm > 0.1
    kept = 1 - plan.optimizer.betas[1 if kind == "signs" else 0]
    squares = sum(float((fragment.tensors[moment] / kept).square().sum()) for fragment in engine.state.fragments())
    assert math.isclose(math.sqrt(squares), 0.01, rel_tol=1e-3)


@pytest.mark.parametrize("summed_in", ["fp32", "bf16"])
@pytest.mark.parametrize(("kind", "moment"), [("adam", "exp_avg"), ("signs", "momentum")])
def test_the_clip_reaches_every_optimizer_whatever_gradients_are_summed_in(request, kind, moment, summed_in):
    """Norms and scales are fp32 (1e-6); gradients and the moment made of them round at 2 ** -24 an element."""
    run_together(
        request,
        clipped_gradients,
        lambda case: (case["kind"], case["moment"], {"gradient_accumulation_dtype": case["summed_in"]}),
        lambda _: 1,
    )


def first_step_poisoned(kind: str, moment: str) -> None:
    engine, plan = engine_of({"optimizer": {"kind": kind}})
    batch = tiny.micro_batches(0, plan, 0)
    batch[0][1][1][0, 0] = float("nan")
    assert engine.train_batch(batch, step=0, learning_rate=RATE).skipped
    assert all(fragment.tensors[moment].count_nonzero() == 0 for fragment in engine.state.fragments())


@pytest.mark.parametrize(("kind", "moment"), [("adam", "exp_avg"), ("sgd", "momentum_buffer")])
def test_a_first_step_that_is_left_out_leaves_no_moments_behind(request, kind, moment):
    run_together(request, first_step_poisoned, lambda case: (case["kind"], case["moment"]), lambda _: 1)


def deterministic_process() -> None:
    assert be_deterministic()
    assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"]
    plan = tiny.plan()
    engine = build(plan)
    assert math.isfinite(engine.train_batch(tiny.micro_batches(0, plan, 0), step=0, learning_rate=RATE).loss)


def test_a_process_that_is_told_to_be_deterministic_is_and_trains():
    run_ranks(1, deterministic_process)


def fp32_products() -> None:
    """torch may compute "high" in fewer bits on this CPU as well, so only what is asked of it is compared."""
    asked = tiny.plan().engine
    for device, said in (("cpu", []), ("cuda", ["products: TF32 (fp32_matmul_precision: high)"])):
        high = replace(asked, fp32_matmul_precision="high")
        assert choose_matmul_precision(high, torch.device(device)) == said
        assert torch.get_float32_matmul_precision() == "high"
        slow = device == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
        said = choose_matmul_precision(replace(high, precision="bf16"), torch.device(device))
        assert ["AVX-512" in line and "write precision: fp32" in line for line in said] == [True] * slow
    [said] = choose_matmul_precision(asked, torch.device("cuda"))
    assert "products: fp32 (fp32_matmul_precision: highest)" in said
    assert torch.get_float32_matmul_precision() == "highest"


def test_fp32_products_are_in_fp32_unless_asked_otherwise_and_a_gpu_says_so():
    run_ranks(1, fp32_products)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_high_computes_in_tf32_and_highest_in_fp32():
    """Ones and 1 + 2 ** -20: TF32 drops the last 13 bits of a mantissa, so all products are 1; fp32 keeps them."""
    asked, device = tiny.plan().engine, torch.device("cuda")
    left, right = torch.full((256, 256), 1 + 2**-20, device=device), torch.eye(256, device=device)
    try:
        for kind, kept in (("high", torch.cuda.get_device_capability() < (8, 0)), ("highest", True)):
            choose_matmul_precision(replace(asked, fp32_matmul_precision=kind), device)
            assert torch.equal(left @ right, left) == kept
    finally:
        choose_matmul_precision(asked, device)


def gradients_by_hand(plan, grid) -> dict[str, torch.Tensor]:
    """bf16 gradients of this rank's micro-batches, summed in fp32, and divided by their number."""
    module = Sequential(gpt_layers(plan.model, grid, plan.engine.seed)).to(torch.bfloat16).train()
    initialise(module)
    sums = {p.global_name: torch.zeros_like(p, dtype=torch.float32) for p in module.parameters()}
    batches = tiny.micro_batches(0, plan, grid.rank("data"))
    for inputs, targets in tree_map_only(torch.Tensor, lambda tensor: tensor.to(grid.device), batches):
        module.zero_grad()
        (module(inputs, targets=targets) / len(batches)).backward()
        for parameter in module.parameters():
            sums[parameter.global_name] += parameter.grad.float()
    return sums


def worst_gradient(settings: dict) -> float:
    """How far the engine's gradients are from those by hand, averaged over ranks in fp32; of their largest element."""
    deterministic_on_gpu()
    plan = tiny.plan(precision="bf16", optimizer={"gradient_clipping": 0.0}, **settings)
    engine = build(plan)
    wanted = gradients_by_hand(plan, engine.grid)
    for gradient in wanted.values():
        torch.distributed.all_reduce(gradient)
        gradient /= plan.layout.data
    engine.train_batch(tiny.micro_batches(0, plan, engine.grid.rank("data")), step=0, learning_rate=RATE)
    assert engine.state.fragments()
    worst = 0.0
    for fragment in engine.state.fragments():
        found = fragment.tensors["exp_avg"] / (1 - plan.optimizer.betas[0])
        expected = wanted[fragment.parameter.global_name].flatten()[fragment.start : fragment.start + fragment.numel]
        worst = max(worst, float((found - expected).abs().max() / wanted[fragment.parameter.global_name].abs().max()))
    return worst


def sums_in_fp32(zero: int) -> None:
    exact = {"gradient_accumulation_dtype": "fp32", "fp32_allreduce": True}
    assert worst_gradient({"zero": zero, "accumulation": 8, "engine": exact}) < 1e-6
    inexact = {"gradient_accumulation_dtype": "bf16", "fp32_allreduce": False}
    in_bf16 = worst_gradient({"zero": zero, "accumulation": 8, "engine": inexact})
    assert in_bf16 > 1e-4, "in bf16 each sum is off by 2 ** -9"


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_gradients_of_many_micro_batches_are_summed_in_fp32(request, zero):
    """fp32 sums of eight bf16 gradients are the same additions; what is left is the rounding of exp_avg, 1e-7."""
    run_together(request, sums_in_fp32, lambda case: (case["zero"],), lambda _: 1)


def averages_in_fp32(zero: int) -> None:
    exact = {"gradient_accumulation_dtype": "fp32", "fp32_allreduce": True}
    replicas = {"zero": zero, "data": 4, "model": {"num_layers": 2, "attention_kinds": ("global",) * 2}}
    assert worst_gradient(replicas | {"engine": exact}) < 1e-6
    assert worst_gradient(replicas) > 1e-4


@pytest.mark.parametrize("zero", [0, *(pytest.param(stage, marks=pytest.mark.long) for stage in (1, 2)), 3])
def test_gradients_of_many_replicas_are_averaged_in_fp32(request, zero):
    run_together(request, averages_in_fp32, lambda case: (case["zero"],), lambda _: 4)
