"""What watching costs: steps with everything on against the same steps with nothing on, in one process.

    python bench/watching.py [--rounds 20] [--minutes 4] [--sequences 16] [--precision bfloat16] [--null]

Two engines of the same model take turns, a step each. One trains with every hook that a run has and with the writers
and figures of `ON`; the other calls the engine alone. A round ends with a log line, so that it has its share of all
that is done only there. Of each place in the round the median over the rounds is taken, so that what disturbs one step
counts once, and the quotient is the mean over the places. The quartiles are those of whole rounds. --null: nothing is
on in either, which shows what the method can resolve on a machine. Where that is not enough there is the share of the
time that steps spend in what watches, timed there: without what it does to caches, and what the writers' threads take.
The panel draws from a thread, so it takes as much from one engine as from the other: it is in the share, not in the
quotient.

A part of the cost is the same however many tokens a step has, above all the addition of all gradients for the noise
scale. So --sequences decides much: 16, which is 8,192 tokens, is what a GPU has in NeoX's configuration of 125M.

Not in it: alerts, which do nothing until there is an event, and the reports of checkpoints, which a process of the
lowest priority writes. The last line is one JSON object.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from functools import partial, wraps
from pathlib import Path
from typing import Any

from megatron.checkpoint.state import TrainState
from megatron.config.load import config_from_flat
from megatron.engine.activations import BlockOutputs
from megatron.engine.figures import BeforeUpdate
from megatron.optimizers.schedules import learning_rate
from megatron.terminal import Footer, live
from megatron.training.batch import BatchBuilder, training_batches
from megatron.training.hooks.base import FinishedStep, MicroBatches, build_hooks
from megatron.training.run import prepare, read_samples, set_up, writers_of

INTERVAL = 10  # steps of a round, and from log line to log line
WARM_UP = 2  # rounds
MODEL: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "seq_length": 512,
    "pos_emb": "rotary",
    "tokenizer_type": "CharLevelTokenizer",
    "data_impl": "mock",
    "num_workers": 0,
    "train_iters": 100_000,
    "eval_iters": 0,
    "log_interval": INTERVAL,
    "optimizer": {"type": "Adam", "params": {"lr": 1e-4}},
}
ON: dict[str, Any] = {
    "use_csv": True,
    "use_wandb": True,
    "prometheus_port": 9477,
    "log_param_norm": True,
    "log_grad_norm": True,
    "log_optimizer_states": True,
    "log_activations": True,
    "log_gradient_noise_scale": True,
}


class Stopwatch:
    """Adds up the time spent in functions."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds = 0.0
        self._clock = clock

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, timed."""

        @wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            began = self._clock()
            result = function(*arguments, **options)
            self.seconds += self._clock() - began
            return result

        return call

    def time_within_steps(self) -> None:
        """Time what looks at gradients and blocks within a step, in engines that are built from now on."""
        BeforeUpdate._before_step = self.timed(BeforeUpdate._before_step)  # type: ignore[method-assign]
        BlockOutputs._see = self.timed(BlockOutputs._see)  # type: ignore[method-assign]


class Trainer:
    """Trains, with what watches a run or without."""

    def __init__(self, keys: Mapping[str, Any], folder: Path | None, watch: Stopwatch) -> None:
        """keys: besides `MODEL`. folder: of what is written; None: nothing watches. watch: times hooks and writers."""
        keys = MODEL | keys
        if folder is not None:
            places = {"log_dir": "logs", "tensorboard_dir": "board", "prometheus_textfile": "deepy.prom"}
            keys |= ON | {key: str(folder / name) for key, name in places.items()}
        config = config_from_flat(keys, script="train.py")
        self.run, self.state = set_up(config, prepare(config, 1))
        accumulation = self.run.plan.batch.accumulation_steps
        self.batches: Iterator[MicroBatches] = training_batches(
            read_samples(self.run, self.state), BatchBuilder.of(self.run), accumulation
        )
        self.hooks = build_hooks(self.run) if folder is not None else []
        self.writers = writers_of(self.run, 0) if folder is not None else None
        for hook in self.hooks:
            self.batches = hook.watched(self.batches)
        self._after_step = [watch.timed(hook.after_step) for hook in self.hooks]
        self._write = watch.timed(self.writers.write) if self.writers is not None else None

    def timed(self) -> float:
        """Seconds of a step."""
        began = time.perf_counter()
        self.step()
        return time.perf_counter() - began

    def step(self) -> None:
        """As `train_steps` does."""
        run, batch = self.run, self.run.plan.batch
        rate = learning_rate(run.plan.schedule, self.state.step)
        output = run.engine.train_batch(next(self.batches), step=self.state.step, learning_rate=rate)
        self.state: TrainState = self.state.after_step(batch.global_size, batch.tokens_per_step)
        metrics: dict[str, float] = {}
        step = FinishedStep(self.state, output, rate, is_last=False, metrics=metrics)
        for after_step in self._after_step:
            metrics |= after_step(step)
        if self._write is not None:
            self._write(self.state.step, metrics)

    def close(self) -> None:
        """Let hooks and writers finish."""
        for hook in self.hooks:
            hook.close()
        if self.writers is not None:
            self.writers.close()


def one_round(off: Trainer, on: Trainer, number: int) -> list[tuple[float, float]]:
    """Seconds of the steps up to a log line, of each; which of the two takes a step first alternates.

    number: of the round, so that the step of the log line is not always after the other's.
    """
    steps = []
    for place in range(INTERVAL):
        first, second = (off, on) if (number + place) % 2 else (on, off)
        seconds = {first: first.timed(), second: second.timed()}
        steps.append((seconds[off], seconds[on]))
    return steps


@contextmanager
def panel_drawn(drawing: Stopwatch) -> Iterator[None]:
    """A block in which standard output is a terminal of 200 columns, on which a run draws its panel.

    drawing: times that.
    """
    Footer._draw = drawing.timed(Footer._draw)  # type: ignore[method-assign]
    shown, terminal = os.openpty()
    termios.tcsetwinsize(terminal, (50, 200))
    os.environ["TERM"] = "xterm-256color"
    with os.fdopen(terminal, "w", encoding="utf-8") as stream, redirect_stdout(stream):
        threading.Thread(target=_discard, args=[shown], daemon=True).start()
        with live():
            yield


def _discard(terminal: int) -> None:
    with suppress(OSError):  # the terminal is gone
        while os.read(terminal, 65536):
            pass


def figures_of(rounds: list[list[tuple[float, float]]], timed: float, drawing: float) -> dict[str, Any]:
    """Of at least two rounds, the seconds of each step without and with what watches: quotients, a step without.

    timed: seconds that all steps with it have spent there. drawing: seconds of a core that the panel took during all
    steps of both.
    """
    places = list(zip(*rounds, strict=True))
    medians = [statistics.median(with_it / without for without, with_it in place) for place in places]
    wholes = [sum(with_it for _, with_it in steps) / sum(without for without, _ in steps) for steps in rounds]
    lower, _, upper = statistics.quantiles(wholes, n=4)
    without, with_it = (sum(seconds) for seconds in zip(*(step for steps in rounds for step in steps), strict=True))
    panel = drawing / (without + with_it)
    return {
        "step_seconds": round(statistics.median(without for steps in rounds for without, _ in steps), 4),
        "ratio": round(statistics.mean(medians), 4),
        "quartiles": [round(lower, 4), round(upper, 4)],
        "timed_share": round(timed / without + panel, 5),
        "timed_share_of_panel": round(panel, 5),
        "rounds": len(rounds),
        "steps_of_a_round": INTERVAL,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument(
        "--minutes", type=float, default=4.0, help="after warming up; no round begins later, but two are always run"
    )
    parser.add_argument("--null", action="store_true", help="nothing is on in either")
    parser.add_argument("--sequences", type=int, default=16, help="of 512 tokens, in a step")
    parser.add_argument("--precision", default="bfloat16", help="fp32 on a CPU without instructions for bfloat16")
    chosen = parser.parse_args()
    os.environ.setdefault("WANDB_MODE", "offline")
    os.environ.setdefault("WANDB_SILENT", "true")
    keys = {"precision": chosen.precision, "train_batch_size": chosen.sequences}
    printed = partial(print, file=sys.stdout, flush=True)
    watch, drawing = Stopwatch(), Stopwatch(time.thread_time)  # a thread that waits for a core takes nothing from it
    watch.time_within_steps()
    rounds: list[list[tuple[float, float]]] = []
    with tempfile.TemporaryDirectory() as name, nullcontext() if chosen.null else panel_drawn(drawing):
        off, on = Trainer(keys, None, watch), Trainer(keys, None if chosen.null else Path(name), watch)
        for number in range(WARM_UP):
            one_round(off, on, number)
        watch.seconds = drawing.seconds = 0.0
        deadline = time.monotonic() + 60 * chosen.minutes
        while len(rounds) < 2 or (len(rounds) < chosen.rounds and time.monotonic() < deadline):
            rounds.append(one_round(off, on, len(rounds)))
            without, with_it = (sum(seconds) for seconds in zip(*rounds[-1], strict=True))
            printed(f"round {len(rounds)}: off {without:.3f} s, on {with_it:.3f} s, {with_it / without:.4f}")
        drawn = drawing.seconds
        on.close()
    figures = figures_of(rounds, watch.seconds, drawn)
    lower, upper = figures["quartiles"]
    print(f"a step {1000 * figures['step_seconds']:.0f} ms; with everything on {figures['ratio']} of it", end=" ")
    print(f"(quartiles of rounds {lower} to {upper}); timed there: {figures['timed_share']:.2%}", end=" ")
    print(f"(the panel {figures['timed_share_of_panel']:.2%})")
    print(json.dumps(figures | vars(chosen)))


if __name__ == "__main__":
    main()
