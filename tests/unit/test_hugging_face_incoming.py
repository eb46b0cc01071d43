"""A published model becomes a checkpoint of ours with the same weights and the same logits, or nothing."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron.checkpoint.converted import checkpoint_weights
from megatron.checkpoint.folder import damage, find_checkpoint
from megatron.config.load import load_config
from megatron.errors import RunError, UserError
from megatron.hugging_face.incoming import import_model
from megatron.hugging_face.published import configuration_keys, open_published
from megatron.hugging_face.stored import StoredTensors
from megatron.inference import find_trained_model
from tests.families import CASES
from tests.hugging_face_files import TEMPLATE, VOCABULARY, change, write, write_model
from tests.tokenizer_files import gpt2_files

QUICK = ("gpt2", "gpt_neox", "llama")  # weights that are transposed, renamed in files, and joined
OF_EACH_FAMILY = [family if family in QUICK else pytest.param(family, marks=pytest.mark.long) for family in CASES]


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("published") / "llama", max_shard_size="40KB")


@pytest.fixture
def copy(llama, tmp_path) -> Path:
    """The same folder, to be spoilt."""
    return Path(shutil.copytree(llama, tmp_path / "model"))


class Disturbed(StoredTensors):
    """Tensors of which one has another element, as a mistake on the way would leave it."""

    def read(self, name: str) -> torch.Tensor:
        tensor = super().read(name)
        if name == "model.layers.1.mlp.down_proj.weight":
            tensor = tensor.clone()
            tensor[3, 5] += 1
        return tensor


def in_folder(path: Path) -> list[str]:
    return sorted(each.name for each in path.iterdir())


@pytest.mark.parametrize("family", OF_EACH_FAMILY)
def test_a_model_of_each_family_comes_in_with_the_same_weights_and_logits(family, tmp_path):
    published = open_published(str(write_model(tmp_path / family, family)))
    told = []
    import_model(published, tmp_path / "ours", check=True, tell=told.append)
    assert "are equal on both sides" in told[-1]
    (unused,) = (line for line in told if "without effect here" in line)
    assert "use_cache" in unused and "vocab_size" not in unused
    path = find_checkpoint(tmp_path / "ours")
    assert path is not None and damage(path, "full") == []
    ours = {name: weight.read() for name, weight in checkpoint_weights(path).items()}
    theirs = published.parameters.to_hugging_face(ours)
    for name, tensor in theirs.items():
        assert torch.equal(tensor, published.read(name)), name


def test_the_folder_describes_its_model_and_keeps_the_tokenizer_the_template_and_the_settings(llama, tmp_path):
    import_model(open_published(str(llama)), tmp_path / "ours", check=False, tell=lambda line: None)
    found = find_trained_model(load_config([str(tmp_path / "ours" / "model.yml")]))
    assert found.checkpoint == tmp_path / "ours" / "global_step0"
    assert found.plan.model.vocab_size == VOCABULARY
    assert found.tokenizer.vocab_size == 400
    assert found.tokenizer.decode([found.tokenizer.end_of_document]) == "<|endoftext|>"
    kept = tmp_path / "ours" / "hugging_face"
    assert (kept / "chat_template.jinja").read_text() == TEMPLATE
    assert (kept / "generation_config.json").read_bytes() == (llama / "generation_config.json").read_bytes()
    assert in_folder(tmp_path) == ["ours"]


def test_pytorch_model_bin_is_read_as_well(copy, tmp_path):
    parts = [load_file(file) for file in sorted(copy.glob("*.safetensors"))]
    for file in copy.glob("model*"):
        file.unlink()
    torch.save({name: tensor for part in parts for name, tensor in part.items()}, copy / "pytorch_model.bin")
    told = []
    import_model(open_published(str(copy)), tmp_path / "ours", check=True, tell=told.append)
    assert "are equal on both sides" in told[-1]


def test_a_check_that_is_left_out_is_said_loudly(llama, tmp_path):
    told = []
    import_model(open_published(str(llama)), tmp_path / "ours", check=False, tell=told.append)
    assert told[-1].startswith("NOT CHECKED")


def test_one_disturbed_weight_is_refused_by_its_layer_and_leaves_nothing(llama, tmp_path):
    published = replace(open_published(str(llama)), tensors=Disturbed(llama))
    with pytest.raises(RunError, match=r"is not equal to the model .* first in block 1; nothing was left behind"):
        import_model(published, tmp_path / "ours", check=True)
    assert in_folder(tmp_path) == []


class Failing(StoredTensors):
    """Files that cannot be read any more once the writing has begun."""

    def read(self, name: str) -> torch.Tensor:
        raise UserError(f"{self.tensors[name].file} cannot be read")


def test_files_that_fail_once_work_has_begun_are_no_wrong_input(llama, tmp_path):
    published = replace(open_published(str(llama)), tensors=Failing(llama))
    with pytest.raises(RunError, match=r"safetensors cannot be read"):
        import_model(published, tmp_path / "ours", check=False)
    assert in_folder(tmp_path) == []


def test_an_output_that_exists_is_left_alone(llama, tmp_path):
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "notes").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        import_model(open_published(str(llama)), tmp_path / "ours", check=False)
    assert in_folder(tmp_path / "ours") == ["notes"]


def without_weights(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()


def without_a_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[1].unlink()


def cut_short(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-100])


def in_integers(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[0]
    save_file({name: tensor.to(torch.int8) for name, tensor in load_file(file).items()}, file)


def without_a_tensor(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(file)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, file)


def test_added_tokens_without_a_row_in_the_embedding_are_left_out(copy, tmp_path):
    content = json.loads((copy / "tokenizer.json").read_text())
    token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content["added_tokens"] += [{"id": id_, "content": f"<{id_}>", **token} for id_ in range(400, VOCABULARY + 1)]
    write(copy / "tokenizer.json", content)
    import_model(open_published(str(copy)), tmp_path / "ours", check=False, tell=lambda line: None)
    found = find_trained_model(load_config([str(tmp_path / "ours" / "model.yml")])).tokenizer
    assert found.vocab_size == VOCABULARY and found.describe().endswith("no row for them: <411>")
    assert found.encode("<410>") == [410] and max(found.encode("<411>")) < 400


def test_a_tokenizer_without_a_tokenizer_json_comes_in_with_one(copy, tmp_path):
    gpt2_files(copy)
    (copy / "tokenizer.json").unlink()
    change(
        copy / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer", bos_token="<|endoftext|>", add_bos_token=True
    )
    published = open_published(str(copy))
    assert configuration_keys(str(copy))["vocab_file"] == str(copy)
    import_model(published, tmp_path / "ours", check=False, tell=lambda line: None)
    assert (tmp_path / "ours" / "hugging_face" / "tokenizer.json").is_file()
    found = find_trained_model(load_config([str(tmp_path / "ours" / "model.yml")])).tokenizer
    assert found.encode("fox")[0] == 0 and found.encode("fox") == published.tokenizer.encode("fox")


def test_fields_of_a_config_json_are_unused_if_nothing_reads_them(llama):
    published = open_published(str(llama))
    given = published.config | {"use_cache": False, "hidden_act": "silu", "made_up": 1, "rope_theta": 10000.0}
    unused = published.family.unused_fields(given)
    assert {"use_cache", "made_up", "attention_dropout", "architectures"} <= set(unused)
    assert not {"hidden_act", "rope_theta", "rope_parameters", "model_type", "hidden_size", "head_dim"} & set(unused)


def not_a_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"model": 3}')


def with_a_larger_tokenizer(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"] | {f"filler{index}": 400 + index for index in range(20)}
    content["model"]["vocab"] = vocabulary
    write(folder / "tokenizer.json", content)


def an_adapter(folder: Path) -> None:
    without_weights(folder)
    write(folder / "adapter_config.json", {})


SPOILT = {
    "no config.json": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "a config.json that is none": (lambda folder: (folder / "config.json").write_text("{"), "it is not JSON"),
    "no weights": (without_weights, "holds no weights: model.safetensors, .* and there is: chat_template.jinja"),
    "a missing shard": (without_a_shard, r"of \d+ files of weights 1 are missing: model-00002"),
    "a file cut short": (cut_short, "model-00001-of-.* is damaged or cut short"),
    "a type that is none of weights": (in_integers, "is stored as I8, which is no type of weights here"),
    "a tensor that the index promises": (without_a_tensor, "which the index says is in it"),
    "another shape": (
        lambda folder: change(folder / "config.json", intermediate_size=90),
        r"is \[86, 48\] in .*, config.json makes it \[90, 48\]",
    ),
    "more layers": (
        lambda folder: change(folder / "config.json", num_hidden_layers=4),
        "model.layers.3.input_layernorm.weight: not among the stored tensors",
    ),
    "an unknown field": (
        lambda folder: change(folder / "config.json", is_encoder_decoder=True),
        "is_encoder_decoder True is not known here",
    ),
    "an architecture without a table": (
        lambda folder: change(folder / "config.json", model_type="lama"),
        'unknown hugging face family "lama". Did you mean "llama"',
    ),
    "a model with code of its own": (
        lambda folder: change(folder / "config.json", model_type="mine", auto_map={"AutoModel": "mine.Model"}),
        "runs Python of its own",
    ),
    "quantized weights": (
        lambda folder: change(folder / "config.json", quantization_config={"quant_method": "gptq"}),
        "quantization_config",
    ),
    "a broken tokenizer": (not_a_tokenizer, "is not a tokenizer.json"),
    "a tokenizer of another model": (with_a_larger_tokenizer, r"has 420 ids, more than vocab_size .*\(411\)"),
    "an adapter": (an_adapter, "holds adapters, not a model"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_what_cannot_be_read_is_refused_in_words_before_anything_is_written(case, copy):
    spoil, message = SPOILT[case]
    spoil(copy)
    with pytest.raises(UserError, match=message):
        open_published(str(copy))


def test_a_file_that_would_run_code_is_refused(copy):
    without_weights(copy)
    torch.save({"weight": shutil.rmtree}, copy / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"asks for shutil\.rmtree"):
        open_published(str(copy))


def test_a_name_without_a_folder_and_without_a_network_is_one_clear_line(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="not in the cache of the Hugging Face hub") as caught:
        open_published("nobody/nothing-at-all")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"there is no folder \./nowhere"):
        open_published("./nowhere")


def test_a_name_is_found_in_the_cache_of_the_hub(llama, monkeypatch, tmp_path):
    from huggingface_hub import constants

    commit = "0123456789012345678901234567890123456789"
    cache = tmp_path / "models--somebody--llama"
    shutil.copytree(llama, cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert configuration_keys("somebody/llama")["hidden_size"] == 48
