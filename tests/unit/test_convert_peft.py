"""Adapters in PEFT's format: what PEFT computes with ours and we with its own.

fp32: relative 1e-4, as for whole models; only the order of additions differs.
"""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron import registry
from megatron.config.parameter_shapes import is_adapter
from megatron.config.plan import LoraPlan
from megatron.convert.family import KIND
from megatron.convert.peft import from_peft, to_peft
from megatron.engine.modules import Sequential
from megatron.errors import UserError
from megatron.model.gpt import gpt_layers
from megatron.parallel.parameter import load_state
from tests.models import VARIETY, random_tensor, random_tokens
from tests.ranks.run import one_rank

LLAMA = replace(VARIETY["llama"], num_layers=2, attention_kinds=("global",) * 2)
NEOX = replace(VARIETY["neox"], num_layers=2, attention_kinds=("global",) * 2)
GPT2 = replace(VARIETY["gpt2"], num_layers=2, attention_kinds=("global",) * 2)
WHOLE = ("query_key_value", "dense", "up", "down")
CASES = {
    "llama": ("llama", LLAMA, ("query", "value", r"blocks\.1\.mlp")),
    "llama, one adapter for three": ("llama", LLAMA, ("query_key_value", "dense")),
    "gpt_neox": ("gpt_neox", NEOX, WHOLE),
    "gpt2": ("gpt2", GPT2, WHOLE),
}


def sides(kind, model):
    """Our weights, random in every parameter, and their model with the same."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    family = registry.resolve(KIND, kind)
    with one_rank() as grid:
        module = Sequential(gpt_layers(model, grid, None))
        shapes = {p.global_name: p.global_shape for p in module.parameters()}
    state = {name: 0.2 * random_tensor(shape, number) for number, (name, shape) in enumerate(sorted(shapes.items()))}
    config = family.config(replace(model, lora=None))
    theirs = AutoModelForCausalLM.from_config(CONFIG_MAPPING[config["model_type"]].from_dict(config)).eval()
    base = {name: tensor for name, tensor in state.items() if not is_adapter(name)}
    theirs.load_state_dict(family.parameters(replace(model, lora=None)).to_hugging_face(base), strict=False)
    return family, state, theirs


def our_logits(model, state):
    with one_rank() as grid, torch.no_grad():
        module = Sequential(gpt_layers(model, grid, None)).eval()
        load_state(module, state)
        return module(random_tokens(model, 2, 10))[..., : model.vocab_size]


def assert_close(found, wanted):
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("case", CASES)
def test_peft_loads_our_adapters_and_computes_the_same(tmp_path, case):
    from peft import PeftModel

    kind, model, targets = CASES[case]
    model = replace(model, lora=LoraPlan(3, 6.0, 0.0, targets))
    family, state, theirs = sides(kind, model)
    config, tensors = to_peft({name: t for name, t in state.items() if is_adapter(name)}, model, family)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    tokens = random_tokens(model, 2, 10)
    with torch.no_grad():
        without = theirs(tokens).logits
        adapted = PeftModel.from_pretrained(theirs, str(tmp_path)).eval()(tokens).logits
    assert (adapted - without).abs().max() > 0.01 * without.abs().max()
    assert_close(our_logits(model, state), adapted)
    # and back: the same computation, in parts where theirs are parts
    lora, ours = from_peft(config, tensors, replace(model, lora=None), family)
    base = {name: t for name, t in state.items() if not is_adapter(name)}
    assert_close(our_logits(replace(model, lora=lora), base | ours), adapted)


@pytest.mark.parametrize(
    ("kind", "model", "modules"),
    [
        ("llama", LLAMA, ["q_proj", "v_proj", "down_proj"]),
        ("gpt_neox", NEOX, ["query_key_value"]),
        ("gpt2", GPT2, ["c_attn"]),
    ],
    ids=["llama", "gpt_neox", "gpt2"],
)
def test_adapters_of_peft_load_here_and_compute_the_same(tmp_path, kind, model, modules):
    from peft import LoraConfig, get_peft_model

    family, state, theirs = sides(kind, model)
    chosen = LoraConfig(r=4, lora_alpha=8, target_modules=modules, init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(theirs, chosen).eval()
    with torch.no_grad():
        wanted = adapted(random_tokens(model, 2, 10)).logits
    adapted.save_pretrained(str(tmp_path))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    lora, ours = from_peft(config, load_file(tmp_path / "adapter_model.safetensors"), model, family)
    assert_close(our_logits(replace(model, lora=lora), state | ours), wanted)


def test_what_an_adapter_of_theirs_cannot_say_is_refused():
    family = registry.resolve(KIND, "gpt_neox")
    parts = replace(NEOX, lora=LoraPlan(2, 2.0, 0.0, ("query",)))
    a, b = torch.zeros(2, 32), torch.zeros(32, 2)
    names = [f"blocks.{layer}.attention.query_key_value.lora.query" for layer in range(2)]
    with pytest.raises(UserError, match=r"has one layer gpt_neox\.layers\.0\.attention\.query_key_value"):
        to_peft({f"{name}.{kind}": t for name in names for kind, t in (("a", a), ("b", b))}, parts, family)
    with pytest.raises(UserError, match="use_dora True is not known here"):
        from_peft({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "use_dora": True}, {}, NEOX, family)
