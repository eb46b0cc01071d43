"""Training speed compared with compiled Hugging Face Transformers and with the matrix products alone.

    python bench/train_step.py [--quick] [--shapes neox-6x512 ...] [--rounds 7] [--repeat 3] [--write]

Every contender (bench/contenders.py) is a process with a model of the same shape, fp32 master weights, bf16 compute,
clipping and fused AdamW. On a CPU, which others may share, they run alternately, one step each, so that other load
affects all of them; a ratio is computed in each round, and its median and spread over the rounds are printed. On a GPU,
whose memory one of them may need, they run one after the other, followed by attention alone at 2k, 8k and 32k. Nothing
new starts after --minutes. A shape whose estimated peak does not fit into the GPU's free memory (--gpu-memory) is
skipped, a contender that takes more than --limit seconds for a step is killed, and both are named.

TFLOP/s are given in two ways (megatron/config/flops.py): by the common formula of MFU, 6 N + 12 L n d T per token, and
as executed. Utilization is relative to the GPU's peak. --write writes the tables into bench/results/. The last line is
one JSON object.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

import torch
from contenders import (
    NAMES,
    ON_CPU,
    ON_GPU,
    ROOT,
    Contender,
    ContenderError,
    free_gpu_memory,
    plan_of,
    why_too_large,
)

from megatron.config.flops import token_flops
from megatron.config.plan import Plan
from megatron.estimate.memory import stage_memories
from megatron.metrics.peaks import peak_flops

WARM_UP = 3
Seconds = dict[str, list[float]]
LABELS = {
    "over_transformers": "over compiled Transformers",
    "over_transformers_same_malloc": "over the same with our allocator setting",
    "share_of_products": "share of the matrix products alone",
    "engine_overhead": "engine over the plain loop",
}


def alternately(keys: dict[str, Any], rounds: int, limit: float, names: Sequence[str] = NAMES) -> tuple[Seconds, int]:
    """Seconds of every round for all contenders, which run at the same time; peak bytes are unknown (0).

    A contender that fails, or takes more than `limit` seconds for a step, is named and left out.
    """
    contenders = [Contender(name, keys) for name in names]
    seconds: Seconds = {name: [] for name in names}

    def attempt(run: Callable[[Contender], object], contender: Contender) -> None:
        if contender.name in seconds:
            try:
                run(contender)
            except ContenderError as error:
                print(f"  {error}", flush=True)
                del seconds[contender.name]

    try:
        for contender in contenders:  # compile one after the other
            attempt(partial(_warm_up, limit=limit), contender)
        for number in range(rounds):
            for contender in contenders[number % len(contenders) :] + contenders[: number % len(contenders)]:
                attempt(lambda chosen: seconds[chosen.name].append(chosen.step(limit)[0]), contender)
        return seconds, 0
    finally:
        for contender in contenders:
            contender.end()


def one_by_one(
    keys: dict[str, Any], rounds: int, limit: float, deadline: float = math.inf, names: Sequence[str] = NAMES
) -> tuple[Seconds, int]:
    """Seconds of every round for contenders that run one after the other, and Deepy's peak bytes.

    A contender that fails, for example for lack of memory, or takes more than `limit` seconds for a step, is named and
    left out, and so are those for which no time is left.
    """
    seconds: Seconds = {}
    peak = 0
    for name in names:
        if name == "same-malloc":  # a setting of the host's allocator
            continue
        if time.monotonic() > deadline:
            print(f"  {name:13} skipped: no time left", flush=True)
            continue
        contender = Contender(name, keys)
        try:
            _warm_up(contender, min(limit, deadline - time.monotonic()))
            answers = [contender.step(limit) for _ in range(rounds)]
            seconds[name] = [answer[0] for answer in answers]
            peak = int(answers[-1][2]) if name == "deepy" else peak
        except ContenderError as error:
            print(f"  {error}", flush=True)
        finally:
            contender.end()
    return seconds, peak


def _warm_up(contender: Contender, limit: float) -> None:
    """Run the first steps and print their losses, which should be similar."""
    losses = [contender.step(limit)[1] for _ in range(WARM_UP)]
    print(f"  {contender.name:13} ready; first losses {losses[0]:.3f} {losses[-1]:.3f}", flush=True)


def ratio(above: list[float], below: list[float]) -> dict[str, Any]:
    """Median, minimum and maximum of the quotients of each round."""
    quotients = [a / b for a, b in zip(above, below, strict=True)]
    spread = [round(f(quotients), 3) for f in (min, max)]
    return {"median": round(statistics.median(quotients), 3), "spread": spread}


def figures_of(plan: Plan, seconds: Seconds, peak_bytes: int) -> dict[str, Any]:
    """The figures of a shape in the last line."""
    own = seconds["deepy"]
    tokens, median = plan.batch.tokens_per_step, statistics.median(own)
    rates = {
        "tflops": token_flops(plan).common * tokens / median / 1e12,
        "executed_tflops": token_flops(plan).executed * tokens / median / 1e12,
    }
    pairs = {
        "over_transformers": ("transformers", "deepy"),
        "over_transformers_same_malloc": ("same-malloc", "deepy"),
        "share_of_products": ("products", "deepy"),
        "engine_overhead": ("deepy", "bare"),
    }
    figures: dict[str, Any] = {
        name: ratio(seconds[above], seconds[below])
        for name, (above, below) in pairs.items()
        if above in seconds and below in seconds
    }
    figures |= {"tokens_per_second": round(tokens / median, 1)} | {name: round(r, 4) for name, r in rates.items()}
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    if peak := peak_flops(None, card, plan.engine.precision):
        figures["utilization"] = round(rates["tflops"] * 1e12 / peak, 4)
        figures["executed_utilization"] = round(rates["executed_tflops"] * 1e12 / peak, 4)
    if peak_bytes:
        estimate = stage_memories(plan)[0].peak
        figures |= {"peak_gib": round(peak_bytes / 2**30, 2), "estimated_gib": round(estimate / 2**30, 2)}
    return figures


def table(name: str, plan: Plan, seconds: Seconds, figures: dict[str, Any]) -> str:
    """A shape's tables, in Markdown."""
    tokens, flops = plan.batch.tokens_per_step, token_flops(plan)
    lines = ["", f"### {name}", ""]
    lines += ["| | ms a step [least, most] | tokens/s | TFLOP/s | executed |", "|---|---|---|---|---|"]
    for contender, values in seconds.items():
        median = statistics.median(values)
        rates = " | ".join(f"{way * tokens / median / 1e12:.2f}" for way in (flops.common, flops.executed))
        cells = " | | " if contender == "products" else f"{tokens / median:,.0f} | {rates}"
        spread = f"[{min(values) * 1e3:,.1f}, {max(values) * 1e3:,.1f}]"
        lines.append(f"| {contender} | {median * 1e3:,.1f} {spread} | {cells} |")
    lines += ["", "| ratio | median [spread] |", "|---|---|"]
    for key, label in LABELS.items():
        if key in figures:
            lines.append(f"| {label} | {figures[key]['median']} {figures[key]['spread']} |")
    if "utilization" in figures:
        lines.append(f"| share of the card's 16-bit peak by the common formula (MFU) | {figures['utilization']} |")
        lines.append(f"| share of the card's 16-bit peak, executed | {figures['executed_utilization']} |")
    if "peak_gib" in figures:
        lines.append(f"| peak memory, GiB (estimated) | {figures['peak_gib']} ({figures['estimated_gib']}) |")
    return "\n".join(lines)


def machine() -> str:
    """The line above the tables."""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    today, load = datetime.now(UTC).date(), os.getloadavg()[0]
    return f"{today}, {card}, torch {torch.__version__}, commit {commit()}, load {load:.1f}"


def commit() -> str:
    """The commit of this checkout; "unknown" outside a repository or without git."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def attention(deadline: float) -> str:
    """The table of bench/attention.py, run in the remaining time."""
    left = deadline - time.monotonic()
    if left < 20:
        return "\nattention alone: skipped, no time left"
    command = [sys.executable, str(ROOT / "bench" / "attention.py")]
    try:
        return "\n" + subprocess.run(command, capture_output=True, text=True, timeout=left, check=True).stdout
    except subprocess.TimeoutExpired as error:
        return f"\nattention alone: {error}"
    except subprocess.CalledProcessError as error:
        return f"\nattention alone: {error}\n{error.stderr[-1500:]}"


def main() -> None:
    """Measure the shapes and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    shapes = ON_GPU if on_gpu else ON_CPU
    parser.add_argument("--shapes", nargs="*", default=list(shapes), choices=list(shapes))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--repeat", type=int, default=1, help="repetitions of each shape, with new processes")
    parser.add_argument("--minutes", type=float, default=8.0, help="on a GPU: start nothing new after this")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds of a step, the compiling first one too")
    parser.add_argument("--gpu-memory", type=float, default=free_gpu_memory(), help="GiB; default: what is free")
    parser.add_argument("--quick", action="store_true", help="the first shape, 3 rounds")
    parser.add_argument("--write", action="store_true", help="write the tables into bench/results/")
    arguments = parser.parse_args()
    names, rounds = (arguments.shapes[:1], 3) if arguments.quick else (arguments.shapes, arguments.rounds)
    deadline = time.monotonic() + 60 * arguments.minutes
    head = machine()
    print(head, flush=True)
    figures: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    tables = []
    for _ in range(arguments.repeat):
        for name in names:
            print(name, flush=True)
            plan, keys, limit = plan_of(shapes[name]), shapes[name], arguments.limit
            if reason := why_too_large(plan, arguments.gpu_memory):
                print(f"  skipped: {reason}", flush=True)
                continue
            seconds, peak = one_by_one(keys, rounds, limit, deadline) if on_gpu else alternately(keys, rounds, limit)
            if "deepy" not in seconds:
                continue
            figures[name].append(figures_of(plan, seconds, peak))
            tables.append(table(name, plan, seconds, figures[name][-1]))
            print(tables[-1], flush=True)
    if on_gpu:
        tables.append(attention(deadline))
        print(tables[-1])
    if arguments.write:
        kind = torch.cuda.get_device_name().replace(" ", "-").lower() if on_gpu else "cpu"
        path = ROOT / "bench" / "results" / f"train-step-{datetime.now(UTC).date()}-{kind}.md"
        path.parent.mkdir(exist_ok=True)
        with path.open("a") as file:  # keep earlier runs of the day
            file.write(f"# Training steps\n\n{head}; `python {' '.join(sys.argv)}`\n" + "\n".join(tables) + "\n\n")
        print(f"written: {path.relative_to(ROOT)}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
