"""The training loop of train.py as it is, with mock data: where it waits for the device, and what the device does.

    python -m bench.gpu_steps.loop [--quick]

A hook counts the synchronizations of three steps, with the lines that cause them; records two steps with torch's
profiler; and times eight more. Exit code 1 if the profile shows an attention that no fused kernel computed.
"""

import argparse
import re
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout
from functools import wraps
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.gpu_steps.common import ON_CARD, keys_of, record, synchronize
from megatron.config.load import config_from_flat
from megatron.training.hooks.base import NOTHING, FinishedStep, Hook, MicroBatches, Run
from megatron.training.hooks.profile_tables import kernel_table
from megatron.training.run import train
from tests.ranks.synchronizations import Waits

DEEPY_REGISTRY = {"hook": {"observing": "bench.gpu_steps.loop:observing"}}
ROOT = Path(__file__).resolve().parents[2]
COUNTED, PROFILED, TIMED = range(6, 9), range(10, 12), range(13, 21)  # steps, counted from 0
# flash-attn, torch's flash, memory-efficient and cuDNN kernels, and FlexAttention; on a CPU torch's operator
FUSED = re.compile(r"flash|fmha|sdpa|flex", re.IGNORECASE)
HIDDEN = r"gpu_steps/loop\.py|/warnings\.py|torch/_dynamo/|_python_dispatch\.py"  # frames of the count itself
PLAIN = "aten::_scaled_dot_product_attention_math"


class Synchronizations:
    """Counts where the host waits for the device: on a GPU as CUDA reports it, on a CPU the reads."""

    def __init__(self) -> None:
        self.places: Counter[str] = Counter()

    def seen(self) -> None:
        """Count the line of this repository, and the innermost one, that run now."""
        frames = [frame for frame in traceback.extract_stack() if not re.search(HIDDEN, frame.filename)]
        ours = [frame for frame in frames if frame.filename.startswith(str(ROOT / "megatron"))]
        shown = dict.fromkeys(f"{_short(f.filename)}:{f.lineno} {f.name}" for f in (*ours[-2:], frames[-1]))
        self.places[" > ".join(shown)] += 1

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count in this block."""
        with ExitStack() as stack:
            if not ON_CARD:
                self.places = stack.enter_context(Waits()).found
                yield
                return
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("always")
            warnings.showwarning = self._warned
            # these two do not report themselves
            for owner in (torch.cuda, torch.cuda.Event):
                stack.enter_context(mock.patch.object(owner, "synchronize", self._counted(owner.synchronize)))
            torch.cuda.set_sync_debug_mode("warn")
            stack.callback(torch.cuda.set_sync_debug_mode, "default")
            yield

    def _warned(self, message: object, *others: object, **options: object) -> None:
        if "called a synchronizing" in str(message):
            self.seen()

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            self.seen()
            return function(*arguments, **options)

        return call


class Observing(Hook):
    """Counts, records and times the steps named above, and prints what it found."""

    def __init__(self, run: Run) -> None:
        self._run, self._done, self._block = run, run.first_step, ExitStack()
        self._syncs = Synchronizations()
        self._profiler = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if ON_CARD else [])])
        self._began = 0.0

    def watched(self, batches: Iterator[MicroBatches]) -> Iterator[MicroBatches]:
        """Begin before the step's batch is loaded."""
        while True:
            if self._done == COUNTED.start:
                self._block.enter_context(self._syncs.counting())
            elif self._done == PROFILED.start - 1:
                self._profiler.prepare_trace()
            elif self._done == PROFILED.start:
                synchronize()
                self._profiler.start_trace()
            elif self._done == TIMED.start:
                synchronize()
                self._began = time.perf_counter()
            yield next(batches)

    def after_step(self, step: FinishedStep) -> Mapping[str, float]:
        """End after the last of the steps, and print."""
        self._done = step.state.step
        if self._done == COUNTED.stop:
            self._block.close()
            self._print_synchronizations()
        elif self._done == PROFILED.stop:
            synchronize()
            self._profiler.stop_trace()
            print_profile(self._profiler, self._run.plan.model.num_layers)
        elif self._done == TIMED.stop:
            synchronize()
            rate = len(TIMED) * self._run.plan.batch.tokens_per_step / (time.perf_counter() - self._began)
            say(f"\nThe loop, data and hooks included: {rate:,.0f} tokens/s")
            record(tokens_per_second=round(rate, 1))
        return NOTHING

    def _print_synchronizations(self) -> None:
        kind = "synchronizations (cudaStreamSynchronize and the like)" if ON_CARD else "reads of tensors by the host"
        count = sum(self._syncs.places.values()) / len(COUNTED)
        say(f"{count:.2f} {kind} per step, in {len(COUNTED)} steps without a log line\n\n| count | where |\n|---|---|")
        for place, number in self._syncs.places.most_common():
            say(f"| {number} | `{place}` |")
        record(synchronizations_per_step=count, places=dict(self._syncs.places))


def observing(run: Run) -> Observing:
    """The plugin's entry in the registry."""
    return Observing(run)


def print_profile(profiler: profile, layers: int) -> None:
    """The idle share of the device, its kernels, and whether attention was fused. Raises SystemExit if not."""
    results: Any = profiler.profiler
    wanted = DeviceType.CUDA if ON_CARD else DeviceType.CPU
    events = [event for event in results.kineto_results.events() if event.device_type() == wanted]
    # on a CPU, operators only: the span of a step is no work
    work = [event for event in events if ON_CARD or event.name().startswith("aten::")]
    spans = [(event.start_ns(), event.start_ns() + event.duration_ns()) for event in work]
    busy, whole = covered(spans), max(end for _, end in spans) - min(start for start, _ in spans)
    name = "GPU" if ON_CARD else "CPU, outside of operators"
    say(f"\nIdle share of the {name} in {len(PROFILED)} steps under the profiler: {1 - busy / whole:.1%}")
    say(f"\n```\n{kernel_table(profiler, on_gpu=ON_CARD)}\n```")
    fused = sum(bool(FUSED.search(event.name())) for event in work)
    plain = sum(event.name() == PLAIN for event in results.kineto_results.events())
    record(idle_share=round(1 - busy / whole, 4), kernels=len(work), fused_attention=fused, plain_attention=plain)
    least = (2 if ON_CARD else 1) * layers * len(PROFILED)  # forward and backward
    say(f"\nFused attention kernels: {fused}, at least {least} expected; torch's plain attention: {plain}, 0 expected")
    if fused < least or plain:
        raise SystemExit("attention was not computed by a fused kernel in every layer")


def say(text: str) -> None:
    """Print a result."""
    print(text, file=sys.__stdout__, flush=True)


def covered(spans: list[tuple[int, int]]) -> int:
    """The length of the union of intervals."""
    length, reached = 0, 0
    for start, end in sorted(spans):
        length += max(0, end - max(start, reached))
        reached = max(reached, end)
    return length


def _short(file: str) -> str:
    path = Path(file)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else "/".join(path.parts[-3:])


def main() -> None:
    """Train with mock data and the hook above."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    keys = keys_of("neox-350M", parser.parse_args().quick) | {
        "data_impl": "mock",
        "tokenizer_type": "CharLevelTokenizer",
        "train_iters": 100,
        "exit_interval": TIMED.stop,
        "eval_iters": 0,
        "log_interval": 1000,
        "plugins": ["bench.gpu_steps.loop"],
    }
    if not ON_CARD:  # the counter of reads and compiled code exclude each other
        keys |= {"compile": False, "num_workers": 0}
    with redirect_stdout(sys.stderr):  # the log
        train(config_from_flat(keys, script="train.py"))


if __name__ == "__main__":
    sys.exit(main())
