"""What must hold between keys."""

import pytest

from megatron.config.errors import ConfigError
from megatron.config.load import config_from_flat

SHAPE = {"num_layers": 4, "hidden_size": 48, "num_attention_heads": 12, "seq_length": 8}
TRAINING = {"train_iters": 10, "train_batch_size": 4, "data_impl": "mock"}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4}


def check(keys, script=None):
    return config_from_flat(SHAPE | keys, script=script)


BROKEN = [
    (
        {"num_attention_heads": 10},
        "hidden_size (48) must be divisible by num_attention_heads (10);",
    ),
    (
        {"seq_length": 10, "sequence_parallel": True, "model_parallel_size": 4},
        "seq_length (10) must be divisible by model_parallel_size (4), as sequence_parallel is true; 12 would work",
    ),
    (
        {"seq_length": 9, "context_parallel_size": 2},
        "seq_length (9) must be divisible by context_parallel_size (2); 10 would work",
    ),
    (
        {"num_kv_heads": 4, "context_parallel_size": 4, "model_parallel_size": 2},
        "num_attention_heads (12) / model_parallel_size (2) must be divisible by context_parallel_size (4); 2, 3 or 6",
    ),
    (
        {"context_parallel_size": 2, "pipe_parallel_size": 2},
        "context_parallel_size (2) excludes a pipeline (pipe_parallel_size 2)",
    ),
    ({"head_dim": 5, "pos_emb": "rotary"}, "rotary_pct (1) rotates 5 of the 5 elements of a head"),
    ({"norm_placement": "output", "gpt_j_residual": True}, "norm_placement (output) and gpt_j_residual (true) exclude"),
    ({"prometheus_textfile": "a.txt"}, 'prometheus_textfile ("a.txt") must end in .prom'),
    ({"use_wandb": True, "wandb_project": "a/b#c"}, 'wandb_project ("a/b#c") must not contain # /, which'),
    ({"norm": "rmsnorm", "norm_bias": False}, "norm_bias (false) has no effect with norm rmsnorm"),
    (
        {"norm": "scalenorm", "qk_norm": "head"},
        "qk_norm (head) needs norm layernorm, rmsnorm or rmsnorm_1p, not scalenorm; leave qk_norm out",
    ),
    (
        {"pos_emb": "rotary", "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        "rope_scaling.rope_type (llama3) needs low_freq_factor, high_freq_factor, original_max_position_embeddings",
    ),
    (
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        "rope_scaling.rope_type (linear) needs pos_emb rotary, not learned",
    ),
    (
        {"pos_emb": "rotary", "rope_scaling": {"factor": 2.0}},
        "rope_scaling: rope_type default does not use factor",
    ),
    (
        {
            "pos_emb": "rotary",
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 4.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 4,
            },
        },
        "rope_scaling.low_freq_factor (4) must be below high_freq_factor (4)",
    ),
    ({"rpe_max_distance": 64}, "rpe_max_distance (64) has no effect with pos_emb learned; leave it out"),
    ({"pos_emb": "rpe", "rpe_num_buckets": 1}, "rpe_num_buckets (1) must be at least 2"),
    (
        {"pos_emb": "rpe", "rpe_max_distance": 16},
        "rpe_max_distance (16) must be above half of rpe_num_buckets (32), whose distances have a bucket each; 128",
    ),
    (
        {"pos_emb": "rotary", "rope_scaling": {"rope_type": "longrope", "factor": 8.0}},
        "rope_scaling.rope_type (longrope) needs original_max_position_embeddings, short_factor, long_factor",
    ),
    (
        {
            "pos_emb": "rotary",
            "rope_scaling": {
                "rope_type": "longrope",
                "factor": 8.0,
                "original_max_position_embeddings": 4,
                "short_factor": [1.0],
                "long_factor": [2.0, 3.0],
            },
        },
        "rope_scaling.short_factor has 1 factors, but a head has 2 rotated pairs of elements",
    ),
    (
        {"pos_emb": "rotary", "rope_scaling": {**YARN, "beta_slow": 40.0}},
        "rope_scaling.beta_slow (40) must be below beta_fast (32)",
    ),
    (
        {"pos_emb": "rotary", "rope_scaling": {**YARN, "mscale": 1.0}},
        "rope_scaling: mscale and mscale_all_dim have an effect together only",
    ),
    (
        {"pos_emb": "rotary", "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "attention_factor": 1.0}},
        "rope_scaling: mscale and mscale_all_dim have no effect with attention_factor",
    ),
    (
        {
            "pos_emb": "rotary",
            "rotary_pct": 0.5,
            "rope_scaling": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 4},
        },
        "rope_scaling.rope_type (dynamic) needs at least 4 rotated elements of a head, not 2",
    ),
    ({"head_bias": True}, "head_bias (true) needs no_weight_tying (false)"),
    ({"pos_emb": "rotary", "position_offset": 2}, "position_offset (2) has no effect with pos_emb rotary"),
    (
        {"pos_emb": "sinusoidal", "hidden_size": 51, "num_attention_heads": 3},
        "pos_emb (sinusoidal) needs an even hidden_size, not 51",
    ),
    ({"rotary_interleaved": True}, "rotary_interleaved (true) has no effect with pos_emb learned"),
    (
        {"pos_emb": "rotary", "no_rope_layer_interval": 5},
        "no_rope_layer_interval (5) is more than num_layers (4)",
    ),
    (
        {"pos_emb": "rotary", "rotary_emb_base_local": 100.0},
        "rotary_emb_base_local (100) has no effect without local layers in attention_config",
    ),
    (
        {"model_parallel_size": 8},
        "num_attention_heads (12) must be divisible by model_parallel_size (8); 4, 6 or 12 would work",
    ),
    (
        {"num_kv_heads": 5},
        "num_attention_heads (12) must be divisible by num_kv_heads (5); num_kv_heads 3, 4 or 6",
    ),
    (
        {"num_kv_heads": 3, "head_dim": 1, "pos_emb": "learned", "model_parallel_size": 4},
        "num_kv_heads (3) x head size (1) must be divisible by model_parallel_size (4); 1 or 3 would work",
    ),
    (
        {"ffn_hidden_size": 30, "model_parallel_size": 4},
        "(30) must be divisible by model_parallel_size (4)",
    ),
    (
        {"ffn_hidden_size": 30, "mlp_multiple_of": 16},
        "(30) must be a multiple of mlp_multiple_of (16); 32",
    ),
    ({"ffn_hidden_size": 96, "intermediate_size": 96}, "set the same thing; keep ffn_hidden_size"),
    ({"max_position_embeddings": 4}, "max_position_embeddings (4) must be at least seq_length (8)"),
    ({"pos_emb": "rotary", "rotary_pct": 0.8}, "rotary_pct (0.8) rotates 3 of the 4 elements of a head"),
    ({"gpt_j_tied": True}, "gpt_j_tied (true) needs gpt_j_residual (false)"),
    ({"attention_config": [[["global"], 3]]}, "attention_config gives 3 layers, but num_layers is 4"),
    ({"attention_config": [[["global"] * 3, "all"]]}, "repeats 3 kinds, which does not divide num_layers (4)"),
    ({"attention_config": [[["local"], "all"]]}, "which need sliding_window_width"),
    ({"sliding_window_width": 4}, "sliding_window_width (4) has no effect without local layers"),
    (
        {"padded_vocab_size": 100, "model_parallel_size": 3},
        "padded_vocab_size (100) must be divisible by",
    ),
    ({"pipe_parallel_size": 8}, "num_layers (4) must be at least pipe_parallel_size (8)"),
    ({"pipe_parallel_size": 2, "zero_optimization": {"stage": 2}}, "zero_optimization.stage (2) excludes a pipeline"),
    (
        {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
        "zero_optimization.offload_optimizer (cpu) needs zero_optimization.stage 1, 2 or 3, not 0",
    ),
    (
        {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
        "zero_optimization.offload_param (cpu) needs zero_optimization.stage 3, not 2",
    ),
    (
        {"precision": "bfloat16", "data_types": {"grad_accum_dtype": "fp16"}},
        "data_types.grad_accum_dtype (fp16) does not fit weights in bf16; leave it unset, or use fp32 or bf16",
    ),
    (
        {"data_types": {"grad_accum_dtype": "bf16"}},
        "data_types.grad_accum_dtype (bf16) does not fit weights in fp32; leave it unset, or use fp32",
    ),
    (
        {"recompute_granularity": "selective"},
        "recompute_granularity (selective) needs checkpoint_activations (false); set it to true",
    ),
    (
        {
            "recompute_granularity": "selective",
            "checkpoint_activations": True,
            "zero_optimization": {"stage": 3},
        },
        "recompute_granularity (selective) with zero_optimization.stage 3 needs compile (true), not unset",
    ),
    (
        {
            "recompute_granularity": "selective",
            "checkpoint_activations": True,
            "compile": True,
            "partition_activations": True,
            "checkpoint_in_cpu": True,
        },
        "with compile (true) excludes partition_activations (true) and checkpoint_in_cpu (true)",
    ),
    (
        {"async_tensor_parallel": True, "compile": True, "model_parallel_size": 2},
        "async_tensor_parallel (true) needs sequence_parallel (false) and model_parallel_size (2) of at least 2",
    ),
    (
        {"async_tensor_parallel": True, "sequence_parallel": True, "model_parallel_size": 2},
        "async_tensor_parallel (true) needs compile (true), not unset",
    ),
    ({"precision_linear": "float8", "seq_length": 16}, "precision_linear (float8) needs weights in bfloat16, not fp32"),
    (
        {
            "precision_linear": "float8",
            "precision": "bfloat16",
            "seq_length": 16,
            "ffn_hidden_size": 72,
        },
        "ffn_hidden_size (72) must be divisible by 16; 80 would work, or leave precision_linear out",
    ),
    (
        {"pipe_partition_method": "best"},
        '("best") must be "type:REGEX", "parameters" or "uniform"',
    ),
    ({"pipe_partition_method": "type:mamba"}, 'pipe_partition_method ("type:mamba") matches no layer'),
    ({"pipe_partition_method": "type:("}, "has an invalid regular expression"),
    (
        {"precision": "fp32", "fp16": {"enabled": True}},
        "precision (fp32) and fp16.enabled (true) contradict",
    ),
    ({"bf16": {"enabled": True}, "fp16": {"fp16": True}}, "fp16.enabled (true) and bf16.enabled (true) contradict"),
    ({"precision": "fp16", "fp16": {"enabled": False}}, "precision (fp16) and fp16.enabled (false) contradict"),
    ({"weight_decay": 0.1, "optimizer": {"params": {"weight_decay": 0.2}}}, "weight_decay (0.1) and optimizer.params"),
    ({"lr_decay_iters": 5, "lr_decay_fraction": 0.5}, "lr_decay_iters (5) and lr_decay_fraction (0.5) set the same"),
    ({"min_lr": 0.01}, "min_lr (0.01) must not be above optimizer.params.lr (0.001)"),
    ({"split": "90, ten"}, 'split ("90, ten") must be one to three shares'),
    ({"split": "0, 0, 0"}, "must be one to three shares"),
    ({"split": "-1, 2, 1"}, "must be one to three shares"),
    ({"finetune": True}, "finetune (true) needs load"),
    ({"iteration": 5}, "iteration (5) needs load"),
    ({"text_gen_type": "input-file"}, "needs sample_input_file"),
    ({"sample_input_format": "jsonl"}, "sample_input_format (jsonl) needs sample_input_file"),
    ({"chat": True}, "chat (true) needs messages: from sample_input_file"),
    ({"minimum_tokens": 65}, "minimum_tokens (65) must be at most maximum_tokens (64); lower it"),
    ({"json_schema": "{}", "regex": "a"}, "json_schema and regex exclude each other; keep one"),
    ({"regex": "a", "ignore_end_of_document": True}, "ignore_end_of_document (true) excludes regex"),
    (
        {"num_beams": 4, "temperature": 0.5, "min_p": 0.1},
        "num_beams (4) excludes temperature (0.5) and min_p (0.1), which choose tokens at random; leave them out, or",
    ),
    (
        {"num_beams": 4, "num_samples": 2, "stop": "x", "logprobs": 0},
        "num_beams (4) excludes num_samples (2) and stop (a list of 1) and logprobs (0), because a search writes one",
    ),
    (
        {"length_penalty": 2.0, "early_stopping": True},
        "length_penalty (2.0) and early_stopping (true) need a beam search",
    ),
    ({"include": "localhost:0", "num_gpus": 1}, "include (localhost:0) and num_gpus (1) exclude each other"),
    ({"eval_num_fewshot": 5, "eval_limit": 0.5}, "eval_num_fewshot (5) and eval_limit (0.5) need eval_tasks"),
    ({"eval_batch_size": 4}, "eval_batch_size (4) need eval_tasks"),
    ({"eval_chat_template": True}, "eval_chat_template (true) need eval_tasks"),
    (
        {"eval_stride": 4, "eval_split": "test", "eval_tasks": ["piqa"]},
        'eval_split ("test") and eval_stride (4) set how perplexity is measured, which eval_tasks replaces',
    ),
    (
        {"eval_stride": 4, "eval_references": "a.jsonl"},
        "eval_stride (4) set how perplexity is measured, which eval_references replaces",
    ),
    ({"eval_tasks": ["piqa"], "eval_references": "a.jsonl"}, "eval_tasks and eval_references (a.jsonl) exclude each"),
    ({"eval_references": "a.txt"}, "eval_references (a.txt) needs sample_input_file"),
    (
        {"eval_references": "a.jsonl", "sample_input_file": "b.txt"},
        "eval_references (a.jsonl) holds prompts itself; leave out sample_input_file (b.txt)",
    ),
    ({"eval_data": ["a.txt"], "eval_split": "test"}, "eval_data and eval_split (test) each name the text to score"),
    ({"eval_stride": 9}, "eval_stride (9) must be at most seq_length (8)"),
]


@pytest.mark.parametrize(("keys", "message"), BROKEN, ids=[" ".join(keys) for keys, _ in BROKEN])
def test_a_broken_rule_names_both_values_and_a_way_out(keys, message):
    with pytest.raises(ConfigError) as caught:
        check(keys)
    assert len(caught.value.problems) == 1
    assert message in caught.value.problems[0]


RIGHT = [
    {},
    {"num_kv_heads": 4, "model_parallel_size": 4, "ffn_hidden_size": 28},
    {"num_kv_heads": 1, "model_parallel_size": 2, "context_parallel_size": 2, "seq_length": 16},
    {"num_kv_heads": 3, "model_parallel_size": 2},
    {"attention_config": [[["global", "local"], 1], [["flash"], 2]], "sliding_window_width": 3},
    {"gpt_j_tied": True, "gpt_j_residual": True},
    {"text_gen_type": "interactive", "chat": True, "minimum_tokens": 64},
    {"sample_input_file": "-", "sample_input_format": "jsonl", "chat": True, "regex": "a"},
    {"num_beams": 4, "length_penalty": 2.0, "early_stopping": True, "repetition_penalty": 1.2},
    {"norm_bias": False, "qk_norm": "each_head"},
    {"norm": "rmsnorm_1p", "qk_norm": "head"},
    {"pipe_parallel_size": 4, "zero_optimization": {"stage": 1}},
    {"pipe_partition_method": "type:transformer|mlp"},
    {"weight_decay": 0.2, "optimizer": {"params": {"weight_decay": 0.2}}},
    {"eval_num_fewshot": 0, "eval_limit": 10, "eval_include_path": "mine", "eval_tasks": ["piqa"]},
    {"eval_data": "a.txt", "eval_stride": 8},
    {"eval_references": "a.txt", "sample_input_file": "b.txt"},
    {"eval_references": "a.jsonl"},
    {"optimizer": {"params": {"weight_decay": 0.2}}},
    {"fp16": {"fp16": True, "enabled": True}, "precision": "fp16"},
    {"split": "1"},
    {"split": "995/4/1"},
    {"iteration": 5, "save": "x"},
]


@pytest.mark.parametrize("keys", RIGHT, ids=[" ".join(keys) or "shape" for keys in RIGHT])
def test_what_belongs_together_passes(keys):
    check(keys)


def test_intermediate_size_with_a_gate_is_refused_with_both_lines_to_paste():
    with pytest.raises(ConfigError) as caught:
        check(
            {
                "hidden_size": 4096,
                "num_attention_heads": 32,
                "activation": "swiglu",
                "intermediate_size": 32768,
                "mlp_multiple_of": 256,
            }
        )
    (problem,) = caught.value.problems
    assert '"ffn_hidden_size": 11008 ' in problem
    assert '"ffn_hidden_size": 32768 ' in problem


@pytest.mark.parametrize(
    ("keys", "missing"),
    [
        ({"train_iters": None}, '"train_iters" is missing'),
        ({"train_batch_size": None}, "train_batch_size or train_micro_batch_size_per_gpu is missing"),
        ({"data_impl": "mmap"}, '"data_path" is missing'),
    ],
)
def test_training_needs_more_than_the_model(keys, missing):
    check(TRAINING, script="train.py")
    check(TRAINING | keys)
    with pytest.raises(ConfigError, match=missing):
        check(TRAINING | keys, script="train.py")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"checkpoint_factor": 5}, r"max_restarts \(3\) needs save, the folder"),
        ({"save": "run"}, r"max_restarts \(3\) needs checkpoint_factor, the steps"),
    ],
)
def test_restarts_need_checkpoints_to_start_from(keys, message):
    again = TRAINING | {"max_restarts": 3}
    check(again | {"save": "run", "checkpoint_factor": 5}, script="train.py")
    check(again | {"load": "x"} | keys, script="generate.py")
    with pytest.raises(ConfigError, match=message):
        check(again | keys, script="train.py")


PROFILE = {"profile": True, "log_dir": "logs", "profile_step_start": 2, "profile_step_stop": 4}


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"log_dir": None}, r"profile \(true\) writes files, but neither log_dir nor save is set; set log_dir"),
        (
            {"log_dir": None, "profile": False, "memory_profiling": True},
            r"memory_profiling \(true\) writes files, but has no folder; set memory_profiling_path",
        ),
        ({"profile_step_stop": 2}, r"profile_step_stop \(2\) must be above profile_step_start \(2\)"),
        (
            {"profile_step_start": 10, "profile_step_stop": 12},
            r"profile_step_start \(10\) steps, but the run ends after train_iters \(10\)",
        ),
    ],
)
def test_a_profile_needs_steps_and_a_folder(keys, problem):
    check(TRAINING | PROFILE, script="train.py")
    with pytest.raises(ConfigError, match=problem):
        check(TRAINING | PROFILE | keys, script="train.py")
    check(TRAINING | PROFILE | keys | {"profile": False, "memory_profiling": False}, script="train.py")
    check(TRAINING | PROFILE | keys | {"save": "x"}, script="evaluate.py")


REWIND = {"on_loss_spike": "rewind", "save": "x", "checkpoint_factor": 4, "keep_last_n_checkpoints": 4}


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"save": None}, r"on_loss_spike \(rewind\) goes back to a checkpoint, but save is not set"),
        ({"checkpoint_factor": None}, r"without checkpoint_factor the only one is that of the end"),
        (
            {"keep_last_n_checkpoints": 3},
            r"loss_spike_patience \(8\) and checkpoint_factor \(4\) needs keep_last_n_checkpoints of at least 4, not 3",
        ),
    ],
)
def test_a_rewind_finds_a_checkpoint(keys, problem):
    check(TRAINING | REWIND)
    with pytest.raises(ConfigError, match=problem):
        check(TRAINING | REWIND | keys)
    check(TRAINING | REWIND | keys | {"on_loss_spike": "warn"})


def test_with_zero_3_there_are_no_replicas_to_compare():
    check(TRAINING | {"check_replicas_interval": 10, "zero_optimization": {"stage": 2}})
    with pytest.raises(ConfigError, match=r"with zero_optimization.stage 3 each element is held once"):
        check(TRAINING | {"check_replicas_interval": 10, "zero_optimization": {"stage": 3}})


def test_the_memory_of_a_run_needs_no_other_place_than_its_own():
    keys = {"profile": False, "memory_profiling": True, "memory_profiling_path": "memory", "log_dir": None}
    check(TRAINING | PROFILE | keys, script="train.py")
    check(TRAINING | PROFILE | {"log_dir": None, "save": "checkpoints"}, script="train.py")


@pytest.mark.parametrize("script", ["generate.py", "evaluate.py"])
def test_reading_a_model_needs_a_checkpoint_and_nothing_of_training(script):
    check({"save": "somewhere"}, script=script)
    with pytest.raises(ConfigError, match='"load" is missing'):
        check({}, script=script)
