"""Every layout trains the same model: loss curves against one rank that runs plain torch underneath.

fp32 on the CPU. A layout changes only the order of additions: sums of a few hundred terms of order one move in their
last bits (1e-7 relative), and 5 steps of Adam with lr 1e-2 on a loss of about 4 let that grow, to 5e-7; so do 20. 1e-5
is twenty times that, and a tenth of what one wrongly counted gradient does: that of a block's bias or of the
embedding, left out of the clip, left out of its norm or halved, moves the losses by 1e-4 to 1e-3 (in 20 steps by up to
1e-2). Gradient norms are derivatives: the same rounding moves them more, in 20 steps by up to 2.3e-5 of their value
with AVX-512, and such a gradient by 3e-3 to 9e-2 of it; 1e-4 lies between.
"""

import json
from pathlib import Path

import pytest
import torch

from megatron.config.plan import RopeScaling
from megatron.engine.distributed import start_layout
from megatron.engine.training import TrainingEngine
from megatron.model.gpt import gpt_layers
from megatron.optimizers.schedules import learning_rate
from tests import tiny
from tests.ranks.run import deterministic_on_gpu, run_ranks
from tests.ranks.together import run_together

STEPS = 5
TOLERANCE = 1e-5
OF_NORMS = 1e-4  # relative


def train_all(folder: str, steps: int, wanted: list[dict]) -> None:
    """Train on this rank with each of the settings."""
    for number, settings in enumerate(wanted):
        train(f"{folder}/{number}.json", steps, settings)


def train(file: str, steps: int, settings: dict) -> None:
    """Train on this rank; rank 0 writes what it saw."""
    found = seen_in_training(steps, settings)
    if torch.distributed.get_rank() == 0:
        Path(file).write_text(json.dumps(found))


def trains_like(wanted: dict, settings: dict) -> None:
    """Train on this rank; on rank 0, what it saw is to be what one rank saw."""
    found = seen_in_training(STEPS, settings)
    if torch.distributed.get_rank() == 0:
        assert_same(found, wanted)


def seen_in_training(steps: int, settings: dict) -> dict:
    """Train on this rank: losses, norms, and the loss of other samples afterwards."""
    deterministic_on_gpu()  # recomputation has to change no bit
    plan = tiny.plan(**settings)
    grid = start_layout(plan.layout)
    engine = TrainingEngine(gpt_layers(plan.model, grid, plan.engine.seed), grid, plan)
    losses, norms = [], []
    for step in range(steps):
        batch = tiny.micro_batches(step, plan, grid.rank("data"))
        output = engine.train_batch(batch, step=step, learning_rate=learning_rate(plan.schedule, step))
        losses.append(float(output.loss))
        norms.append(float(output.grad_norm))
    validation = float(engine.evaluate_batch(tiny.micro_batches(1000, plan, grid.rank("data"))))
    return {"losses": losses, "norms": norms, "validation": validation}


def curve(folder: Path, steps: int = STEPS, **settings) -> dict:
    return curves(folder, steps, [settings])[0]


def curves(folder: Path, steps: int, wanted: list[dict]) -> list[dict]:
    """Those of settings that all take the same ranks, which train one after the other."""
    run_ranks(tiny.ranks_of(wanted[0]), train_all, str(folder), steps, wanted, timeout=180)
    return [json.loads((folder / f"{number}.json").read_text()) for number in range(len(wanted))]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Curves of one rank, one for each kind of model."""
    known = {}

    def get(**settings):
        key = json.dumps(settings, sort_keys=True, default=str)
        if key not in known:
            known[key] = curve(tmp_path_factory.mktemp("reference"), **settings)
        return known[key]

    return get


def assert_same(found: dict, wanted: dict) -> None:
    gap = max(abs(a - b) for a, b in zip(found["losses"], wanted["losses"], strict=True))
    assert gap < TOLERANCE, f"losses differ by {gap:.1e}"
    gap = max(abs(a - b) / b for a, b in zip(found["norms"], wanted["norms"], strict=True))
    assert gap < OF_NORMS, f"norms differ by {gap:.1e} of their value"
    assert abs(found["validation"] - wanted["validation"]) < TOLERANCE


OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
LAYOUTS = [
    {"data": 2},
    {"tensor": 2},
    {"pipe": 2},
    {"pipe": 2, "tensor": 2},
    {"data": 2, "zero": 1},
    {"data": 2, "zero": 2},
    {"data": 2, "zero": 3},
    {"pipe": 2, "data": 2, "zero": 1},
    {"tensor": 2, "data": 2, "zero": 3},
    {"pipe": 2, "tensor": 2, "sequence_parallel": True},
    {"context": 2, "tensor": 2, "sequence_parallel": True, "zero": 3},
    {"context": 2, "data": 2},
    {"data": 2, "zero": 2, "zero_options": OFFLOAD},
    {"data": 2, "zero": 3, "zero_options": OFFLOAD | {"offload_param": {"device": "cpu"}}},
]
TIED = {"tied_embeddings": True}


def name_of(layout: dict) -> str:
    return "-".join(key if isinstance(value, dict) else f"{key}{value}" for key, value in layout.items())


# a layout of which other tests below train a model with more to it
COVERED = ({"pipe": 2, "tensor": 2}, {"tensor": 2, "data": 2, "zero": 3})


# every second one accumulates; pipe2-data2-zero1 enough for stages to be busy with several micro-batches at once. All
# pairs of everything are in test_layout_table.py, which takes longer
@pytest.mark.parametrize(
    ("layout", "accumulation"),
    [
        pytest.param(
            layout,
            (4 if "pipe" in layout and "data" in layout else 2) if i % 2 else 1,
            id=name_of(layout),
            marks=[pytest.mark.long] if layout in COVERED else [],
        )
        for i, layout in enumerate(LAYOUTS)
    ],
)
def test_a_layout_trains_like_one_rank(request, reference, layout, accumulation):
    run_together(
        request,
        trains_like,
        lambda case: (reference(), {"accumulation": case["accumulation"]} | case["layout"]),
        lambda case: tiny.ranks_of(case["layout"]),
    )


@pytest.mark.parametrize(
    "layout",
    [{"pipe": 2}, {"pipe": 2, "tensor": 2, "zero": 1}, {"tensor": 2, "zero": 2}, {"data": 2, "zero": 3}],
    ids=str,
)
def test_tied_embeddings_train_like_one_rank(tmp_path, reference, layout):
    assert_same(curve(tmp_path, accumulation=2, model=TIED, **layout), reference(model=TIED))


OLMO = {"norm": "non_parametric_layernorm", "bias_in_query_key_value": False, "bias_in_dense": False}
GEMMA = {"norm": "rmsnorm_1p", "norm_placement": "both", "num_kv_heads": 2}
COHERE = {"norm_bias": False, "parallel_residual": True, "tied_norm": True, "qk_norm": "each_head", "num_kv_heads": 2}
SPLIT = {"pipe": 2, "tensor": 2, "sequence_parallel": True}


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        pytest.param(OLMO, {"data": 2, "zero": 3}, id="norms without parameters, ZeRO 3"),
        pytest.param(OLMO, SPLIT, id="norms without parameters, pipeline", marks=pytest.mark.long),
        pytest.param(GEMMA | TIED, SPLIT, id="Gemma, pipeline"),
        pytest.param(COHERE, {"tensor": 2, "data": 2, "zero": 3}, id="Cohere, ZeRO 3", marks=pytest.mark.long),
        pytest.param({"norm": "scalenorm"}, SPLIT, id="scalenorm, pipeline", marks=pytest.mark.long),
    ],
)
def test_norms_of_every_kind_train_like_one_rank(tmp_path, reference, model, layout):
    assert_same(curve(tmp_path, model=model, **layout), reference(model=model))


# on two tensor-parallel ranks: heads 0, 0, 1 and 1, 2, 2; the same head
THREE = {"num_attention_heads": 6, "num_kv_heads": 3, "norm": "rmsnorm", "qk_norm": "full"}
ONE = {"num_kv_heads": 1, "activation": "swiglu"}


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        pytest.param(THREE, {"tensor": 2, "data": 2, "zero": 3}, id="three, ZeRO 3"),
        pytest.param(THREE, {"tensor": 2, "data": 2, "zero": 1}, id="three, ZeRO 1", marks=pytest.mark.long),
        pytest.param(ONE, SPLIT | {"zero": 1}, id="one, pipeline"),
        pytest.param(ONE, {"tensor": 2, "context": 2}, id="one, context"),
        pytest.param(THREE, {"context": 2}, id="three, context alone", marks=pytest.mark.long),
    ],
)
def test_key_value_heads_that_ranks_share_train_like_one_rank(tmp_path, reference, model, layout):
    assert_same(curve(tmp_path, model=model, **layout), reference(model=model))


ENDS = {"embedding_norm": True, "embedding_multiplier": 4.0, "logit_multiplier": 0.5, "logit_softcap": 5.0}
ROTATIONS = {
    "attention_kinds": ("local", "global", "local", "global"),
    "sliding_window": 5,
    "rotary_base_local": 100.0,
    "rope_scaling": RopeScaling("dynamic", 2.0, original_positions=8),
}


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        pytest.param(ENDS | {"head_bias": True}, {"data": 2, "zero": 3}, id="untied, ZeRO 3"),
        pytest.param(ENDS | TIED, SPLIT, id="tied, pipeline"),
        pytest.param(ENDS | {"head_bias": True}, SPLIT, id="untied, pipeline", marks=pytest.mark.long),
        pytest.param(
            ENDS | {"head_bias": True},
            {"tensor": 2, "data": 2, "zero": 3},
            id="untied, tensor, ZeRO 3",
            marks=pytest.mark.long,
        ),
        pytest.param(ROTATIONS, {"context": 2, "tensor": 2}, id="two bases, context", marks=pytest.mark.long),
    ],
)
def test_norm_and_factors_at_the_ends_and_bases_by_layer_train_like_one_rank(tmp_path, reference, model, layout):
    assert_same(curve(tmp_path, model=model, **layout), reference(model=model))


def test_training_learns_and_the_clip_is_at_work(tmp_path):
    seen = curve(tmp_path, steps=20)
    assert seen["losses"][-1] < seen["losses"][0] - 0.5
    assert seen["norms"][0] > 1.0, "the clip at 1.0 must bite, or the tests above do not test it"


DROPOUT = {"attention_dropout": 0.1, "hidden_dropout": 0.1}


TWO_LAYERS = {"num_layers": 2, "attention_kinds": ("global",) * 2}
SELECTIVE = {"recompute_selective": True}
STORED = {"partition_activations": True, "checkpoint_in_cpu": True}


@pytest.mark.parametrize(
    "layout", [{}, {"pipe": 2}, {"tensor": 2}, {"tensor": 2, "sequence_parallel": True}, {"context": 2}], ids=str
)
def test_recompute_changes_no_bit(tmp_path, layout):
    plain = {"accumulation": 2, "model": DROPOUT | TWO_LAYERS, **layout}
    ways = [{}, SELECTIVE, STORED | SELECTIVE, STORED]
    found, *again = curves(tmp_path, 2, [plain, *(plain | {"recompute": 1, "engine": way} for way in ways)])
    for way, other in zip(ways, again, strict=True):
        assert found == other, way


def test_recompute_in_groups_changes_no_bit(tmp_path):
    plain, in_groups = curves(tmp_path, 5, [{}, {"recompute": 3}])
    assert in_groups == plain
