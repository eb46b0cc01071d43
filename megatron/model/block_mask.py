"""FlexAttention's block mask for attention within documents or a window on a GPU.

Shapes: b micro-batch (1 if documents are not kept apart), s sequence, c = ceil(s / 128) blocks of 128, w windows.

Document starts never decrease along a sequence. So a block of 128 queries sees a range of key blocks: from the block in
which the document of its first query begins to its own. Of these, the blocks before its own that lie within the
document of its last query are fully visible. The lists of blocks are made from these ranges, with c x c entries per
sequence, once per micro-batch, and accompany the hidden states; no s x s tensor is ever created.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128  # queries or keys in a block of the kernel


def block_lists(first: Tensor, windows: Sequence[int | None]) -> tuple[Tensor, Tensor]:
    """Which blocks see each other, for each window: counts [w, 4, b, 1, c] and indices [w, 4, b, 1, c, c] (int32).

    A query sees the keys from `first` to itself, at most the last `window`. The four lists: of each query block the
    key blocks that are partly visible, and those that are fully visible; of each key block the query blocks likewise.
    first: int32 [b, s], never decreasing along s.
    """
    length, device = first.shape[1], first.device
    blocks = torch.arange(-(-length // BLOCK), device=device)
    begin, end = blocks * BLOCK, (blocks * BLOCK + BLOCK - 1).clamp(max=length - 1)  # first and last query
    rows, columns = blocks[:, None], blocks[None, :]
    chosen = []
    for window in windows:
        lowest, highest = first[:, begin], first[:, end]  # the first keys of these queries, [b, c]
        if window is not None:
            lowest, highest = torch.maximum(lowest, begin - window + 1), torch.maximum(highest, end - window + 1)
        seen = (columns <= rows) & (columns >= (lowest // BLOCK)[:, :, None])
        # an incomplete last block is never fully visible, as in torch
        whole = (columns < rows) & (begin[None, :] >= highest[:, :, None]) & (begin + BLOCK <= length)[:, None]
        partly, fully = seen & ~whole, seen & whole
        chosen.append(torch.stack([partly, fully, partly.mT, fully.mT])[:, :, None])
    listed = torch.stack(chosen)  # bool [w, 4, b, 1, c, c]
    indices = torch.argsort(listed.int(), dim=-1, descending=True, stable=True)  # the chosen ones first
    return listed.sum(-1, dtype=torch.int32), indices.int()


def block_mask(counts: Tensor, indices: Tensor, first: Tensor | None, window: int | None, length: int) -> BlockMask:
    """The mask of one window, made of views of its lists: counts [4, b, 1, c], indices [4, b, 1, c, c].

    first: [b, s], as for `block_lists`; None: 0. length: s.
    """
    if first is not None and length % BLOCK:
        first = torch.nn.functional.pad(first, (0, BLOCK - length % BLOCK))  # a kernel may read past the end

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        visible = key <= query
        if first is not None:
            visible = visible & (key >= first[batch, query])
        return visible if window is None else visible & (key > query - window)

    return BlockMask(
        seq_lengths=(length, length),
        kv_num_blocks=counts[0],
        kv_indices=indices[0],
        full_kv_num_blocks=counts[1],
        full_kv_indices=indices[1],
        q_num_blocks=counts[2],
        q_indices=indices[2],
        full_q_num_blocks=counts[3],
        full_q_indices=indices[3],
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=sees,
    )
