"""A run is not resumed with other data, another seed or another tokenizer, unless that is asked for by name."""

import pytest

from megatron.checkpoint.folder import publish
from megatron.config.load import config_from_flat
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
    "data_path": "data/text",
    "optimizer": {"type": "Adam", "params": {"lr": 1e-3}},
}


@pytest.fixture
def tokenizer():
    return build_tokenizer("CharLevelTokenizer", None, None, None)


@pytest.fixture
def checkpoint(tmp_path, tokenizer):
    (tmp_path / "unfinished").mkdir()
    final = tmp_path / "global_step10"
    written = config_from_flat(FLAT, "test").to_flat(with_defaults=True)
    publish(tmp_path / "unfinished", final, {"config.json": written, "identity.json": identity_of(tokenizer)}, {})
    return final


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
    changes = {"seed": 1, "data_path": "data/other", "seq_length": 64}
    with pytest.raises(UserError) as error:
        check(changes, tokenizer, checkpoint)
    said = str(error.value)
    assert "another seed and another data" in said
    assert "seed is 1 here, and was 1234 there" in said
    assert "data_path is data/other here, and was data/text there" in said
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


def test_another_tokenizer_is_recognised_by_what_it_does(checkpoint, tokenizer):
    class Other:
        fingerprint = "another"

        def describe(self):
            return "Other"

    with pytest.raises(UserError, match="another tokenizer"):
        check({}, Other(), checkpoint)
    check({"allow_changes": ["tokenizer"]}, Other(), checkpoint)
