"""Thirty wrong configurations, each beside a right twin that differs in that one thing.

A wrong one ends with exit code 2, with file and line (or both values), and without importing torch.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BASE = {
    "num_layers": "4",
    "hidden_size": "48",
    "num_attention_heads": "12",
    "seq_length": "8",
    "train_iters": "10",
    "train_micro_batch_size_per_gpu": "2",
    "data_impl": "mock",
    "num_gpus": "1",
}
# wrong lines, right lines, what the message must say; F:n is the line of the file, after the lines of BASE
PAIRS = [
    ("hiden_size: 48", "hidden_dropout: 0.1", ['F:9: unknown key "hiden_size". Did you mean "hidden_size"?']),
    ("save_intervall: 5", "checkpoint_factor: 5", ['F:9: unknown key "save_intervall"']),
    ("zero_optimization: {stge: 1}", "zero_optimization: {stage: 1}", ["F:9", "zero_optimization.stge", '"stage"?']),
    ("fp16:\n  loss_scal: 0", "fp16:\n  loss_scale: 0", ["F:10", "fp16.loss_scal", '"loss_scale"?']),
    (
        "optimizer:\n  params:\n    lrr: 1",
        "optimizer:\n  params:\n    lr: 1",
        ["F:11", "optimizer.params.lrr", '"lr"?'],
    ),
    ("optimizer: {type: Adaam}", "optimizer: {type: Adam}", ["F:9", "adaam", 'Did you mean "adam"?']),
    ("optimizer: {params: {lr: fast}}", "optimizer: {params: {lr: 1e-4}}", ['F:9: optimizer.params.lr ("fast")']),
    ("optimizer: {params: {betas: [0.9]}}", "optimizer: {params: {betas: [0.9, 0.95]}}", ["F:9", "too short"]),
    ("zero_optimization: {stage: 4}", "zero_optimization: {stage: 3}", ["F:9: zero_optimization.stage (4)", "most 3"]),
    ("norm: rms", "norm: rmsnorm", ["F:9: norm", '"rms"', 'Did you mean "rmsnorm"?']),
    ("pos_emb: alibbi", "pos_emb: alibi", ["F:9", 'unknown position embedding "alibbi"', 'Did you mean "alibi"?']),
    ("activation: swigul", "activation: swiglu", ["F:9", 'Did you mean "swiglu"?']),
    ("precision: bf16", "precision: bfloat16", ['F:9: precision ("bf16")', "write bfloat16"]),
    ("seed: '1234'", "seed: 1234", ['F:9: seed ("1234") must be a whole number']),
    ("eod_mask_loss: yes", "eod_mask_loss: true", ['F:9: eod_mask_loss ("yes") must be true or false']),
    ("seed: 1\nseed: 2", "seed: 1", ['F:10: "seed" is there already, in line 9']),
    ("save: [a", "save: a", ["F:10: this is not YAML"]),
    ("model_parallel_size: 8", "model_parallel_size: 4\nnum_nodes: 4", ["(12)", "(8); 4, 6 or 12 would work"]),
    ("num_kv_heads: 5", "num_kv_heads: 4", ["num_attention_heads (12)", "num_kv_heads (5)", "3, 4 or 6"]),
    (
        "pipe_parallel_size: 2\nzero_optimization: {stage: 2}\nnum_nodes: 2",
        "pipe_parallel_size: 2\nzero_optimization: {stage: 1}\nnum_nodes: 2",
        ["zero_optimization.stage (2)", "pipe_parallel_size 2"],
    ),
    (
        "activation: swiglu\nintermediate_size: 96",
        "activation: swiglu\nffn_hidden_size: 96",
        ["intermediate_size (96)", '"ffn_hidden_size": 32', '"ffn_hidden_size": 96'],
    ),
    (
        "num_nodes: 6\ntrain_batch_size: 64\ngradient_accumulation_steps: 2",
        "num_nodes: 6\ntrain_batch_size: 24\ngradient_accumulation_steps: 2",
        [
            "train_batch_size (64) is not",
            "(2) x gradient_accumulation_steps (2) x 6",
            "= 24",
            "16 replicas would give 64",
        ],
    ),
    ("num_nodes: 3\ntrain_batch_size: 8", "num_nodes: 3\ntrain_batch_size: 12", ["train_batch_size (8)", "= 6", "12"]),
    ("min_lr: 0.1", "min_lr: 0.0001", ["min_lr (0.1)", "optimizer.params.lr (0.001)"]),
    ("max_position_embeddings: 4", "max_position_embeddings: 8", ["(4) must be at least seq_length (8)"]),
    ("pos_emb: rotary\nrotary_pct: 0.8", "pos_emb: rotary\nrotary_pct: 0.5", ["rotary_pct (0.8) rotates 3 of the 4"]),
    ("precision: fp32\nbf16: {enabled: true}", "bf16: {enabled: true}", ["precision (fp32)", "bf16.enabled (true)"]),
    ("finetune: true", "finetune: true\nload: there", ["finetune (true) needs load"]),
    ("moe_num_experts: 8", "moe_num_experts: 1", ["F:9: moe_num_experts (8) is not supported"]),
    (
        "zero_optimization: {stage: 1, offload_param: {device: cpu}}",
        "zero_optimization: {stage: 3, offload_param: {device: cpu}}",
        ["zero_optimization.offload_param (cpu) needs zero_optimization.stage 3, not 1"],
    ),
]
PROGRAM = """
import contextlib, io, json, sys
from pathlib import Path
from megatron.launch.main import main
results = {}
for file in sys.argv[1:]:
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = main(["train.py", file, "--dry-run"], Path.cwd())
    heavy = sorted({"torch", "numpy", "deepspeed", "transformers"} & set(sys.modules))
    results[file] = [code, said.getvalue(), heavy]
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What deepy.py says to every file: exit code, stderr, heavy modules."""
    folder = tmp_path_factory.mktemp("pairs")
    base = "".join(f"{key}: {value}\n" for key, value in BASE.items())
    for number, (wrong, right, _) in enumerate(PAIRS):
        (folder / f"wrong{number}.yml").write_text(base + wrong + "\n")
        (folder / f"right{number}.yml").write_text(base + right + "\n")
    files = sorted(str(path) for path in folder.iterdir())
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *files],
        cwd=ROOT,
        env=os.environ | {"DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return {Path(file).stem: result for file, result in json.loads(done.stdout).items()}


def test_there_are_thirty():
    assert len(PAIRS) == 30


@pytest.mark.parametrize("number", range(len(PAIRS)), ids=[wrong.split("\n")[0] for wrong, _, _ in PAIRS])
def test_the_wrong_one_is_named_and_its_twin_passes(number, results):
    code, said, heavy = results[f"wrong{number}"]
    assert code == 2
    assert heavy == []
    for part in PAIRS[number][2]:
        assert part.replace("F:", f"wrong{number}.yml:") in said
    assert said.startswith("1 problem in "), "one mistake, one message"
    code, said, _ = results[f"right{number}"]
    assert code == 0, said


@pytest.mark.parametrize("number", [0, 21])
def test_deepy_itself_ends_with_exit_code_2_before_torch_is_imported(number, tmp_path):
    file = tmp_path / "wrong.yml"
    file.write_text("".join(f"{key}: {value}\n" for key, value in BASE.items()) + PAIRS[number][0] + "\n")
    command = [sys.executable, "-X", "importtime", "deepy.py", "train.py", str(file), "--dry-run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "megatron.config.load" in imported and not {"torch", "deepspeed", "numpy"} & imported
