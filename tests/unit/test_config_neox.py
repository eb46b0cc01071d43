"""Every key of GPT-NeoX has an answer: honoured, translated with a line, or refused with a way out."""

import json
from pathlib import Path

import pytest

from megatron import registry
from megatron.config.errors import ConfigError
from megatron.config.load import load_config
from megatron.config.neox.answers import ANSWERS, HONOURED, VALUES
from megatron.config.resolve import resolve
from megatron.config.schema.config import group_fields, group_of_key

LIST = Path(__file__).with_name("neox_keys.txt").read_text().splitlines()
NEOX_KEYS = [line for line in LIST if line and line[0] not in "#["]
SHAPE = "num_layers: 2\nhidden_size: 16\nnum_attention_heads: 2\nseq_length: 8\n"


def load(tmp_path, text, shape=SHAPE):
    file = tmp_path / "neox.yml"
    file.write_text(shape + text)
    told: list[str] = []
    return load_config([str(file)], tell=told.append), [line.replace(f"{tmp_path}/", "") for line in told]


def problems(tmp_path, text):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    return [problem.replace(f"{tmp_path}/", "") for problem in caught.value.problems]


def is_a_field(key: str) -> bool:
    """Whether Config has the key, nested ones too."""
    first, *rest = key.split(".")
    if first not in group_of_key():
        return False
    kind = group_fields()[group_of_key()[first]].model_fields[first].annotation
    for part in rest:
        if part not in getattr(kind, "model_fields", {}):
            return False
        kind = kind.model_fields[part].annotation
    return True


def test_the_list_is_whole():
    assert len(NEOX_KEYS) == len(set(NEOX_KEYS)) == 356
    assert len([key for key in NEOX_KEYS if "." not in key]) == 318


@pytest.mark.parametrize("key", NEOX_KEYS)
def test_every_key_has_one_answer_that_the_code_keeps(key):
    answer = ANSWERS[key]
    if answer.kind == "honoured":
        assert is_a_field(key), "honoured, but no field of Config has this name"
    else:
        assert not is_a_field(key), "a field now: it belongs to HONOURED in answers.py"
        assert answer.line, "the answer must say why"


def test_no_key_has_two_answers():
    from megatron.config.neox import answers

    keys = [*HONOURED, *(key for keys, _ in (*answers.TRANSLATED, *answers.REFUSED) for key in keys)]
    assert len(keys) == len(set(keys))


def test_a_value_that_is_answered_is_not_a_registered_name():
    kinds = {
        "activation": "activation",
        "norm": "norm",
        "pos_emb": "position_embedding",
        "init_method": "init_method",
        "output_layer_init_method": "init_method",
        "optimizer.type": "optimizer",
        "launcher": "launcher",
    }
    assert [pair for pair in VALUES if pair[0] in kinds and pair[1] in registry.names(kinds[pair[0]])] == []


REFUSED = [key for key, answer in ANSWERS.items() if answer.kind == "refused" and "." not in key]


@pytest.mark.parametrize("key", REFUSED)
def test_a_refused_key_stops_with_its_line_and_passes_where_it_says_what_happens_anyway(key, tmp_path):
    (problem,) = problems(tmp_path, f"{key}: 17\n")
    assert problem == f"neox.yml:5: {key} (17) is not supported: {ANSWERS[key].line}"
    for value in (None, *ANSWERS[key].harmless):
        _, told = load(tmp_path, f"{key}: {json.dumps(value)}\n")
        assert told == [f"neox.yml:5: {key} ({json.dumps(value)}) is left out: it changes nothing here"]


TRANSLATED = [key for key, answer in ANSWERS.items() if answer.kind == "translated" and "." not in key]


@pytest.mark.parametrize("key", TRANSLATED)
def test_a_translated_key_is_never_dropped_without_a_line(key, tmp_path):
    _, told = load(tmp_path, f"{key}: 17\n")
    assert len(told) == 1
    assert told[0].startswith(f"neox.yml:5: {key} (17) is ")
    assert told[0].endswith(ANSWERS[key].line)


@pytest.mark.parametrize(
    ("text", "expected", "lines"),
    [
        ("fp16: {fp16: true, loss_scale: 0}", "fp16", ["neox.yml:5: fp16.fp16 (true) is taken as fp16.enabled: true"]),
        ("bf16: {bf16: true}", "bf16", ["neox.yml:5: bf16.bf16 (true) is taken as bf16.enabled: true"]),
        ("fp16:\n  type: bfloat16\n  enabled: true", "bf16", ['neox.yml:6: fp16.type ("bfloat16") is taken as bf16.e']),
        ("fp16: {type: bfloat16}", "bf16", ['neox.yml:5: fp16.type ("bfloat16") is taken as bf16.enabled: true']),
        ("fp16: {enabled: false, type: bfloat16}", "fp32", ['fp16.type ("bfloat16") is taken as bf16.enabled: false']),
        ("fp16: {type: fp16}", "fp16", ['fp16.type ("fp16") is taken as fp16.enabled: true']),
        ("bf16: {enabled: true, loss_scale: 0}", "bf16", ["bf16.loss_scale (0) is left out: bfloat16 has the range"]),
    ],
)
def test_number_formats_in_the_ways_its_files_write_them(text, expected, lines, tmp_path):
    config, told = load(tmp_path, text + "\n")
    assert resolve(config, 1, 100).engine.precision == expected
    assert len(told) == len(lines)
    for line, start in zip(told, lines, strict=True):
        assert start in line


def test_two_ways_of_one_setting_that_contradict_each_other_are_refused(tmp_path):
    assert problems(tmp_path, "fp16: {fp16: true, enabled: false}\n") == [
        "neox.yml:5: fp16.fp16 (true) and fp16.enabled (false) contradict each other; keep fp16.enabled"
    ]


def test_the_fused_gelu_of_its_files_is_the_tanh_gelu_it_was(tmp_path):
    config, told = load(tmp_path, "bias_gelu_fusion: true\n")
    assert config.model.activation == "gelu_tanh"
    assert "bias_gelu_fusion (true) is taken as activation" in told[0]
    assert load(tmp_path, "bias_gelu_fusion: true\nactivation: relu\n")[0].model.activation == "relu"
    assert load(tmp_path, "bias_gelu_fusion: false\n")[0].model.activation == "gelu"


def test_a_gated_default_width_which_differs_is_told(tmp_path):
    shape = SHAPE.replace("hidden_size: 16", "hidden_size: 48")
    config, told = load(tmp_path, "activation: swiglu\n", shape)
    assert told == [
        "activation (swiglu) without ffn_hidden_size: the width is 128, two thirds of 4 x hidden_size; "
        "in GPT-NeoX it is 64. Set ffn_hidden_size to choose"
    ]
    assert resolve(config, 1, 100).model.ffn_hidden_size == 128
    assert load(tmp_path, "activation: swiglu\nffn_hidden_size: 128\n", shape)[1] == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer: {type: OneBitAdam}", 'optimizer.type ("OneBitAdam") is not supported: Adam'),
        ("zero_optimization: {offload_optimizer: {device: nvme}}", "zero_optimization.offload_optimizer.device"),
        ("deepspeed: false", "deepspeed (false) is not supported"),
        ("deepspeed_extra_args: {no_such_key: 1}", "deepspeed_extra_args.no_such_key (1) is not supported"),
        ("activation: swiglu\nintermediate_size: 32768", "has two meanings with the gated activation"),
        ("moe_num_experts: 8", "moe_num_experts (8) is not supported: experts are not supported"),
    ],
)
def test_what_would_be_another_run_is_refused_once(text, message, tmp_path):
    (problem,) = problems(tmp_path, text + "\n")
    assert message in problem


def test_a_typical_file_of_it_loads_and_each_key_that_does_nothing_is_told(tmp_path):
    text = """"pipe-parallel-size": 1
"model-parallel-size": 1
"max-position-embeddings": 8
"norm": "layernorm"
"pos-emb": "rotary"
"no-weight-tying": true
"gpt-j-residual": false
"output-layer-parallelism": "column"
"scaled-upper-triang-masked-softmax-fusion": false
"bias-gelu-fusion": false
"rope-fusion": false
"layernorm-fusion": false
"init_method": "small_init"
"output_layer_init_method": "wang_init"
"optimizer": {"type": "Adam", "params": {"lr": 0.0006, "betas": [0.9, 0.95], "eps": 1.0e-8}}
"min_lr": 0.00006
"zero_optimization": {"stage": 1, "allgather_partitions": True, "allgather_bucket_size": 500000000,
  "overlap_comm": True, "reduce_scatter": True, "reduce_bucket_size": 500000000, "contiguous_gradients": True}
"train_micro_batch_size_per_gpu": 4
"data-impl": "mmap"
"checkpoint-activations": true
"checkpoint-num-layers": 1
"partition-activations": true
"synchronize-each-layer": true
"gradient_clipping": 1.0
"weight-decay": 0.1
"hidden-dropout": 0.0
"attention-dropout": 0.0
"fp16": {"enabled": true, "loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1}
"train-iters": 320000
"lr-decay-iters": 320000
"distributed-backend": "nccl"
"lr-decay-style": "cosine"
"warmup": 0.01
"checkpoint-factor": 10000
"eval-interval": 1000
"eval-iters": 10
"log-interval": 100
"steps_per_print": 10
"keep-last-n-checkpoints": 4
"wall_clock_breakdown": true
"""
    config, told = load(tmp_path, text)
    assert config.engine.checkpoint_activations
    assert [line.split(": ")[1].split(" (")[0] for line in told] == [
        "output_layer_parallelism",
        "scaled_upper_triang_masked_softmax_fusion",
        "bias_gelu_fusion",
        "rope_fusion",
        "layernorm_fusion",
        "synchronize_each_layer",
        "steps_per_print",
    ]


def test_ranks_do_not_repeat_what_was_told(tmp_path, capsys, monkeypatch):
    (tmp_path / "a.yml").write_text(SHAPE + "steps_per_print: 10\n")
    monkeypatch.setenv("RANK", "1")
    load_config([str(tmp_path / "a.yml")])
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    load_config([str(tmp_path / "a.yml")])
    assert capsys.readouterr().err.count("\n") == 1


def test_its_switches_for_a_launcher_choose_that_launcher(tmp_path):
    config, told = load(tmp_path, "deepspeed_slurm: true\ncomment: neox\n")
    assert (config.launcher.launcher, config.launcher.comment) == ("slurm", "neox")
    assert told == ['neox.yml:5: deepspeed_slurm (true) is taken as launcher: "slurm": ranks start through srun']
    assert load(tmp_path, "deepspeed_slurm: true\nlauncher: slurm\n")[0].launcher.launcher == "slurm"
    assert load(tmp_path, "deepspeed_mpi: true\n")[0].launcher.launcher == "openmpi"
    assert load(tmp_path, "deepspeed_slurm: false\n")[0].launcher.launcher is None
    assert problems(tmp_path, "deepspeed_slurm: true\nlauncher: pdsh\n") == [
        'neox.yml:5: deepspeed_slurm (true) and launcher ("pdsh") contradict each other; keep launcher'
    ]


def test_extra_args_of_deepspeed_are_the_keys_of_the_same_names(tmp_path):
    text = """deepspeed_extra_args:
  comms_logger: {enabled: true, verbose: true, prof_all: true, debug: false}
  wall_clock_breakdown: true
  gradient_clipping: 0.5
  bf16: {bf16: true}
  zero_optimization: {stage: 1, cpu_offload: false}
  optimizer: {type: SGD, params: {lr: 0.1}}
  steps_per_print: 10
"""
    config, told = load(tmp_path, text)
    assert (config.profiling.wall_clock_breakdown, config.optimizer.gradient_clipping) == (True, 0.5)
    assert resolve(config, 2, 100).engine.precision == "bf16"
    assert config.engine.zero_optimization.stage == 1
    assert (config.optimizer.optimizer.type, config.optimizer.optimizer.params.lr) == ("sgd", 0.1)
    said = "".join(told)
    assert "neox.yml:6: deepspeed_extra_args.comms_logger (a group of keys) is taken as the key comms_logger" in said
    assert "neox.yml:6: comms_logger (a group of keys) is left out: it measures only" in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{sparse_attention: {mode: fixed}}", "sparse_attention (a group of keys) is not supported: write attention_c"),
        ("{nebula: {enabled: true}, seed: 1}", "deepspeed_extra_args.nebula (a group of keys) is not supported"),
        ("{hidden_size: 8}", "deepspeed_extra_args.hidden_size (8) is not supported"),
        ("{gradient_clipping: 0.5}\ngradient_clipping: 2", "and the key gradient_clipping contradict each other"),
        ("{gradient_clipping: much}", 'neox.yml:5: gradient_clipping ("much") must be a number'),
        ("true", "deepspeed_extra_args (true) is not supported"),
    ],
)
def test_extra_args_without_a_key_here_are_refused_by_name(text, message, tmp_path):
    assert message in problems(tmp_path, f"deepspeed_extra_args: {text}\n")[0]


def test_what_may_stand_in_extra_args_has_an_answer():
    from megatron.config.neox.answers import DEEPSPEED_KEYS

    assert [key for key in DEEPSPEED_KEYS if key not in ANSWERS] == []
