"""`load: hf:...` and `save_hf` in a configuration: what they stand for, and what is refused before a run begins."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron.config.command_line import configuration_of, parse_command_line
from megatron.config.errors import ConfigError
from megatron.config.load import load_config
from megatron.config.yaml_file import yaml_text
from megatron.errors import UserError
from megatron.inference import find_trained_model
from megatron.training.run import Prepared, prepare
from tests.hugging_face_files import VOCABULARY, write_model

TRAINING = {"data_impl": "mock", "train_batch_size": 4, "train_iters": 2, "seq_length": 16}


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("published") / "llama")


def prepared(folder: Path, **keys: Any) -> Prepared:
    file = folder / "run.yml"
    file.write_text(yaml_text(TRAINING | keys))
    return prepare(load_config([str(file)], script="train.py"), 1)


def test_keys_of_model_and_tokenizer_that_are_not_set_are_those_of_the_folder(llama, tmp_path):
    found = prepared(tmp_path, load=f"hf:{llama}")
    assert found.published is not None and found.checkpoint is None
    assert found.plan.model.vocab_size == VOCABULARY
    assert (found.plan.model.norm, found.plan.model.max_position_embeddings) == ("rmsnorm", 19)
    assert found.plan.batch.sequence_length == 16, "a key that is set stays as it is"
    assert found.tokenizer.vocab_size == 400


def test_generation_and_evaluation_take_a_published_model_as_well(llama, tmp_path):
    (tmp_path / "run.yml").write_text(yaml_text({"load": f"hf:{llama}"}))
    found = find_trained_model(load_config([str(tmp_path / "run.yml")], script="generate.py"))
    assert found.published is not None and found.plan.model.vocab_size == VOCABULARY


def test_without_a_configuration_a_published_model_brings_all_settings_of_its_own(llama, tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    default = tmp_path / "configs" / "default.yml"
    shape = {"num_layers": 7, "hidden_size": 16, "num_attention_heads": 2, "seq_length": 8}
    default.write_text(yaml_text(shape | {"tokenizer_type": "CharLevelTokenizer", "save": "other"}))
    monkeypatch.chdir(tmp_path)
    words = [f"load=hf:{llama}", "maximum_tokens=5"]
    for script in ("generate.py", "evaluate.py", "serve.py"):
        config = configuration_of(parse_command_line(words, script), words, script)
        found = find_trained_model(config)
        assert found.published is not None and found.tokenizer.vocab_size == 400
        assert (config.checkpoint.save, config.generation.maximum_tokens) == (None, 5)
        assert config.origin is not None and config.origin.files == ()
    assert load_config([], overrides=["load=checkpoints"]).model.num_layers == 7


def test_added_tokens_without_a_row_in_the_embedding_do_not_keep_a_published_model_out(llama, tmp_path):
    folder = Path(shutil.copytree(llama, tmp_path / "model"))
    content = json.loads((folder / "tokenizer.json").read_text())
    token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content["added_tokens"] += [{"id": id_, "content": f"<{id_}>", **token} for id_ in range(400, VOCABULARY + 1)]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    found = prepared(tmp_path, load=f"hf:{folder}")
    assert found.tokenizer.vocab_size == VOCABULARY
    assert found.tokenizer.describe().endswith("left out, for the model has no row for them: <411>")
    assert found.tokenizer.encode("<410>") == [410] and max(found.tokenizer.encode("<411>")) < 400


REFUSED = {
    "a model that is nowhere": ({"load": "hf:./nowhere"}, ConfigError, "there is no folder ./nowhere"),
    "finetune, which changes nothing": ({"finetune": True}, ConfigError, "finetune .* has no effect with load"),
    "another shape": (
        {"ffn_hidden_size": 90},
        UserError,
        "holds another model .*\n  ffn_hidden_size is 90 here, and 86 there\nto use it as it is, leave these keys out",
    ),
    "another function of the same weights": (
        {"rotary_emb_base": 500},
        UserError,
        r"rotary_base is 500.0 here, and 10000.0 there\n.*allow_changes=\[model\]",
    ),
    "an export that is there": ({"save_hf": "."}, UserError, "exists already"),
    "an export that nothing holds": (
        {"clip_qkv": 3, "qk_norm": "head", "allow_changes": ["model"], "load": None, "save_hf": "export"},
        UserError,
        "no architecture of Hugging Face",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_before_the_run_begins(case, llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keys, kind, message = REFUSED[case]
    own = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "tokenizer_type": "CharLevelTokenizer"}
    given = {"load": f"hf:{llama}"} | keys
    with pytest.raises(kind, match=message):
        prepared(tmp_path, **(given if given["load"] else own | given))


def test_another_function_of_the_same_weights_may_be_asked_for(llama, tmp_path):
    found = prepared(tmp_path, load=f"hf:{llama}", rotary_emb_base=500, allow_changes=["model"])
    assert found.plan.model.rotary_base == 500
