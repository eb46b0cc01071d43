"""From text to an evaluated model, through the commands of the README on a small scale.

The ranks are forked: what deepy.py adds to its commands has tests of its own.
"""

import json
import math
import shutil
from pathlib import Path

import pytest

from tests.end_to_end.commands import SMALL, json_lines, losses, run

SENTENCE = "the quick brown fox jumps over the lazy dog and runs away from a small red hen"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A corpus, tokenized with a vocabulary trained on it, and a configuration; one trained run in `run`."""
    folder = tmp_path_factory.mktemp("whole_way")
    words = SENTENCE.split()
    documents = [" ".join(words[(n * step) % len(words)] for step in range(1, 60)) for n in range(200)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    run(folder, "tools/train_tokenizer.py", "--input", "text.jsonl", "--vocab-size", 300, "--output", "vocab.json")
    run(
        folder, "tools/preprocess_data.py", "--input", "text.jsonl", "--tokenizer-type", "HFTokenizer",
        "--vocab-file", "vocab.json", "--append-eod", "--output-prefix", "corpus",
    )  # fmt: skip
    own = SMALL.replace("tokenizer_type: CharLevelTokenizer", "tokenizer_type: HFTokenizer\nvocab_file: vocab.json")
    own = own.replace("data_impl: mock", 'data_path: corpus_text_document\nsplit: "80, 20, 0"')
    (folder / "model.yml").write_text(own)
    (folder / "places.yml").write_text("save: run\nload: run\ncheckpoint_factor: 10\nkeep_last_n_checkpoints: 1\n")
    return folder


@pytest.fixture(scope="module")
def trained(folder) -> str:
    """What the training said, on two ranks with a pipeline."""
    return run(folder, "train.py", "model", "places", "pipe_parallel_size=2", ranks=2).stdout


def test_training_says_what_it_does_and_learns(folder, trained):
    assert "HFTokenizer" in trained
    assert "starting fresh" in trained
    assert "pipeline 2 x data 1 x tensor 1" in trained
    assert "step 20/20 | loss" in trained
    found = losses(folder / "run")
    assert list(found) == list(range(1, 21))
    assert found[20] < found[1] - 1.0


def test_metrics_hold_what_is_documented_and_validation_stands_with_its_step(folder, trained):
    rows = json_lines(folder / "run" / "logs" / "metrics.jsonl")
    always = {
        "step",
        "train/lm_loss",
        "train/learning_rate",
        "train/grad_norm",
        "train/param_norm",
        "train/skipped_steps",
        "train/tokens",
        "train/samples",
        "train/epochs",
        "runtime/iteration_time",
        "runtime/tokens_per_sec",
        "runtime/samples_per_sec",
        "runtime/flops_per_sec_per_gpu",
        "runtime/executed_flops_per_sec_per_gpu",
        "runtime/model_flops_utilization",
        "runtime/executed_flops_utilization",
        "runtime/peak_memory_bytes",
        *(
            f"runtime/{phase}_seconds"
            for phase in ("data_wait", "forward", "pipeline_exchange", "backward", "optimizer")
        ),
    }
    validation = {"validation/lm_loss", "validation/lm_loss_ppl"}
    now_and_then = {"runtime/slowest_rank", "runtime/slowest_rank_seconds", "runtime/fastest_rank_seconds"}
    for row in rows:
        assert set(row) - now_and_then == always | (validation if row["step"] in (10, 20) else set())
    assert rows[19]["validation/lm_loss_ppl"] == pytest.approx(math.exp(rows[19]["validation/lm_loss"]))
    assert trained.count("validation at step") == 2


def test_only_the_checkpoints_that_are_kept_are_there(folder, trained):
    assert (folder / "run" / "latest").read_text() == "global_step20"
    assert [path.name for path in (folder / "run").glob("global_step*")] == ["global_step20"]


def test_the_same_command_under_another_layout_goes_on_where_it_ended(folder, trained):
    copy = shutil.copytree(folder / "run", folder / "again")
    said = run(folder, "train.py", "model", "places", "save=again", "load=again", "train_iters=24", ranks=2).stdout
    assert "resuming from again/global_step20: step 20, 160 samples seen" in said
    assert "pipeline 1 x data 2 x tensor 1" in said
    found = losses(copy)
    assert list(found) == list(range(1, 25))
    assert found[21] < found[1] - 1.0


def test_prompts_of_a_file_are_continued_in_json_lines(folder, trained):
    (folder / "prompt.txt").write_text("the quick\n\na small red hen and\n")
    said = run(
        folder, "generate.py", "model", "places", "-i", "prompt.txt", "-o", "out.txt",
        "maximum_tokens=12", "temperature=0.8", "model_parallel_size=2", ranks=2,
    ).stdout  # fmt: skip
    rows = json_lines(folder / "out.txt")
    assert [row["context"] for row in rows] == ["the quick", "a small red hen and"]
    for row in rows:
        # GPT-NeoX's fields, and ours
        assert list(row)[:6] == ["context", "text", "length", "finished", "message", "duration_seconds"]
        assert list(row)[6:] == ["reason", "prompt", "sample", "identity"]
        assert row["length"] == 12 or row["finished"]
    assert "2 texts" in said
    run(
        folder, "generate.py", "model.yml", "places.yml", "-i", "prompt.txt", "-o", "alone.txt",
        "maximum_tokens=12", "temperature=0.8",
    )  # fmt: skip
    assert [row["text"] for row in json_lines(folder / "alone.txt")] == [row["text"] for row in rows]


@pytest.mark.long
def test_prompts_can_be_typed(folder, trained):
    done = run(
        folder, "deepy.py", "generate.py", "model", "places", "text_gen_type=interactive", "maximum_tokens=5",
        input="the quick\nbrown\n",
    )  # fmt: skip
    assert done.stdout.count("\n>>> ") == 3  # two prompts, and the end of the input


def test_evaluation_scores_the_held_out_part_and_writes_a_file(folder, trained):
    said = run(folder, "evaluate.py", "model", "places", "--eval_results_prefix", "mine", ranks=2).stdout
    [path] = (folder / "run").glob("mine_eval_results_*.json")
    document = json.loads(path.read_text())
    results = document["results"]["valid"]
    assert "perplexity" in said
    assert 0 < results["unigram_entropy"] < math.log(300)
    text = [json.loads(line)["text"] for line in (folder / "text.jsonl").read_text().splitlines()][160:]
    assert results["words"] == sum(len(document.split()) for document in text)
    assert results["bytes"] == sum(len(document) for document in text)
    last_validation = json_lines(folder / "run" / "logs" / "metrics.jsonl")[-1]["validation/lm_loss"]
    assert results["loss"] == pytest.approx(last_validation, abs=0.3)
