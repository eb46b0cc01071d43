"""The commands of the README on one rank: tokenize, train with asynchronous saves, resume, generate, evaluate.

    python -m bench.gpu_steps.commands

A small bf16 model, on the bytes of this repository's docs, in a temporary folder, and two processes at a time. Two
trainings, of 2 N steps, and of N steps, a restart and N more: their losses, gradient norms and every tensor of their
last checkpoints have to be equal, bit for bit (tools/verify_resume.py).
"""

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.gpu_steps.common import ON_CARD, record
from tools.verify_resume import compare_checkpoints, compare_metrics, losses, train

ROOT = Path(__file__).resolve().parents[2]
STEPS = 5  # N
CONFIGURATION = """
num_layers: 2
hidden_size: 64
num_attention_heads: 2
seq_length: 128
pos_emb: rotary
tokenizer_type: CharLevelTokenizer
data_path: FOLDER/docs_text_document
split: "95, 5, 0"
train_micro_batch_size_per_gpu: 2
gradient_accumulation_steps: 2
bf16: {enabled: true}
optimizer: {type: Adam, params: {lr: 1.0e-2}}
num_gpus: 1
max_gpu_memory_in_use: 1 # two runs share the GPU
distributed_backend: BACKEND
eval_interval: 1000
eval_iters: 2
async_save: true
checkpoint_factor: 5
maximum_tokens: 32
"""


def main() -> int:
    """Run the commands; exit code 1 if one failed, the resumed run differs, or nothing was learned."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        # with nccl a rank cannot fall back to the CPU
        configuration = CONFIGURATION.replace("FOLDER", name).replace("BACKEND", "nccl" if ON_CARD else "gloo")
        (folder / "small.yml").write_text(configuration)
        (folder / "prompt.txt").write_text("the quick\nbrown fox\n")
        (folder / "docs.txt").write_text("".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))))
        whole, resumed = folder / "whole", folder / "resumed"
        print("| command | result | seconds |\n|---|---|---|", flush=True)
        tokenize = ("--input", "docs.txt", "--tokenizer-type", "CharLevelTokenizer", "--output-prefix", "docs")
        if not _run(folder, "tools/preprocess_data.py", *tokenize):
            return 1
        with ThreadPoolExecutor(2) as pool:
            at_once, restarted = (pool.submit(_train, folder, save, runs) for save, runs in ((whole, 1), (resumed, 2)))
            if not at_once.result():
                return 1
            generate = ("generate.py", "small.yml", "-i", "prompt.txt", "-o", "out.txt", f"load={whole}")
            evaluate = ("evaluate.py", "small.yml", f"load={whole}", f"save={whole}")
            used = [pool.submit(_run, folder, "deepy.py", *words) for words in (generate, evaluate)]
            if not all([restarted.result(), *(future.result() for future in used)]):
                return 1
        differences = [*compare_metrics(whole, resumed), *compare_checkpoints(whole, resumed, 2 * STEPS)]
        verdict = f"{len(differences)} differences" if differences else "equal, bit for bit"
        print(f"| {2 * STEPS} steps against {STEPS} + restart + {STEPS} | {verdict} | |", flush=True)
        found = [loss for _, (loss, _) in sorted(losses(whole).items())]
        texts = [json.loads(line) for line in (folder / "out.txt").read_text().splitlines()]
        [written] = whole.glob("eval_results_*.json")
        held_out = json.loads(written.read_text())["results"]["valid"]["loss"]
    generated = [text["length"] for text in texts]
    print(f"\nLoss {found[0]:.3f} at step 1, {found[-1]:.3f} at step {2 * STEPS}, {held_out:.3f} held out;")
    print(f"tokens generated for each prompt: {generated}")
    record(losses=found, held_out=held_out, generated=generated, differences=differences[:20])
    return int(bool(differences) or not (found[-1] < found[0] and held_out < found[0] and all(generated)))


def _train(folder: Path, save: Path, runs: int) -> bool:
    """Train 2 N steps in so many runs."""
    began = time.perf_counter()
    for _ in range(runs):
        if code := train([str(folder / "small.yml")], save, 2 * STEPS, 2 * STEPS // runs):
            print(f"| train.py into {save.name} | exit code {code} | |", flush=True)
            return False
    seconds = time.perf_counter() - began
    print(f"| train.py, {runs} x {2 * STEPS // runs} steps, async_save | passed | {seconds:.1f} |", flush=True)
    return True


def _run(folder: Path, script: str, *words: str) -> bool:
    """Run a script of the repository in `folder`."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, str(ROOT / script), *words], capture_output=True, text=True, cwd=folder)
    if done.returncode:
        print(done.stdout[-2000:], done.stderr[-4000:], sep="\n", file=sys.stderr)
    result = f"exit code {done.returncode}" if done.returncode else "passed"
    name = words[0] if script == "deepy.py" else script
    print(f"| {name} | {result} | {time.perf_counter() - began:.1f} |", flush=True)
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
