"""From files to a checked Config."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from megatron.config.errors import ConfigError
from megatron.config.load import config_from_flat, find_files, load_config
from megatron.config.schema.config import group_fields, group_of_key

ROOT = Path(__file__).parents[2]
SHAPE = "num_layers: 2\nhidden_size: 16\nnum_attention_heads: 2\nseq_length: 8\n"


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write_file(name: str, text: str) -> str:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return name

    return write_file


def problems_of(*files, **arguments):
    with pytest.raises(ConfigError) as caught:
        load_config(files, **arguments)
    return list(caught.value.problems)


def test_files_are_merged_and_what_nobody_wrote_has_its_default(write):
    config = load_config([write("a.yml", SHAPE), write("b.yml", "train_iters: 7\nzero_optimization: {stage: 1}\n")])
    assert (config.model.hidden_size, config.training.train_iters) == (16, 7)
    assert config.engine.zero_optimization.stage == 1
    assert config.training.seed == 1234


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "1E-4", "0.0001"])
def test_1e_minus_4_is_a_number(write, text):
    config = load_config([write("a.yml", f"{SHAPE}min_lr: {text}\noptimizer: {{params: {{lr: {text}}}}}\n")])
    assert config.optimizer.min_lr == 1e-4
    assert config.optimizer.optimizer.params.lr == 1e-4


def test_dashes_and_underscores_are_the_same_in_a_key_at_every_depth(write):
    text = SHAPE.replace("num_layers", "num-layers") + '"data-path": x\noptimizer: {params: {weight-decay: 0.1}}\n'
    config = load_config([write("a.yml", text)])
    assert (config.model.num_layers, config.data.data_path) == (2, "x")
    assert config.optimizer.optimizer.params.weight_decay == 0.1


def test_a_key_in_two_files_is_refused_with_both_places(write):
    found = problems_of(write("a.yml", SHAPE), write("b.yml", "# more\nhidden-size: 16\n"))
    assert found == ['b.yml:2: "hidden_size" is in a.yml:2 already; keep it in one file']


def test_a_key_twice_in_one_file_is_refused_also_inside_a_group(write):
    found = problems_of(
        write("a.yml", SHAPE + "train-iters: 1\ntrain_iters: 2\nfp16:\n  enabled: true\n  enabled: false\n")
    )
    assert found == [
        'a.yml:6: "train_iters" is there already, in line 5',
        'a.yml:9: "fp16.enabled" is there already, in line 8',
    ]


def test_all_problems_are_reported_at_once_in_files_rules_and_command_line(write):
    text = "num_layers: '2'\nhidden_size: 16\nnum_attention_heads: 3\nhiden_size: 1\nnorm: rms\nseq_length: 0\n"
    found = problems_of(write("a.yml", text), overrides=["train_iters=1.5", "nonsense"])
    assert found == [
        'command line: "nonsense" is not of the form key=value',
        'a.yml:4: unknown key "hiden_size". Did you mean "hidden_size"?',
        'a.yml:1: num_layers ("2") must be a whole number; write 2 without quotation marks',
        "a.yml:6: seq_length (0) must be greater than 0",
        'a.yml:5: norm: unknown norm "rms". Did you mean "rmsnorm"? (known: layernorm, rmsnorm, '
        "rmsnorm_1p, non_parametric_layernorm, scalenorm)",
        "command line: train_iters (1.5) must be a whole number",
        "hidden_size (16) must be divisible by num_attention_heads (3); num_attention_heads 1, 2 or 4 would work, "
        "or set head_dim, the size of a head",
    ]


def test_the_message_counts_the_problems_and_names_the_files(write):
    with pytest.raises(ConfigError, match=r"^1 problem in a\.yml \+ b\.yml \+ the command line:\n  b\.yml:1: "):
        load_config([write("a.yml", SHAPE), write("b.yml", "hiden: 1")], overrides=["seed=1"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("optimizer: {type: Adamm}", 'a.yml:5: optimizer.type: unknown optimizer "adamm". Did you mean "adam"?'),
        ("optimizer: {params: {lrr: 1}}", 'a.yml:5: unknown key "optimizer.params.lrr". Did you mean "lr"?'),
        ("optimizer: {params: {lr: fast}}", 'a.yml:5: optimizer.params.lr ("fast") must be a number'),
        ("optimizer: {params: {betas: [0.9]}}", "a.yml:5: optimizer.params.betas (a list of 1) is too short"),
        ("optimizer: {params: {betas: [0.9, 2]}}", "a.yml:5: optimizer.params.betas[1] (2) must be less than 1"),
        ("optimizer: {params: {betas: [0, 0, 0]}}", "a.yml:5: optimizer.params.betas (a list of 3) must not have more"),
        ("optimizer: Adam", 'a.yml:5: optimizer ("Adam") must be a group of keys'),
        ("zero_optimization:\n  stage: 4", "a.yml:6: zero_optimization.stage (4) must be at most 3"),
        ("zero_optimization: {stge: 1}", 'a.yml:5: unknown key "zero_optimization.stge". Did you mean "stage"?'),
        ("fp16: {loss_scale: -1}", "a.yml:5: fp16.loss_scale (-1) must be at least 0"),
        ("precision: bf16", 'a.yml:5: precision ("bf16") is not supported: write bfloat16'),
        ("precision: float16", "precision (\"float16\") must be 'fp32', 'fp16' or 'bfloat16'. Did you mean"),
        ("eod_mask_loss: yes", 'a.yml:5: eod_mask_loss ("yes") must be true or false'),
        ("eod_mask_loss: 1", "a.yml:5: eod_mask_loss (1) must be true or false"),
        ("train_iters: true", "a.yml:5: train_iters (true) must be a whole number"),
        ("seed: null", "a.yml:5: seed (null) must be a whole number"),
        ("min_lr: .nan", "a.yml:5: min_lr (nan) must be a finite number"),
        ("save: [a]", "a.yml:5: save (a list of 1) must be text"),
        ("attention_config: [[[golbal], all]]", "unknown attention backend"),
        ("attention_config: [global, 2]", "a.yml:5: attention_config: must be a list of [kinds, repetitions]"),
        ("plugins: 5", "a.yml:5: plugins (5) must be a list"),
        ("plugins: [no_such_plugin]", 'a.yml:5: plugins: "no_such_plugin" cannot be imported'),
        ("master_port: 70000", "a.yml:5: master_port (70000) must be less than 65536"),
    ],
)
def test_a_wrong_value_is_named_with_its_place(write, line, message):
    found = problems_of(write("a.yml", SHAPE + line + "\n"))
    assert len(found) == 1
    assert message in found[0]


def test_a_missing_required_key_is_said_and_rules_that_read_it_stay_silent(write):
    found = problems_of(write("a.yml", SHAPE.replace("num_attention_heads: 2\n", "") + "num_kv_heads: 3\n"))
    assert found == ['"num_attention_heads" is missing; it has no default']


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1\n", "a.yml:2: this is not YAML"),
        ("a: 1\n b: 2\n", "a.yml:2: this is not YAML"),
        ("- 1\n- 2\n", "a configuration is a set of keys with values, not a list of 2"),
        ("just text", 'not "just text"'),
        ("a: 1\n---\nb: 2\n", "this is not YAML"),
    ],
)
def test_a_file_that_is_no_set_of_keys_is_refused_with_its_line(write, text, message):
    found = problems_of(write("a.yml", text), write("shape.yml", SHAPE))
    assert len(found) == 1
    assert message in found[0]


def test_a_file_that_is_not_text_is_refused(write):
    Path("a.yml").write_bytes(b"\xff\xfe\x00")
    assert "a.yml is not UTF-16-LE: byte 2" in problems_of("a.yml", write("shape.yml", SHAPE))[0]


def test_an_empty_file_adds_nothing_and_json_with_tabs_is_read(write):
    json = '{\n\t"num_layers": 2, "hidden_size": 16,\n\t"num_attention_heads": 2, "seq_length": 8, "save": "a\\tb"\n}'
    config = load_config([write("empty.yml", "# nothing\n"), write("shape.json", json)])
    assert (config.model.num_layers, config.checkpoint.save) == (2, "a\tb")


def test_overrides_replace_and_reach_into_groups(write):
    file = write("a.yml", SHAPE + "save: x\noptimizer: {type: SGD, params: {lr: 0.1, betas: [0.5, 0.9]}}\n")
    overrides = ["optimizer.params.lr=1e-4", "optimizer.params.betas=[0.8, 0.9]", "num-layers=4", "save=", "seed=0"]
    config = load_config([file], overrides=overrides)
    assert config.optimizer.optimizer.type == "sgd"
    assert config.optimizer.optimizer.params.lr == 1e-4
    assert config.optimizer.optimizer.params.betas == (0.8, 0.9)
    assert (config.model.num_layers, config.checkpoint.save, config.training.seed) == (4, None, 0)


def test_an_override_outranks_a_wrong_value_in_a_file_and_is_named_itself(write):
    file = write("a.yml", SHAPE + "train_iters: soon\n")
    assert load_config([file], overrides=["train_iters=3"]).training.train_iters == 3
    assert problems_of(file, overrides=["train_iters=later"]) == [
        'command line: train_iters ("later") must be a whole number'
    ]
    assert "is not YAML" in problems_of(file, overrides=["train_iters=[1"])[0]


def test_files_are_found_without_extension_in_a_folder_and_by_their_folder(write):
    write("configs/default.yml", SHAPE)
    write("configs/125M.yml", SHAPE)
    write("configs/local.json", "{}")
    assert [str(path) for path in find_files(["125M", "local", "125M.yml"], "configs")[0]] == [
        "configs/125M.yml",
        "configs/local.json",
        "configs/125M.yml",
    ]
    for files, folder in ((["configs"], None), (["./configs/"], None), ([], None), ([], "configs")):
        assert find_files(files, folder) == ([Path("configs/default.yml")], [])


def test_a_name_that_is_both_a_folder_and_a_file_is_taken_for_neither(write):
    write("llama/default.yml", SHAPE)
    write("llama.yml", SHAPE)
    assert problems_of("llama") == ["llama is a folder and llama.yml a file; write llama/ or llama.yml"]
    assert find_files(["llama/", "llama.yml"]) == ([Path("llama/default.yml"), Path("llama.yml")], [])


def test_missing_files_are_all_named_with_the_nearest_one(write):
    write("configs/125M.yml", SHAPE)
    assert problems_of("configs/125m", "nowhere/a.yml", "configs") == [
        "there is no file configs/125m. Did you mean configs/125M?",
        "there is no folder nowhere (for a.yml)",
        "there is no file configs/default.yml",
    ]


def test_a_config_and_its_groups_are_frozen(write):
    config = load_config([write("a.yml", SHAPE)])
    for group, key, value in (
        (config.model, "num_layers", 3),
        (config, "plugins", ()),
        (config.engine.zero_optimization, "stage", 2),
    ):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(group, key, value)
    assert isinstance(config.optimizer.optimizer.params.betas, tuple)


def test_flat_keys_come_back_as_they_were_written(write):
    text = SHAPE + "attention_config: [[[global], 2]]\noptimizer: {params: {lr: 1e-4}}\nplugins: []\n"
    config = load_config([write("a.yml", text)])
    flat = config.to_flat()
    assert flat["attention_config"] == [[["global"], 2]]
    assert flat["optimizer"] == {"params": {"lr": 1e-4}}
    assert len(flat) == 7
    assert config_from_flat(flat) == config
    assert config_from_flat(config.to_flat(with_defaults=True)).to_flat(with_defaults=True) == config.to_flat(True)


def test_a_plugin_named_in_a_file_adds_a_value(write, monkeypatch, tmp_path):
    from megatron import registry

    monkeypatch.setattr(registry, "TABLE", {kind: dict(entries) for kind, entries in registry.TABLE.items()})
    monkeypatch.syspath_prepend(tmp_path)
    write("loaded_plugin.py", 'DEEPY_REGISTRY = {"norm": {"my_norm": "loaded_plugin:norm"}}')
    assert load_config([write("a.yml", SHAPE + "norm: my_norm\nplugins: [loaded_plugin]\n")]).model.norm == "my_norm"


def test_what_a_plugin_brings_is_honoured_though_gpt_neox_has_the_name_too(write, monkeypatch, tmp_path):
    from megatron import registry

    monkeypatch.setattr(registry, "TABLE", {kind: dict(entries) for kind, entries in registry.TABLE.items()})
    monkeypatch.syspath_prepend(tmp_path)
    choice = SHAPE + "optimizer: {type: Lion}\n"
    with pytest.raises(ConfigError, match=r'optimizer.type \("Lion"\) is not supported'):
        load_config([write("a.yml", choice)])
    write("lion_plugin.py", 'DEEPY_REGISTRY = {"optimizer": {"lion": "lion_plugin:lion"}}')
    config = load_config([write("b.yml", choice + "plugins: [lion_plugin]\n")])
    assert config.optimizer.optimizer.type == "lion"


def test_every_key_is_documented_and_belongs_to_one_group():
    fields = [(key, field) for kind in group_fields().values() for key, field in kind.model_fields.items()]
    assert [key for key, field in fields if not field.description] == []
    assert len(fields) == len(group_of_key()) > 100


def test_configuration_is_checked_without_torch():
    program = (
        "import sys\n"
        "from megatron import logging, registry\n"
        "from megatron.config import command_line, load, resolve\n"
        "from megatron.estimate import describe, memory\n"
        f"config = load.load_config([{str(ROOT / 'configs')!r}])\n"
        "describe.dry_run(config, resolve.resolve(config, 2, 1000), 'train.py', [])\n"
        "heavy = {'torch', 'numpy', 'deepspeed', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_tilde_and_variables_are_expanded_in_every_path_key(write, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("RUNS", "/scratch/runs")
    keys = ("save", "load", "vocab_file", "merge_file", "log_dir", "tensorboard_dir", "memory_profiling_path")
    keys += ("hostfile", "sample_input_file", "sample_output_file", "eval_include_path", "eval_results_prefix")
    lists = [f"{part}{label}_data_paths" for part in ("train", "valid", "test") for label in ("", "_label")]
    text = "".join(f"{key}: ~/{key}\n" for key in keys) + "".join(f"{key}: [~/a, '$RUNS/b']\n" for key in lists)
    flat = load_config([write("a.yml", SHAPE + text + "eval_tasks: [x]\n")]).to_flat()
    assert [flat[key] for key in keys] == [f"/home/me/{key}" for key in keys]
    assert [flat[key] for key in lists] == [["/home/me/a", "/scratch/runs/b"]] * 6
    config = load_config(["a.yml"], overrides=["data_path=${RUNS}/x", *(f"{key}=" for key in lists), "save=a"])
    assert (config.data.data_path, config.checkpoint.save) == ("/scratch/runs/x", "a")
    assert load_config(["a.yml"], overrides=["wandb_run_name=~$RUNS"]).logging.wandb_run_name == "~$RUNS"


def test_every_text_that_names_a_file_is_a_path_key():
    from megatron.config.schema.key_group import PathText

    fields = {key: field for kind in group_fields().values() for key, field in kind.model_fields.items()}
    words = ("file", "folder of", "prefix of the .bin", "prefixes", "labels for")
    named = {key for key, field in fields.items() if str(field.description).lower().startswith(words)}
    paths = {key for key, f in fields.items() if str(PathText.__metadata__[0]) in f"{f.annotation}{f.metadata}"}
    assert named - paths == set()
    assert {"save", "load", "data_path", "train_data_paths", "hostfile", "vocab_file", "log_dir"} <= paths


def test_a_variable_that_is_not_set_is_refused_by_name(write, monkeypatch):
    monkeypatch.delenv("NO_SUCH_ROOT", raising=False)
    found = problems_of(write("a.yml", SHAPE + "save: $NO_SUCH_ROOT/run\ntrain_data_paths: [a, '${NO_SUCH_ROOT}/b']\n"))
    assert len(found) == 2
    assert found[0].startswith('a.yml:6: train_data_paths ("${NO_SUCH_ROOT}/b"): ')
    assert found[1].startswith('a.yml:5: save ("$NO_SUCH_ROOT/run"): the environment variable NO_SUCH_ROOT is not set')


def test_names_of_configurations_are_expanded_as_well(write, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write("mine/a.yml", SHAPE)
    assert find_files(["~/mine/a"]) == ([tmp_path / "mine/a.yml"], [])
    assert find_files(["a.yml"], "~/mine") == ([tmp_path / "mine/a.yml"], [])
    assert "NO_SUCH_ROOT is not set" in find_files(["$NO_SUCH_ROOT/a.yml"])[1][0]


@pytest.mark.parametrize("name", ["x" * 300, "x" * 5000, "a/" + "y" * 300, "z" * 300 + "/"])
def test_a_name_too_long_for_a_file_is_a_missing_file(write, name):
    assert "there is no f" in problems_of(name)[0]


def test_a_long_override_is_a_value(write):
    steps = list(range(1, 400))
    config = load_config([write("a.yml", SHAPE)], overrides=[f"extra_save_iters={steps}"])
    assert config.checkpoint.extra_save_iters == tuple(steps)


def test_a_hash_sign_belongs_to_the_value_of_an_override(write):
    config = load_config([write("a.yml", SHAPE)], overrides=["save=runs/try #1", "prompt_end= ###"])
    assert (config.checkpoint.save, config.generation.prompt_end) == ("runs/try #1", "###")
    assert problems_of("a.yml", overrides=["seed=5 # five"]) == [
        'command line: seed ("5 # five") must be a whole number'
    ]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path, encoding):
    (tmp_path / "a.yml").write_bytes((SHAPE + "wandb_run_name: Größe\n").encode(encoding))
    config = load_config([str(tmp_path / "a.yml")])
    assert (config.model.num_layers, config.logging.wandb_run_name) == (2, "Größe")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x1f\x8b\x08\x00" + bytes(30), "a.yml is gzip data"),
        (b"%PDF-1.7\n", "a.yml is a PDF document"),
        ("save: Größe".encode("latin-1"), "iconv"),
    ],
)
def test_a_file_that_is_something_else_is_named(write, data, message):
    Path("a.yml").write_bytes(data)
    assert message in problems_of("a.yml")[0]


def test_whole_numbers_may_be_written_as_1e3_in_files_lists_and_overrides(write):
    text = SHAPE + "train_iters: 1e3\nextra_save_iters: [1e1, 20]\nzero_optimization: {stage: 1.0}\nmaster_port: 3e4\n"
    config = load_config([write("a.yml", text)], overrides=["eval_interval=1E2", "seed=5.0"])
    assert (config.training.train_iters, config.training.eval_interval, config.training.seed) == (1000, 100, 5)
    assert (config.checkpoint.extra_save_iters, config.launcher.master_port) == ((10, 20), 30000)
    assert '"train_iters": 1000,' in json.dumps(config.to_flat())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train_iters: 1e400", "train_iters (inf) must be a whole number"),
        ("train_iters: .inf", "train_iters (inf) must be a whole number"),
        ("train_iters: 1e30", "train_iters: 1e+30 is too large; whole numbers go up to 2^63 - 1"),
        ("seed: 18446744073709551616", "seed: 1.84e+19 is too large"),
        ("min_lr: 1e400", "min_lr (inf) must be a finite number"),
        ("seed: '100'", 'seed ("100") must be a whole number; write 100 without quotation marks'),
        ("min_lr: '1e-5'", 'min_lr ("1e-5") must be a number; write 1e-5 without quotation marks'),
        ("eod_mask_loss: 'True'", 'eod_mask_loss ("True") must be true or false; write true'),
        ("eod_mask_loss: off", 'eod_mask_loss ("off") must be true or false; write false'),
        ("eod_mask_loss: 1", "eod_mask_loss (1) must be true or false; write true"),
        ("wandb_run_name: 7", "wandb_run_name (7) must be text; put it in quotation marks"),
        ("train_data_paths: a", 'train_data_paths ("a") must be a list; write [a]'),
        ("fp16: {initial_scale_power: 2000}", "fp16.initial_scale_power (2000) must be at most 127"),
        ("pipe_partition_method: 'type:a{99999999999}'", "has an invalid regular expression"),
        (f"pipe_partition_method: 'type:{'(' * 5000}'", "has an invalid regular expression"),
        ("attention_config: [[[global], 1000000000000000000]]", "gives 1000000000000000000 layers or more"),
        ("data_path: 0.3 a 0.7 b", "write train_data_paths: [a, b] and train_data_weights: [0.3, 0.7]"),
        ("wandb_run_name: [x\n", "this is not YAML"),
    ],
)
def test_surprising_numbers_and_words_are_refused_in_one_line_with_a_way_out(write, line, message):
    (found,) = problems_of(write("a.yml", SHAPE + line + "\n"))
    assert message in found
    assert "\n" not in found


def test_a_large_prime_width_is_answered_at_once(write):
    found = problems_of(write("a.yml", SHAPE.replace("hidden_size: 16", "hidden_size: 1000000000039")))
    assert "num_attention_heads 1 or 1000000000039 would work" in found[0]


@pytest.mark.parametrize("value", ["None", "none", "'null'", "null", "~", ""])
def test_none_in_any_spelling_means_unset_and_is_no_folder(write, value):
    text = SHAPE + f"save: {value}\nqk_norm: {value}\noptimizer: {{params: {{weight_decay: {value or 'None'}}}}}\n"
    told: list[str] = []
    config = load_config([write("a.yml", text)], overrides=["load=None"], tell=told.append)
    assert config.checkpoint.save is config.checkpoint.load is config.model.qk_norm is None
    assert config.optimizer.optimizer.params.weight_decay is None
    assert 'command line: load ("None") is taken as unset (null)' in told


def test_none_where_a_path_is_needed_is_refused(write):
    found = problems_of(write("a.yml", SHAPE + "sample_output_file: None\ntrain_data_paths: [None]\npos_emb: none\n"))
    assert len(found) == 2
    assert 'a.yml:5: sample_output_file ("None") would be a file of that name; leave the key out' in found[1]
    assert 'train_data_paths ("None")' in found[0]


@pytest.mark.parametrize(
    ("value", "text"),
    [("100", "100"), ("[969, 30, 1]", "969, 30, 1"), ("0.9", "0.9"), ('"100,0,0"', "100,0,0"), ("90,10", "90,10")],
)
def test_a_split_may_be_a_number_or_a_list(write, value, text):
    assert load_config([write("a.yml", f"{SHAPE}split: {value}\n")]).data.split == text
    assert load_config(["a.yml"], overrides=["split=100"]).data.split == "100"
    assert "split" in problems_of("a.yml", overrides=["split=true"])[0]


def test_tasks_may_be_separated_by_commas(write):
    config = load_config([write("a.yml", SHAPE + "eval_tasks: piqa, winogrande\n")])
    assert config.evaluation.eval_tasks == ("piqa", "winogrande")
    assert load_config(["a.yml"], overrides=["eval_tasks=[a, 'b,c']"]).evaluation.eval_tasks == ("a", "b", "c")


def test_an_override_inside_of_what_is_not_a_group_is_refused(write):
    found = problems_of(write("a.yml", SHAPE + "optimizer: Adam\n"), overrides=["optimizer.params.lr=1"])
    assert found[0] == 'a.yml:5: optimizer ("Adam") is not a group with params'
    assert "unknown key" in problems_of("a.yml", overrides=[f"{'a.' * 3000}b=1"])[0]
