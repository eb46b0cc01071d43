"""Speed, start-up cost and memory of the training data loader.

    python bench/loader.py [--config configs/default.yml --steps 20] [--batches 100000]

Start: for each corpus of 10^4, 10^6 and 10^11 tokens (a sparse file, which needs no disk space) a process opens it,
permutes its windows and reads the first sample; seconds and peak memory do not include imports. Speed: samples of 2,049
tokens from a file of 100 million random ids in the page cache. With --config that configuration is trained for a few
steps, and its rate is compared with the loader's. The last line is one JSON object.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np

from megatron.data.build import Mixture, build_sources
from megatron.data.indexed import HEADER, MAGIC, IndexedWriter
from megatron.data.loader import micro_batches
from megatron.data.windows import SampleSource

ROOT = Path(__file__).parents[1]
SEQUENCE, MICRO_BATCH, VOCABULARY = 2048, 4, 50_000
START = """
import resource, sys, time
import megatron.data.build as build, megatron.data.loader
began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if sys.argv[1]:
    source = build.build_sources(data_path=sys.argv[1], split="1,0", seq_length=64, seed=1, vocab_size=65536).train
    source[0]
print(time.perf_counter() - began, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def sparse_corpus(prefix: Path, tokens: int) -> str:
    """A sparse corpus of zeros."""
    count = max(10, tokens // (2 * 10**9))
    sizes = np.full(count, tokens // count, dtype="<i4")
    ends = np.cumsum(sizes, dtype="<i8") * 2
    header = HEADER.pack(MAGIC, 1, 8, len(sizes), len(sizes) + 1)
    pointers, documents = ends - sizes.astype("<i8") * 2, np.arange(len(sizes) + 1, dtype="<i8")
    Path(f"{prefix}.idx").write_bytes(header + sizes.tobytes() + pointers.tobytes() + documents.tobytes())
    with Path(f"{prefix}.bin").open("wb") as file:
        file.truncate(int(ends[-1]))
    return str(prefix)


def starts(folder: Path) -> dict[str, dict[str, float]]:
    """Seconds and MiB of a start for each size; medians of 3."""
    figures = {}
    for power in (4, 6, 11):
        path = sparse_corpus(folder / f"tokens{power}", 10**power)
        runs = [
            subprocess.run([sys.executable, "-c", START, path], capture_output=True, text=True, check=True, cwd=ROOT)
            for _ in range(3)
        ]
        seconds, memory = (median(float(run.stdout.split()[i]) for run in runs) for i in (0, 1))
        figures[f"10^{power}"] = {"milliseconds": round(1000 * seconds, 1), "MiB": round(memory, 1)}
        print(f"start with 10^{power} tokens: {1000 * seconds:8.1f} ms, {memory:6.1f} MiB of memory", flush=True)
    return figures


def random_corpus(prefix: Path, tokens: int) -> str:
    """Random ids in documents of 1,000 tokens."""
    ids = np.random.default_rng(0).integers(0, VOCABULARY, tokens, dtype=np.uint16)
    with IndexedWriter(str(prefix), np.uint16) as writer:
        writer.add_documents(ids, [1000] * (tokens // 1000))
    return str(prefix)


def rate(source: SampleSource, sequence: int, micro_batch: int, workers: int, seconds: float = 3.0) -> float:
    """Tokens per second of one rank's loader, after a warm-up."""
    batches = micro_batches(
        source, consumed_samples=0, global_size=micro_batch, micro_size=micro_batch, data_rank=0, data_size=1,
        num_workers=workers,
    )  # fmt: skip
    for _ in islice(batches, 50):
        pass
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        next(batches)
        count += 1
    return count * micro_batch * sequence / (time.perf_counter() - began)


def rates(path: str) -> dict[str, float]:
    """Tokens per second for each kind of sample."""
    common = {"seq_length": SEQUENCE, "seed": 1, "vocab_size": VOCABULARY}
    two = Mixture((path, path), (0.7, 0.3))
    sources = {
        "packed": build_sources(data_path=path, split="1,0", **common).samples("train"),
        "blend of 2": build_sources(mixtures={"train": two}, **common).samples("train"),
        "pack_until_overflow": build_sources(
            data_path=path, split="1,0", pack_impl="pack_until_overflow", **common
        ).samples("train"),
    }
    figures = {}
    for name, source in sources.items():
        for workers in (0, 2):
            speed = median(rate(source, SEQUENCE, MICRO_BATCH, workers) for _ in range(3))
            figures[f"{name}, {workers} workers"] = round(speed)
            print(f"{name:20} {workers} workers: {speed / 1e6:7.1f} million tokens/s", flush=True)
    return figures


def memory_over(path: str, batches: int) -> dict[str, float]:
    """Memory of this process in MiB, without file pages, after up to `batches` batches."""
    source = build_sources(data_path=path, split="1,0", seq_length=SEQUENCE, seed=1, vocab_size=VOCABULARY)
    loader = micro_batches(
        source.samples("train"), consumed_samples=0, global_size=4, micro_size=4, data_rank=0, data_size=1,
        num_workers=2,
    )  # fmt: skip
    figures = {}
    for done in range(batches + 1):
        next(loader)
        if done % (batches // 4) == 0:
            figures[f"{done}"] = round(anonymous_memory(), 1)
            print(f"after {done:7,} batches: {figures[f'{done}']:.1f} MiB", flush=True)
    return figures


def anonymous_memory() -> float:
    """MiB of this process and its workers, without file pages."""
    children = Path("/proc/self/task").glob("*/children")
    processes = ["self", *(number for file in children for number in file.read_text().split())]
    lines = [line for number in processes for line in Path(f"/proc/{number}/smaps_rollup").read_text().splitlines()]
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Anonymous:", "Shmem"))) / 1024


def training_rate(config: str, steps: int, folder: Path) -> float:
    """Tokens per second of a short run, from its metrics."""
    keys = [f"train_iters={steps}", "log_interval=1", f"log_dir={folder}", "save=null", "load=null", "eval_iters=0"]
    subprocess.run([sys.executable, "deepy.py", "train.py", config, *keys], cwd=ROOT, check=True, capture_output=True)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return median(line["runtime/tokens_per_sec"] for line in lines[steps // 2 :] if "runtime/tokens_per_sec" in line)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="a configuration to train for the comparison")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batches", type=int, default=100_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        figures: dict[str, object] = {"start": starts(folder)}
        path = random_corpus(folder / "random", 10**8)
        figures["tokens_per_second"] = speeds = rates(path)
        figures["MiB_after_batches"] = memory_over(path, options.batches)
        if options.config:
            training = training_rate(options.config, options.steps, folder / "logs")
            figures["training_tokens_per_second"] = round(training)
            figures["loader_over_training"] = ratio = round(speeds["packed, 0 workers"] / training)
            print(
                f"training {options.config}: {training:,.0f} tokens/s; the loader without workers is {ratio} times that"
            )
    figures["peak_MiB"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
