"""FlexAttention's block mask for attention within documents on a GPU.

Shapes: b micro-batch, s sequence, c = ceil(s / 128) blocks of 128.

Document starts never decrease along a sequence. So a block of 128 queries sees a range of key blocks: from the block in
which the document of its first query begins to its own. Of these, the blocks before its own that lie within the
document of its last query are fully visible. The mask is built from these ranges, with c x c entries per sequence; no
s x s tensor is ever created.
"""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128  # queries or keys in a block of the kernel


def document_blocks(first: Tensor, window: int | None = None) -> BlockMask:
    """The mask in which each query sees the keys from `first` to itself, at most the last `window`.

    first: [b, s], never decreasing along s.
    """
    length, device = first.shape[1], first.device
    blocks = torch.arange(-(-length // BLOCK), device=device)
    begin, end = (
        blocks * BLOCK,
        (blocks * BLOCK + BLOCK - 1).clamp(max=length - 1),
    )  # first and last query
    lowest, highest = first[:, begin], first[:, end]  # the first keys of these queries, [b, c]
    if window is not None:
        lowest, highest = torch.maximum(lowest, begin - window + 1), torch.maximum(highest, end - window + 1)
    rows, columns = blocks[:, None], blocks[None, :]
    seen = (columns <= rows) & (columns >= (lowest // BLOCK)[:, :, None])
    # an incomplete last block is never fully visible, as in torch
    whole = (columns < rows) & (begin[None, :] >= highest[:, :, None]) & (begin + BLOCK <= length)[:, None]
    padded = torch.nn.functional.pad(first, (0, len(blocks) * BLOCK - length))  # a kernel may read past the end

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        visible = (key <= query) & (key >= padded[batch, query])
        return visible if window is None else visible & (key > query - window)

    return BlockMask.from_kv_blocks(
        *_listed(seen & ~whole), *_listed(seen & whole), BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(length, length)
    )


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Counts and indices of the chosen blocks of each row, chosen first: [b, c, c] -> [b, 1, c] and [b, 1, c, c]."""
    order = torch.argsort(chosen.int(), dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None].contiguous()
