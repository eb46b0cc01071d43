"""The commands that take models in and hand them out, and a fine-tune in one step."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers

from megatron.config.yaml_file import yaml_text
from tests.end_to_end.commands import losses, run
from tests.hugging_face_files import write_model

FINE_TUNE = {
    "seq_length": 16,
    "data_impl": "mock",
    "num_workers": 0,
    "train_batch_size": 4,
    "train_iters": 2,
    "optimizer": {"type": "Adam", "params": {"lr": 0.001}},
    "eval_iters": 0,
    "log_interval": 1,
    "load": "hf:llama",
    "save": "trained",
    "save_hf": "export",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hugging_face")
    write_model(folder / "llama")
    (folder / "run.yml").write_text(yaml_text(FINE_TUNE))
    return folder


def test_one_command_fine_tunes_a_published_model_exports_it_and_goes_on_where_it_ended(folder):
    done = run(folder, "train.py", "run")
    assert "are equal on both sides" in done.stdout + done.stderr
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "export")
    before = transformers.AutoModelForCausalLM.from_pretrained(folder / "llama")
    assert not torch.equal(model.lm_head.weight, before.lm_head.weight)
    assert "| Steps | 2 |" in (folder / "export" / "README.md").read_text()
    run(folder, "train.py", "run", "train_iters=3", "save_hf=another")
    assert list(losses(folder / "trained")) == [1, 2, 3]
    assert (folder / "another" / "config.json").is_file()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(torch.arange(30).reshape(2, 15)).logits
    return found


@pytest.mark.long  # adapters have tests/ranks/test_lora.py and test_convert_peft.py
def test_one_command_tunes_a_published_model_with_adapters_and_every_way_out_computes_the_same(folder):
    adapted = FINE_TUNE | {"lora": {"rank": 4, "alpha": 8, "dropout": 0.1, "targets": ["query", "value", "down"]}}
    adapted |= {"save": "adapters", "optimizer": {"type": "Adam", "params": {"lr": 0.02}}, "save_hf": None}
    (folder / "lora.yml").write_text(yaml_text(adapted))
    run(folder, "train.py", "lora")
    done = run(folder, "train.py", "lora", "train_iters=4", "save_hf=merged")
    assert "resuming from adapters/global_step2: step 2" in done.stdout + done.stderr
    assert list(losses(folder / "adapters")) == [1, 2, 3, 4]
    run(folder, "tools/convert_to_hf.py", "--load", "adapters", "--output", "peft")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "llama")
    before = logits(base)
    merged = logits(transformers.AutoModelForCausalLM.from_pretrained(folder / "merged"))
    assert (merged - before).abs().max() > 1e-2 * before.abs().max()
    over_base = logits(peft.PeftModel.from_pretrained(base, folder / "peft"))
    assert (over_base - merged).abs().max() < 1e-5 * merged.abs().max()
    named = json.loads((folder / "peft" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(folder / "llama")


@pytest.mark.long
def test_adapters_of_a_published_model_generate_and_merge_and_need_it(folder):
    adapted = FINE_TUNE | {"lora": {"rank": 4, "targets": ["query"]}, "save": "their_adapters", "save_hf": None}
    (folder / "others.yml").write_text(yaml_text(adapted))
    prompt = ["text_gen_type=unconditional", "num_samples=2", "maximum_tokens=4", "-o", "samples.jsonl"]
    early = run(folder, "generate.py", "others", *prompt, expect=2)
    assert "there is no checkpoint in their_adapters" in early.stderr
    run(folder, "train.py", "others")
    done = run(folder, "generate.py", "others", *prompt)
    assert "weights of their_adapters/global_step2" in done.stdout + done.stderr
    run(folder, "tools/merge_lora.py", "--load", "their_adapters", "--output", "whole")
    run(folder, "tools/convert_to_hf.py", "--load", "whole", "--output", "whole_export")
    shutil.copytree(folder / "llama", folder / "moved")
    moved = run(folder, "tools/merge_lora.py", "--load", "their_adapters", "--base", "hf:moved", "--output", "again")
    assert "with its adapters merged" in moved.stdout
    with (folder / "moved" / "model.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"1234")
    other = run(folder, "generate.py", "others", *prompt[:-1], "other.jsonl", "lora.base=hf:moved", expect=2)
    assert "what is in moved is another one" in other.stderr


@pytest.mark.long
def test_the_tools_take_a_model_in_and_out_and_say_so_with_their_exit_codes(folder):
    done = run(folder, "tools/convert_from_hf.py", "--model", "llama", "--output", "ours")
    assert "are equal on both sides" in done.stdout
    text = run(folder, "tools/convert_from_hf.py", "--model", "llama", "--yaml").stdout
    assert "hidden_size: 48" in text and "vocab_file: llama/tokenizer.json" in text
    run(folder, "tools/convert_to_hf.py", "--load", "ours", "--output", "back", "--dtype", "bf16")
    assert json.loads((folder / "back" / "config.json").read_text())["dtype"] == "bfloat16"
    wrong = run(folder, "tools/convert_to_hf.py", "--load", "ours", "--output", "back", expect=2)
    assert "exists already" in wrong.stderr
    gone = run(folder, "tools/convert_from_hf.py", "--model", "./gone", "--output", "x", expect=2)
    assert gone.stderr.strip() == "there is no folder ./gone"


@pytest.mark.long
def test_a_fine_tune_on_two_tensor_parallel_ranks_begins_with_the_loss_of_one(folder):
    words = ["load=hf:llama", "train_iters=1", "model_parallel_size=2"]
    run(folder, "train.py", "run", *words, "save=two", "save_hf=two_export", ranks=2)
    one = run(folder, "train.py", "run", "train_iters=1", "save=one", "save_hf=one_export")
    assert one.returncode == 0
    assert abs(losses(folder / "two")[1] - losses(folder / "one")[1]) < 1e-5  # sums in another order
