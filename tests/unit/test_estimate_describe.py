"""--print-config, --dry-run and the arithmetic behind them."""

import pytest

from megatron.config.load import config_from_flat, load_config
from megatron.config.parameter_counts import checkpoint_bytes, held_parameters, parameter_count
from megatron.config.resolve import resolve
from megatron.estimate.describe import dry_run, plan_lines, print_config

SHAPE = {"num_layers": 4, "hidden_size": 48, "num_attention_heads": 12, "seq_length": 8, "train_iters": 100}


def planned(world_size=1, vocab_size=1000, **keys):
    config = config_from_flat(SHAPE | {"train_batch_size": 4} | keys)
    return config, resolve(config, world_size, vocab_size)


def test_a_printed_configuration_gives_the_same_plan_again(tmp_path):
    config, plan = planned(
        2,
        activation="swiglu",
        optimizer={"params": {"lr": 1e-4, "betas": [0.9, 0.95]}},
        attention_config=[[["global", "local"], "all"]],
        sliding_window_width=3,
        fp16={"type": "bfloat16"},
        lr_decay_fraction=0.5,
        prompt_end="\n",
        save="here",
    )
    (tmp_path / "printed.yml").write_text(print_config(config, plan))
    again = load_config([str(tmp_path / "printed.yml")])
    assert resolve(again, 2, 1000) == plan
    assert again.model.num_kv_heads == 12
    assert again.optimizer.lr_decay_iters == 50
    assert again.logging.log_dir == "here/logs"


def test_a_dry_run_says_layout_sizes_and_what_it_could_not_check():
    config, plan = planned(4, 50304, model_parallel_size=2, data_path="there", load="elsewhere")
    text = dry_run(config, plan, "train.py", ["something"])
    for part in (
        "train.py would run on 4 ranks",
        "4 ranks = pipeline 1 x data 2 x tensor 2",
        "4 samples = micro-batch 2 x accumulation 1 x 2 data-parallel",
        "tokens per step: 32",
        "100 steps, 3.20k tokens",
        f"parameters: {parameter_count(plan.model):,}",
        "FLOPs per token: 15.2 MFLOP by the common formula, 6 N + 12 L n d T (486 MFLOP per step)",
        "FLOPs per token: 15.2 MFLOP executed (485 MFLOP per step)",
        "checkpoint: 0.03 GB",
        "stage 0, ranks 0-3: embedding, blocks 0 to 3, final norm, head; ",
        "every matrix is sharded over 2 adjacent ranks (tensor parallelism)",
        "memory of a rank, in GiB",
        "set gpu_memory=80 to see whether it fits",
        "not checked:\n  something\n  tokenizer: GPT2BPETokenizer; the vocabulary size is assumed to be 50,304",
        "data: there",
        "checkpoint: elsewhere",
    ):
        assert part in text


def test_a_run_says_how_its_gradients_are_reduced_and_what_that_costs():
    bf16 = {"precision": "bfloat16", "num_layers": 1, "hidden_size": 4096, "num_attention_heads": 32}
    zero_1 = bf16 | {"train_batch_size": 16, "zero_optimization": {"stage": 1, "overlap_comm": True}}

    def said(world=4, **keys):
        config, plan = planned(world, **keys)
        lines = [line for line in plan_lines(plan) if line.startswith("gradients: ")]
        assert all(f"  {line}" in dry_run(config, plan, "train.py", []) for line in lines)
        return lines

    # P = 205.6 million parameters: 2 x 3/4 x 4 P = 1.23 GB, 6 P, 4 P / 4
    assert said(**zero_1, train_micro_batch_size_per_gpu=1) == [
        "gradients: averaged over 4 replicas in fp32, once a step, after the backward pass: each rank sends 1.23 GB; "
        "ZeRO 2 would send 4 times as much; ZeRO 1 keeps 1.23 GB of gradients instead of 0.21 GB; overlap_comm has no "
        "effect here"
    ]
    assert said(**zero_1, train_micro_batch_size_per_gpu=1, gpu_memory=1) == [
        "gradients: averaged over 4 replicas in fp32, for each of 4 micro-batches, during the backward pass: each rank "
        "sends 4.93 GB; ZeRO 2 instead of 1 sends 4 times as much, but stage 1 would not fit, and keeps 0.21 GB of "
        "fp32 sums"
    ]
    assert said(**zero_1) == [
        "gradients: averaged over 4 replicas in bf16, once a step, during the backward pass: each rank sends 0.62 GB"
    ]
    assert said(**bf16 | {"zero_optimization": {"stage": 3}}) == [
        "gradients: averaged over 4 replicas in bf16, once a step, during the backward pass: each rank sends 0.31 GB"
    ]
    assert said(1, **zero_1) == []


def test_a_dry_run_says_what_host_memory_an_asynchronous_save_takes():
    for zero, said in ((0, "0.02 GB of host memory on 2 of 4 ranks"), (1, "0.01 GB of host memory on each rank")):
        settings = {"model_parallel_size": 2, "async_save": True, "zero_optimization": {"stage": zero}}
        config, plan = planned(4, 50304, data_path="there", **settings)
        assert f"  async_save: {said}, pinned on a GPU\n" in dry_run(config, plan, "train.py", [])
        assert "async_save" not in dry_run(*planned(4, 50304, model_parallel_size=2), "train.py", [])


def test_a_stated_vocabulary_is_used_and_named():
    config, plan = planned(vocab_size=512, padded_vocab_size=512)
    assert "the vocabulary size is assumed to be padded_vocab_size 512" in dry_run(config, plan, "train.py", [])


@pytest.mark.parametrize(
    ("layers", "hidden", "heads", "billions"),
    # sizes of GPT-3's table and of GPT-NeoX-20B, with embeddings of 50304 rows
    [(12, 768, 12, 0.162), (24, 1024, 16, 0.405), (24, 2048, 16, 1.41), (32, 4096, 32, 6.86), (44, 6144, 64, 20.5)],
)
def test_known_models_have_their_known_size(layers, hidden, heads, billions):
    keys = {"num_layers": layers, "hidden_size": hidden, "num_attention_heads": heads, "seq_length": 2048}
    _, plan = planned(vocab_size=50304, pos_emb="rotary", no_weight_tying=True, **keys)
    assert parameter_count(plan.model) / 1e9 == pytest.approx(billions, rel=0.005)


MODELS = [
    {},
    {"no_weight_tying": True, "pos_emb": "rotary", "norm": "rmsnorm", "activation": "swiglu", "num_kv_heads": 4},
    {"gpt_j_residual": True, "gpt_j_tied": True, "use_bias_in_mlp": False, "pos_emb": "none"},
    {"use_bias_in_attn_linear": False, "activation": "geglu", "max_position_embeddings": 20},
]


@pytest.mark.parametrize("keys", MODELS, ids=[" ".join(keys) or "default" for keys in MODELS])
def test_the_estimate_counts_what_the_model_has(keys):
    from megatron.engine.distributed import start, stop
    from megatron.model.gpt import gpt_layers

    _, plan = planned(vocab_size=1001, **keys)
    try:
        layers = gpt_layers(plan.model, start(backend="gloo"), seed=1)
        modules = [layer.build() for number, layer in enumerate(layers) if layer.tied is None or number == 0]
    finally:
        stop()
    parameters = [parameter for module in modules for parameter in module.parameters()]
    held = held_parameters(plan.model, 1, range(plan.model.num_layers + 3))
    assert held == sum(parameter.numel() for parameter in parameters)
    padding = plan.model.padded_vocab_size - plan.model.vocab_size
    rows = padding * plan.model.hidden_size * (1 if plan.model.tied_embeddings else 2)
    assert parameter_count(plan.model) == held - rows


def test_a_dry_run_says_what_is_recomputed_and_where_documents_make_it_a_bound():
    plain = dry_run(*planned(), "train.py", [])
    assert "FLOP executed" in plain and "recomputed" not in plain
    apart = dry_run(*planned(reset_attention_mask=True, checkpoint_activations=True), "train.py", [])
    assert "FLOP at most executed" in apart and "FLOP more recomputed" in apart


def test_a_checkpoint_takes_twelve_bytes_a_parameter_with_adam_and_eight_with_sgd():
    plan = planned()[1]
    assert checkpoint_bytes(plan) == 12 * parameter_count(plan.model)
    assert checkpoint_bytes(planned(optimizer={"type": "SGD"})[1]) == 8 * parameter_count(plan.model)
