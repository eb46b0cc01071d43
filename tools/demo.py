"""The main job, from nothing to a model that writes and has been measured: what `make demo` runs.

    python tools/demo.py

Each step is a command you can type yourself; each knows what is done already, so a second run goes on from there.
"""

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = "import os\ndef read(self,\nclass Test"
CHECKPOINTS = Path("checkpoints/stdlib")
GAIN = 1.0  # nats per token that the model must win over guessing by frequency

STEPS = (
    ("a corpus and a tokenizer from Python's own source text", "python tools/prepare_data.py stdlib"),
    ("training", "./deepy.py train.py configs"),
    ("generation", "./deepy.py generate.py -i prompt.txt -o out.txt overwrite_samples=true"),
    ("evaluation on the held-out part", "./deepy.py evaluate.py"),
)


def main() -> int:
    """Run all steps; 0 when they worked and the model has learned."""
    prompt = ROOT / "prompt.txt"
    if not prompt.exists():
        prompt.write_text(PROMPTS + "\n")
    started = time.monotonic()
    for number, (what, command) in enumerate(STEPS, 1):
        print(f"\n== {number}/{len(STEPS)} {what}\n$ {command}", flush=True)
        code = subprocess.run(as_here(command), cwd=ROOT).returncode
        if code:
            print(f"this step ended with exit code {code}; `make demo` goes on from here", file=sys.stderr)
            return code
    return summarise(time.monotonic() - started)


def as_here(command: str) -> list[str]:
    """The command with this Python, whichever one a shell would find."""
    words = shlex.split(command)
    return [sys.executable, *words[1:]] if words[0] == "python" else [sys.executable, *words]


def summarise(seconds: float) -> int:
    """Say what came out and where it lies; 1 if the model has not learned what it must."""
    newest = max((ROOT / CHECKPOINTS).glob("eval_results_*.json"), key=lambda path: path.stat().st_mtime)
    results = json.loads(newest.read_text())["results"]["valid"]
    sample = json.loads((ROOT / "out.txt").read_text().splitlines()[0])
    entropy, loss = results["unigram_entropy"], results["loss"]
    print(
        f"\n== done in {seconds:.0f} s\n"
        f"unigram entropy  {entropy:.3f} nats per token: guessing by frequency alone\n"
        f"held-out loss    {loss:.3f} nats per token: {entropy - loss:.3f} below, {GAIN} was asked for\n"
        f"data             data/stdlib\n"
        f"checkpoints      {CHECKPOINTS} (metrics and logs in {CHECKPOINTS}/logs)\n"
        f"report           {CHECKPOINTS}/logs/report.html\n"
        f"evaluation       {newest.relative_to(ROOT)}\n"
        f"samples          out.txt; the first of them:\n{sample['context']}{sample['text'] or ''}"
    )
    return 0 if entropy - loss >= GAIN else 1


if __name__ == "__main__":
    sys.exit(main())
