"""README.md of an exported model: what it is and how it was trained, from the record of the run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.checkpoint.state import TrainState
from megatron.config.parameter_counts import parameter_count
from megatron.config.plan import ModelPlan
from megatron.convert.family import Family
from megatron.units import perplexity, short_number

HEADER = "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [deepy]\n---\n"
# Keys of the configuration that a reader wants to know, with what the card calls them.
RECORDED = {
    "seq_length": "Tokens in a sequence",
    "train_batch_size": "Sequences in a batch",
    "lr_decay_style": "Schedule",
    "warmup": "Warm-up, share of the steps",
    "min_lr": "Lowest learning rate",
    "weight_decay": "Weight decay",
    "gradient_clipping": "Gradients clipped at",
    "precision": "Precision",
    "attention_dropout": "Dropout of attention",
    "hidden_dropout": "Dropout of hidden states",
    "seed": "Seed",
    "data_path": "Data",
    "train_data_paths": "Data",
    "train_data_weights": "Weights of the data",
    "load": "Started from",
}
PATHS = {"data_path", "train_data_paths", "load"}


def model_card(
    name: str,
    family: Family,
    model: ModelPlan,
    keys: Mapping[str, Any],
    state: TrainState,
    validation_loss: float | None,
) -> str:
    """The text. keys: the flat configuration of the run."""
    attention = f"{model.num_attention_heads} attention heads, {model.num_kv_heads} for keys and values"
    return "\n".join(
        [
            f"{HEADER}\n# {name}\n",
            f"A language model with {short_number(parameter_count(model))} parameters: {model.num_layers} layers of "
            f"width {model.hidden_size}, {attention}, a vocabulary of {model.vocab_size:,} ids, up to "
            f"{model.max_position_embeddings:,} tokens. Its architecture is {family.name} (`{family.architecture}`).\n",
            *_training(keys, state, validation_loss),
            "## Use\n",
            "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n",
            f'model = AutoModelForCausalLM.from_pretrained("{name}")',
            f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n```\n',
        ]
    )


def _training(keys: Mapping[str, Any], state: TrainState, validation_loss: float | None) -> list[str]:
    if state.step == 0:
        return ["The weights are as they came: this conversion trained nothing.\n"]
    rows = {"Steps": f"{state.step:,}", "Tokens": f"{state.consumed_tokens:,}"}
    optimizer = keys.get("optimizer")
    if isinstance(optimizer, dict):
        parameters = {name: value for name, value in optimizer.get("params", {}).items() if value is not None}
        settings = ", ".join(f"{name} {value}" for name, value in parameters.items())
        rows["Optimizer"] = f"{optimizer.get('type', '')}: {settings}"
    for key, title in RECORDED.items():
        value = keys.get(key)
        if value not in (None, [], ()):
            rows[title] = _shown(value, is_path=key in PATHS)
    if (lora := keys.get("lora") or {}).get("rank"):
        rows["LoRA, merged"] = f"rank {lora['rank']}, alpha {lora['alpha']}, {', '.join(lora['targets'])}"
    if validation_loss is not None:
        rows["Validation loss"] = f"{validation_loss:.4f} (perplexity {perplexity(validation_loss):.2f})"
    return [
        "## How it was trained\n",
        "With Deepy, from the record in its checkpoint:\n",
        "| | |\n|---|---|",
        *(f"| {title} | {value} |" for title, value in rows.items()),
        "",
    ]


def _shown(value: Any, is_path: bool) -> str:
    """A value for the table; of a path its last part, since the rest says where it lay on one machine."""
    if isinstance(value, list | tuple):
        return ", ".join(_shown(part, is_path) for part in value)
    return Path(str(value)).name if is_path else str(value)
