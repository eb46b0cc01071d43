"""Models of LitGPT give, through our converter, the logits of the model of transformers that they were written from.

The writer below is an account of LitGPT's names (litgpt/scripts/convert_hf_checkpoint.py) apart from the converter.
fp32: the same sums in another order, so that 1e-4 of the largest logit is far above the gaps and below any mistake.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from megatron.errors import UserError
from tests.models import random_tensor, spread
from tests.ranks.converted import assert_checkpoint_logits
from tests.ranks.run import run_ranks
from tools.convert_from_litgpt import parse, run

VOCABULARY, LENGTH, LAYERS = 257, 19, 2
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 6}
NEOX = {**SIZES, "intermediate_size": 90, "max_position_embeddings": LENGTH}
LLAMA = {**NEOX, "intermediate_size": 86, "num_key_value_heads": 2, "rms_norm_eps": 1e-3}
LLAMA_3_1 = {"factor": 4.0, "low_freq_factor": 0.5, "high_freq_factor": 2.0}

FIELDS = {"block_size": LENGTH, "n_layer": LAYERS, "n_embd": 48, "n_head": 6, "vocab_size": VOCABULARY, "hf_config": {}}
LLAMA_FIELDS = {
    **FIELDS,
    "n_query_groups": 2,
    "rotary_percentage": 1.0,
    "parallel_residual": False,
    "bias": False,
    "norm_class_name": "RMSNorm",
    "norm_eps": 1e-3,
    "mlp_class_name": "LLaMAMLP",
    "intermediate_size": 86,
    "n_expert": 0,
}


def padded(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, torch.full((7, tensor.shape[1]), 9.0)])


def neox_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As older versions wrote it: queries, keys and values by head."""
    names = {
        "input_layernorm": "norm_1",
        "post_attention_layernorm": "norm_2",
        "attention.query_key_value": "attn.attn",
        "attention.dense": "attn.proj",
        "mlp.dense_h_to_4h": "mlp.fc",
        "mlp.dense_4h_to_h": "mlp.proj",
    }
    found = {
        "transformer.wte.weight": padded(state["gpt_neox.embed_in.weight"]),
        "lm_head.weight": padded(state["lm_head.weight"]),
        **{f"transformer.ln_f.{kind}": state[f"gpt_neox.final_layer_norm.{kind}"] for kind in ("weight", "bias")},
    }
    for layer in range(LAYERS):
        for theirs, lit in names.items():
            for kind in ("weight", "bias"):
                found[f"transformer.h.{layer}.{lit}.{kind}"] = state[f"gpt_neox.layers.{layer}.{theirs}.{kind}"]
    return found


def llama_state(state: dict[str, Tensor], norms: dict[str, str] | None = None) -> dict[str, Tensor]:
    """norms: their norms in a block -> LitGPT's."""
    norms = norms or {"input_layernorm": "norm_1", "post_attention_layernorm": "norm_2"}
    names = {"self_attn.o_proj": "attn.proj", "mlp.gate_proj": "mlp.fc_1", "mlp.up_proj": "mlp.fc_2"} | norms
    names["mlp.down_proj"] = "mlp.proj"
    found = {
        "transformer.wte.weight": padded(state["model.embed_tokens.weight"]),
        "lm_head.weight": padded(state["lm_head.weight"]),
        "transformer.ln_f.weight": state["model.norm.weight"],
    }
    for layer in range(LAYERS):
        theirs, lit = f"model.layers.{layer}", f"transformer.h.{layer}"
        found |= {f"{lit}.{name}.weight": state[f"{theirs}.{other}.weight"] for other, name in names.items()}
        parts = [state[f"{theirs}.self_attn.{name}_proj.weight"] for name in "qkv"]
        found[f"{lit}.attn.qkv.weight"] = torch.cat(parts)
    return found


OLMO_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "post_feedforward_layernorm": "post_mlp_norm",
    "self_attn.q_norm": "attn.norm_q",
    "self_attn.k_norm": "attn.norm_k",
}

# name -> model of transformers, its parameters as LitGPT names them, LitGPT's fields, name of the file of fields
CASES: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "Pythia of an older version": (
        transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**NEOX, rotary_pct=0.25)),
        neox_state,
        {**FIELDS, "org": "x", "intermediate_size": 90, "_norm_class": "LayerNorm", "_mlp_class": "GptNeoxMLP"},
        "lit_config.json",
    ),
    "Llama 3.1: grouped queries, wavelengths stretched": (
        transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                **LLAMA,
                rope_parameters={
                    "rope_type": "llama3",
                    "rope_theta": 20.0,
                    "original_max_position_embeddings": 16,
                    **LLAMA_3_1,
                },
            )
        ),
        llama_state,
        {**LLAMA_FIELDS, "rope_base": 20, "rope_adjustments": LLAMA_3_1 | {"original_max_seq_len": 16}},
        "model_config.yaml",
    ),
    "Mistral: windows shorter than the text": (
        transformers.MistralForCausalLM(transformers.MistralConfig(**LLAMA, sliding_window=5)),
        llama_state,
        {**LLAMA_FIELDS, "sliding_window_size": 5},
        "model_config.yaml",
    ),
    "OLMo 2: norms on outputs, all heads normalized together": (
        transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**LLAMA)),
        lambda state: llama_state(state, OLMO_NORMS),
        {
            **LLAMA_FIELDS,
            **{"norm_1": False, "norm_2": False, "post_attention_norm": True, "post_mlp_norm": True},
            **{"norm_qk": True, "norm_qk_type": "olmo2"},
        },
        "model_config.yaml",
    ),
}


def write_case(folder: Path, case: str) -> torch.nn.Module:
    model, names, fields, file = CASES[case]
    model.config._attn_implementation = "eager"
    model = model.eval().requires_grad_(False)
    for index, (name, parameter) in enumerate(model.named_parameters()):
        parameter.copy_(spread(name, random_tensor(parameter.shape, index)))
    folder.mkdir()
    state = {name: tensor.clone() for name, tensor in names(model.state_dict()).items()}
    torch.save({"model": state} if file.endswith("yaml") else state, folder / "lit_model.pth")
    (folder / file).write_text(json.dumps(fields))
    return model


def convert(folder: Path, output: Path, *words: str) -> None:
    run(parse(["--input", str(folder), "--output", str(output), "tokenizer_type=CharLevelTokenizer", *words]))


def test_logits_equal_those_of_the_model_that_was_written(tmp_path):
    tokens = torch.randint(0, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    converted = []
    for index, case in enumerate(CASES):
        model = write_case(tmp_path / str(index), case)
        convert(tmp_path / str(index), tmp_path / f"converted{index}")
        converted.append((case, str(tmp_path / f"converted{index}"), model(tokens).logits))
    run_ranks(2, assert_checkpoint_logits, converted, tokens)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_expert": 8}, "n_expert .8. has no counterpart here"),
        ({"latent_attention": {"q_lora_rank": 2}}, "latent_attention"),
        ({"something_new": 3}, "something_new .3. has no counterpart here"),
        ({"mlp_class_name": "LLaMAMoE"}, "mlp_class_name 'LLaMAMoE'"),
        ({"rope_adjustments": {"factor": 2.0, "beta": 1}}, "rope_adjustments"),
        ({"post_attention_norm": True}, "norm_class_name 'RMSNorm' with norms"),
    ],
)
def test_a_field_without_a_counterpart_is_refused_by_name(tmp_path, fields, message):
    write_case(tmp_path / "lit", "Llama 3.1: grouped queries, wavelengths stretched")
    path = tmp_path / "lit" / "model_config.yaml"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "lit", tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


def test_a_parameter_without_a_counterpart_is_named(tmp_path):
    write_case(tmp_path / "lit", "Pythia of an older version")
    path = tmp_path / "lit" / "lit_model.pth"
    torch.save(torch.load(path) | {"transformer.h.0.attn.lora_A": torch.ones(3)}, path)
    with pytest.raises(UserError, match=r"transformer.h.0.attn.lora_A: has no counterpart"):
        convert(tmp_path / "lit", tmp_path / "converted")


def test_a_checkpoint_of_a_run_with_more_than_tensors_is_refused_with_the_command_that_helps(tmp_path):
    write_case(tmp_path / "lit", "Pythia of an older version")
    torch.save({"model": {}, "hparams": {"out_dir": Path("x")}}, tmp_path / "lit" / "lit_model.pth")
    with pytest.raises(UserError, match=r"(?s)is refused: it asks for pathlib.*litgpt convert_pretrained_checkpoint"):
        convert(tmp_path / "lit", tmp_path / "converted")


def test_a_vocabulary_larger_than_the_stored_one_is_refused(tmp_path):
    write_case(tmp_path / "lit", "Pythia of an older version")
    path = tmp_path / "lit" / "lit_model.pth"
    torch.save(torch.load(path) | {"lm_head.weight": torch.ones(9, 48)}, path)
    with pytest.raises(UserError, match=r"lm_head.weight has 9 rows, and the tokenizer 257 ids"):
        convert(tmp_path / "lit", tmp_path / "converted")
