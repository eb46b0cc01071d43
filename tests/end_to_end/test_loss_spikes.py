"""A run that meets a poisoned stretch of its data: with on_loss_spike rewind it ends as if the stretch had not been."""

import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megatron.checkpoint.folder import steps_in
from megatron.data.build import build_sources
from megatron.data.indexed import IndexedWriter
from megatron.data.mock import MockStream
from megatron.events import read_events
from tests.end_to_end.commands import ENVIRONMENT, ROOT, json_lines, losses, run

SEQUENCE, BATCH, STEPS, SEED = 32, 8, 60, 1234
POISONED = (41, 47)  # the first and the last step whose samples are poison
CONFIG = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": SEQUENCE,
    "pos_emb": "rotary",
    "tokenizer_type": "CharLevelTokenizer",
    "num_workers": 0,
    "train_batch_size": BATCH,
    "train_iters": STEPS,
    "optimizer": {"type": "Adam", "params": {"lr": 1e-2}},
    "gradient_clipping": 0.0,
    "valid_data_paths": ["clean"],
    "valid_data_weights": [1.0],
    "eval_interval": STEPS,
    "eval_iters": 8,
    "log_interval": 1,
    "checkpoint_factor": 10,
    "loss_spike_window": 16,
}


# a plugin that notes the numbers of the training samples that a rank reads
NOTING = """
import os

from megatron.data.windows import Windows

DEEPY_REGISTRY = {}
read = Windows.__getitem__

def noting(self, sample):
    if "poisoned" in str(self.stream.dataset.prefix):
        with open(f"read_{os.environ.get('RANK', '0')}", "a") as file:
            print(sample, file=file)
    return read(self, sample)

Windows.__getitem__ = noting
"""


def write_corpus(prefix: Path, tokens: np.ndarray) -> None:
    with IndexedWriter(str(prefix), np.dtype("u2")) as writer:
        writer.add_document(tokens.tolist())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A corpus, and a copy in which the windows of a few steps hold random bytes that occur nowhere else."""
    folder = tmp_path_factory.mktemp("spikes")
    text = MockStream("train", 1 << 16, 128, seed=5).tokens(0, 1 << 16)
    write_corpus(folder / "clean", text)
    source = build_sources(
        mixtures={}, data_path=str(folder / "clean"), split="1,0,0", seq_length=SEQUENCE, seed=SEED, vocab_size=256
    ).samples("train")
    draw = np.random.default_rng(1)
    for sample in range((POISONED[0] - 1) * BATCH, POISONED[1] * BATCH):
        places = (source.start_of(sample) + np.arange(SEQUENCE + 1)) % len(text)
        text[places] = draw.integers(128, 256, SEQUENCE + 1)
    write_corpus(folder / "poisoned", text)
    (folder / "small.yml").write_text(json.dumps(CONFIG))
    (folder / "noting.py").write_text(NOTING)
    return folder


def train(folder: Path, name: str, corpus: str, *words: str) -> float:
    """The validation loss at the end of a run."""
    data = (f"train_data_paths=[{corpus}]", "train_data_weights=[1.0]")
    run(folder, "train.py", "small", f"save={name}", f"load={name}", *data, *words)
    return json_lines(folder / name / "logs" / "metrics.jsonl")[-1]["validation/lm_loss"]


@pytest.fixture(scope="module", autouse=True)
def plugins_are_found(folder) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")])))
        yield


@pytest.fixture(scope="module")
def rewound(folder) -> float:
    """The validation loss at the end of the run that goes back, in one process; it notes which samples it reads."""
    return train(folder, "rewound", "poisoned", "on_loss_spike=rewind", "plugins=[noting]")


@pytest.mark.long
def test_the_rewound_run_ends_within_noise_of_a_clean_one_and_one_that_goes_on_does_not(folder, rewound):
    """The noise is the range of clean runs with other seeds: other weights at the start, and another order."""
    clean = [train(folder, f"clean_{seed}", "clean", f"seed={seed}") for seed in (SEED, 1, 2, 3)]
    poisoned = train(folder, "poisoned_run", "poisoned")
    noise, usual = max(clean) - min(clean), statistics.mean(clean)
    said = f"clean {clean}, rewound {rewound}, poisoned {poisoned}"
    assert abs(rewound - usual) < noise, said
    assert poisoned - usual > 1.5 * noise, said
    assert abs(rewound - clean[0]) < abs(poisoned - clean[0]) / 4, said
    print(said)


@pytest.mark.long
def test_what_went_wrong_and_what_was_left_out_is_recorded(folder, rewound):
    events = read_events(folder / "rewound" / "logs")
    (spike,) = (event for event in events if event.kind == "spike")
    (back,) = (event for event in events if event.kind == "rewind")
    first, end = (POISONED[0] - 1) * BATCH, POISONED[1] * BATCH
    assert spike.step == POISONED[0] and f"samples {first} to {first + BATCH - 1}" in spike.text
    assert back.details["spike"] == list(POISONED) and back.details["to_step"] == 40
    assert back.details["skipped_samples"] == [320, end]
    texts = json_lines(folder / "rewound" / "logs" / f"rewind_from_step_{back.step}_sample_{first}.jsonl")
    assert [line["sample"] for line in texts] == list(range(first, end))
    # every step has one line of metrics, and what was recorded on the way that was given up is kept aside
    assert list(losses(folder / "rewound")) == list(range(1, STEPS + 1))
    aside = json_lines(folder / "rewound" / "logs" / "metrics.1.jsonl")
    assert [line["step"] for line in aside] == list(range(41, back.step + 1))
    for step in (40, 50, 60):  # the one gone back to as well: a run that is killed now resumes past the poison
        progress = json.loads((folder / "rewound" / f"global_step{step}" / "progress.json").read_text())
        assert progress["skipped_samples"] == [[320, end]]
        assert progress["consumed_samples"] == step * BATCH + end - 320
        assert progress["consumed_tokens"] == step * BATCH * SEQUENCE
    assert steps_in(folder / "rewound") == [10, 20, 30, 40, 50, 60]


def noted(folder: Path, ranks: int) -> list[int]:
    """The training samples that the ranks of a run have read, in order of number."""
    return sorted(int(line) for rank in range(ranks) for line in (folder / f"read_{rank}").read_text().splitlines())


@pytest.mark.long
def test_a_run_that_resumes_after_a_rewind_on_another_layout_reads_the_same_samples(folder, rewound):
    """Of one rank and of two: the numbers of the samples that they read, and the losses, up to rounding."""
    whole = [int(line) for line in (folder / "read_0").read_text().splitlines()]
    last = POISONED[1] * BATCH
    rest = list(range(last, last + 20 * BATCH))
    assert whole[-len(rest) :] == rest, "from the checkpoint of step 40 on, past the poison"
    shutil.copytree(folder / "rewound", folder / "moved")
    for kept in ("global_step50", "global_step60"):
        shutil.rmtree(folder / "moved" / kept)
    (folder / "read_0").unlink()
    words = ("save=moved", "load=moved", "train_data_paths=[poisoned]", "train_data_weights=[1.0]")
    said = run(
        folder, "deepy.py", "train.py", "small", *words, "num_gpus=2", "zero_optimization={stage: 1}",
        "plugins=[noting]", "on_loss_spike=rewind",
    ).stdout  # fmt: skip
    assert f"step 40, 320 samples seen, left out: 320 to {last - 1}" in said
    assert noted(folder, 2) == rest
    one, two = losses(folder / "rewound"), losses(folder / "moved")
    assert [two[step] for step in range(41, 61)] == pytest.approx([one[step] for step in range(41, 61)], abs=1e-5)


@pytest.mark.long
def test_two_ranks_go_back_together_while_checkpoints_are_written_in_the_background(folder, rewound):
    words = ("save=two", "load=two", "train_data_paths=[poisoned]", "train_data_weights=[1.0]", "num_gpus=2")
    keys = (
        "on_loss_spike=rewind",
        "async_save=true",
        "num_workers=2",
        "pipe_parallel_size=2",
        "keep_last_n_checkpoints=3",
    )
    run(folder, "deepy.py", "train.py", "small", *words, *keys)
    kinds = [event.kind for event in read_events(folder / "two" / "logs")]
    assert kinds.count("rewind") == kinds.count("spike") == 1
    one, two = losses(folder / "rewound"), losses(folder / "two")
    assert list(two) == list(one) and list(two.values()) == pytest.approx(list(one.values()), abs=1e-3)
    assert steps_in(folder / "two") == [40, 50, 60]


@pytest.mark.long
def test_without_a_checkpoint_from_before_the_spike_the_run_goes_on(folder):
    words = ("save=nowhere", "load=nowhere", "train_data_paths=[poisoned]", "train_data_weights=[1.0]")
    said = run(folder, "train.py", "small", *words, "on_loss_spike=rewind", "checkpoint_factor=55").stdout
    assert f"there is no whole checkpoint from before step {POISONED[0]} in nowhere to go back to" in said
    assert list(losses(folder / "nowhere")) == list(range(1, STEPS + 1))
    kinds = [event.kind for event in read_events(folder / "nowhere" / "logs")]
    assert "rewind" not in kinds and kinds.count("spike") == 1


@pytest.mark.long
def test_a_run_that_began_without_the_state_of_the_optimizer_does_not_go_back_to_what_it_began_with(folder):
    data = ("train_data_paths=[poisoned]", "train_data_weights=[1.0]")
    run(folder, "train.py", "small", "save=first_part", *data, "exit_interval=25", "checkpoint_factor=25")
    for key, rewinds in (("no_load_optim=false", 1), ("no_load_optim=true", 0)):
        name = f"second_part_{rewinds}"
        shutil.copytree(folder / "first_part", folder / name)
        words = (f"save={name}", f"load={name}", *data, "on_loss_spike=rewind", "checkpoint_factor=100", key)
        run(folder, "train.py", "small", *words)
        kinds = [event.kind for event in read_events(folder / name / "logs")]
        assert kinds.count("rewind") == rewinds and kinds.count("spike") == 1, key


@pytest.mark.long
def test_a_run_that_went_back_before_it_was_resumed_is_made_again_with_the_same_losses(folder):
    words = ("deepy.py", "train.py", "small", "save=parts", "load=parts", "num_gpus=1", "on_loss_spike=rewind")
    words += ("train_data_paths=[poisoned]", "train_data_weights=[1.0]")
    run(folder, *words, "exit_interval=55")
    run(folder, *words)
    rerun = [sys.executable, str(ROOT / "tools" / "rerun.py"), "parts", "--into", "again"]
    rerun += ["--python", sys.executable, "--code", str(ROOT)]
    script = subprocess.run(rerun, cwd=folder, capture_output=True, text=True, check=True).stdout
    subprocess.run(["bash"], input=script, text=True, cwd=folder, env=os.environ | ENVIRONMENT, check=True)
    assert [event.kind for event in read_events(folder / "again" / "parts" / "logs")].count("rewind") == 1
    assert losses(folder / "again" / "parts") == losses(folder / "parts")
    assert list(losses(folder / "parts")) == list(range(1, STEPS + 1))
