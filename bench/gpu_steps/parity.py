"""Losses of small models on this device against those on the CPU, over 20 steps of Adam (4 with --quick).

    python -m bench.gpu_steps.parity [--quick]

Every case has the weights and batches of its model in fp32 on the CPU, with which its losses are compared. Bounds:

fp32      1e-4: ten times the gap between eager and compiled code on a CPU, which round at different places as another
          device does. TF32 would exceed it: its products have two bits more than bf16's, whose gap is 1e-2.
16 bit    Twice the gap between bf16 and fp32 on the CPU, and at least 0.01, as argued in tests/ranks/layouts.py.
float8    Compared with float8 on the CPU: twice the gap between float8 and bf16 there, and at least 0.01.
dropout   Other devices draw other masks: recomputation is compared with none on the same device, in fp32.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from contenders import engine_of

from bench.gpu_steps.common import ON_CARD, TINY, free, record
from megatron.config.load import config_from_flat
from megatron.config.plan import Plan
from megatron.config.resolve import resolve
from megatron.engine.distributed import stop
from megatron.model.layer import NO_MASKING, Masking, pack
from megatron.model.positions import document_starts

Keys = dict[str, Any]
VOCABULARY, END_OF_DOCUMENT, STEPS, RATE = 251, 0, 20, 1e-2
FP32_BOUND, ROUNDING = 1e-4, 0.01
PROCESSES = 4 if ON_CARD else 1  # on this device: a GPU waits while code is compiled
NEOX: Keys = {
    "num_layers": 2,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "seq_length": 256,
    "train_micro_batch_size_per_gpu": 4,
    "pos_emb": "rotary",
    "no_weight_tying": True,
    "compile": False,
}
SLOW_ON_A_CPU = NEOX | {"num_layers": 1, "hidden_size": 64, "seq_length": 64, "train_micro_batch_size_per_gpu": 1}
GROUPED = NEOX | {"norm": "rmsnorm", "activation": "swiglu", "num_kv_heads": 2, "no_weight_tying": False}
APART = {"reset_attention_mask": True, "reset_position_ids": True}
WINDOW = {"attention_config": [[["global", "local"], 1]], "sliding_window_width": 100}
DROPOUT = NEOX | {"attention_dropout": 0.1, "hidden_dropout": 0.1}
BF16, FP16, COMPILED = {"precision": "bfloat16"}, {"precision": "fp16"}, {"compile": True}
FLOAT8 = BF16 | {"precision_linear": "float8"}
RECOMPUTED = {"checkpoint_activations": True}
SELECTIVE = RECOMPUTED | {"recompute_granularity": "selective"}


@dataclass(frozen=True)
class Case:
    """A model, how it is trained, and how the run is that it is compared with: on the CPU, or `here` as well."""

    name: str
    model: Keys
    how: Keys = field(default_factory=dict)
    like: Keys = field(default_factory=dict)
    here: bool = False

    @property
    def keys(self) -> Keys:
        """All keys."""
        return self.model | self.how


CASES = (
    Case("fp32", NEOX),
    Case("fp32, compiled", NEOX, COMPILED),
    Case("bf16", NEOX, BF16),
    Case("bf16, compiled", NEOX, BF16 | COMPILED),
    Case("bf16, accumulation 2", NEOX, BF16 | {"gradient_accumulation_steps": 2, "train_micro_batch_size_per_gpu": 2}),
    Case("bf16, ZeRO 3", NEOX, BF16 | {"zero_optimization": {"stage": 3}}),
    Case("fp16", NEOX, FP16),
    Case("grouped queries, fp32", GROUPED),
    Case("grouped queries, bf16, compiled", GROUPED, BF16 | COMPILED),
    Case("grouped queries, bf16, selective recomputation", GROUPED, BF16 | SELECTIVE),
    Case("documents apart, fp32", NEOX | APART),
    Case("documents apart, grouped queries, bf16", GROUPED | APART, BF16),
    Case("documents apart, grouped queries, bf16, compiled", GROUPED | APART, BF16 | COMPILED),
    Case("window, bf16", NEOX | WINDOW, BF16),
    Case("float8, compiled", SLOW_ON_A_CPU, FLOAT8 | COMPILED, like=FLOAT8),
    Case("dropout, recomputation", DROPOUT, RECOMPUTED, here=True),
    Case("dropout, selective recomputation", DROPOUT, SELECTIVE, here=True),
    Case("dropout, compiled, recomputation", DROPOUT, COMPILED | RECOMPUTED, like=COMPILED, here=True),
)
QUICK = ("bf16, compiled", "documents apart, grouped queries, bf16", "dropout, recomputation")
QUICK_STEPS = 4
# the block of TINY, which other steps compile as well
SHAPE = ("gpt_j_residual", "rotary_pct", "hidden_size", "seq_length", "train_micro_batch_size_per_gpu")
QUICK_KEYS = {key: TINY[key] for key in SHAPE}


def bound(case: Case, on_cpu: dict[str, list[float]]) -> float:
    """How far the losses of a case may be from those it is compared with; argued above."""
    if case.here or "precision" not in case.how:
        return FP32_BOUND
    coarse, fine = (FLOAT8, BF16) if case.like else (BF16, {})
    return max(ROUNDING, 2 * gap(on_cpu[_name(case.model | coarse)], on_cpu[_name(case.model | fine)]))


def gap(one: list[float], other: list[float]) -> float:
    """The largest difference of two curves."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def trained(keys: Keys, steps: int) -> list[float] | str:
    """The losses of `train`, or the error: a case that fails leaves the others."""
    try:
        return train(keys, steps)
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {error}".splitlines()[0]
    finally:
        stop()
        free()


def train(keys: Keys, steps: int) -> list[float]:
    """The losses of `steps` steps on this process's device."""
    plan = resolve(config_from_flat(keys), 1, VOCABULARY)
    if plan.engine.precision == "fp16" and not torch.cuda.is_available():
        from tests.ranks.moves import allow_fp16_on_cpu

        allow_fp16_on_cpu()
    engine = engine_of(plan)
    return [
        float(engine.train_batch(batches(step, plan), step=step, learning_rate=RATE * 0.95**step).loss)
        for step in range(steps)
    ]


def batches(step: int, plan: Plan) -> list[Any]:
    """The micro-batches of a step: samples of several documents, in which each second token can be learned."""
    samples, length = plan.batch.global_size, plan.batch.sequence_length
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(1, VOCABULARY, (samples, length + 1), generator=generator)
    ids[:, 1::2] = (ids[:, 0 : length - 1 : 2] * 3 + 1) % VOCABULARY
    ids[torch.rand(ids.shape, generator=generator) < 0.02] = END_OF_DOCUMENT
    weight = plan.batch.accumulation_steps / (samples * length)
    found = []
    for part in ids.split(plan.batch.micro_size):
        tokens, labels = part[:, :-1].contiguous(), part[:, 1:].contiguous()
        apart = plan.model.keeps_documents_apart
        masking = Masking(document_starts(tokens, END_OF_DOCUMENT)) if apart else NO_MASKING
        found.append((pack(tokens, masking), (labels, torch.full(labels.shape, weight))))
    return found


def _name(keys: Keys) -> str:
    return json.dumps(keys, sort_keys=True)


def _curves(wanted: list[Keys], steps: int, folder: Path, number: int) -> "tuple[subprocess.Popen[bytes], Path]":
    """Start a process that trains everything `wanted`: number 0 on the CPU, others on this device."""
    file, names = folder / f"{number}.jsonl", folder / f"{number}.json"
    names.write_text(json.dumps(wanted))
    hidden = {} if number else {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "bench.gpu_steps.parity", "--steps", str(steps), "--train", str(names), str(file)]
    return subprocess.Popen(command, env=os.environ | hidden, stdout=subprocess.DEVNULL), file


def main() -> int:
    """Compare and print; exit code 1 if a case is out of its bound."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)  # these two in the processes started here
    parser.add_argument("--train", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        with arguments.train[1].open("w", buffering=1) as file:
            for keys in json.loads(arguments.train[0].read_text()):
                file.write(json.dumps([_name(keys), trained(keys, arguments.steps)]) + "\n")
        return 0
    cases = CASES
    if arguments.quick:
        cases = tuple(replace(case, model=case.model | QUICK_KEYS) for case in CASES if case.name in QUICK)
    return compare(cases, QUICK_STEPS if arguments.quick else STEPS)


def compare(cases: tuple[Case, ...], steps: int) -> int:
    """Train `cases` on the CPU and on this device at the same time, and print the table."""
    on_cpu_too = [case for case in cases if not case.here]
    wanted = [case.model | how for case in on_cpu_too for how in ({}, case.like)]
    wanted += [case.model | BF16 for case in on_cpu_too if "precision" in case.how]
    own = _unique([keys for case in cases for keys in (case.keys, *([case.model | case.like] if case.here else []))])
    parts = [_unique(wanted), *(own[number::PROCESSES] for number in range(PROCESSES))]
    with TemporaryDirectory() as name:
        started = [_curves(part, steps, Path(name), number) for number, part in enumerate(parts)]
        print(f"| case | loss at the end | largest gap of {steps} losses | bound | holds |")
        print("|---|---|---|---|---|", flush=True)
        holding, left = list[bool](), list(cases)
        while left:
            codes = [process.poll() for process, _ in started]
            on_cpu, *others = (_complete_lines(file) for _, file in started)
            here = {name: curve for curves in others for name, curve in curves.items()}
            for case in list(left):
                if None not in codes or None not in curves_of(case, on_cpu, here):
                    holding.append(_print_row(case, on_cpu, here))
                    left.remove(case)
            time.sleep(0.2)
        ended = [process.wait() for process, _ in started]
    return int(any(ended) or not all(holding))


def _complete_lines(file: Path) -> dict[str, Any]:
    """The curves in a file that another process writes, which it may not have begun."""
    text = file.read_text() if file.exists() else ""
    return dict(map(json.loads, text[: text.rfind("\n") + 1].splitlines()))


def curves_of(case: Case, on_cpu: dict[str, Any], here: dict[str, Any]) -> list[Any]:
    """The curve of a case, the one it is compared with, and those of its bound. None: not trained."""
    with_precision = not case.here and "precision" in case.how
    names = [_name(case.model | how) for how in (case.like, *([{}, BF16] if with_precision else []))]
    return [here.get(_name(case.keys)), *map((here if case.here else on_cpu).get, names)]


def _print_row(case: Case, on_cpu: dict[str, Any], here: dict[str, Any]) -> bool:
    """Print a case's row; returns whether it is within its bound."""
    found, expected, *others = curves_of(case, on_cpu, here)
    if failures := [curve for curve in (found, expected, *others) if not isinstance(curve, list)]:
        print(f"| {case.name} | {failures[0] or 'not trained'} | | | NO |", flush=True)
        return False
    apart, allowed = gap(found, expected), bound(case, on_cpu)
    holds = apart <= allowed  # False for NaN
    print(f"| {case.name} | {found[-1]:.4f} | {apart:.1e} | {allowed:.1e} | {'yes' if holds else 'NO'} |", flush=True)
    record(case=case.name, losses=found, expected=expected, gap=apart, bound=allowed)
    return holds


def _unique(wanted: list[Keys]) -> list[Keys]:
    return list({_name(keys): keys for keys in wanted}.values())


if __name__ == "__main__":
    sys.exit(main())
