"""The commands that users type, as processes in a folder of their own.

deepy.py is started as users start it, and so are its ranks. Other scripts, which are called often, come from the fork
server, which saves each of them the import of torch and DeepSpeed, and where they are several ranks the launcher.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.forking import BACKEND, run_script

ROOT = Path(__file__).resolve().parents[2]
# no GPU even where there is one: these tests compare runs of the CPU's arithmetic
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}

SMALL = """
num_layers: 2
hidden_size: 32
num_attention_heads: 4
seq_length: 32
pos_emb: rotary
tokenizer_type: CharLevelTokenizer
data_impl: mock
num_workers: 0
train_batch_size: 8
train_iters: 20
optimizer: {type: Adam, params: {lr: 1e-2}}
eval_interval: 10
eval_iters: 2
log_interval: 1
report: false
"""


def command(script: str, *words: object) -> list[str]:
    return [sys.executable, str(ROOT / script), *map(str, words)]


def run(folder: Path, script: str, *words: object, expect: int = 0, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a script of the repository in `folder`, which must end with the exit code `expect`."""
    done = finished(folder, script, *words, **options)
    assert done.returncode == expect, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def finished(
    folder: Path, script: str, *words: object, timeout: float = 600, ranks: int = 1, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a script of the repository in `folder` to its end, on several ranks if so many are asked for.

    options: of subprocess.run, which then starts it.
    """
    environment = os.environ | ENVIRONMENT
    if ranks > 1 and BACKEND != "gloo":
        script, words = "deepy.py", (script, *words, f"num_gpus={ranks}")
    if script == "deepy.py" or options or BACKEND != "gloo":
        return subprocess.run(
            command(script, *words),
            capture_output=True, text=True, cwd=folder, env=environment, timeout=timeout, **options,
        )  # fmt: skip
    return run_script(ROOT / script, [str(word) for word in words], folder, environment, timeout, ranks)


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(save: Path) -> dict[int, float]:
    """The training loss of each logged step."""
    return {row["step"]: row["train/lm_loss"] for row in json_lines(save / "logs" / "metrics.jsonl")}
