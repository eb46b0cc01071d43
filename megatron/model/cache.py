"""Key-value cache: keys and values of earlier tokens, so that decoding computes each token once.

Shapes: b batch, s tokens of this step, k tokens so far including this step's, g key/value heads on this rank,
d head size.
Sequences of a batch may be padded on the left, so that they end together. A token's position is its column minus its
sequence's padding: negative for padding, which no real token sees.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Positions:
    """Positions of queries and keys in their sequences; a query sees the keys that are not after it."""

    queries: Tensor  # [b or 1, s] int64
    keys: Tensor  # [b or 1, k] int64
    first: Tensor | None = None  # [b, s] the first key that each query sees; None: all before it

    def visible(self, window: int | None = None) -> Tensor:
        """Which keys each query sees, bool [b or 1, 1, s, k]; with a window, only the last `window` keys.

        Padding sees padding: a query without any key would give NaN.
        """
        queries, keys = self.queries[:, None, :, None], self.keys[:, None, None, :]
        seen = (keys <= queries) & ((keys >= 0) | (queries < 0))
        if self.first is not None:
            seen = seen & (keys >= self.first[:, None, :, None])
        return seen if window is None else seen & (keys > queries - window)


class KVCache:
    """Keys and values of all layers on this rank, and the range of the current step.

    The embedding begins a step; each block appends its keys and values.
    """

    def __init__(
        self,
        num_layers: int,
        batch: int,
        max_length: int,
        kv_heads_local: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device,
        padding: Tensor | None = None,
    ) -> None:
        """Allocate `max_length` tokens, padding included. padding: [b] left-padding tokens of each sequence."""
        shape = (num_layers, batch, max_length, kv_heads_local, head_size)
        self._keys = torch.zeros(shape, dtype=dtype, device=device)
        self._values = torch.zeros(shape, dtype=dtype, device=device)
        self._padded = padding is not None and bool(padding.any())
        self._positions = torch.arange(max_length, device=device).unsqueeze(0)
        if padding is not None and self._padded:
            self._positions = self._positions - padding.to(device).unsqueeze(1)
        self._start = self._end = 0

    @property
    def length(self) -> int:
        """Tokens so far, padding included."""
        return self._end

    @property
    def max_length(self) -> int:
        """Capacity in tokens."""
        return self._keys.shape[2]

    def begin_step(self, tokens: int) -> None:
        """Begin a step of `tokens` tokens. Raises ValueError if they do not fit."""
        if self._end + tokens > self.max_length:
            raise ValueError(f"the cache holds {self._end} of {self.max_length} tokens; {tokens} more do not fit")
        self._start, self._end = self._end, self._end + tokens

    @property
    def positions(self) -> Tensor:
        """Positions of this step's tokens, [b or 1, s]; 0 for padding."""
        return self._positions[:, self._start : self._end].clamp(min=0)

    def visibility(self) -> Positions | None:
        """Positions of this step's queries and all keys; None: each query sees all keys up to its own.

        None without padding in the first step and in a step of one token, the cases with fast kernels.
        """
        if not self._padded and (self._start == 0 or self._end - self._start == 1):
            return None
        return Positions(self._positions[:, self._start : self._end], self._positions[:, : self._end])

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's keys and values [b, s, g, d] of this step; returns all so far, [b, k, g, d]."""
        self._keys[layer, :, self._start : self._end] = keys
        self._values[layer, :, self._start : self._end] = values
        return self._keys[layer, :, : self._end], self._values[layer, :, : self._end]
