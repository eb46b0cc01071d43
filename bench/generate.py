"""Speed of generation compared with Transformers' generate, and with reading the weights alone.

    python bench/generate.py [--quick] [--repeat 3] [--prompts 200] [--int8] [--write]

A model of 6 layers x 512 x 8 heads like GPT-NeoX, vocabulary 50,304, bf16. The contenders (bench/decoders.py) are
processes with the same weights, threads and allocator settings. They answer the same prompts alternately, so that other
load affects all of them; a ratio is computed in each round, and its median and spread over the rounds are printed.

one, eight: so many prompts of 64 tokens, answers of 128. unequal: prompts of 16 to 256 tokens and answers of 16 to 128,
drawn log-uniformly. There Transformers gets batches of 8 in order, as guides do, and also batches of 32 sorted by
length; the engine has 32 slots and answers in order.

Tokens are compared twice: of every timed answer, in bf16 with a head that knows the next token by a margin beyond
bf16's rounding; and before, untimed, in fp32 with weights as drawn, where the next token depends on all before it.
The ceiling is the time to read each weight once (of the embedding a row): its bytes over the bandwidth with which all
threads read a large tensor, measured in each round. --write writes the tables into bench/results/. The last line is one
JSON object.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from contenders import ON_CPU, ROOT, Contender, plan_of
from train_step import machine, ratio

from megatron.config.parameter_counts import embedding_parameters, parameter_count

SHAPE = "neox-6x512"
DECODERS = str(Path(__file__).with_name("decoders.py"))
LIMIT = 1200.0  # seconds of one answer
READ = 2**28  # bytes: many times the caches


@dataclass(frozen=True)
class Job:
    """Prompts, the number of tokens of each answer, and texts at once for both sides.

    order: in which Transformers gets them; None: as they are.
    """

    prompts: list[list[int]]
    tokens: list[int]
    slots: int
    batch: int
    order: list[int] | None = None

    def question(self, contender: str) -> str:
        """The line that asks `contender`."""
        order = range(len(self.prompts)) if contender == "deepy" or self.order is None else self.order
        batch = self.slots if contender.startswith("deepy") else self.batch
        prompts, tokens = ([column[number] for number in order] for column in (self.prompts, self.tokens))
        return json.dumps({"prompts": prompts, "tokens": tokens, "batch": batch})

    def in_order(self, contender: str, answers: list[list[int]]) -> list[list[int]]:
        """Answers of `contender` in the order of the prompts."""
        if contender.startswith("deepy") or self.order is None:
            return answers
        return [answer for _, answer in sorted(zip(self.order, answers, strict=True))]


def even(count: int, length: int, tokens: int) -> Job:
    """`count` prompts of `length` tokens, all at once."""
    draw = torch.Generator().manual_seed(count)
    prompts = torch.randint(0, 50000, (count, length), generator=draw).tolist()
    return Job(prompts, [tokens] * count, slots=count, batch=count)


def unequal(count: int, batch: int, is_sorted: bool) -> Job:
    """Prompts and answers of any length."""
    draw = torch.Generator().manual_seed(3)
    lengths, tokens = ((16 * (most / 16) ** torch.rand(count, generator=draw)).long().tolist() for most in (256, 128))
    prompts = [torch.randint(0, 50000, (length,), generator=draw).tolist() for length in lengths]
    order = sorted(range(count), key=lambda number: (lengths[number], number)) if is_sorted else None
    return Job(prompts, tokens, slots=32, batch=batch, order=order)


def read_bandwidth() -> float:
    """Bytes per second at which all threads read memory, the best of five times."""
    tensor = torch.ones(READ // 4)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        tensor.sum()
        seconds.append(time.perf_counter() - began)
    return READ / min(seconds)


def bytes_per_token(keys: dict[str, Any]) -> int:
    """Bytes of the 16-bit weights that a token reads at batch 1."""
    model = plan_of(keys).model
    return 2 * (parameter_count(model) - (0 if model.tied_embeddings else embedding_parameters(model)))


def equal_in_fp32(keys: dict[str, Any], job: Job) -> str:
    """Compare the tokens of both sides with weights as drawn; how many are equal."""
    answers = []
    for name in ("deepy", "transformers.generate"):
        contender = Contender(name, keys | {"precision": "fp32", "sharp": False}, DECODERS)
        answers.append(contender.ask(job.question(name), LIMIT)[1])
        contender.end()
    return _equal(*answers)


def _equal(ours: list[list[int]], theirs: list[list[int]]) -> str:
    pairs = [pair for a, b in zip(ours, theirs, strict=True) for pair in zip(a, b, strict=True)]
    return f"{sum(a == b for a, b in pairs)} of {len(pairs)}"


def measure(jobs: dict[str, Job], keys: dict[str, Any], rounds: int, names: list[str]) -> dict[str, dict[str, Any]]:
    """Seconds of each round and contender, tokens that are equal, and bandwidths, by job."""
    contenders = [Contender(name, keys | KINDS[name] | {"sharp": True}, DECODERS) for name in names]
    found: dict[str, dict[str, Any]] = {}
    try:
        for contender in contenders:  # load, and compute once
            contender.ask(even(1, 16, 4).question(contender.name), LIMIT)
        for label, job in jobs.items():
            seconds: dict[str, list[float]] = {name: [] for name in names}
            answers, bandwidths = {}, []
            for number in range(rounds):
                bandwidths.append(read_bandwidth())
                for contender in contenders[number % len(contenders) :] + contenders[: number % len(contenders)]:
                    took, ids = contender.ask(job.question(contender.name), LIMIT)
                    seconds[contender.name].append(took)
                    answers[contender.name] = job.in_order(contender.name, ids)
            equal = _equal(answers["deepy"], answers["transformers.generate"])
            found[label] = {"seconds": seconds, "equal": equal, "bandwidths": bandwidths, "tokens": sum(job.tokens)}
            print(f"  {label}: { ({name: round(statistics.median(s), 2) for name, s in seconds.items()}) }", flush=True)
    finally:
        for contender in contenders:
            contender.end()
    return found


KINDS: dict[str, dict[str, Any]] = {
    "deepy": {},
    "deepy-int8": {"quantization": "int8"},
    "transformers.generate": {},
}


def figures_of(found: dict[str, dict[str, Any]], size: int) -> dict[str, dict[str, Any]]:
    """Tokens/s, ratios and the share of the ceiling, by job. size: bytes of weights."""
    figures: dict[str, dict[str, Any]] = {}
    for label, each in found.items():
        seconds, tokens = each["seconds"], each["tokens"]
        rates = {name: round(tokens / statistics.median(values), 1) for name, values in seconds.items()}
        figures[label] = {
            "tokens_per_second": rates,
            "over_transformers": ratio(seconds["transformers.generate"], seconds["deepy"]),
            "equal": each["equal"],
        }
        if "deepy-int8" in seconds:
            figures[label]["int8_over_16_bits"] = ratio(seconds["deepy"], seconds["deepy-int8"])
        if label == "one":
            ceilings = [tokens * size / bandwidth for bandwidth in each["bandwidths"]]
            figures[label]["share_of_ceiling"] = ratio(ceilings, seconds["deepy"])
            figures[label]["read_gb_per_second"] = round(statistics.median(each["bandwidths"]) / 1e9, 1)
    return figures


def table(figures: dict[str, dict[str, Any]]) -> str:
    """In Markdown."""
    lines = ["| prompts | tokens/s: ours, Transformers' | ratio [least, most] | tokens equal | share of the ceiling |"]
    lines.append("|---|---|---|---|---|")
    for label, each in figures.items():
        rates, over, share = each["tokens_per_second"], each["over_transformers"], each.get("share_of_ceiling")
        limit = f"{share['median']} {share['spread']} of {each['read_gb_per_second']} GB/s" if share else ""
        lines.append(
            f"| {label} | {rates['deepy']:,}, {rates['transformers.generate']:,} | {over['median']} {over['spread']} "
            f"| {each['equal']} | {limit} |"
        )
    for label, each in figures.items():
        if "int8_over_16_bits" in each:
            over = each["int8_over_16_bits"]
            rate = each["tokens_per_second"]["deepy-int8"]
            lines.append(f"| {label}, int8 | {rate:,} | {over['median']} {over['spread']} over 16 bits | | |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=1, help="repetitions, with new processes")
    parser.add_argument("--prompts", type=int, default=200, help="of unequal length; 0: skip them")
    parser.add_argument("--int8", action="store_true", help="measure the engine with int8 weights as well")
    parser.add_argument(
        "--quick", action="store_true", help="one round of few tokens, without prompts of unequal length"
    )
    parser.add_argument("--write", action="store_true", help="write the tables into bench/results/")
    arguments = parser.parse_args()
    keys, new = ON_CPU[SHAPE], 8 if arguments.quick else 128
    rounds, prompts = (1, 0) if arguments.quick else (arguments.rounds, arguments.prompts)
    jobs = {"one": even(1, 64, new), "eight": even(8, 64, new)}
    if prompts:
        jobs["unequal, their batches of 8 in order"] = unequal(prompts, 8, is_sorted=False)
        jobs["unequal, their batches of 32 sorted"] = unequal(prompts, 32, is_sorted=True)
    names = [name for name in KINDS if arguments.int8 or name != "deepy-int8"]
    text = [f"{machine()}; {SHAPE}, bf16; {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"]
    exact = equal_in_fp32(keys, even(8, 64, new // 4))
    text.append(f"\nTokens equal in fp32, weights as drawn: {exact}\n")
    print("\n".join(text), flush=True)
    every = []
    for _ in range(arguments.repeat):
        every.append(figures_of(measure(jobs, keys, rounds, names), bytes_per_token(keys)))
        text.append(table(every[-1]) + "\n")
        print(text[-1], flush=True)
    if arguments.write:
        path = ROOT / "bench" / "results" / f"generate-{datetime.now(UTC).date()}-cpu.md"
        path.parent.mkdir(exist_ok=True)
        with path.open("a") as file:  # keep earlier runs of the day
            file.write(f"# Generation\n\n`python {' '.join(sys.argv)}`; " + "\n".join(text) + "\n")
        print(f"written: {path.relative_to(ROOT)}")
    print(json.dumps({"equal_in_fp32": exact, "runs": every}))


if __name__ == "__main__":
    main()
