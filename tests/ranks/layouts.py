"""Layouts against one rank: what `test_layout_table.py` asserts and `bench/layouts.py` tabulates.

Each case is a layout together with one value of everything else that meets it; the cases are chosen so that every pair
of values that may stand together stands together in one of them. Its loss curve over 20 steps is compared with that of
one rank with the same model, precision and clip, without accumulation, recomputation, ZeRO or any cut. Bounds:

fp32      1e-5, as argued in test_layouts.py.
16 bit    Two runs that round at different places are both off the exact curve, and how far is measured: the gap e
          between one rank in 16 bit and one rank in fp32. Two such runs lie within 2 e of each other. With t
          tensor-parallel ranks each of t summands of a row-parallel product is rounded where one rank rounds the
          product once: up to t times the rounding, so within (1 + t) e. e is a maximum over 20 steps of one sample, so
          that at least 0.01 is allowed (2 ** -8, the step of bf16, of a loss of 4 is 0.016). In fp32 the same layouts
          lie within 1e-6. A gradient counted wrongly moves the losses by 0.002 to 0.01 over 20 steps, which the fp32
          cases of the same layouts see.
dropout   Layouts draw other masks. Half of the largest gap between two one-rank runs with different masks is what a
          mask moves a loss; three times the gap is allowed. Dropout is no part of the fp32 proof.
"""

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

from megatron.engine.distributed import start_layout
from megatron.engine.training import TrainingEngine
from megatron.model.gpt import gpt_layers
from megatron.optimizers.schedules import learning_rate
from tests import tiny
from tests.ranks.moves import allow_fp16_on_cpu, layout_name
from tests.ranks.run import run_ranks

Settings = dict[str, Any]  # of tests.tiny.plan; and "rate", a factor of the learning rate
Curve = dict[str, Any]  # "losses", and whether all ranks skipped the same steps ("alike")
STEPS = 20
FP32_BOUND = 1e-5
ROUNDING = 0.01

OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
LLAMA = {
    "norm": "rmsnorm",
    "activation": "swiglu",
    "num_kv_heads": 2,
    "bias_in_query_key_value": False,
    "bias_in_dense": False,
    "bias_in_mlp": False,
}
OLMO = {"norm": "rmsnorm", "activation": "swiglu", "qk_norm": "full", "norm_placement": "output"}
# Two layers with what most sets these families apart; each with every arrangement of ranks (`cases_of_families`).
FAMILIES: dict[str, Settings] = {
    "Gemma": {
        "num_layers": 2,
        "attention_kinds": ("local", "global"),
        "sliding_window": 5,
        "norm": "rmsnorm_1p",
        "norm_placement": "both",
        "qk_norm": "head",
        "activation": "geglu_tanh",
        "num_kv_heads": 2,
        "rotary_fraction": 1.0,
        "rotary_base_local": 100.0,
        "embedding_multiplier": tiny.MODEL.hidden_size**0.5,
        "attention_scale": 0.3,
        "attention_softcap": 5.0,
        "logit_softcap": 3.0,
        "bias_in_query_key_value": False,
        "bias_in_dense": False,
        "bias_in_mlp": False,
    },
    "BLOOM": {
        "num_layers": 2,
        "attention_kinds": ("global",) * 2,
        "position_embedding": "alibi",
        "embedding_norm": True,
        "activation": "gelu_tanh",
    },
    "Falcon": {
        "num_layers": 2,
        "attention_kinds": ("global",) * 2,
        "parallel_residual": True,
        "num_kv_heads": 2,
        "rotary_fraction": 1.0,
        "bias_in_query_key_value": False,
        "bias_in_dense": False,
        "bias_in_mlp": False,
    },
}
FACTORS: dict[str, dict[str, Settings]] = {
    "ranks": {
        "one": {},
        "dp2": {"data": 2},
        "tp2": {"tensor": 2},
        "pp2": {"pipe": 2},
        "cp2": {"context": 2},
        "tp4": {"tensor": 4},
        "pp4": {"pipe": 4},
        "pp2 tp2": {"pipe": 2, "tensor": 2},
        "pp2 dp2": {"pipe": 2, "data": 2},
        "tp2 dp2": {"tensor": 2, "data": 2},
        "tp2 cp2": {"tensor": 2, "context": 2},
        "cp2 dp2": {"context": 2, "data": 2},
    },
    "zero": {"": {}, "zero1": {"zero": 1}, "zero2": {"zero": 2}, "zero3": {"zero": 3}},
    "offload": {"": {}, "offloaded": {"zero_options": OFFLOAD}},
    "sequence": {"": {}, "sp": {"sequence_parallel": True}},
    # Adam's steps have the size of the rate: in 16 bit a large one only enlarges what rounding does
    "precision": {
        "fp32": {},
        "bf16": {"precision": "bf16", "rate": 0.1},
        "fp16": {"precision": "fp16", "rate": 0.1},
    },
    "model": {"NeoX": {}, "Llama": {"model": LLAMA}, "OLMo": {"model": OLMO}},
    "ends": {"untied": {}, "tied": {"model": {"tied_embeddings": True}}},
    "dropout": {"": {}, "dropout": {"model": {"attention_dropout": 0.1, "hidden_dropout": 0.1}}},
    "accumulation": {"": {}, "x4": {"accumulation": 4}},
    "recompute": {
        "": {},
        "recompute": {"recompute": 1},
        "selective": {"recompute": 2, "engine": {"recompute_selective": True}},
        "stored": {"recompute": 1, "engine": {"partition_activations": True, "checkpoint_in_cpu": True}},
    },
    "clip": {"clip": {}, "no clip": {"optimizer": {"gradient_clipping": 0.0}}},
}
OF_THE_MODEL = ("precision", "model", "ends", "dropout", "clip")  # what one rank has in common with a layout


@dataclass(frozen=True)
class Case:
    """One name of each of FACTORS, in their order."""

    names: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join(name for name in self.names if name)

    def name(self, factor: str) -> str:
        """The value of a factor."""
        return self.names[list(FACTORS).index(factor)]

    def settings(self, *factors: str) -> Settings:
        """For tests.tiny.plan, of the factors named, by default of all."""
        merged: Settings = {}
        for factor in factors or FACTORS:
            name = self.name(factor)
            chosen = {"model": FAMILIES[name]} if name in FAMILIES else FACTORS[factor][name]
            for key, value in chosen.items():
                merged[key] = merged.get(key, {}) | value if isinstance(value, dict) else value
        return merged


def is_possible(case: Case) -> bool:
    """Whether the rules of the configuration allow it and it says something new."""
    settings = case.settings()
    zero, tensor = settings.get("zero", 0), settings.get("tensor", 1)
    model = settings.get("model", {})
    heads = model.get("num_attention_heads", tiny.MODEL.num_attention_heads)
    return not (
        (settings.get("pipe", 1) > 1 and zero > 1)
        or ("zero_options" in settings and not zero)
        or (settings.get("sequence_parallel") and tensor == 1)
        or (case.name("recompute") == "selective" and zero == 3)
        or heads % (tensor * settings.get("context", 1))
        or settings.get("pipe", 1) > model.get("num_layers", tiny.MODEL.num_layers)
    )


@cache
def cases() -> tuple[Case, ...]:
    """All pairs of values that are possible together, in few cases. Always the same ones."""
    draw, names = random.Random(2), [list(values) for values in FACTORS.values()]

    def drawn() -> Iterator[Case]:
        while True:
            case = Case(tuple(draw.choice(values) for values in names))
            if is_possible(case):
                yield case

    pool = list(itertools.islice(drawn(), 1500))
    pairs = {case: set(itertools.combinations(enumerate(case.names), 2)) for case in pool}
    missing, chosen = set().union(*pairs.values()), []
    while missing:
        # of equal cases one without dropout, which widens the bound
        best = max(pool, key=lambda case: (len(pairs[case] & missing), not case.name("dropout")))
        chosen.append(best)
        missing -= pairs[best]
    return tuple(chosen)


@cache
def cases_of_families() -> tuple[Case, ...]:
    """Each of FAMILIES with each arrangement of ranks that is possible, in fp32; ZeRO and the rest are drawn."""
    draw, chosen = random.Random(2), []
    fixed = {"precision": "fp32", "ends": "tied", "offload": "", "dropout": "", "clip": "clip"}
    for model, ranks in itertools.product(FAMILIES, FACTORS["ranks"]):
        given = fixed | {"model": model, "ranks": ranks}
        tried = [
            Case(tuple(given[factor] if factor in given else draw.choice(list(FACTORS[factor])) for factor in FACTORS))
            for _ in range(40)
        ]
        chosen += [case for case in tried if is_possible(case)][:1]
    return tuple(chosen)


@dataclass(frozen=True)
class Outcome:
    """How a case differs from one rank."""

    gap: float  # the largest over 20 losses
    bound: float
    skipped_alike: bool  # every rank skipped the same steps
    finite: bool


def carry_out(case: Case) -> Outcome:
    """Train as the case says, and compare with one rank."""
    settings, alone = case.settings(), case.settings(*OF_THE_MODEL)
    (found,) = curves([settings])
    (wanted,) = references([alone])
    return Outcome(
        _gap(found, wanted),
        bound(alone, settings.get("tensor", 1)),
        bool(found["alike"]),
        all(map(_is_finite, found["losses"])),
    )


def bound(alone: Settings, tensor: int = 1) -> float:
    """What a layout with `tensor` tensor-parallel ranks may be off one rank with the model `alone`; argued above."""
    if not (compared := [other for other, _ in comparisons(alone)]):
        return FP32_BOUND
    own, *others = references([alone, *compared])
    factors = [factor for _, factor in comparisons(alone, tensor)]
    return max(ROUNDING, *(factor * _gap(own, other) for factor, other in zip(factors, others, strict=True)))


def comparisons(alone: Settings, tensor: int = 1) -> list[tuple[Settings, float]]:
    """What one rank is compared with to know the bound, and how many times the gap is allowed."""
    compared: list[tuple[Settings, float]] = []
    if "precision" in alone:
        compared.append(({key: value for key, value in alone.items() if key != "precision"}, 1 + tensor))
    if "hidden_dropout" in alone.get("model", {}):
        compared.append((alone | {"engine": {"seed": 4321}}, 3))
    return compared


_KNOWN: dict[str, Curve] = {}  # curves of one rank, which many cases share


def references(wanted: Sequence[Settings]) -> list[Curve]:
    """The curves of one rank with these settings; those not known yet are trained in one process."""
    frozen = {json.dumps(settings, sort_keys=True): settings for settings in wanted}
    missing = {name: settings for name, settings in frozen.items() if name not in _KNOWN}
    if missing:
        _KNOWN.update(zip(missing, curves(list(missing.values())), strict=True))
    return [_KNOWN[json.dumps(settings, sort_keys=True)] for settings in wanted]


def learn_references(chosen: Sequence[Case]) -> None:
    """Train all that one rank has to, for `chosen`, at once."""
    models = [case.settings(*OF_THE_MODEL) for case in chosen]
    references([settings for alone in models for settings in (alone, *(other for other, _ in comparisons(alone)))])


def curves(wanted: Sequence[Settings]) -> list[Curve]:
    """Train 20 steps on the ranks of a layout: the losses, and whether all ranks skipped the same steps.

    All of `wanted` take the same number of ranks.
    """
    with TemporaryDirectory() as folder:
        run_ranks(tiny.ranks_of(wanted[0]), train_all, folder, wanted, timeout=60 + 240 * len(wanted))
        return [json.loads(Path(folder, f"{number}.json").read_text()) for number in range(len(wanted))]


def train_all(folder: str, wanted: Sequence[Settings]) -> None:
    """On a rank."""
    for number, settings in enumerate(wanted):
        train(f"{folder}/{number}.json", settings)


def train(file: str, settings: Settings) -> None:
    """On a rank; the first writes what was seen. The weights do not depend on the seed of the masks."""
    scale = settings.get("rate", 1.0)
    plan = tiny.plan(**{key: value for key, value in settings.items() if key != "rate"})
    grid = start_layout(plan.layout)
    if plan.engine.precision == "fp16" and grid.device.type == "cpu":
        allow_fp16_on_cpu()
    engine = TrainingEngine(gpt_layers(plan.model, grid, 1234), grid, plan)
    losses, skipped = [], []
    for step in range(STEPS):
        batch = tiny.micro_batches(step, plan, grid.rank("data"))
        output = engine.train_batch(batch, step=step, learning_rate=scale * learning_rate(plan.schedule, step))
        losses.append(float(output.loss))
        skipped.append(output.skipped)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, skipped)
    if dist.get_rank() == 0:
        Path(file).write_text(json.dumps({"losses": losses, "alike": all(other == skipped for other in everyone)}))


def row(case: Case, outcome: Outcome) -> str:
    """A line of the table."""
    settings = case.settings()
    of_layout = {key: settings[key] for key in settings if key not in ("precision", "accumulation")}
    rest = [case.name(factor) for factor in ("model", "ends", "accumulation", "recompute", "clip", "dropout")]
    words = ", ".join(word.replace("x4", "accumulation 4") for word in rest if word)
    verdict = "yes" if outcome.gap < outcome.bound and outcome.skipped_alike and outcome.finite else "NO"
    return (
        f"| {layout_name(of_layout)} | {case.name('precision')} | {words} | {outcome.gap:.1e} | {outcome.bound:.1e} "
        f"| {verdict} |"
    )


def _gap(one: Curve, other: Curve) -> float:
    return max(abs(a - b) for a, b in zip(one["losses"], other["losses"], strict=True))


def _is_finite(loss: float) -> bool:
    return bool(torch.tensor(loss).isfinite())
