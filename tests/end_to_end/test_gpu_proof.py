"""bench/gpu_proof.py: it loses nothing of what its steps print, however they end, and every step runs on a CPU."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench import gpu_proof
from bench.allowance import Allowance
from bench.attention import attention, documents
from bench.gpu_proof import SAME_WHEN_QUICK, STEPS, Step, main
from bench.gpu_steps.loop import covered
from bench.gpu_steps.parity import FP32_BOUND, Case, bound, curves_of
from megatron.model.attention_kernels import ScaledDotProduct, Scores
from tests import flex, tiny
from tests.end_to_end.commands import ENVIRONMENT, ROOT, json_lines

LENGTH, WINDOW, CPU = 300, 70, torch.device("cpu")

ROW = 'print("| a | row |"); print(\'{"tokens": 3}\', flush=True)'


def step(name: str, code: str, seconds: int = 30, **options) -> Step:
    return Step(name, name, ("-c", code), seconds, gpus=0, **options)


def proof(folder: Path, *words: str, limit: float = 280) -> subprocess.CompletedProcess[str]:
    """The command itself, on the CPU."""
    command = [sys.executable, "bench/gpu_proof.py", "--output", str(folder / "proof.md"), *words]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=limit
    )  # fmt: skip


def results(folder: Path) -> dict[str, str]:
    return {row["step"]: row["result"] for row in json_lines(folder / "proof.jsonl") if "result" in row}


@pytest.fixture
def on_no_card(monkeypatch):
    monkeypatch.setattr(gpu_proof, "cards_here", list)


def test_a_step_that_fails_or_takes_too_long_keeps_its_output_and_the_next_one_begins(tmp_path, on_no_card):
    steps = (
        step("broken", ROW + "; raise ValueError('of this kind')"),
        step("endless", ROW + "; import time; time.sleep(60)", seconds=4),
        step("sound", ROW),
        step("long", ROW, seconds=100),
    )
    assert main(["--output", str(tmp_path / "proof.md"), "--minutes", "1"], steps) == 1
    assert results(tmp_path) == {"broken": "failed", "endless": "over time", "sound": "passed", "long": "skipped"}
    figures = [row for row in json_lines(tmp_path / "proof.jsonl") if "figures" in row]
    assert figures == [{"step": name, "figures": {"tokens": 3}} for name in ("broken", "endless", "sound")]
    text = (tmp_path / "proof.md").read_text()
    assert text.count("| a | row |") == 3
    assert "ValueError: of this kind" in text
    assert "| long | skipped |  | 100 | its 100 s do not fit into the" in text
    assert "`python bench/gpu_proof.py --only broken endless long`" in text


def test_a_report_names_paths_relative_to_the_repository(tmp_path, on_no_card, capsys):
    shows = f"print('rootdir: {ROOT}'); print('{ROOT}/bench/x.md'); " + ROW
    main(["--output", str(tmp_path / "proof.md"), "--minutes", "1"], (step("paths", shows, seconds=20),))
    text = (tmp_path / "proof.md").read_text()
    assert "rootdir: .\n" in text and "bench/x.md\n" in text and str(ROOT) not in text
    assert f"rootdir: {ROOT}" in capsys.readouterr().out


def test_only_the_steps_that_are_asked_for_run_and_skipping_is_no_failure(tmp_path, on_no_card, capsys):
    code = main(["--output", str(tmp_path / "proof.md"), "--only", "versions", "125M", "ranks"], STEPS)
    assert code == 0
    assert results(tmp_path) == {"versions": "skipped", "125M": "skipped", "ranks": "skipped"}
    said = capsys.readouterr().out
    assert "| ranks | skipped |  | 400 | it needs 2 GPUs, and there are 0 |" in said
    assert said.index("- `ranks`: it needs 2 GPUs, and there are 0") < said.index("## Summary"), "at the head too"


def test_the_steps_on_one_gpu_fit_into_the_usual_time():
    assert sum(step.seconds for step in STEPS if step.gpus == 1) <= 60 * gpu_proof.MINUTES - 10, (
        "and some to start them"
    )


def test_a_step_may_use_the_time_that_earlier_ones_left(tmp_path, on_no_card):
    two_seconds = ROW + "; import time; time.sleep(1.5)"
    steps = (step("slow", two_seconds, seconds=1), step("last", ROW, seconds=20))
    assert main(["--output", str(tmp_path / "proof.md"), "--minutes", "1"], steps) == 0
    assert results(tmp_path) == {"slow": "passed", "last": "passed"}
    assert main(["--output", str(tmp_path / "other.md"), "--minutes", "0.36"], steps) == 1
    assert '"over time"' in (tmp_path / "other.jsonl").read_text()


def test_an_allowance_ends_when_the_longest_does_not_fit_any_more():
    allowance = Allowance(0.5)
    assert allowance.has_room()
    time.sleep(0.3)
    assert not allowance.has_room()
    assert Allowance().has_room()


def test_a_row_of_losses_is_printed_as_soon_as_its_curves_are_there():
    case = Case("bf16", {"num_layers": 1}, {"precision": "bfloat16"})
    name, coarse = (json.dumps(keys, sort_keys=True) for keys in (case.model, case.keys))
    assert None in curves_of(case, {name: [1.0]}, {coarse: [1.0]}), "its bound needs bf16 on the CPU"
    assert None not in curves_of(case, {name: [1.0], coarse: [1.0]}, {coarse: [1.0]})


def test_a_stop_ends_the_step_and_writes_the_summary(tmp_path):
    code = (
        "from bench.gpu_proof import *; import bench.gpu_proof as proof; proof.cards_here = list;"
        f"steps = [Step('a', 'a', ('-c', {ROW + '; import time; time.sleep(60)'!r}), 50, gpus=0),"
        " Step('b', 'b', ('-c', ''), 50, gpus=0)];"
        f"sys.exit(main(['--output', {str(tmp_path / 'proof.md')!r}], steps))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not (tmp_path / "proof.jsonl").exists() or not (tmp_path / "proof.jsonl").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 1
    assert results(tmp_path) == {"a": "stopped", "b": "skipped"}
    assert "| a | row |" in (tmp_path / "proof.md").read_text()


def test_what_pip_installs_is_named_without_torch():
    named = gpu_proof.requirements()
    assert not [name for name in named if name.startswith("torch")]
    assert {"pydantic>=2.9", "pytest>=8.3", "transformers>=5"} <= set(named)


def test_every_file_with_a_test_for_gpus_is_found():
    assert "tests/unit/test_model_documents.py" in gpu_proof.gpu_tests()
    assert "tests/unit/test_model_gpt.py" not in gpu_proof.gpu_tests()


def test_idle_time_is_what_no_interval_covers():
    assert covered([(0, 4), (2, 5), (7, 9), (8, 8)]) == 7


def test_a_case_in_16_bits_may_be_off_by_what_rounding_does_and_others_hardly():
    model = {"num_layers": 1}
    curves = {json.dumps(model): [1.0, 2.0]}
    assert bound(Case("fp32", model), curves) == FP32_BOUND
    curves[json.dumps(dict(sorted((model | {"precision": "bfloat16"}).items())))] = [1.5, 2.0]
    assert bound(Case("bf16", model, {"precision": "bfloat16"}), curves) == 1.0


def test_attention_alone_computes_the_same_by_blocks_as_with_a_mask():
    plain = replace(tiny.MODEL, head_size=8)
    for model in (replace(plain, reset_attention_mask=True), replace(plain, sliding_window=WINDOW)):
        first, pairs = documents(2, LENGTH, model.reset_attention_mask, model.sliding_window, CPU)
        query, key, value = (torch.randn(2, LENGTH, heads, 8) for heads in (4, 2, 2))
        wanted = attention(ScaledDotProduct(model.sliding_window), model, first)(query, key, value)
        found = attention(flex.on_cpu(model.sliding_window, Scores.of(model)), model, first)(query, key, value)
        torch.testing.assert_close(found, wanted)
        mask = order(first, model.sliding_window)
        assert pairs == int(mask.sum())


def order(first: Tensor, window: int | None) -> Tensor:
    """Which keys each query sees, written out."""
    columns = torch.arange(LENGTH)
    query, key = columns[:, None], columns[None, :]
    seen = (key <= query) & (key >= first[:, :, None])
    return seen if window is None else seen & (key > query - window)


@pytest.mark.long
def test_versions_and_chosen_kernels_are_written(tmp_path):
    done = proof(tmp_path, "--quick", "--only", "versions")
    assert done.returncode == 0, done.stdout + done.stderr
    assert results(tmp_path) == {"versions": "passed"}
    text = (tmp_path / "proof.md").read_text()
    assert "attention: global in 24 of 24 layers: torch's scaled_dot_product_attention" in text
    [found] = [row["figures"] for row in json_lines(tmp_path / "proof.jsonl") if "figures" in row]
    assert found["torch"] != "absent"


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", [step.name for step in STEPS if step.name not in ("versions", *SAME_WHEN_QUICK)])
def test_every_step_runs_on_a_cpu_with_tiny_shapes(tmp_path, name):
    done = proof(tmp_path, "--quick", "--only", name, limit=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert results(tmp_path) == {name: "passed"}
