"""FLOPs of a token in training, counted in three ways. One multiply-add is two FLOPs.

Only matrix products are counted: norms, activations, softmax, rotary positions, biases and the optimizer are not.
Letters: L layers, N parameters, T tokens per sequence, n query heads, d head size. The backward pass has two products
for each one of the forward pass.
"""

from dataclasses import dataclass

from megatron.config.parameter_counts import parameter_count, product_weights
from megatron.config.plan import ModelPlan, Plan


@dataclass(frozen=True)
class TokenFlops:
    """FLOPs of one token's forward and backward pass, over all ranks.

    common: `common_flops`, the formula of most published MFU figures.
    executed: `executed_flops`, without recomputation.
    recomputed: `recomputed_flops`; 0 without recomputation.
    """

    common: float
    executed: float
    recomputed: float = 0.0

    @property
    def hardware(self) -> float:
        """Executed and recomputed: the numerator of hardware FLOPs utilization."""
        return self.executed + self.recomputed


def token_flops(plan: Plan) -> TokenFlops:
    """FLOPs of one token in training under `plan`."""
    model, length = plan.model, plan.batch.sequence_length
    return TokenFlops(common_flops(model, length), executed_flops(model, length), recomputed_flops(plan))


def common_flops(model: ModelPlan, sequence_length: int) -> float:
    """6 N + 12 L n d T, as in PaLM (https://arxiv.org/abs/2204.02311, appendix B), with all parameters in N.

    It counts more than is executed: the lookup of an untied embedding and of learned positions as if they were
    products, and attention over the full square, of which causal attention needs half.
    """
    width = model.num_attention_heads * model.head_size
    return 6.0 * parameter_count(model) + 12.0 * model.num_layers * width * sequence_length


def executed_flops(model: ModelPlan, sequence_length: int) -> float:
    """6 FLOPs per weight of the blocks' matrices and of the head, and 12 n d per key that a query sees, in each layer.

    The head counts once, tied or not, with the vocabulary as padded in memory. A query sees the keys up to its own,
    (T + 1) / 2 on average, and in a local layer at most sliding_window of them. Where documents are kept apart it sees
    fewer, so this is an upper bound. What kernels compute beyond that is not counted: masked parts of their tiles, and
    the scores that flash attention recomputes in its backward pass.
    """
    head = model.padded_vocab_size * model.hidden_size
    return 6.0 * (model.num_layers * product_weights(model) + head) + 3.0 * _attention(model, sequence_length)


def recomputed_flops(plan: Plan) -> float:
    """With recomputed blocks their forward pass once more; 0 if recomputation is selective, which stores products.

    An upper bound: torch stops before the last product of a group of blocks if nothing after it is needed.
    """
    if not plan.engine.recompute_layers or plan.engine.recompute_selective:
        return 0.0
    model = plan.model
    return 2.0 * model.num_layers * product_weights(model) + _attention(model, plan.batch.sequence_length)


def seen_keys(sequence_length: int, window: int | None = None) -> float:
    """Keys that a query of causal attention sees, averaged over a sequence; at most `window` for each query."""
    window = min(window or sequence_length, sequence_length)
    return (window * (window + 1) / 2 + (sequence_length - window) * window) / sequence_length


def _attention(model: ModelPlan, sequence_length: int) -> float:
    """FLOPs of one token's attention scores and their product with the values, forward, in all layers."""
    windows = [model.sliding_window if kind == "local" else None for kind in model.attention_kinds]
    keys = sum(seen_keys(sequence_length, window) for window in windows)
    return 4.0 * model.num_attention_heads * model.head_size * keys
