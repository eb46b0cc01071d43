"""Every file in configs/: it is a right configuration, has the size of the model it names, and fits its machines."""

import re
import shlex
from pathlib import Path

import pytest

from megatron.config.errors import ConfigError
from megatron.config.load import load_config
from megatron.config.parameter_counts import parameter_count
from megatron.config.resolve import resolve
from megatron.launch.main import main

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
FILES = {str(path.relative_to(CONFIGS).with_suffix("")): path for path in sorted(CONFIGS.rglob("*.yml"))}
# files that add to others, with what makes them whole
MIX_INS = {
    "local_setup": "125M",
    "cluster": "125M",
    "wandb": "125M",
    "text_generation": "125M",
    "data/mock": "125M",
    "data/stdlib": "125M",
    "tokenizer/bytes": "125M",
    "precision/bf16": "default",
    "precision/fp16": "default",
    "precision/fp32": "default",
}
MODELS = [name for name in FILES if name not in MIX_INS]

# Parameters with the vocabulary the weights were published with: sums over the published weights' shapes, as Hugging
# Face shows them for gpt2*, EleutherAI/pythia-*, EleutherAI/gpt-neox-20b, meta-llama/*, mistralai/Mistral-7B-v0.1,
# Qwen/Qwen3-* (0.6B is counted once where its files hold the tied embedding twice), allenai/OLMo-2-1124-7B,
# Qwen/Qwen2.5-*, HuggingFaceTB/SmolLM2-*, bigcode/starcoder2-*, tiiuae/falcon-*,
# microsoft/phi-2, EleutherAI/gpt-j-6b, google/gemma-2-*, facebook/opt-*, bigscience/bloom*.
PUBLISHED = {
    "gpt2/124M": (50257, 124_439_808),
    "gpt2/355M": (50257, 354_823_168),
    "gpt2/774M": (50257, 774_030_080),
    "gpt2/1558M": (50257, 1_557_611_200),
    "pythia/14M": (50304, 14_067_712),
    "pythia/31M": (50304, 30_494_720),
    "pythia/70M": (50304, 70_426_624),
    "pythia/160M": (50304, 162_322_944),
    "pythia/410M": (50304, 405_334_016),
    "pythia/1B": (50304, 1_011_781_632),
    "pythia/1-4B": (50304, 1_414_647_808),
    "pythia/2-8B": (50304, 2_775_208_960),
    "pythia/6-9B": (50432, 6_857_302_016),
    "pythia/12B": (50688, 11_846_072_320),
    "20B": (50432, 20_554_567_680),
    "llama2/7B": (32000, 6_738_415_616),
    "llama2/13B": (32000, 13_015_864_320),
    "llama2/70B": (32000, 68_976_648_192),
    "llama3/8B": (128256, 8_030_261_248),
    "llama3/70B": (128256, 70_553_706_496),
    "llama3-1/8B": (128256, 8_030_261_248),
    "llama3-1/70B": (128256, 70_553_706_496),
    "mistral/7B": (32000, 7_241_732_096),
    "qwen3/0-6B": (151936, 596_049_920),
    "qwen3/8B": (151936, 8_190_735_360),
    "olmo2/7B": (100352, 7_298_617_344),
    "qwen2-5/0-5B": (151936, 494_032_768),
    "qwen2-5/1-5B": (151936, 1_543_714_304),
    "qwen2-5/3B": (151936, 3_085_938_688),
    "qwen2-5/7B": (152064, 7_615_616_512),
    "qwen2-5/14B": (152064, 14_770_033_664),
    "qwen2-5/32B": (152064, 32_763_876_352),
    "qwen2-5/72B": (152064, 72_706_203_648),
    "smollm2/135M": (49152, 134_515_008),
    "smollm2/360M": (49152, 361_821_120),
    "smollm2/1-7B": (49152, 1_711_376_384),
    "starcoder2/3B": (49152, 3_030_371_328),
    "starcoder2/7B": (49152, 7_173_923_840),
    "starcoder2/15B": (49152, 15_957_889_024),
    "phi2/2-7B": (51200, 2_779_683_840),
    "gptj/6B": (50400, 6_050_882_784),
    "gemma2/2B": (256000, 2_614_341_888),
    "gemma2/9B": (256000, 9_241_705_984),
    "opt/125M": (50272, 125_239_296),
    "opt/1-3B": (50272, 1_315_758_080),
    "opt/2-7B": (50272, 2_651_596_800),
    "opt/6-7B": (50272, 6_658_473_984),
    "opt/13B": (50272, 12_853_473_280),
    "opt/30B": (50272, 29_974_540_288),
    "bloom/560M": (250880, 559_214_592),
    "bloom/1-1B": (250880, 1_065_314_304),
    "bloom/1-7B": (250880, 1_722_408_960),
    "bloom/3B": (250880, 3_002_557_440),
    "bloom/7-1B": (250880, 7_069_016_064),
    "bloom/176B": (250880, 176_247_271_424),
    "falcon/1B": (50304, 1_311_625_216),
    "falcon/7B": (65024, 6_921_720_704),
    "falcon/40B": (65024, 41_303_293_952),
    "falcon/180B": (65024, 179_522_565_120),
}
# To three digits, with an embedding and a head of 50,304 rows: the sizes of GPT-3's table and their neighbours.
ROUNDED = {
    "19M": 70.4e6,
    "49M": 114e6,
    "125M": 162e6,
    "350M": 405e6,
    "760M": 834e6,
    "800M": 1.01e9,
    "1-3B": 1.41e9,
    "2-7B": 2.77e9,
    "6-7B": 6.86e9,
    "13B": 13.1e9,
    "175B": 175e9,
}


def dry_run(words, capsys):
    assert main([*words, "--dry-run"], ROOT) == 0, capsys.readouterr().err
    said = capsys.readouterr()
    assert said.err == "", "a shipped file needs no translation"
    return said.out


def commands(name):
    """The commands in the head of a file."""
    head = FILES[name].read_text().split("\n\n")[0]
    return [shlex.split(line)[1:] for line in re.findall(r"^#\s+(\./deepy\.py [^(\n]*)", head, re.MULTILINE)]


@pytest.fixture(autouse=True)
def at_home(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.delenv("DLTS_HOSTFILE", raising=False)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("char", "default")])
def test_the_size_is_the_published_one(name):
    config = load_config([str(FILES[name])])
    ranks = max(1, config.parallelism.pipe_parallel_size) * config.parallelism.model_parallel_size
    vocabulary, published = PUBLISHED.get(name, (50304, ROUNDED.get(name)))
    count = parameter_count(resolve(config, ranks, vocabulary).model)
    assert count == (published if name in PUBLISHED else pytest.approx(published, rel=0.004))


@pytest.mark.parametrize("name", MODELS)
def test_a_dry_run_of_the_file_alone_works_on_any_machine(name, capsys):
    assert "parameters: " in dry_run(["train.py", f"configs/{name}"], capsys)


@pytest.mark.parametrize("name", [name for name in FILES if name not in ("char", "default")])
def test_the_commands_in_its_head_are_right_and_the_recipe_fits_its_gpus(name, capsys):
    written = [words for words in commands(name) if words[0] == "train.py"]
    for words in written:
        text = dry_run(words, capsys)
        if any(word.startswith("gpu_memory") for word in words):
            assert "it fits into gpu_memory 80 GiB" in text
    assert written or name in MIX_INS


@pytest.mark.parametrize("name", MIX_INS)
def test_a_mix_in_goes_with_a_model(name, capsys):
    dry_run(["train.py", "-d", "configs", MIX_INS[name], name], capsys)


@pytest.mark.parametrize(
    "command",
    [
        "train.py -d configs 125M.yml local_setup.yml",
        "train.py configs",
        "train.py -d configs 125M local_setup wandb",
        "generate.py -d configs 125M.yml local_setup.yml text_generation.yml -i prompt.txt -o out.txt",
        "generate.py ./configs/20B.yml -i prompt.txt -o sample_outputs.txt",
        "generate.py ./configs/20B.yml",
        "generate.py -i prompt.txt -o out.txt",
    ],
)
def test_the_commands_of_guides_are_understood(command, capsys):
    assert command.split()[0] in dry_run(command.split(), capsys)


@pytest.mark.parametrize(
    "command",
    [
        "evaluate.py ./configs/20B.yml --eval_tasks triviaqa piqa",
        "evaluate.py -d configs 125M local_setup --eval_tasks lambada_openai piqa",
        "evaluate.py configs --eval_tasks mine --include_path tasks --num_fewshot 5 --limit 10 --eval_results_prefix P",
    ],
)
def test_the_commands_of_guides_for_evaluation_are_understood(command, capsys):
    dry_run(command.split(), capsys)


def test_a_model_does_not_go_with_a_second_one():
    with pytest.raises(ConfigError, match=r"is in .*125M\.yml:.* already"):
        load_config([str(FILES["125M"]), str(FILES["350M"])])
