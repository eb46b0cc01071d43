"""A run is not resumed with other data, another seed or another tokenizer, unless that is asked for by name."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron.checkpoint.folder import publish
from megatron.config.load import config_from_flat
from megatron.data.indexed import IndexedWriter
from megatron.data.manifest import write_manifest
from megatron.errors import UserError
from megatron.tokenizer.build import build_tokenizer
from megatron.training.identity import check_same_run, identity_of

FLAT = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 32,
    "train_batch_size": 8,
    "train_iters": 10,
    "tokenizer_type": "CharLevelTokenizer",
    "data_path": "text_document",
    "optimizer": {"type": "Adam", "params": {"lr": 1e-3}},
}


@pytest.fixture
def tokenizer():
    return build_tokenizer("CharLevelTokenizer", None, None, None)


def corpus(prefix: str, sizes: list[int], first: int = 0) -> str:
    """Documents of these sizes, of consecutive ids."""
    with IndexedWriter(prefix, np.dtype("<u2")) as writer:
        writer.add_documents(np.concatenate([np.arange(first, first + size) % 200 for size in sizes]), sizes)
    return prefix


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """Where the data lie: `text_document`, and the parts of a blend."""
    monkeypatch.chdir(tmp_path)
    corpus("text_document", [50, 60, 70])
    for name in "ab":
        corpus(name, [40, ord(name)])
        corpus(f"{name}_labels", [40, ord(name)], first=1)
    return tmp_path


def written_by(flat, tokenizer, without=()) -> Path:
    """A checkpoint of step 10 of a run with these keys."""
    config = config_from_flat(flat, "test")
    identity = {k: v for k, v in identity_of(tokenizer, config.data).items() if k not in without}
    documents = {"config.json": config.to_flat(with_defaults=True), "identity.json": identity}
    Path("unfinished").mkdir()
    publish(Path("unfinished"), Path("global_step10"), json.loads(json.dumps(documents)), {})
    return Path("global_step10")


@pytest.fixture
def checkpoint(folder, tokenizer):
    return written_by(FLAT, tokenizer)


def check(changes, tokenizer, checkpoint):
    check_same_run(config_from_flat(FLAT | changes, "test"), tokenizer, checkpoint)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train_batch_size": 16},
        {"num_workers": 0},
        {"save": "elsewhere"},
        {"train_iters": 20},
        {"bf16": {"enabled": True}},
        {"optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "betas": [0.8, 0.9]}}},
    ],
    ids=str,
)
def test_what_changes_neither_data_nor_model_may_differ(checkpoint, tokenizer, changes):
    check(changes, tokenizer, checkpoint)


def test_every_difference_is_listed_with_both_values(checkpoint, tokenizer):
    corpus("other", [50, 60, 70, 80])
    changes = {"seed": 1, "data_path": "other", "seq_length": 64}
    with pytest.raises(UserError) as error:
        check(changes, tokenizer, checkpoint)
    said = str(error.value)
    assert "another seed and another data" in said
    assert "seed is 1 here, and was 1234 there" in said
    assert "data_path: other with 4 documents and 260 tokens (content " in said
    assert " here, and text_document with 3 documents and 180 tokens (content " in said
    assert "seq_length is 64 here, and was 32 there" in said
    assert "allow_changes=[seed, data]" in said


def test_another_optimizer_is_refused_unless_its_state_is_not_loaded(checkpoint, tokenizer):
    """Its tensors may have the names of the other's and mean something else."""
    changes = {"optimizer": {"type": "SGD", "params": {"lr": 1e-3}}}
    with pytest.raises(UserError) as error:
        check(changes | {"seed": 1}, tokenizer, checkpoint)
    assert "optimizer.type is sgd here, and was adam there" in str(error.value)
    assert "allow_changes=[seed] no_load_optim=true" in str(error.value)
    check(changes | {"no_load_optim": True}, tokenizer, checkpoint)


def test_what_is_allowed_by_name_may_differ_and_nothing_else(checkpoint, tokenizer):
    changes = {"seed": 1, "split": "90, 10, 0"}
    check(changes | {"allow_changes": ["seed", "data"]}, tokenizer, checkpoint)
    with pytest.raises(UserError, match="another data"):
        check(changes | {"allow_changes": ["seed"]}, tokenizer, checkpoint)


def test_a_corpus_that_changed_under_its_path_is_noticed_whatever_changed(checkpoint, tokenizer, caplog):
    for sizes, first, told in (
        ([50, 60, 70, 5], 0, "text_document with 4 documents and 185 tokens"),
        ([60, 50, 70], 0, "text_document with 3 documents and 180 tokens"),  # told apart by their content only
        ([50, 60, 70], 1, "text_document with 3 documents and 180 tokens"),
    ):
        corpus("text_document", sizes, first)
        with pytest.raises(UserError, match=rf"another data:\n  data_path: {told} \(content .* there") as error:
            check({}, tokenizer, checkpoint)
        assert "allow_changes=[data]" in str(error.value)
    check({"allow_changes": ["data"]}, tokenizer, checkpoint)
    assert f"allowed: data_path: {told}" in caplog.text
    corpus("text_document", [50, 60, 70])
    check({}, tokenizer, checkpoint)


def test_a_look_at_a_large_corpus_is_small_and_sees_a_document_of_another_length_anywhere(tokenizer):
    """Of 8 MB and an index of 800 kB half a megabyte is read. Two documents changed, and all between them moved."""
    sizes = [100] * 40_000
    corpus("text_document", sizes)
    checkpoint = written_by(FLAT, tokenizer)
    check({}, tokenizer, checkpoint)
    sizes[20_001], sizes[30_001] = 101, 99
    corpus("text_document", sizes)
    with pytest.raises(UserError, match="40,000 documents and 4,000,000 tokens"):
        check({}, tokenizer, checkpoint)


def test_one_overwritten_place_of_a_large_corpus_is_seen_by_the_manifest_if_that_was_written_anew(tokenizer):
    corpus("mine_text_document", [400] * 10_000)
    outputs = ["mine_text_document.bin", "mine_text_document.idx"]
    write_manifest("mine", outputs)
    checkpoint = written_by(FLAT | {"data_path": "mine_text_document"}, tokenizer)
    with Path("mine_text_document.bin").open("r+b") as file:
        file.seek(4_060_000)
        file.write(b"other words")
    write_manifest("mine", outputs)
    with pytest.raises(UserError, match="SHA-256"):
        check({"data_path": "mine_text_document"}, tokenizer, checkpoint)
    Path("mine_manifest.json").unlink()  # then there is nothing to compare with
    check({"data_path": "mine_text_document"}, tokenizer, checkpoint)


BLEND = FLAT | {
    "data_path": None,
    "train_data_paths": ["a", "b"],
    "train_label_data_paths": ["a_labels", "b_labels"],
    "valid_data_paths": ["a"],
}


def test_a_corpus_that_moved_is_the_same_and_that_is_said(tokenizer, caplog):
    checkpoint = written_by(BLEND, tokenizer)
    Path("new").mkdir()
    for file in (*Path().glob("a*.*"), *Path().glob("b*.*")):
        shutil.move(file, "new")
    moved = {key: [f"new/{path}" for path in BLEND[key]] for key in BLEND if key.endswith("paths")}
    with caplog.at_level(logging.INFO):
        check_same_run(config_from_flat(BLEND | moved, "test"), tokenizer, checkpoint)
    assert "train_data_paths: new/a has the content that a had" in caplog.text
    assert "train_label_data_paths: new/b_labels has the content that b_labels had" in caplog.text


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"train_data_paths": ["b", "a"]}, "train_data_paths: b with 2 documents and 138 tokens"),
        ({"train_label_data_paths": None}, r"train_label_data_paths is not read here, and was \[a_labels, b_labels\]"),
        ({"train_label_data_paths": ["a", "b"]}, "train_label_data_paths: a with 2 documents and 137 tokens"),
        ({"train_data_paths": ["a"], "train_label_data_paths": ["a_labels"]}, r"is \[a\] here, and was \[a, b\] there"),
    ],
    ids=str,
)
def test_corpora_of_a_blend_are_compared_in_their_order_and_their_labels_too(tokenizer, changes, told):
    checkpoint = written_by(BLEND, tokenizer)
    with pytest.raises(UserError, match=told):
        check_same_run(config_from_flat(BLEND | changes, "test"), tokenizer, checkpoint)


def test_other_data_for_validation_are_no_other_run(tokenizer):
    checkpoint = written_by(BLEND, tokenizer)
    check_same_run(config_from_flat(BLEND | {"valid_data_paths": ["b"]}, "test"), tokenizer, checkpoint)


def test_a_checkpoint_that_says_nothing_of_contents_is_held_to_its_paths(tokenizer):
    checkpoint = written_by(FLAT, tokenizer, without={"data"})
    corpus("text_document", [1, 2, 3])
    check({}, tokenizer, checkpoint)
    shutil.copy("text_document.bin", "copy.bin"), shutil.copy("text_document.idx", "copy.idx")
    with pytest.raises(UserError, match="data_path is copy here, and was text_document there"):
        check({"data_path": "copy"}, tokenizer, checkpoint)


def test_another_tokenizer_is_recognised_by_what_it_does(checkpoint, tokenizer):
    class Other:
        fingerprint = "another"

        def describe(self):
            return "Other"

    with pytest.raises(UserError, match="another tokenizer"):
        check({}, Other(), checkpoint)
    check({"allow_changes": ["tokenizer"]}, Other(), checkpoint)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("identity.json", {"data": {"data_path": [{"path": "x"}]}}),
        ("identity.json", {"data": [1]}),
        ("config.json", {"optimizer": "Adam"}),
    ],
    ids=str,
)
def test_json_that_does_not_describe_a_run_is_named(checkpoint, tokenizer, name, content):
    (checkpoint / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"^config.json and identity.json of global_step10 do not describe a run"):
        check({}, tokenizer, checkpoint)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe{", b"\0"], ids=str)
def test_a_file_that_is_no_json_object_is_named(checkpoint, tokenizer, content):
    (checkpoint / "identity.json").write_bytes(content)
    with pytest.raises(UserError, match=r"^global_step10/identity.json cannot be read: it is not "):
        check({}, tokenizer, checkpoint)
