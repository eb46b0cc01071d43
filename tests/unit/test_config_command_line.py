"""What a command line says."""

import pytest

from megatron.config.command_line import MERGED_FLAG, config_from_argument, merged_to_argument, parse_command_line
from megatron.config.load import config_from_flat, load_config
from megatron.config.yaml_file import parse_value
from megatron.errors import UserError


def overrides(command):
    return {key: parse_value(value) for key, _, value in (text.partition("=") for text in command.overrides)}


@pytest.mark.parametrize(
    ("line", "script", "files", "folder"),
    [
        ("train.py configs", "train.py", ("configs",), None),
        ("train.py", "train.py", (), None),
        ("train.py -d configs 125M.yml local_setup.yml", "train.py", ("125M.yml", "local_setup.yml"), "configs"),
        ("train.py 125M --conf-dir configs local", "train.py", ("125M", "local"), "configs"),
        ("./train.py a.yml seed=1 b.yml --num_gpus 2 c.yml", "./train.py", ("a.yml", "b.yml", "c.yml"), None),
    ],
)
def test_configs_stand_anywhere_between_the_options(line, script, files, folder):
    command = parse_command_line(line.split())
    assert (command.script, command.files, command.folder) == (script, files, folder)


def test_a_door_has_no_script_among_its_arguments():
    command = parse_command_line(["a.yml", "b.yml", "seed=3"], script="train.py")
    assert (command.script, command.files, command.overrides) == ("train.py", ("a.yml", "b.yml"), ("seed=3",))


def test_flags_become_keys_in_both_spellings_and_come_after_the_overrides():
    line = "train.py a.yml --num_gpus 2 --master-port=29501 -H hosts --wandb_run_name 007 num_gpus=4"
    command = parse_command_line(line.split())
    assert command.overrides[0] == "num_gpus=4"
    assert overrides(command) == {"num_gpus": 2, "master_port": 29501, "hostfile": "hosts", "wandb_run_name": "007"}


def test_text_in_a_flag_stays_the_text_it_is():
    text = 'a "quoted" {name}: # 😀\n'
    command = parse_command_line(["generate.py", "-o", text])
    assert overrides(command) == {"sample_output_file": text}


def test_an_input_file_means_that_prompts_come_from_it():
    command = parse_command_line(
        ["generate.py", "./configs/20B.yml", "-i", "prompt.txt", "-o", "out.txt", "--iteration", "10"]
    )
    assert overrides(command) == {
        "sample_input_file": "prompt.txt",
        "sample_output_file": "out.txt",
        "iteration": 10,
        "text_gen_type": "input-file",
    }


def test_tasks_are_a_list_that_ends_at_an_override():
    command = parse_command_line(
        ["evaluate.py", "-d", "configs", "125M", "local", "--eval_tasks", "triviaqa", "piqa", "seed=1"]
    )
    assert command.files == ("125M", "local")
    assert overrides(command) == {"seed": 1, "eval_tasks": ("triviaqa", "piqa")}


def test_flags_of_the_harness_have_the_names_of_the_harness_and_of_the_keys():
    expected = {"eval_tasks": ("piqa", "mine_*"), "eval_num_fewshot": 5, "eval_limit": 0.5, "eval_include_path": "mine"}
    start = ["evaluate.py", "a.yml", "--eval_tasks", "piqa", "mine_*"]
    short = ["--num_fewshot", "5", "--limit", "0.5", "--include_path", "mine"]
    long = ["--eval-num-fewshot", "5", "--eval_limit", "0.5", "--eval_include_path", "mine"]
    assert overrides(parse_command_line([*start, *short])) == expected
    assert overrides(parse_command_line([*start, *long])) == expected


def test_a_file_with_an_equals_sign_in_its_name_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b.yml").write_text("")
    assert parse_command_line(["train.py", "a=b.yml", "seed=1"]).files == ("a=b.yml",)


def test_a_long_word_is_an_override_and_a_folder_hides_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "save=x").mkdir()
    words = ["extra_save_iters=[" + "1," * 500 + "]", "wandb_run_name=" + "x" * 5000, "save=x"]
    command = parse_command_line(["train.py", "a.yml", *words])
    assert (command.files, command.overrides) == (("a.yml",), tuple(words))


def test_print_config_and_dry_run_are_noted():
    assert parse_command_line(["train.py", "--print-config"]).print_config
    assert parse_command_line(["train.py", "--dry-run"]).dry_run


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "a script is missing"),
        ("train.py --num_gpus many", "invalid int value"),
        ("train.py --no_such_flag", "--no_such_flag"),
        ("train.py --num_gpu 2", "--num_gpu"),
        (f"train.py {MERGED_FLAG} xyz", "is written by deepy.py"),
    ],
)
def test_a_wrong_command_is_a_user_error(line, message):
    with pytest.raises(UserError, match=message):
        parse_command_line(line.split())


def test_a_configuration_travels_to_the_ranks_in_one_word(tmp_path):
    flat = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "seq_length": 8, "prompt_end": "\n 😀"}
    config = config_from_flat(flat | {"optimizer": {"params": {"lr": 1e-4, "betas": [0.1, 0.2]}}})
    word = merged_to_argument(config)
    assert not set(word) & set(" \n\"'$")
    assert config_from_argument(word) == config
    command = parse_command_line([MERGED_FLAG, word], script="train.py")
    assert command.merged == config


def test_flags_outrank_the_files(tmp_path):
    file = tmp_path / "a.yml"
    file.write_text("num_layers: 2\nhidden_size: 16\nnum_attention_heads: 2\nseq_length: 8\nnum_gpus: 8\n")
    command = parse_command_line(["train.py", str(file), "--num_gpus", "2"])
    assert load_config(command.files, command.folder, command.overrides).launcher.num_gpus == 2
