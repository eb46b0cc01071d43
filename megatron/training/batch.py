"""Turn samples of token ids into micro-batches: tokens, labels and a weight for each label (the loss mask).

Shapes: b micro-batch, s sequence.

The loss of a step is the mean over the unmasked labels of the global batch, independent of layout and micro-batch
size: the labels of the global batch are counted first, and each has the weight W / count, where
W = accumulation steps * data-parallel size. The engine sums weight * loss over a micro-batch and takes the mean over
the W micro-batches, which is the mean over the labels.

A sample is s + 1 ids, each the label of its predecessor; or two rows of s + 1, ids and their labels, which are
`NOT_A_LABEL` where the loss is masked (label files, padded samples).
"""

from collections.abc import Iterator, Sequence
from itertools import islice

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.data.windows import NOT_A_LABEL
from megatron.engine.training import MicroBatch
from megatron.model.layer import LayerInput
from megatron.model.positions import document_starts
from megatron.parallel.grid import ParallelGrid
from megatron.training.hooks.base import Run


class BatchBuilder:
    """Builds the micro-batches of one step from samples."""

    def __init__(self, grid: ParallelGrid, masked_token: int | None = None, document_end: int | None = None) -> None:
        """masked_token: the label after this token is masked (`eod_mask_loss`: the end of a document).

        document_end: the token that ends a document, if the model keeps documents apart.
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
        """Split this rank's samples into tokens and shifted labels, and compute the weights of the labels.

        samples: one int64 [b, s + 1] or [b, 2, s + 1] per accumulation step. counted: bool [b] for each, False for a
        sample that only pads the batch; default: all True.
        Returns the micro-batches and the number of unmasked labels in the global batch. One all-reduce over the data
        axis if labels can be masked, none otherwise.
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
            (self._inputs(tokens), (labels.clamp(min=0), mask * weight))  # the loss needs a valid id everywhere
            for (tokens, labels), mask in zip(pairs, masks, strict=True)
        ]
        return batches, total

    def _inputs(self, tokens: Tensor) -> LayerInput:
        """Input of the model: tokens [b, s] and, if it keeps documents apart, where they begin."""
        if self._document_end is None:
            return tokens
        return tokens, document_starts(tokens, self._document_end)

    def _mask(self, tokens: Tensor, labels: Tensor, counted: Tensor | None) -> Tensor:
        """Loss mask, 1 for a label that counts: [b, s] float32."""
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
    """One list of micro-batches per optimizer step, without end. micro_batches: samples from the loader."""
    while samples := list(islice(micro_batches, accumulation_steps)):
        yield builder.build(samples)[0]
