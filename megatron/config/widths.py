"""Sizes derived from other sizes, for rules, resolve and estimate."""

from math import isqrt

from megatron.config.schema.model_keys import ModelKeys


def is_gated(activation: str) -> bool:
    """Whether the feed-forward layer has a gate: names that end in "glu" or "glu_tanh", plugins' too, and bilinear."""
    return activation.endswith(("glu", "glu_tanh")) or activation == "bilinear"


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple


def feed_forward_width(model: ModelKeys) -> int:
    """Width of the feed-forward layer, as written or by default.

    The default is 4 x hidden_size; with a gate two thirds of that, for the same number of parameters (GLU variants,
    https://arxiv.org/abs/2002.05202).
    """
    written = model.ffn_hidden_size or model.intermediate_size
    if written is not None:
        return written
    default = 8 * model.hidden_size // 3 if is_gated(model.activation) else 4 * model.hidden_size
    return round_up(default, model.mlp_multiple_of)


def neox_gated_width(intermediate_size: int, multiple: int) -> int:
    """The width of a gated layer with this `intermediate_size` in GPT-NeoX."""
    return round_up(int(intermediate_size * 2 / 3), multiple) // 2


def attention_names(model: ModelKeys) -> tuple[str, ...]:
    """The attention of each layer. Raises ValueError if attention_config does not give num_layers kinds."""
    names: list[str] = []
    for kinds, repetitions in model.attention_config or ((("global",), "all"),):
        if repetitions == "all" and model.num_layers % len(kinds):
            raise ValueError(f'"all" repeats {len(kinds)} kinds, which does not divide num_layers ({model.num_layers})')
        times = model.num_layers // len(kinds) if repetitions == "all" else int(repetitions)
        count = len(names) + len(kinds) * times
        if count > model.num_layers:
            raise ValueError(f"gives {count} layers or more, but num_layers is {model.num_layers}")
        names += kinds * times
    if len(names) != model.num_layers:
        raise ValueError(f"gives {len(names)} layers, but num_layers is {model.num_layers}")
    return tuple(names)


def layers_without_rotary(model: ModelKeys) -> tuple[int, ...]:
    """The layers that no_rope_layer_interval leaves without rotary positions."""
    interval = model.no_rope_layer_interval
    return tuple(range(interval - 1, model.num_layers, interval)) if interval else ()


def norm_epsilon(model: ModelKeys) -> float:
    """The epsilon of the norm that the model has; that of a plugin's norm is layernorm_epsilon."""
    own = {"rmsnorm": model.rms_norm_epsilon, "rmsnorm_1p": model.rms_norm_epsilon}
    return (own | {"scalenorm": model.scalenorm_epsilon}).get(model.norm, model.layernorm_epsilon)


def head_size(model: ModelKeys) -> int:
    """Size of a head, as written or by default."""
    return model.head_dim or model.hidden_size // model.num_attention_heads


def rotary_elements(model: ModelKeys) -> int:
    """Elements of each head that rotary positions rotate."""
    return int(head_size(model) * model.rotary_pct)


def loss_chunk(tokens: int, hidden_size: int, is_compiled: bool, on_cpu: bool) -> int:
    """Tokens of a chunk, whose logits the loss computes at a time (parallel/cross_entropy.py), of `tokens` on a rank.

    So many logits as the weight has elements, or half as many where eager code adds an fp32 copy. A GPU, and compiled
    code, which is for runs whose speed matters, need 2,048 tokens for the products of a chunk to take longer than
    reading and writing the sum of weight gradients.
    """
    limit = max(hidden_size // (1 if is_compiled else 2), 2048 if is_compiled or not on_cpu else 64)
    return round_up(tokens, chunks := -(-tokens // limit)) // chunks


def divisors(number: int) -> list[int]:
    """The divisors up to a million and their counterparts, ascending: all of them for numbers up to 10^12."""
    small = [d for d in range(1, min(isqrt(number), 10**6) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def would_work(choices: list[int], near: int, at_most: int = 3) -> str:
    """The choices nearest to `near`, as "4, 6 or 12 would work"."""
    best = sorted(sorted(choices, key=lambda choice: abs(choice - near))[:at_most])
    head = ", ".join(str(choice) for choice in best[:-1])
    return (f"{head} or {best[-1]}" if head else f"{best[-1]}") + " would work"
