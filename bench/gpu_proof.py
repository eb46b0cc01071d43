"""Everything that has to be seen on a GPU, in one command and at most eight minutes on one H100.

    python bench/gpu_proof.py                        the steps below, in this order
    python bench/gpu_proof.py --only loop parity     some of them
    python bench/gpu_proof.py --quick                tiny shapes; also on a CPU, over gloo
    python bench/gpu_proof.py --requirements         what pip has to install besides torch

Each step is a process. Its limit of time is its budget, and what the steps before it have left of theirs; the budgets
of the steps on one GPU fit into eight minutes. On one GPU only scaling and ranks are skipped, which need several, and
there also more time: --only scaling ranks --minutes 10. A step begins only if its budget fits into the time left. The
head of the report names what will be skipped and why, its end what was.
Lines are written as a step prints them: Markdown into bench/results/gpu-proof-DATE-CARD.md, figures into the .jsonl
beside it. A step that fails leaves the end of its output, and the next one begins. Compiled code is kept in
build/gpu-proof-cache/ for later steps and runs.
No git and no network are needed. Exit code: 0 if every step that ran passed, 1 if one failed, 2 if none can run.
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megatron.launch.accelerators import cores  # noqa: E402
from megatron.launch.protocol.environment import rank_environment  # noqa: E402

CACHE = ROOT / "build" / "gpu-proof-cache"
MINUTES = 8.0  # in all, unless --minutes says otherwise
QUICK_SECONDS = 900  # limit of each step with --quick: a slow CPU is no failure
THE_QUICK_ONE, SAME_WHEN_QUICK = "contenders", ("125M", "1.3B", "350M")
STOPPED = "the command was stopped"
TAIL = 30  # lines of a failed step's errors
STARTING = 10  # seconds until a step that limits itself counts them
PATIENCE = 10  # seconds between SIGTERM and SIGKILL
TEST_WORKERS = 4  # a GPU waits while code is compiled
# tests and benches need these besides the dependencies in pyproject.toml
EXTRAS = ("transformers>=5", "pytest>=8.3", "pytest-timeout>=2.3", "pytest-xdist>=3.6", "hypothesis>=6.100")


@dataclass(frozen=True)
class Step:
    """A process of Python. What it prints is Markdown, but for lines that begin with "{": figures, in JSON."""

    name: str
    title: str
    words: tuple[str, ...]
    seconds: int  # budget on an H100
    gpus: int = 1  # fewer: the step is skipped
    is_text: bool = False  # it prints neither Markdown nor figures
    as_rank: bool = False  # in the environment that deepy.py gives its ranks


def _module(name: str, *words: str) -> tuple[str, ...]:
    return ("-m", f"bench.gpu_steps.{name}", *words)


def _train(shape: str, *words: str) -> tuple[str, ...]:
    return _module("throughput", f"neox-{shape}", "{seconds}", "{quick}", *words)


def _pytest(*words: str) -> tuple[str, ...]:
    return ("-m", "pytest", "-p", "no:cacheprovider", *words)


# The most valuable first. Words in braces are replaced (`_words`).
STEPS = (
    Step("versions", "Versions and chosen kernels", _module("versions"), 10),
    Step("125M", "Training step, 125M", _train("125M"), 40),
    Step("1.3B", "Training step, 1.3B", _train("1.3B"), 45),
    Step("350M", "Training step, 350M", _train("350M"), 35),
    Step("loop", "Synchronizations, idle time and kernels of train.py", _module("loop", "{quick}"), 30, as_rank=True),
    Step("commands", "Train, resume, generate, evaluate", _module("commands"), 50),
    Step("tests", "Tests that need a GPU", _pytest("-v", "-m", "gpu", "{workers}", "{gpu-tests}"), 40, is_text=True),
    Step("parity", "Losses on the CPU and on this device", _module("parity", "{quick}"), 55, as_rank=True),
    Step("ablations", "One change at a time, 350M", _module("ablations", "{seconds}", "{quick}"), 50, as_rank=True),
    Step("attention", "Attention alone", ("bench/attention.py", "{seconds}", "{quick}"), 35),
    Step("contenders", "Compiled Transformers, bare loop", _train("125M", "--all"), 60),
    Step("decoding", "Decoding", _module("decoding", "{quick}"), 20, as_rank=True),
    Step("scaling", "Scaling over GPUs", _module("scaling", "{quick}"), 120, gpus=2),
    Step(
        "ranks", "The tests of ranks over NCCL", _pytest("-q", "-m", "not long", "{ranks}"), 400, gpus=2,
        is_text=True,
    ),
)  # fmt: skip


class Report:
    """The Markdown and the JSON lines, flushed at each line."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._text = path.open("a", buffering=1)
        self._figures = path.with_suffix(".jsonl").open("a", buffering=1)

    def line(self, text: str = "") -> None:
        """Write a line of Markdown, here with paths relative to the repository and to the terminal as it is."""
        self._text.write(text.replace(f"{ROOT}/", "").replace(str(ROOT), ".") + "\n")
        print(text, flush=True)

    def figures(self, **figures: Any) -> None:
        """Write a line of JSON."""
        self._figures.write(json.dumps(figures) + "\n")


@dataclass(frozen=True)
class Outcome:
    """How a step ended: "passed", "failed", "over time", "stopped" or "skipped"."""

    step: Step
    result: str
    seconds: float = 0.0
    reason: str = ""

    def row(self) -> str:
        """A row of the summary."""
        seconds = f"{self.seconds:.0f}" if self.seconds else ""
        return f"| {self.step.name} | {self.result} | {seconds} | {self.step.seconds} | {self.reason} |"


class Stopped(BaseException):
    """SIGTERM, from whoever limits the time of this command."""


def main(arguments: Sequence[str] | None = None, steps: Sequence[Step] = STEPS) -> int:
    """Run the steps and write the report."""
    options = _parse(arguments)
    if options.requirements:
        print("\n".join(requirements()))
        return 0
    cards = cards_here()
    if cards is None:
        return 2
    signal.signal(signal.SIGTERM, _stop)
    deadline = time.monotonic() + 60 * options.minutes
    card = cards[0] if cards else "cpu"
    name = f"gpu-proof-{datetime.now(UTC).date()}-{'quick-' * options.quick}{card.replace(' ', '-').lower()}.md"
    report = Report(options.output or ROOT / "bench" / "results" / name)
    where = ", ".join(cards) or f"{os.cpu_count()} CPU cores, no GPU"
    report.line(f"# GPU proof\n\n{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {where}; `python {' '.join(sys.argv)}`")
    chosen = [step for step in steps if step.name in (options.only or [step.name])]
    left, skipped = 60 * options.minutes, dict[str, str]()
    for step in chosen:
        if reason := _reason_to_skip(step, len(cards), options.quick, left):
            skipped[step.name] = reason
        else:
            left -= step.seconds
    if skipped:
        report.line("\nTo be skipped (`--only STEP` runs a step alone):\n")
    for name, reason in skipped.items():
        report.line(f"- `{name}`: {reason}")
    outcomes: list[Outcome] = []
    for number, step in enumerate(chosen):
        left = deadline - time.monotonic()
        stopped = any(outcome.reason == STOPPED for outcome in outcomes)
        if reason := STOPPED if stopped else _reason_to_skip(step, len(cards), options.quick, left):
            outcomes.append(Outcome(step, "skipped", reason=reason))
        else:
            report.line(f"\n## {step.title} (`{step.name}`)\n")
            later = sum(
                s.seconds for s in chosen[number:] if not _reason_to_skip(s, len(cards), options.quick, math.inf)
            )
            limit = QUICK_SECONDS if options.quick else step.seconds + max(0, int(left) - later)
            outcomes.append(run(step, report, limit, options.quick, bool(cards)))
            report.line(f"\n{outcomes[-1].result} after {outcomes[-1].seconds:.0f} s")
        last = outcomes[-1]
        report.figures(step=step.name, result=last.result, seconds=round(last.seconds, 1), reason=last.reason)
    return _summary(outcomes, report, len(cards))


def _reason_to_skip(step: Step, gpus: int, quick: bool, left: float) -> str:
    if quick and step.name in SAME_WHEN_QUICK:
        return f"--quick has one shape only, and {THE_QUICK_ONE} measures it"
    if gpus < step.gpus and not quick:
        return f"it needs {step.gpus} GPU{'s' * (step.gpus > 1)}, and there are {gpus}"
    if left < step.seconds and not quick:
        return f"its {step.seconds} s do not fit into the {max(0, left):.0f} s left; use --minutes or --only"
    return ""


def run(step: Step, report: Report, limit: int, quick: bool, on_card: bool) -> Outcome:
    """Run a step to its end, or for `limit` seconds, and copy what it prints into `report`."""
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, *_words(step, limit, quick, on_card)],
            cwd=ROOT, env=_environment(step, on_card), text=True, bufsize=1,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, start_new_session=True,
        )  # fmt: skip
        assert process.stdout is not None
        reader = threading.Thread(target=_copy, args=(process.stdout, step, report), daemon=True)
        reader.start()
        result, reason = "passed", ""
        try:
            if process.wait(limit):
                result, reason = "failed", f"exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            result, reason = "over time", f"ended after its limit of {limit} s"
        except (Stopped, KeyboardInterrupt):
            result, reason = "stopped", STOPPED
        finally:
            _end(process)
        reader.join(PATIENCE)
        if result != "passed":
            errors.seek(0)
            tail = errors.read().strip().splitlines()[-TAIL:]
            report.line("\n".join(["", "```", *tail, "```"]))
    return Outcome(step, result, time.monotonic() - began, reason)


def _words(step: Step, limit: int, quick: bool, on_card: bool) -> list[str]:
    values = {
        "{quick}": ["--quick"] * quick,
        "{seconds}": ["--seconds", str(limit - STARTING)],
        "{workers}": ["-n", str(TEST_WORKERS)] * on_card,
        "{gpu-tests}": gpu_tests(),
        "{ranks}": ["tests/ranks/test_parallel_random.py" if quick else "tests/ranks"],
    }
    return [word for part in step.words for word in values.get(part, [part])]


def gpu_tests() -> list[str]:
    """The files that have tests with the mark "gpu"."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in files if "mark.gpu" in path.read_text(encoding="utf-8")]


def _environment(step: Step, on_card: bool) -> dict[str, str]:
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(CACHE / "inductor"), "TRITON_CACHE_DIR": str(CACHE / "triton")}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # ranks of tests are GPUs; on a CPU several processes share the cores, and scalar code compiles quicker
    on_cpu = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_VEC_ISA_OK": "0"}
    usual = caches | ({"RANKS_BACKEND": "nccl"} if on_card else on_cpu)
    environment = {**usual, **os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    return rank_environment(environment, "cuda" if on_card else "cpu", cores()) if step.as_rank else environment


def _copy(output: TextIO, step: Step, report: Report) -> None:
    """In a thread: what a step prints, into the report."""
    if step.is_text:
        report.line("```")
    for line in output:
        try:
            figures = json.loads(line) if line.startswith("{") and not step.is_text else None
        except ValueError:  # some library's own output
            figures = None
        if figures is None:
            report.line(line.rstrip("\n"))
        else:
            report.figures(step=step.name, figures=figures)
    if step.is_text:
        report.line("```")


def _end(process: "subprocess.Popen[str]") -> None:
    """End a step and what it has started."""
    for number, patience in ((signal.SIGTERM, PATIENCE), (signal.SIGKILL, PATIENCE)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:  # all of them have ended
            return
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue


def _summary(outcomes: Sequence[Outcome], report: Report, gpus: int) -> int:
    report.line("\n## Summary\n\n| step | result | seconds | budget | |\n|---|---|---|---|---|")
    for outcome in outcomes:
        report.line(outcome.row())
    again = [
        outcome.step.name for outcome in outcomes if outcome.result != "passed" and outcome.step.gpus <= max(1, gpus)
    ]
    if again:
        report.line(f"\nWhat did not pass or run: `python bench/gpu_proof.py --only {' '.join(again)}`")
    report.line(f"\nwritten: {report.path} and {report.path.with_suffix('.jsonl').name}\n")
    return int(any(outcome.result not in ("passed", "skipped") for outcome in outcomes))


def cards_here() -> list[str] | None:
    """Names of the GPUs that torch sees, asked in a process that does not keep their memory; None without torch."""
    names = "[torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]"
    code = f"import json, torch; print(json.dumps({names}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        print(f"{sys.executable} cannot ask torch for its GPUs:\n{done.stderr.strip()[-2000:]}", file=sys.stderr)
        return None
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


def requirements() -> list[str]:
    """What pip has to install besides torch."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [name for name in project["dependencies"] if not name.startswith("torch")] + list(EXTRAS)


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    table = "\n".join(f"  {step.name:11} {step.seconds:4} s  {step.title}" for step in STEPS)
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"steps and budgets:\n{table}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="tiny shapes, on whatever device there is")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="in all (default: 8)")
    parser.add_argument("--only", nargs="+", metavar="STEP", choices=[step.name for step in STEPS])
    parser.add_argument("--output", type=Path, metavar="FILE.md", help="default: bench/results/gpu-proof-DATE-CARD.md")
    parser.add_argument("--requirements", action="store_true", help="print what pip has to install, and exit")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
