"""From token ids to what the engine trains on: tokens, labels, and a weight for each label.

Shapes: b micro-batch, s sequence.

The loss of a step is the mean over the counted labels of the whole global batch, whatever the layout and the
micro-batch: the labels of a global batch are counted first, and each carries the weight W / count, where
W = accumulation steps * data-parallel size. The engine sums weight * loss over a micro-batch and takes the mean over
the W micro-batches, which is then the mean over the labels.

A sample is s + 1 ids, each the label of the one before it; or two rows of s + 1, ids and the label of each, which is
`NOT_A_LABEL` where there is nothing to learn (label files, samples that are filled up).
"""

from collections.abc import Iterator, Sequence
from itertools import islice

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.data.windows import NOT_A_LABEL
from megatron.engine.training import Inputs, MicroBatch
from megatron.model.positions import document_starts
from megatron.parallel.grid import ParallelGrid
from megatron.training.hooks.base import Run


class BatchBuilder:
    """Makes the micro-batches of one step out of samples."""

    def __init__(self, grid: ParallelGrid, masked_token: int | None = None, document_end: int | None = None) -> None:
        """masked_token: the label after this token does not count (`eod_mask_loss`: the end of a document).

        document_end: the token that ends a document, where the model is told where documents begin.
        """
        self._grid = grid
        self._masked_token = masked_token
        self._document_end = document_end

    @classmethod
    def of(cls, run: Run) -> "BatchBuilder":
        """The builder for a run."""
        end = run.tokenizer.end_of_document
        masked, apart = run.config.data.eod_mask_loss, run.plan.model.keeps_documents_apart
        return cls(run.engine.grid, end if masked else None, end if apart else None)

    def build(self, samples: Sequence[Tensor], counted: Sequence[Tensor] | None = None) -> tuple[list[MicroBatch], int]:
        """Cut this rank's micro-batches into tokens and shifted labels, and weigh the labels.

        samples: one int64 [b, s + 1] or [b, 2, s + 1] per accumulation step. counted: bool [b] for each, False where a
        sample only fills up the batch; the same on no two layouts, so it is counted over ranks. Default: all count.
        Returns the micro-batches and how many labels of the global batch count. One all-reduce over the data axis
        where a label can be left out, none otherwise.
        """
        pairs = [_tokens_and_labels(ids) for ids in samples]
        masks = [self._mask(*pair, None if counted is None else counted[i]) for i, pair in enumerate(pairs)]
        replicas = self._grid.size("data")
        if self._masked_token is None and counted is None and samples[0].dim() == 2:
            total = replicas * sum(mask.numel() for mask in masks)
        else:
            total = self._sum_over_replicas(sum(int(mask.sum()) for mask in masks))
        weight = len(samples) * replicas / max(total, 1)
        batches: list[MicroBatch] = [
            (self._inputs(tokens), (labels.clamp(min=0), mask * weight))  # a loss wants an id in every place
            for (tokens, labels), mask in zip(pairs, masks, strict=True)
        ]
        return batches, total

    def _inputs(self, tokens: Tensor) -> Inputs:
        """What the model reads: tokens [b, s], and, where it keeps documents apart, where they begin."""
        if self._document_end is None:
            return tokens
        return tokens, document_starts(tokens, self._document_end)

    def _mask(self, tokens: Tensor, labels: Tensor, counted: Tensor | None) -> Tensor:
        """1 for a label that counts: [b, s] float32."""
        mask = (labels != NOT_A_LABEL).float()
        if self._masked_token is not None:
            mask[tokens == self._masked_token] = 0
        return mask if counted is None else mask * counted[:, None]

    def _sum_over_replicas(self, count: int) -> int:
        total = torch.tensor(count, device=self._grid.device)
        if self._grid.size("data") > 1:
            dist.all_reduce(total, group=self._grid.group("data"))
        return int(total)


def _tokens_and_labels(ids: Tensor) -> tuple[Tensor, Tensor]:
    """[b, s + 1] or [b, 2, s + 1] -> tokens and labels, each [b, s]."""
    tokens, labels = (ids, ids) if ids.dim() == 2 else ids.unbind(1)
    return tokens[:, :-1], labels[:, 1:]


def training_batches(
    micro_batches: Iterator[Tensor], builder: BatchBuilder, accumulation_steps: int
) -> Iterator[list[MicroBatch]]:
    """One list of micro-batches per optimizer step, for ever. micro_batches: samples, as the loader makes them."""
    while samples := list(islice(micro_batches, accumulation_steps)):
        yield builder.build(samples)[0]
