"""Training speed compared with compiled Hugging Face Transformers and with the matrix products alone.

    python bench/train_step.py [--quick] [--shapes neox-6x512 ...] [--rounds 7] [--repeat 3] [--write]

Every contender (bench/contenders.py) is a process with a model of the same shape, fp32 master weights, bf16 compute,
clipping and fused AdamW. On a CPU, which others may share, they run alternately, one step each, so that other load
affects all of them; a ratio is computed in each round, and its median and spread over the rounds are printed. On a GPU,
whose memory one of them may need, they run one after the other, followed by attention alone at 2k, 8k and 32k. Nothing
new starts after --minutes; what was skipped is named.

TFLOP/s count 6 N + 12 L n d T per token (megatron/metrics/flops.py); utilization is relative to the GPU's peak.
--write writes the tables into bench/results/. The last line is one JSON object.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from typing import Any

import torch
from contenders import NAMES, ON_CPU, ON_GPU, ROOT, Contender, ContenderError, plan_of

from megatron.config.parameter_counts import flops_per_token
from megatron.config.plan import Plan
from megatron.estimate.memory import stage_memories
from megatron.metrics.flops import peak_flops

WARM_UP = 3
Seconds = dict[str, list[float]]
LABELS = {
    "over_transformers": "over compiled Transformers",
    "over_transformers_same_malloc": "over the same with our allocator setting",
    "share_of_products": "share of the matrix products alone",
    "engine_overhead": "engine over the plain loop",
}


def alternately(keys: dict[str, Any], rounds: int) -> tuple[Seconds, int]:
    """Seconds of every round for all contenders, which run at the same time; peak bytes are unknown (0)."""
    contenders = [Contender(name, keys) for name in NAMES]
    try:
        for contender in contenders:  # compile one after the other
            _warm_up(contender)
        seconds: Seconds = {name: [] for name in NAMES}
        for number in range(rounds):
            turn = contenders[number % len(contenders) :] + contenders[: number % len(contenders)]
            for contender in turn:
                seconds[contender.name].append(contender.step()[0])
        return seconds, 0
    finally:
        for contender in contenders:
            contender.end()


def one_by_one(keys: dict[str, Any], rounds: int, deadline: float) -> tuple[Seconds, int]:
    """Seconds of every round for contenders that run one after the other, and Deepy's peak bytes.

    A contender that does not fit into memory or time is named and skipped.
    """
    seconds: Seconds = {}
    peak = 0
    for name in NAMES:
        if name == "same-malloc":  # a setting of the host's allocator
            continue
        if time.monotonic() > deadline:
            print(f"  {name:13} skipped: no time left", flush=True)
            continue
        contender = Contender(name, keys)
        try:
            _warm_up(contender)
            answers = [contender.step() for _ in range(rounds)]
            seconds[name] = [answer[0] for answer in answers]
            peak = int(answers[-1][2]) if name == "deepy" else peak
        except ContenderError as error:
            print(f"  {error}", flush=True)
        finally:
            contender.end()
    return seconds, peak


def _warm_up(contender: Contender) -> None:
    """Run the first steps and print their losses, which should be similar."""
    losses = [contender.step()[1] for _ in range(WARM_UP)]
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
    flops = flops_per_token(plan.model, plan.batch.sequence_length) * tokens
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
    figures |= {"tokens_per_second": round(tokens / median, 1), "tflops": round(flops / median / 1e12, 4)}
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    if card and (peak := peak_flops(None, card, half_precision=True)):
        figures["utilization"] = round(flops / median / peak, 4)
    if peak_bytes:
        estimate = stage_memories(plan)[0].peak
        figures |= {"peak_gib": round(peak_bytes / 2**30, 2), "estimated_gib": round(estimate / 2**30, 2)}
    return figures


def table(name: str, plan: Plan, seconds: Seconds, figures: dict[str, Any]) -> str:
    """A shape's tables, in Markdown."""
    tokens = plan.batch.tokens_per_step
    flops = flops_per_token(plan.model, plan.batch.sequence_length) * tokens
    lines = ["", f"### {name}", "", "| | ms a step [least, most] | tokens/s | TFLOP/s |", "|---|---|---|---|"]
    for contender, values in seconds.items():
        median = statistics.median(values)
        rates = "" if contender == "products" else f"{tokens / median:,.0f} | {flops / median / 1e12:.2f}"
        spread = f"[{min(values) * 1e3:,.1f}, {max(values) * 1e3:,.1f}]"
        lines.append(f"| {contender} | {median * 1e3:,.1f} {spread} | {rates or '|'} |")
    lines += ["", "| ratio | median [spread] |", "|---|---|"]
    for key, label in LABELS.items():
        if key in figures:
            lines.append(f"| {label} | {figures[key]['median']} {figures[key]['spread']} |")
    if "utilization" in figures:
        lines.append(f"| share of the card's peak (MFU) | {figures['utilization']} |")
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
    except (FileNotFoundError, subprocess.CalledProcessError):
        return "unknown"


def attention(deadline: float) -> str:
    """The table of bench/attention.py, run in the remaining time."""
    left = deadline - time.monotonic()
    if left < 20:
        return "\nattention alone: skipped, no time left"
    command = [sys.executable, str(ROOT / "bench" / "attention.py")]
    try:
        return "\n" + subprocess.run(command, capture_output=True, text=True, timeout=left, check=True).stdout
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
        return f"\nattention alone: {error}"


def main() -> None:
    """Measure the shapes and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    shapes = ON_GPU if on_gpu else ON_CPU
    parser.add_argument("--shapes", nargs="*", default=list(shapes), choices=list(shapes))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--repeat", type=int, default=1, help="repetitions of each shape, with new processes")
    parser.add_argument("--minutes", type=float, default=8.0, help="on a GPU: start nothing new after this")
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
            plan = plan_of(shapes[name])
            seconds, peak = one_by_one(shapes[name], rounds, deadline) if on_gpu else alternately(shapes[name], rounds)
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
