"""A checkpoint of ours becomes a folder that transformers loads, with the same weights and logits, or nothing."""

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron.checkpoint.converted import StoredWeight, checkpoint_weights
from megatron.checkpoint.merge import adapter_weight, merged_weights
from megatron.checkpoint.state import TrainState
from megatron.config.parameter_shapes import adapters_of
from megatron.config.plan import LoraPlan
from megatron.errors import RunError, UserError
from megatron.hugging_face.adapters import base_weights, export_adapters, import_adapters
from megatron.hugging_face.incoming import import_model
from megatron.hugging_face.model_card import model_card
from megatron.hugging_face.outgoing import TrainedWeights, export_model, open_checkpoint, plan_export
from megatron.hugging_face.published import open_published
from megatron.resources import check_same_model
from tests.hugging_face_files import TEMPLATE, VOCABULARY, write_model
from tests.unit.test_hugging_face_incoming import OF_EACH_FAMILY, in_folder
from tools.convert_to_hf import size


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A published model."""
    return write_model(tmp_path_factory.mktemp("published") / "llama")


@pytest.fixture(scope="module")
def trained(llama, tmp_path_factory) -> TrainedWeights:
    """A checkpoint of ours."""
    return ours(llama, tmp_path_factory.mktemp("ours") / "llama")


def ours(published: Path, folder: Path) -> TrainedWeights:
    import_model(open_published(str(published)), folder, check=False, tell=lambda line: None)
    return open_checkpoint(folder, None, {})


def export(
    trained: TrainedWeights, output: Path, dtype: str = "fp32", family: str | None = None, **options
) -> list[str]:
    told: list[str] = []
    planned = plan_export(trained.model, trained.vocab_file, trained.tokenizer, dtype, family)
    export_model(trained, planned, output, tell=told.append, **options)
    return told


def logits(folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.randint(VOCABULARY, (2, 19), generator=torch.Generator().manual_seed(3))
    return model(tokens).logits.detach()


@pytest.mark.parametrize("family", OF_EACH_FAMILY)
def test_a_model_of_each_family_returns_with_the_same_bits_and_loads_in_transformers(family, tmp_path):
    there = write_model(tmp_path / "there", family)
    told = export(ours(there, tmp_path / "ours"), tmp_path / "back")
    assert "are equal on both sides" in told[-1]
    before, after = (load_file(folder / "model.safetensors") for folder in (there, tmp_path / "back"))
    assert {name for name in before if name in after} == set(after)
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    after, before = logits(tmp_path / "back"), logits(there)
    assert (after - before).abs().max() <= 1e-5 * before.abs().max()  # one function under two names rounds in two ways
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert written["model_type"] == family


def test_the_tokenizer_its_template_and_the_settings_of_generation_go_along(llama, trained, tmp_path):
    export(trained, tmp_path / "back", check=False)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "back").chat_template == TEMPLATE
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (llama / name).read_bytes()


def test_adapters_become_a_folder_that_peft_loads_over_the_model(llama, trained, tmp_path):
    from peft import PeftModel

    ours(llama, tmp_path / "base")
    model = replace(trained.model, lora=LoraPlan(3, 6.0, 0.0, ("query", "value", "down")))
    found = [(layer, each) for layer in range(model.num_layers) for each in adapters_of(model, layer)]
    draw = torch.Generator().manual_seed(1)
    adapters, merged = {}, {name: stored.read() for name, stored in trained.weights.items()}
    for layer, each in found:
        a, b = (torch.randn(shape, generator=draw) for shape in ((3, each.inputs), (each.outputs, 3)))
        adapters |= {f"blocks.{layer}.{each.name}.a": a, f"blocks.{layer}.{each.name}.b": b}
        merged[f"blocks.{layer}.{each.layer}.weight"] += adapter_weight(a, b, each, model)
    adapted, whole = (
        {name: StoredWeight(tuple(tensor.shape), partial(torch.clone, tensor)) for name, tensor in tensors.items()}
        for tensors in (adapters, merged)
    )
    told: list[str] = []
    export_adapters(replace(trained, model=model, weights=adapted), tmp_path / "adapters", tell=told.append)
    export(replace(trained, weights=whole), tmp_path / "merged", check=False)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    tokens = torch.randint(VOCABULARY, (2, 19), generator=torch.Generator().manual_seed(3))
    over_base = PeftModel.from_pretrained(theirs, str(tmp_path / "adapters")).eval()(tokens).logits.detach()
    wanted = logits(tmp_path / "merged")
    assert (over_base - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert (logits(llama) - wanted).abs().max() > 1e-2 * wanted.abs().max()
    assert "adapters for LlamaForCausalLM" in told[0]

    import_adapters(tmp_path / "adapters", tmp_path / "base", tmp_path / "again", tell=told.append)
    again = open_checkpoint(tmp_path / "again", None, {})
    assert again.model.lora is not None and (again.model.lora.rank, again.model.lora.alpha) == (3, 6.0)
    assert {name: stored.read().tolist() for name, stored in again.weights.items()} == {
        name: tensor.tolist() for name, tensor in adapters.items()
    }
    check_same_model(replace(again.model, lora=model.lora), tmp_path / "again" / "global_step0")  # by other patterns
    with pytest.raises(UserError, match="lora"):
        fewer = replace(again.model, lora=replace(model.lora, targets=("query",)))
        check_same_model(fewer, tmp_path / "again" / "global_step0")
    path = tmp_path / "again" / "global_step0"
    once = merged_weights(base_weights(path), checkpoint_weights(path), again.model)
    assert set(once) == set(merged)
    for name, stored in once.items():
        assert torch.equal(stored.read(), merged[name])


def test_a_folder_without_adapters_or_of_another_model_is_refused(llama, trained, tmp_path):
    base, output = tmp_path / "base", tmp_path / "out"
    ours(llama, base)
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        import_adapters(adapters, base, output)
    (adapters / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    with pytest.raises(UserError, match=r"adapter_model\.safetensors cannot be read"):
        import_adapters(adapters, base, output)
    names = [f"base_model.model.model.layers.9.mlp.up_proj.lora_{kind}.weight" for kind in "AB"]
    save_file({name: torch.ones(2, 2) for name in names}, adapters / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"layers\.9\.mlp\.up_proj: our model has no layer"):
        import_adapters(adapters, base, output)
    assert not output.exists()


def test_shards_are_no_larger_than_asked_and_have_an_index(trained, tmp_path):
    export(trained, tmp_path / "back", dtype="bf16", largest=60_000)
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("back/*.safetensors"))
    assert [file.name for file in files] == [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)]
    assert set(index["weight_map"].values()) == {file.name for file in files}
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert sum(tensor.nbytes for tensor in tensors.values()) == index["metadata"]["total_size"]
    assert all(sum(tensor.nbytes for tensor in load_file(file).values()) <= 60_000 for file in files)


def test_sizes_are_read_with_their_units():
    assert [size(text) for text in ("5GB", "300MiB", "1.5kb", "77")] == [5 * 10**9, 300 * 2**20, 1500, 77]


def disturbed(trained: TrainedWeights) -> TrainedWeights:
    """Weights of which one is read wrongly the first time, as a mistake in writing would have it."""
    name = "blocks.2.mlp.up.weight"
    weight, times = trained.weights[name], []

    def read() -> torch.Tensor:
        tensor = weight.read()
        if not times:
            tensor[1, 2] += 1
        times.append(1)
        return tensor

    return replace(trained, weights={**trained.weights, name: StoredWeight(weight.shape, read)})


def test_one_disturbed_weight_is_refused_by_its_layer_and_leaves_nothing(trained, tmp_path):
    with pytest.raises(RunError, match=r"is not equal to the model .* first in block 2; nothing was left behind"):
        export(disturbed(trained), tmp_path / "back")
    assert in_folder(tmp_path) == []


def test_a_check_that_is_left_out_is_said_loudly(trained, tmp_path):
    assert export(disturbed(trained), tmp_path / "back", check=False)[-1].startswith("NOT CHECKED")
    assert in_folder(tmp_path) == ["back"]


def test_weights_too_large_for_the_type_are_refused(trained, tmp_path):
    name = "blocks.0.mlp.up.weight"
    huge = StoredWeight(trained.weights[name].shape, lambda: trained.weights[name].read() * 1e6)
    with pytest.raises(RunError, match="logits differ"):
        export(replace(trained, weights={**trained.weights, name: huge}), tmp_path / "back", dtype="fp16")


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fails_in_mid_export_leaves_nothing(trained, tmp_path):
    with files_limited_to(100_000), pytest.raises(RunError, match=r"cannot write .*back .*: File too large"):
        export(trained, tmp_path / "back")
    assert in_folder(tmp_path) == []


def test_a_checkpoint_that_cannot_be_read_in_mid_export_is_no_wrong_input(trained, tmp_path):
    def fails() -> torch.Tensor:
        raise UserError("a file of the checkpoint cannot be read")

    name = "blocks.2.mlp.up.weight"
    broken = {**trained.weights, name: StoredWeight(trained.weights[name].shape, fails)}
    with pytest.raises(RunError, match="cannot be read"):
        export(replace(trained, weights=broken), tmp_path / "back")
    assert in_folder(tmp_path) == []


def test_a_model_that_no_architecture_holds_is_refused_with_the_reasons_of_the_nearest(trained):
    model = replace(trained.model, qk_norm="head", clip_qkv=3.0)
    with pytest.raises(UserError, match=r"no architecture of Hugging Face .*\n.*cannot hold this model"):
        plan_export(model, trained.vocab_file, trained.tokenizer, "fp32")
    with pytest.raises(UserError, match="GPT-2 cannot hold this model"):
        plan_export(trained.model, trained.vocab_file, trained.tokenizer, "fp32", "gpt2")


def test_an_output_that_exists_is_left_alone(trained, tmp_path):
    (tmp_path / "back").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        export(trained, tmp_path / "back")
    assert (tmp_path / "back").read_text() == "mine"


def test_the_card_tells_how_the_model_was_trained(trained):
    keys = {
        "optimizer": {"type": "adam", "params": {"lr": 0.001, "betas": [0.9, 0.95]}},
        "seq_length": 64,
        "data_path": "/home/me/corpus_text_document",
        "seed": 7,
    }
    family = plan_export(trained.model, trained.vocab_file, trained.tokenizer, "fp32").family
    card = model_card("mine", family, trained.model, keys, TrainState(300, 2400, 153600), 2.5)
    for text in ("| Steps | 300 |", "| Tokens | 153,600 |", "lr 0.001", "| Seed | 7 |", "2.5000 (perplexity 12.18)"):
        assert text in card
    assert "| Data | corpus_text_document |" in card and "/home/me" not in card
