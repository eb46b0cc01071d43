"""Every key of GPT-NeoX and its meaning here, as data, from which `docs/from-neox.md` is generated.

Keys with the same answer share an entry. HONOURED keys are fields of Config; their lines name differences. A key that
becomes a field moves from TRANSLATED or REFUSED to HONOURED, which the tests check.
"""

from collections.abc import Mapping
from typing import Any

from megatron.config.neox.translate import EXTRA_ARGS, Answer, Change

# Keys that keep their meaning, with differences from GPT-NeoX.
HONOURED: dict[str, str] = {
    "pipe_parallel_size": "0 and 1 both mean no pipeline",
    "model_parallel_size": "",
    "sequence_parallel": "model_parallel_size must divide seq_length",
    "pipe_partition_method": "blocks are called TransformerBlock; type:transformer|mlp matches them too",
    "precision": "",
    "num_layers": "",
    "hidden_size": "",
    "num_attention_heads": "",
    "num_kv_heads": "need not be divisible by model_parallel_size",
    "intermediate_size": "for activations without a gate; with a gated one it is refused, because GPT-NeoX counts it "
    "three times: write ffn_hidden_size, as the message proposes",
    "mlp_multiple_of": "the default width is rounded up; a written width must be a multiple",
    "seq_length": "",
    "sliding_window_width": "for local layers of attention_config",
    "max_position_embeddings": "unset: seq_length",
    "norm": "",
    "layernorm_epsilon": "",
    "rms_norm_epsilon": "added to the mean square; GPT-NeoX adds it to the root",
    "scalenorm_epsilon": "",
    "pos_emb": "rpe has a table in each layer, where GPT-NeoX has one in each "
    "stage of the pipeline, whose values it multiplies by the square root of the head size",
    "no_weight_tying": "",
    "attention_config": "global, flash and local",
    "make_vocab_size_divisible_by": "model_parallel_size must divide the result and does not multiply it, so that the "
    "model does not depend on the layout",
    "activation": "a gated one without ffn_hidden_size gets 8/3 of hidden_size, in GPT-NeoX 4/3; a line reports it",
    "init_method_std": "",
    "rpe_num_buckets": "",
    "rpe_max_distance": "",
    "rotary_pct": "",
    "rotary_emb_base": "",
    "init_method": "xavier_* and orthogonal of a whole matrix, gate and up apart; in GPT-NeoX of a rank's part, with "
    "gate and up as one",
    "output_layer_init_method": "as init_method",
    "gpt_j_residual": "",
    "gpt_j_tied": "",
    "use_bias_in_attn_linear": "",
    "use_bias_in_mlp": "works with gpt_j_residual and without a gate too",
    "lr_decay_style": "linear and cosine decay from the peak to min_lr at the last decay step; GPT-NeoX decays to 0 "
    "and clamps at min_lr. exponential is GPT-NeoX's: half of the peak at the end",
    "lr_decay_iters": "",
    "lr_decay_fraction": "",
    "min_lr": "",
    "warmup": "the learning rate of the first step is not 0",
    "use_wandb": "off unless true; an API key alone does not turn it on",
    "wandb_group": "",
    "wandb_run_name": "",
    "wandb_team": "",
    "wandb_project": "",
    "wandb_host": "",
    "log_param_norm": "with each log line, of the whole model under every layout",
    "log_grad_norm": "as log_param_norm; the norm of all gradients is in every log line",
    "log_optimizer_states": "as log_param_norm",
    "log_gradient_noise_scale": "in every layout, in samples",
    "gradient_noise_scale_n_batches": "",
    "use_comet": "off unless true; an API key alone does not turn it on",
    "comet_workspace": "",
    "comet_project": "",
    "comet_experiment_name": "",
    "comet_tags": "",
    "comet_others": "",
    "log_dir": "rank_N.log and metrics.jsonl",
    "tensorboard_dir": "",
    "peak_theoretical_tflops": "not needed for known GPUs",
    "log_interval": "",
    "wall_clock_breakdown": "in the log line and metrics.jsonl, regardless of steps_per_print",
    "profile": "traces and kernel tables of all ranks are in the folder profile of log_dir, not in tensorboard_dir",
    "profile_step_start": "",
    "profile_step_stop": "later steps are not profiled, as in GPT-NeoX",
    "memory_profiling": "for the profiled steps of every rank, with or without profile; a table on a CPU",
    "memory_profiling_path": "a folder; unset: the folder profile of log_dir",
    "distributed_backend": "nccl or gloo",
    "eod_mask_loss": "",
    "seed": "",
    "iteration": "",
    "tokenizer_type": "",
    "padded_vocab_size": "unset: derived from the tokenizer",
    "data_path": "",
    **{f"{part}_data_paths": "valid and test are optional" for part in ("train", "valid", "test")},
    **{f"{part}_data_weights": "exact at every step to within one sample" for part in ("train", "valid", "test")},
    **{f"{part}_label_data_paths": "" for part in ("train", "valid", "test")},
    "weight_by_num_documents": "excludes explicit weights",
    "weighted_sampler_alpha": "weights are documents ** alpha, as GPT-NeoX documents; its code multiplies by 1 - p",
    "pack_impl": "",
    "allow_chopped": "with pack_until_overflow and unpacked only",
    "data_impl": "infer means mmap; mock is random text",
    "save": "also saves at the end of the run; the format does not depend on the layout and is not DeepSpeed's",
    "load": "a folder without a checkpoint is an error unless it is save",
    "checkpoint_factor": "unset: only at the end",
    "checkpoint_scale": "log: after 1, f, f², ... steps, with f = checkpoint_factor",
    "extra_save_iters": "never deleted",
    "no_load_optim": "the optimizer is still created",
    "no_load_rng": "random state is not saved: dropout and data order are functions of seed and step",
    "finetune": "",
    "train_iters": "",
    "eval_iters": "always the same samples; 0: no validation",
    "keep_last_n_checkpoints": "",
    "eval_interval": "",
    "split": "",
    "vocab_file": "",
    "merge_file": "",
    "num_workers": "",
    "exit_interval": "",
    "attention_dropout": "",
    "hidden_dropout": "",
    "weight_decay": "not applied to norms and biases, as in GPT-NeoX",
    "checkpoint_activations": "",
    "checkpoint_num_layers": "",
    "partition_activations": "no effect with sequence_parallel, which shards them already",
    "checkpoint_in_cpu": "",
    "fp32_allreduce": "",
    "text_gen_type": "unconditional, input-file or interactive",
    "temperature": "",
    "top_p": "",
    "top_k": "",
    "return_logits": "",
    "maximum_tokens": "",
    "prompt_end": "",
    "sample_input_file": "",
    "sample_output_file": "",
    "num_samples": "",
    "eval_results_prefix": "",
    "eval_tasks": "tasks, groups and tags; all documents unless eval_limit is set, in GPT-NeoX 10",
    "train_batch_size": "",
    "train_micro_batch_size_per_gpu": "",
    "gradient_accumulation_steps": "unset: derived from the other two sizes, else 1",
    "optimizer": "type and params; Adam is AdamW, as in GPT-NeoX",
    "optimizer.type": "",
    "optimizer.params": "",
    "optimizer.params.lr": "1e-4 is a number",
    "optimizer.params.betas": "",
    "optimizer.params.eps": "",
    "fp16": "",
    "fp16.enabled": "",
    "fp16.loss_scale": "0: dynamic",
    "fp16.loss_scale_window": "",
    "fp16.hysteresis": "",
    "fp16.min_loss_scale": "",
    "fp16.initial_scale_power": "",
    "bf16": "",
    "bf16.enabled": "",
    "gradient_clipping": "",
    "zero_optimization": "stages 0 to 3; offload_optimizer and offload_param to the CPU, not to NVMe",
    "zero_optimization.stage": "fp16 with stage 0 runs as stage 1; 1 and 2 run as 0 with a single replica",
    "zero_optimization.allgather_partitions": "",
    "zero_optimization.allgather_bucket_size": "",
    "zero_optimization.overlap_comm": "",
    "zero_optimization.reduce_scatter": "",
    "zero_optimization.reduce_bucket_size": "",
    "zero_optimization.contiguous_gradients": "",
    "data_types": "",
    "data_types.grad_accum_dtype": "",
    "hostfile": "DLTS_HOSTFILE and /job/hostfile work too",
    "include": "",
    "exclude": "",
    "num_nodes": "-1 (all) is the same as unset",
    "num_gpus": "processes per node, on CPU nodes too",
    "master_port": "unset: a free one",
    "master_addr": "",
    "launcher": "unset: pdsh with a hostfile of several hosts, slurm inside an allocation, else local",
    "comment": "passed to srun by launcher slurm; other launchers ignore it",
}


def _leave_out_if_gelu(value: Any, keys: Mapping[str, Any]) -> dict[str, Any] | None:
    return {"activation": "gelu_tanh"} if value is True and keys.get("activation", "gelu") == "gelu" else {}


def _bfloat16(value: Any, keys: Mapping[str, Any]) -> dict[str, Any] | None:
    fp16 = keys["fp16"]
    on = fp16.pop("enabled", fp16.pop("fp16", True)) is not False
    return {"bf16.enabled": on} if value == "bfloat16" else {"fp16.enabled": on}


def _launcher(name: str) -> Change:
    """A switch that chooses a launcher."""
    return lambda value, _: {"launcher": name} if value is True else {}


_FUSION = "torch's kernels and torch.compile replace the fused kernel; results are the same"
_SUBSIDIARY = "it belongs to a feature that is not supported"
_DEAD = "GPT-NeoX declares it but never reads it"

# Keys that are replaced by others, or that have no effect here.
TRANSLATED: tuple[tuple[tuple[str, ...], Answer], ...] = (
    (("fp16.fp16",), Answer("translated", "DeepSpeed's key is enabled", change=lambda v, _: {"fp16.enabled": v})),
    (("bf16.bf16",), Answer("translated", "DeepSpeed's key is enabled", change=lambda v, _: {"bf16.enabled": v})),
    (("fp16.type",), Answer("translated", "bf16 has its own group", change=_bfloat16)),
    (("fp16.auto_cast",), Answer("translated", "the model's inputs are token ids, which are not cast")),
    (
        tuple(
            f"bf16.{key}"
            for key in ("loss_scale", "loss_scale_window", "initial_scale_power", "hysteresis", "min_loss_scale")
        ),
        Answer("translated", "bfloat16 has the range of fp32 and needs no loss scale"),
    ),
    (
        ("zero_optimization.cpu_offload",),
        Answer(
            "translated",
            "DeepSpeed's name since 2021",
            change=lambda value, _: {"zero_optimization.offload_optimizer.device": "cpu" if value else "none"},
        ),
    ),
    (("recompute",), Answer("translated", "keys and values are always cached, with the same texts up to rounding")),
    (
        ("save_interval",),
        Answer("translated", "its name since 2022", change=lambda value, _: {"checkpoint_factor": value}),
    ),
    (
        ("bias_gelu_fusion",),
        Answer(
            "translated",
            "GPT-NeoX's fused kernel is the tanh form of gelu, which differs from gelu; otherwise no effect",
            change=_leave_out_if_gelu,
        ),
    ),
    (
        (
            "layernorm_fusion",
            "rmsnorm_fusion",
            "use_flashattn_swiglu",
            "scaled_upper_triang_masked_softmax_fusion",
            "scaled_masked_softmax_fusion",
            "bias_dropout_fusion",
            "rope_fusion",
        ),
        Answer("translated", _FUSION),
    ),
    (("fused_kernels_build_path",), Answer("translated", "there are no kernels to build")),
    (
        ("attention_softmax_in_fp32", "apply_query_key_layer_scaling"),
        Answer("translated", "all attention kernels here compute the softmax in fp32"),
    ),
    (
        ("use_cpu_initialization",),
        Answer("translated", "weights are always initialized on the CPU, identically in every layout"),
    ),
    (("rotary_save_freqs_buffer",), Answer("translated", "checkpoints contain parameters only")),
    (("onnx_safe",), Answer("translated", "gelu is exact, and ONNX export is not supported")),
    (
        ("param_sharing_style", "use_bias_in_norms", "short_seq_prob", "deepscale", "deepscale_config"),
        Answer("translated", _DEAD),
    ),
    (("adlr_autoresume", "adlr_autoresume_interval", "no_save_optim"), Answer("translated", _DEAD)),
    (("hysteresis", "loss_scale_window", "min_scale"), Answer("translated", f"{_DEAD}; write them in the group fp16")),
    (("mup_attn_temp", "mup_output_temp", "moe_lbl_in_fp32"), Answer("translated", _DEAD)),
    (("weight_server_port", "te_fp8_margin"), Answer("translated", _DEAD)),
    (("output_layer_parallelism",), Answer("translated", "the output layer is always sharded along the vocabulary")),
    (("gmlp_attn_dim",), Answer("translated", _SUBSIDIARY)),
    (
        (
            "mamba_selective_scan_fusion",
            "mamba_causal_conv_fusion",
            "mamba_inner_func_fusion",
            "mamba_selective_fp32_params",
            "mamba_use_bias_in_conv",
            "mamba_use_bias_in_linears",
            "dim_att",
            "ffn_dim",
        ),
        Answer("translated", "only for Mamba and RWKV layers, which are not supported"),
    ),
    (
        ("head_size",),
        Answer("translated", "only for RWKV layers, which are not supported; for attention write head_dim"),
    ),
    (
        ("sparsity_config", "sparsity_config.block", "sparsity_config.num_local_blocks"),
        Answer("translated", _SUBSIDIARY),
    ),
    (
        (
            "te_fp8_format",
            "te_fp8_wgrad",
            "te_fp8_amax_history_len",
            "te_fp8_amax_compute_algo",
            "online_dataserver_ips",
            "online_dataserver_ports",
            "precompute_model_name",
            "s3_chunk_size",
        ),
        Answer("translated", _SUBSIDIARY),
    ),
    (
        (
            "dpo_fp32",
            "dpo_reference_free",
            "dpo_beta",
            "kto_fp32",
            "kto_desirable_weight",
            "kto_undesirable_weight",
            "kto_beta",
            "fp32_reinforce",
            "kl_impl",
            "kl_div_beta",
            "reinforce_leave_one_out",
        ),
        Answer("translated", "only for preference training (train_impl), which is not supported"),
    ),
    (
        ("mup_init_scale", "mup_embedding_mult", "mup_rp_embedding_mult", "mup_width_scale", "base_shapes_file"),
        Answer("translated", "only for use_mup, which is not supported"),
    ),
    (
        ("moe_expert_interval", "moe_top_k", "moe_router_type", "moe_jitter_eps"),
        Answer("translated", "only for experts (moe_num_experts), which are not supported"),
    ),
    (("override_lr_scheduler",), Answer("translated", "the schedule always comes from the configuration")),
    (("gradient_noise_scale_cpu_offload",), Answer("translated", "the sum of gradients stays where they are")),
    (("lazy_mpu_init",), Answer("translated", "ranks always initialize communication at the start")),
    (
        ("use_shared_fs",),
        Answer("translated", "no index files are written next to the data"),
    ),
    (("mmap_warmup",), Answer("translated", "the operating system reads ahead")),
    (("zero_optimization.load_from_fp32_weights",), Answer("translated", "checkpoints always contain fp32 weights")),
    (("no_save_rng",), Answer("translated", "random state is never saved")),
    (
        ("deepspeed_activation_checkpointing",),
        Answer("translated", "deprecated in GPT-NeoX; see checkpoint_activations"),
    ),
    (
        ("contiguous_checkpointing", "synchronize_each_layer"),
        Answer("translated", "torch's allocator and streams make it unnecessary; results are the same"),
    ),
    (("steps_per_print", "dump_state"), Answer("translated", "log_interval sets the interval of log lines")),
    (("profile_backward",), Answer("translated", "every profile includes the backward pass")),
    (("flops_profiler",), Answer("translated", "it measures only; FLOP/s and MFU are in the log line")),
    (
        (
            "comms_logger",
            *(f"{EXTRA_ARGS}.comms_logger{key}" for key in ("", ".enabled", ".verbose", ".prof_all", ".debug")),
        ),
        Answer("translated", "it measures only; profile: true traces the communication, NCCL_DEBUG=INFO logs it"),
    ),
    (
        ("opt_pos_emb_offset",),
        Answer(
            "translated",
            "the table of positions has so many rows more than max_position_embeddings, which counts them in GPT-NeoX",
            change=lambda value, _: {"position_offset": value},
        ),
    ),
    (("deepspeed_slurm",), Answer("translated", "ranks start through srun", change=_launcher("slurm"))),
    (("deepspeed_mpi",), Answer("translated", "ranks start through mpirun", change=_launcher("openmpi"))),
    (("no_ssh_check", "force_multi"), Answer("translated", "the launcher detects it")),
)

_SET_BY_CODE = "it is derived; leave it out"
_POST_TRAINING = "preference training is not supported"

# Keys that stop the run with exit code 2, unless their value has no effect.
REFUSED: tuple[tuple[tuple[str, ...], Answer], ...] = (
    (
        (
            "world_size",
            "is_pipe_parallel",
            "git_hash",
            "local_rank",
            "rank",
            "user_script",
            "do_train",
            "do_valid",
            "do_test",
            "config_files",
            "batch_size",
            "dynamic_loss_scale",
            "comet_experiment",
        ),
        Answer("refused", _SET_BY_CODE),
    ),
    (
        ("global_num_gpus",),
        Answer("refused", "--dry-run with num_nodes and num_gpus plans for other machines"),
    ),
    (("expansion_factor",), Answer("refused", "write ffn_hidden_size, the true width (factor x hidden_size)")),
    (
        ("use_qk_layernorm",),
        Answer(
            "refused",
            "its numbers depend on model_parallel_size; write qk_norm: head, each_head or full",
        ),
    ),
    (("num_unique_layers",), Answer("refused", "layers do not share weights, in GPT-NeoX neither; leave it out")),
    (("fp16_lm_cross_entropy",), Answer("refused", "the loss is always computed in fp32; leave it out")),
    (("soft_prompt_tuning",), Answer("refused", "train the weights instead: finetune: true with load")),
    (("serve_model_weights",), Answer("refused", "use checkpoints (save)")),
    (
        ("te_columnparallel", "te_rowparallel", "te_layernorm_mlp", "te_mha", "te_fp8_mha"),
        Answer("refused", "Transformer Engine is not supported; leave it out to run the same layers in torch, in bf16"),
    ),
    (("optimizer_type",), Answer("refused", "write optimizer: {type: ...}")),
    (("lr",), Answer("refused", "write optimizer: {params: {lr: ...}}")),
    (("clip_grad",), Answer("refused", "write gradient_clipping")),
    (("loss_scale",), Answer("refused", "write fp16: {loss_scale: ...}")),
    (("use_bnb_optimizer",), Answer("refused", "8-bit optimizer states are not supported; use ZeRO to shard them")),
    (
        (
            "zero_stage",
            "zero_reduce_scatter",
            "zero_contiguous_gradients",
            "zero_reduce_bucket_size",
            "zero_allgather_bucket_size",
        ),
        Answer("refused", "write it in the group zero_optimization"),
    ),
    (
        ("use_checkpoint_lr_scheduler",),
        Answer("refused", "the schedule comes from the configuration; write the checkpoint's learning rate keys there"),
    ),
    (
        ("wandb_init_all_ranks",),
        Answer("refused", "only rank 0 reports to Weights & Biases; each rank has its own log in log_dir"),
    ),
    (
        ("log_grad_pct_zeros",),
        Answer("refused", "it is not measured; log_grad_norm writes the norm of each parameter's gradient"),
    ),
    (
        tuple(f"{part}_reward_data_paths" for part in ("train", "valid", "test"))
        + tuple(f"{side}_{part}_data_paths" for side in ("pos", "neg") for part in ("train", "valid", "test"))
        + tuple(f"{side}_{part}_label_data_paths" for side in ("pos", "neg") for part in ("train", "valid", "test")),
        Answer("refused", _POST_TRAINING),
    ),
    (("dataset_impl",), Answer("refused", _POST_TRAINING, harmless=("gpt2",))),
    (("train_impl",), Answer("refused", _POST_TRAINING, harmless=("normal",))),
    (("z_loss",), Answer("refused", "GPT-NeoX reads it only for reward models", harmless=(0, 0.0))),
    (("s3_path",), Answer("refused", "copy finished checkpoints from save with the store's own tool")),
    (
        ("checkpoint_validation_with_forward_pass",),
        Answer("refused", "use evaluate.py; names and shapes are always checked when a checkpoint is loaded"),
    ),
    (("train_epochs",), Answer("refused", "write train_iters: epochs x tokens / (train_batch_size x seq_length)")),
    (("char_level_ppl",), Answer("refused", "evaluate.py always reports perplexity per token, word and byte")),
    (("use_mup", "coord_check", "save_base_shapes"), Answer("refused", "muP is not supported; set lr and init_method")),
    (
        ("moe_num_experts",),
        Answer(
            "refused", "experts are not supported; a larger ffn_hidden_size makes a dense layer wider", harmless=(1,)
        ),
    ),
    (("deepspeed",), Answer("refused", "DeepSpeed is always used; leave it out", harmless=(True,))),
    (("scheduler",), Answer("refused", "write lr_decay_style, warmup and min_lr")),
    (
        ("communication_data_type",),
        Answer("refused", "gradients are reduced in the format of their sums; fp32_allreduce chooses fp32 or 16 bits"),
    ),
    (
        ("prescale_gradients", "gradient_predivide_factor"),
        Answer("refused", "gradients are averaged after the sum; leave it out", harmless=(1, 1.0)),
    ),
    (("sparse_gradients",), Answer("refused", "embedding gradients are dense; leave it out")),
    (("amp",), Answer("refused", "write precision: fp16 or bfloat16")),
    (
        ("curriculum_learning", "curriculum_seqlen", "data_efficiency"),
        Answer("refused", "samples always have seq_length tokens", harmless=(0,)),
    ),
    (("autotuning", "autotuning_run"), Answer("refused", "compare layouts with --dry-run instead")),
    (("activation_checkpointing",), Answer("refused", "write checkpoint_activations and checkpoint_num_layers")),
    (("sparse_attention",), Answer("refused", "write attention_config with local layers")),
    (("tensorboard",), Answer("refused", "write tensorboard_dir")),
    (("wandb",), Answer("refused", "write use_wandb, wandb_project and the other wandb keys")),
    (("csv_monitor",), Answer("refused", "metrics.jsonl in log_dir has all metrics")),
    (("elasticity",), Answer("refused", "stop the run and resume from save on any number of ranks")),
    (("compression_training",), Answer("refused", "compression is not supported")),
    (("checkpoint",), Answer("refused", "write save, load and checkpoint_factor")),
    (("deepspeed_extra_args",), Answer("refused", "write a group of DeepSpeed's keys, or those keys themselves")),
    (("account",), Answer("refused", "pass it to sbatch or salloc")),
)

# Single values of honoured keys, lower case.
VALUES: dict[tuple[str, object], Answer] = {
    ("activation", "swish"): Answer("translated", "the same function", change=lambda value, _: {"activation": "silu"}),
    ("norm", "te_rmsnorm"): Answer("translated", "the same norm in torch", change=lambda value, _: {"norm": "rmsnorm"}),
    ("norm", "te_layernorm"): Answer("translated", "the same norm in torch", change=lambda v, _: {"norm": "layernorm"}),
    **{
        ("optimizer.type", name): Answer("refused", "Adam or SGD would work; ZeRO shards their states")
        for name in ("onebitadam", "cpu_adam", "cpu_torch_adam", "sm3", "madgrad_wd", "lion")
    },
    ("precision", "bf16"): Answer("refused", "write bfloat16"),
    ("data_impl", "cached"): Answer("refused", "encode the text again with tools/preprocess_data.py (mmap)"),
    ("text_gen_type", "precompute"): Answer("refused", "return_logits: true also writes logits"),
    ("num_nodes", -1): Answer("translated", "unset means all nodes", change=lambda value, _: {}),
    ("launcher", "mvapich"): Answer("refused", "use openmpi, or torchrun under any scheduler"),
}


def _table() -> dict[str, Answer]:
    table = {key: Answer("honoured", line) for key, line in HONOURED.items()}
    for keys, answer in (*TRANSLATED, *REFUSED):
        table |= dict.fromkeys(keys, answer)
    return table


ANSWERS: dict[str, Answer] = _table()

# Keys of DeepSpeed's own settings, which deepspeed_extra_args may contain; each is a field or has an answer.
DEEPSPEED_KEYS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "optimizer",
    "scheduler",
    "prescale_gradients",
    "gradient_predivide_factor",
    "sparse_gradients",
    "fp16",
    "bf16",
    "amp",
    "gradient_clipping",
    "zero_optimization",
    "curriculum_learning",
    "steps_per_print",
    "wall_clock_breakdown",
    "dump_state",
    "flops_profiler",
    "communication_data_type",
    "autotuning",
    "activation_checkpointing",
    "sparse_attention",
    "data_efficiency",
    "tensorboard",
    "wandb",
    "csv_monitor",
    "elasticity",
    "comms_logger",
    "compression_training",
    "checkpoint",
    "data_types",
)
