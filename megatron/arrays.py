"""Token ids of several documents in one array, with the size of each. Imports no torch."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[Any]


def flat(documents: Sequence[Sequence[int] | Ids]) -> tuple[Ids, Ids]:
    """The concatenated ids of all documents (uint32), and the number of ids of each (int64)."""
    arrays = [np.asarray(ids, np.uint32) for ids in documents]
    return np.concatenate([np.empty(0, np.uint32), *arrays]), sizes_of(arrays)


def sizes_of(documents: Sequence[Any]) -> Ids:
    """The length of each document, as int64."""
    return np.fromiter(map(len, documents), np.int64, len(documents))


def split(ids: Ids, sizes: Ids) -> list[Ids]:
    """Undo the concatenation: the ids of each document, as views."""
    return np.split(ids, np.cumsum(sizes)[:-1])


def surrounded(ids: Ids, sizes: Ids, before: Sequence[int], after: Sequence[int]) -> Ids:
    """Insert `before` and `after` around each of the documents, which have these sizes."""
    ends = np.cumsum(sizes)
    columns = [ends - sizes] * len(before) + [ends] * len(after)
    around = np.array([*before, *after])
    ids = ids.astype(np.promote_types(ids.dtype, np.min_scalar_type(around.max())), copy=False)
    if len(sizes) == 1:  # possibly a large one, which np.insert would copy several times
        return np.concatenate([np.asarray(ends, ids.dtype) for ends in (before, ids, after)])
    return np.insert(ids, np.column_stack(columns).ravel(), np.tile(around, len(sizes)))
