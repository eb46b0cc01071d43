"""What must hold between the keys of the data."""

import pytest

from megatron.config.errors import ConfigError
from megatron.config.load import config_from_flat
from megatron.config.resolve import resolve

SHAPE = {"num_layers": 4, "hidden_size": 48, "num_attention_heads": 12, "seq_length": 8}
TWO = ["a", "b"]

BROKEN = [
    ({"split": "1,2,3,4"}, 'split ("1,2,3,4") must be one to three shares'),
    ({"data_path": "x", "train_data_paths": TWO}, "data_path (x) and train_data_paths ([a, b]) exclude each other"),
    ({"valid_data_paths": TWO}, "valid_data_paths ([a, b]) needs train_data_paths"),
    ({"train_data_paths": []}, "train_data_paths is an empty list"),
    (
        {"train_data_paths": TWO, "train_data_weights": [1.0]},
        "train_data_weights ([1]) has 1 entries and train_data_paths ([a, b]) 2; give one for each path",
    ),
    ({"test_data_weights": [0.5, 1]}, "test_data_weights ([0.5, 1]) has 2 entries and test_data_paths ([]) 0"),
    (
        {"train_data_paths": TWO, "train_label_data_paths": ["c", "d", "e", "f"]},
        "train_label_data_paths ([c, d, e, ...]) has 4 entries",
    ),
    (
        {"train_data_paths": TWO, "train_data_weights": [1, 2], "weight_by_num_documents": True},
        "weight_by_num_documents (true) and train_data_weights ([1, 2]) exclude each other",
    ),
    ({"data_path": "x", "weight_by_num_documents": True}, "weight_by_num_documents (true) needs train_data_paths"),
    ({"weighted_sampler_alpha": 0.3}, "weighted_sampler_alpha (0.3) has no effect without weight_by_num_documents"),
    ({"allow_chopped": False}, "allow_chopped (false) has no effect with pack_impl (packed)"),
    (
        {"reset_attention_mask": True, "attention_dropout": 0.1},
        "reset_attention_mask (true) excludes attention_dropout (0.1)",
    ),
]


@pytest.mark.parametrize(("keys", "message"), BROKEN, ids=[message[:40] for _, message in BROKEN])
def test_a_broken_rule_names_both_values_and_a_way_out(keys, message):
    with pytest.raises(ConfigError) as caught:
        config_from_flat(SHAPE | keys)
    assert message in str(caught.value)
    assert len(caught.value.problems) == 1


def test_a_weight_must_be_above_zero():
    with pytest.raises(ConfigError, match="train_data_weights"):
        config_from_flat(SHAPE | {"train_data_paths": TWO, "train_data_weights": [1, 0]})


def test_what_fits_together_passes():
    keys = {
        "train-data-paths": TWO,
        "train-data-weights": [1, 0.5],
        "valid-data-paths": ["c"],
        "train_label_data_paths": TWO,
        "pack_impl": "unpacked",
        "allow_chopped": False,
        "reset_position_ids": True,
        "train_iters": 1,
        "train_batch_size": 1,
    }
    config = config_from_flat(
        {key.replace("-", "_"): value for key, value in (SHAPE | keys).items()}, script="train.py"
    )
    model = resolve(config, 1, 100).model
    assert model.keeps_documents_apart and not model.reset_attention_mask
    config_from_flat(SHAPE | {"train_data_paths": TWO, "weight_by_num_documents": True, "weighted_sampler_alpha": 0.3})


def test_training_needs_data_of_some_kind():
    with pytest.raises(ConfigError, match='"data_path" is missing'):
        config_from_flat(SHAPE | {"train_iters": 1, "train_batch_size": 1}, script="train.py")
