"""Checkpoints of GPT-NeoX give, through our converter, the logits of the model they were written from.

Random values stand in every parameter; padding rows and shards of summed biases have values that would show. fp32: the
same sums in another order, so that 1e-4 of the largest logit is far above the gaps and far below any mistake.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megatron.convert.neox_checkpoint import NeoXFiles, find_step
from megatron.errors import UserError
from tests import neox_files
from tests.models import random_tensor, spread
from tests.ranks.converted import assert_checkpoint_logits
from tests.ranks.run import run_ranks
from tools.convert_from_neox import parse, run

VOCABULARY, PADDED, LENGTH = 257, 272, 19
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6}
NEOX = {**SIZES, "intermediate_size": 90, "max_position_embeddings": LENGTH}
LLAMA = {**NEOX, "intermediate_size": 86, "rms_norm_eps": 1e-6}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 48, "n_layer": 2, "n_head": 6, "n_inner": 90, "n_positions": LENGTH}
KEYS = {
    "num-layers": 2,
    "hidden-size": 48,
    "num-attention-heads": 6,
    "seq-length": LENGTH,
    "max-position-embeddings": LENGTH,
    "tokenizer-type": "CharLevelTokenizer",
    # keys of training, of which some are refused in a run here
    "optimizer": {"type": "Adam", "params": {"lr": 0.001}},
    "fp16": {"fp16": True, "loss_scale": 0},
    "s3_path": "s3://bucket/x",
    "model_parallel_size": 2,
    "scaled-upper-triang-masked-softmax-fusion": True,
}
ROTARY = {"pos-emb": "rotary", "rotary-pct": 0.25, "gpt-j-residual": True, "no-weight-tying": True}
LLAMA_KEYS = {
    "pos-emb": "rotary",
    "norm": "rmsnorm",
    "rms-norm-epsilon": 1e-6,
    "no-weight-tying": True,
    "use_bias_in_attn_linear": False,
}
# name -> model of transformers, layers as GPT-NeoX stores them, its keys, tensor-parallel ranks, options of the files
CASES: dict[str, tuple[Any, Any, dict[str, Any], int, dict[str, Any]]] = {
    "Pythia on 2 ranks, biases summed over them": (
        transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**NEOX, rotary_pct=0.25)),
        neox_files.neox_layers,
        ROTARY,
        2,
        {},
    ),
    "serial, tied, in whole files, with the names of version 2": (
        transformers.GPTNeoXForCausalLM(
            transformers.GPTNeoXConfig(**NEOX, rotary_pct=1.0, use_parallel_residual=False, tie_word_embeddings=True)
        ),
        lambda *arguments: neox_files.neox_layers(*arguments, new_names=True),
        {"pos-emb": "rotary", "use_bias_in_attn_linear": True},
        2,
        {"whole_files": True},
    ),
    "Llama with grouped queries on 2 ranks, gate packed behind up": (
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, num_key_value_heads=2)),
        neox_files.llama_layers,
        {**LLAMA_KEYS, "num_kv_heads": 2, "activation": "swiglu", "intermediate_size": 258, "use_bias_in_mlp": False},
        2,
        {},
    ),
    "Llama of old versions: w1, w2, w3, and a config that knows no biases": (
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, num_key_value_heads=6)),
        lambda *arguments: neox_files.llama_layers(*arguments, old_names=True),
        {**LLAMA_KEYS, "activation": "silu", "mlp_type": "llama"},
        1,
        {"whole_files": True},
    ),
    "GPT-2: learned positions, tied, fused tanh gelu": (
        transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)),
        neox_files.gpt2_layers,
        {"pos-emb": "learned", "bias-gelu-fusion": True},
        2,
        {},
    ),
}


def write_case(folder: Path, case: str) -> tuple[Path, torch.nn.Module]:
    model, layers, keys, tp, options = CASES[case]
    model = model.eval().requires_grad_(False)
    for index, (name, parameter) in enumerate(model.named_parameters()):
        parameter.copy_(spread(name, random_tensor(parameter.shape, index)))
    written = layers(model.state_dict(), model.config, tp, PADDED)
    return neox_files.write_step(folder, written, tp, KEYS | keys, **options), model


def test_logits_equal_those_of_the_model_that_was_written(tmp_path):
    tokens = torch.randint(0, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    converted = []
    for index, case in enumerate(CASES):
        step, model = write_case(tmp_path / str(index), case)
        run(parse(["--input", str(step), "--output", str(tmp_path / f"converted{index}")]))
        converted.append((case, str(tmp_path / f"converted{index}"), model(tokens).logits))
    run_ranks(2, assert_checkpoint_logits, converted, tokens)


@pytest.fixture
def step(tmp_path) -> Path:
    return write_case(tmp_path / "run", "Pythia on 2 ranks, biases summed over them")[0]


def convert(step: Path, *words: str) -> None:
    run(parse(["--input", str(step), "--output", str(step.parent / "converted"), *words]))


def test_the_folder_of_a_run_stands_for_the_step_that_latest_names(step):
    assert find_step(step.parent) == step
    assert NeoXFiles(find_step(step.parent)).tensor_parallel_size == 2


def test_a_missing_shard_is_named_before_anything_is_written(step):
    (step / "layer_03-model_01-model_states.pt").unlink()
    with pytest.raises(UserError, match=r"layer_03-model_01-model_states.pt is missing"):
        convert(step)
    assert not (step.parent / "converted").exists()


def test_a_missing_layer_is_named(step):
    for path in step.glob("layer_05-*"):
        path.unlink()
    with pytest.raises(UserError, match=r"layer 5: norm.weight or norm.scale is missing"):
        convert(step)


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(Path(__file__).with_name("harmed")),)


def test_a_file_that_would_run_something_is_refused_and_runs_nothing(step):
    torch.save({"norm.weight": torch.ones(48), "x": Harmful()}, step / "layer_05-model_00-model_states.pt")
    with pytest.raises(UserError, match=r"layer_05-model_00-model_states.pt is refused: it asks for posix.mkdir"):
        convert(step)
    assert not Path(__file__).with_name("harmed").exists()


def test_a_truncated_file_is_one_line(step):
    path = step / "layer_02-model_00-model_states.pt"
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(UserError, match=r"layer_02-model_00-model_states.pt cannot be decoded"):
        convert(step)


def test_parameters_without_a_counterpart_are_named(step):
    path = step / "layer_02-model_00-model_states.pt"
    torch.save(torch.load(path) | {"attention.qk_layernorm.weight": torch.ones(8)}, path)
    with pytest.raises(UserError, match=r"layer 2: attention.qk_layernorm.weight has no counterpart"):
        convert(step)


def test_keys_that_change_the_model_and_have_no_counterpart_are_refused(step):
    with pytest.raises(UserError, match="use_mup"):
        convert(step, "use_mup=true")


def test_a_vocabulary_larger_than_the_stored_one_is_refused(step):
    path = step / "layer_00-model_01-model_states.pt"
    torch.save({"word_embeddings.weight": torch.ones(9, 48)}, path)
    with pytest.raises(UserError, match=r"word_embeddings.weight has \[136, 48\], \[9, 48\] on .* for \[257, 48\]"):
        convert(step)


def test_without_a_configuration_the_flag_is_named(step):
    (step / "configs" / "model.yml").unlink()
    with pytest.raises(UserError, match=r"no YAML file of the run; name it with --config"):
        convert(step)


def test_windows_of_neox_count_one_key_less(step):
    convert(step, "sliding_window_width=4")
    text = (step.parent / "converted" / "model.yml").read_text()
    assert "sliding_window_width: 5" in text
    assert "local" in text
