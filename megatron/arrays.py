"""The ids of several documents as one array, with the size of each. Below all floors; no torch."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[Any]


def flat(documents: Sequence[Sequence[int] | Ids]) -> tuple[Ids, Ids]:
    """The ids of all documents one after another, and the number of each."""
    arrays = [np.asarray(ids, np.uint32) for ids in documents]
    return np.concatenate([np.empty(0, np.uint32), *arrays]), sizes_of(arrays)


def sizes_of(documents: Sequence[Any]) -> Ids:
    """The length of each."""
    return np.fromiter(map(len, documents), np.int64, len(documents))


def split(ids: Ids, sizes: Ids) -> list[Ids]:
    """The ids of each document."""
    return np.split(ids, np.cumsum(sizes)[:-1])


def surrounded(ids: Ids, sizes: Ids, before: Sequence[int], after: Sequence[int]) -> Ids:
    """The ids of documents of these sizes, with `before` and `after` put around each."""
    ends = np.cumsum(sizes)
    columns = [ends - sizes] * len(before) + [ends] * len(after)
    around = np.array([*before, *after])
    ids = ids.astype(np.promote_types(ids.dtype, np.min_scalar_type(around.max())), copy=False)
    if len(sizes) == 1:  # perhaps a large one, of which an insertion would make several copies
        return np.concatenate([np.asarray(ends, ids.dtype) for ends in (before, ids, after)])
    return np.insert(ids, np.column_stack(columns).ravel(), np.tile(around, len(sizes)))
