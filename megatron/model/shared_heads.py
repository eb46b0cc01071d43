"""Key/value heads that several tensor- or context-parallel ranks need, because the ranks do not divide them.

A rank has the key/value heads of its query heads, in copies such that the same number of queries shares each copy
(`ModelPlan.queries_per_key`). Six query heads and three key/value heads on two ranks: queries 0 to 2 with heads 0, 0, 1
and queries 3 to 5 with heads 1, 2, 2, one query for each copy.
"""

from collections.abc import Callable

from megatron.config.plan import ModelPlan
from megatron.parallel.column_exchange import ColumnExchange
from megatron.parallel.grid import ParallelGrid


def fused_exchange(model: ModelPlan, grid: ParallelGrid) -> ColumnExchange | None:
    """Of the fused queries, keys and values: for each copy of a key/value head its queries, the key, the value."""
    share, size = model.num_attention_heads // model.num_kv_heads, model.head_size

    def of_copy(head: int, first_query: int, queries: int) -> list[range]:
        group = head * (share + 2) * size
        first, key = group + first_query * size, group + share * size
        return [range(first, first + queries * size), range(key, key + 2 * size)]

    return _exchange(model, grid, model.num_kv_heads * (share + 2) * size, of_copy)


def key_exchange(model: ModelPlan, grid: ParallelGrid) -> ColumnExchange | None:
    """Of what belongs to the keys alone, or the values: for each copy of a key/value head its elements."""
    size = model.head_size
    return _exchange(model, grid, model.num_kv_heads * size, lambda head, *_: [range(head * size, (head + 1) * size)])


def _exchange(
    model: ModelPlan, grid: ParallelGrid, columns: int, of_copy: Callable[[int, int, int], list[range]]
) -> ColumnExchange | None:
    """of_copy: the columns of a key/value head, of this first query among its own, and this number of queries.

    None: every rank computes what its heads need, in the right order.
    """
    ranks, heads, share = (
        grid.size("tensor"),
        model.num_attention_heads,
        model.num_attention_heads // model.num_kv_heads,
    )
    queries = model.queries_per_key(ranks * grid.size("context"))
    if queries == share:
        return None
    firsts = [range(rank * heads // ranks, (rank + 1) * heads // ranks, queries) for rank in range(ranks)]
    wanted = [[part for first in some for part in of_copy(*divmod(first, share), queries)] for some in firsts]
    return ColumnExchange(columns, wanted, grid)
