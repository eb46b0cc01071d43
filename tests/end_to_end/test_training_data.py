"""A run on several corpora, with documents kept apart: the same under every layout, and a validation loss for each."""

import json
from pathlib import Path

import numpy as np
import pytest

from megatron.data.indexed import IndexedWriter
from tests.end_to_end.commands import json_lines, run

END = 256  # of the tokenizer of bytes
CONFIG = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "seq_length": 32,
    "tokenizer_type": "CharLevelTokenizer",
    "num_workers": 0,
    "train_batch_size": 8,
    "train_iters": 4,
    "log_interval": 1,
    "eval_interval": 2,
    "eval_iters": 4,
    "train_data_weights": [3, 1],
    "reset_attention_mask": True,
    "reset_position_ids": True,
    "eod_mask_loss": True,
}


def corpus(path: Path, lowest: int) -> str:
    """Documents of 2 to 60 bytes; successors depend on the corpus."""
    draw = np.random.default_rng(lowest)
    with IndexedWriter(str(path), np.dtype("u2")) as writer:
        for size in draw.integers(2, 60, 200):
            writer.add_document([*(lowest + np.cumsum(draw.integers(0, 3, size)) % 20).tolist(), END])
    return str(path)


def train(folder: Path, name: str, **keys: object) -> list[dict[str, float]]:
    """The metrics of a run on two ranks."""
    paths = [str(folder / "alpha_text_document"), str(folder / "beta_text_document")]
    config = CONFIG | {"train_data_paths": paths, "valid_data_paths": paths, "log_dir": str(folder / name)} | keys
    file = folder / f"{name}.yml"
    file.write_text(json.dumps(config))
    said = run(folder, "train.py", file, ranks=2).stdout
    assert "a blend of 2 corpora, exact every 4 samples" in said
    return json_lines(folder / name / "metrics.jsonl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpora")
    corpus(folder / "alpha_text_document", 10)
    corpus(folder / "beta_text_document", 100)
    return folder


@pytest.fixture(scope="module")
def two_replicas(folder: Path) -> list[dict[str, float]]:
    return train(folder, "data2")


def losses(metrics: list[dict[str, float]], key: str) -> list[float]:
    return [line[key] for line in metrics if key in line]


@pytest.mark.long
@pytest.mark.parametrize("layout", [{"pipe_parallel_size": 2, "gradient_accumulation_steps": 4}], ids=["pipe2"])
def test_another_layout_gives_the_same_losses(folder: Path, two_replicas: list, layout: dict[str, int]) -> None:
    other = train(folder, "-".join(layout), **layout)
    for key in ("train/lm_loss", "validation/lm_loss", "validation/lm_loss/beta"):
        assert losses(other, key) == pytest.approx(losses(two_replicas, key), abs=1e-5) != []


def test_each_corpus_has_its_validation_loss_and_the_part_their_mean(two_replicas: list) -> None:
    alpha, beta, both = (losses(two_replicas, f"validation/lm_loss{end}") for end in ("/alpha", "/beta", ""))
    assert len(both) == 2 and alpha[-1] != pytest.approx(beta[-1], abs=1e-4)
    assert both == pytest.approx([(a + b) / 2 for a, b in zip(alpha, beta, strict=True)])
    assert alpha[-1] < alpha[0]


@pytest.mark.long
def test_documents_that_see_each_other_train_another_model(folder: Path, two_replicas: list) -> None:
    together = train(folder, "together", reset_attention_mask=False, reset_position_ids=False)
    gap = abs(losses(together, "train/lm_loss")[0] - losses(two_replicas, "train/lm_loss")[0])
    assert gap > 1e-4
