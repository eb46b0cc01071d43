"""The limits of the benchmarks: memory, time, ranks, and a machine without git."""

import json
import time
from pathlib import Path

import pytest

from bench import memory, watching
from bench.contenders import ON_CPU, ON_GPU, Contender, ContenderError, plan_of, why_too_large
from megatron.config.flops import token_flops
from tests.end_to_end.commands import ENVIRONMENT, ROOT
from tests.forking import run_script

SHAPE = "neox-6x512"


@pytest.fixture
def train_step(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import train_step

    return train_step


def run(script: str, *words: str, folder: Path):
    done = run_script(ROOT / "bench" / script, words, folder, ENVIRONMENT, timeout=60)
    assert done.returncode == 0, done.stderr
    return done


def test_a_shape_that_does_not_fit_is_said_to_with_both_figures():
    large = plan_of(ON_GPU["llama-7B"])
    assert why_too_large(large, 79.0).endswith("GiB does not fit into 79.0 GiB")
    assert why_too_large(large, 139.0) is why_too_large(large, None) is None
    assert all(why_too_large(plan_of(shape), 79.0) is None for name, shape in ON_GPU.items() if name != "llama-7B")


def test_a_training_benchmark_skips_what_does_not_fit_and_still_ends_well(tmp_path):
    done = run("train_step.py", "--shapes", SHAPE, "--gpu-memory", "0.5", folder=tmp_path)
    assert "skipped: its estimated peak of" in done.stdout
    assert json.loads(done.stdout.splitlines()[-1]) == {SHAPE: []}


def test_a_contender_that_does_not_answer_in_time_is_killed_and_named():
    contender = Contender("products", ON_CPU[SHAPE])
    began = time.monotonic()
    with pytest.raises(ContenderError, match=r"products was killed, because a step took more than 0 s"):
        contender.step(0.05)  # it is importing torch
    assert contender.process.poll() is not None
    assert time.monotonic() - began < 30


def test_a_contender_that_fails_is_named_with_the_end_of_its_output():
    contender = Contender("nobody", ON_CPU[SHAPE])
    with pytest.raises(ContenderError, match=r"(?s)nobody failed: .*KeyError: 'nobody'"):
        contender.step(60)


def test_the_figures_of_a_shape_count_flops_in_both_ways(train_step):
    plan = plan_of(ON_CPU[SHAPE])
    figures = train_step.figures_of(plan, {"deepy": [2.0], "products": [1.5]}, peak_bytes=0)
    assert figures["share_of_products"]["median"] == 0.75
    for name, flops in (("tflops", token_flops(plan).common), ("executed_tflops", token_flops(plan).executed)):
        assert figures[name] == pytest.approx(flops * plan.batch.tokens_per_step / 2 / 1e12, abs=1e-4)
    assert figures["tflops"] > figures["executed_tflops"]


def test_without_git_the_commit_is_unknown(train_step, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert train_step.commit() == "unknown"


def test_the_memory_benchmark_skips_cases_of_more_ranks_than_there_are_gpus(tmp_path):
    done = run("memory.py", "--ranks", "1", "NeoX, bf16, tensor 2", folder=tmp_path)
    assert "skipped: NeoX, bf16, tensor 2 needs 2 ranks of 1" in done.stderr
    assert "tensor 2" not in done.stdout


def test_the_memory_benchmark_knows_the_ranks_of_every_case():
    assert {memory.ranks_of(case) for case in memory.SHAPES} == {1}
    assert memory.ranks_of("NeoX, bf16, tensor 2") == 2


def test_a_step_that_was_disturbed_does_not_count_in_what_watching_costs_and_a_dear_place_does():
    quiet, logged = (1.0, 1.0), (1.0, 1.5)
    rounds = [[quiet, logged], [quiet, logged], [(1.0, 9.0), logged]]
    figures = watching.figures_of(rounds, timed=0.3, drawing=0.215)
    assert figures["ratio"] == 1.25 and figures["quartiles"] == [1.25, 5.25]
    assert figures["step_seconds"] == 1.0 and figures["rounds"] == 3
    assert figures["timed_share_of_panel"] == 0.01  # of all 21.5 s
    assert figures["timed_share"] == 0.06  # and 0.05 of the six steps without


@pytest.fixture
def generate(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import generate

    return generate


def test_the_figures_of_generation_are_ratios_of_each_round_and_a_share_of_reading_the_weights(generate):
    seconds = {"deepy": [2.0, 1.0], "transformers.generate": [3.0, 3.0], "deepy-int8": [1.0, 1.0]}
    found = {"one": {"seconds": seconds, "equal": "4 of 4", "bandwidths": [1e10, 2e10], "tokens": 100}}
    figures = generate.figures_of(found, size=10**8)["one"]
    assert figures["over_transformers"] == {"median": 2.25, "spread": [1.5, 3.0]}
    assert figures["int8_over_16_bits"]["spread"] == [1.0, 2.0]
    assert figures["share_of_ceiling"]["spread"] == [0.5, 0.5]  # 1 s of 2 s, 0.5 s of 1 s
    assert "| one | 66.7, 33.3 | 2.25 [1.5, 3.0] | 4 of 4 | 0.5 [0.5, 0.5] of 15.0 GB/s |" in generate.table(
        {"one": figures}
    )


def test_answers_to_sorted_prompts_are_compared_in_the_order_of_the_prompts(generate):
    job = generate.unequal(5, 2, is_sorted=True)
    asked = json.loads(job.question("transformers.generate"))["prompts"]
    assert sorted(map(len, asked)) == list(map(len, asked)) != list(map(len, job.prompts))
    assert job.in_order("transformers.generate", asked) == job.prompts == job.in_order("deepy", job.prompts)


@pytest.mark.long
def test_the_benchmark_of_generation_finds_the_tokens_of_transformers(tmp_path):
    done = run_script(ROOT / "bench" / "generate.py", ("--quick",), tmp_path, ENVIRONMENT, timeout=280)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["equal_in_fp32"] == "16 of 16"
    assert [each["equal"] for each in figures["runs"][0].values()] == ["8 of 8", "64 of 64"]
