"""Steps of decoding as CUDA graphs: one launch instead of hundreds, between which a GPU waits for the host.

Shapes: b rows, s columns, h hidden.
A graph repeats operations on the same addresses, so it serves steps of one form (`KVCache.begin_step`).
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from megatron.model.cache import KVCache


@dataclass(frozen=True)
class _Recorded:
    tokens: Tensor
    hidden: Tensor
    graph: torch.cuda.CUDAGraph | None  # None: not on a GPU


class Replay:
    """Runs a function of tokens and a cache; steps of a form that it has seen are replayed.

    On other devices than a GPU a step is computed again from the same tensors, for tests.
    """

    def __init__(self, run: Callable[[Tensor, KVCache], Tensor]) -> None:
        """run: tokens [b, s] on the device -> [b, s, h], without communication and without reading on the host."""
        self._run = run
        self._of: WeakKeyDictionary[KVCache, dict[Hashable, _Recorded]] = WeakKeyDictionary()
        self._pool: Any = None  # memory that all graphs share, as one runs at a time

    def __call__(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """What `run` returns for the fixed step that `cache` has begun; it is overwritten by the next call."""
        known = self._of.setdefault(cache, {})
        if cache.form not in known:
            known[cache.form] = self._recorded(tokens.clone(), cache)
        recorded = known[cache.form]
        recorded.tokens.copy_(tokens, non_blocking=True)
        if recorded.graph is not None:
            recorded.graph.replay()
        else:
            cache.begin_again()
            recorded.hidden.copy_(self._run(recorded.tokens, cache))
        return recorded.hidden

    def _recorded(self, tokens: Tensor, cache: KVCache) -> _Recorded:
        hidden = self._run(tokens, cache)  # kernels are loaded, and workspaces allocated, outside of the graph
        if not tokens.is_cuda:
            return _Recorded(tokens, hidden, None)
        cache.begin_again()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            hidden = self._run(tokens, cache)
        self._pool = graph.pool()
        return _Recorded(tokens, hidden, graph)
