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

        samples: one int64 [b, s + 1] or [b, 2, s + 1] per accumulation step, in host memory. counted: bool [b] for
        each, False for a sample that only pads the batch; default: all True.
        Returns the micro-batches, on the device, and the number of unmasked labels in the global batch. If labels can
        be masked, they are counted in host memory, with one all-reduce there; nothing waits for the device.
        """
        kept = [None] * len(samples) if counted is None else counted
        total = self._count(samples, kept)
        weight = len(samples) * self._grid.size("data") / max(total, 1)
        return [self._micro_batch(*pair, weight) for pair in zip(samples, kept, strict=True)], total

    def _count(self, samples: Sequence[Tensor], counted: Sequence[Tensor | None]) -> int:
        """Unmasked labels in the global batch."""
        if self._masked_token is None and counted[0] is None and samples[0].dim() == 2:
            return self._grid.size("data") * sum(_tokens_and_labels(ids)[1].numel() for ids in samples)
        masks = (self._mask(*_tokens_and_labels(ids), kept) for ids, kept in zip(samples, counted, strict=True))
        return self._grid.sum_over_data(sum(int(mask.sum()) for mask in masks))

    def _micro_batch(self, ids: Tensor, counted: Tensor | None, weight: float) -> MicroBatch:
        """On the device. Whole samples are copied, once, and cut there: slices would need another copy on the host."""
        tokens, labels = _tokens_and_labels(self._on_device(ids))
        mask = self._mask(tokens, labels, None if counted is None else self._on_device(counted))
        return self._inputs(tokens), (labels.clamp(min=0), mask * weight)  # the loss needs a valid id everywhere

    def _on_device(self, host: Tensor) -> Tensor:
        """A copy that the host does not wait for, which takes page-locked memory."""
        device = self._grid.device
        return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host

    def _inputs(self, tokens: Tensor) -> LayerInput:
        """Input of the model: tokens [b, s] and, if it keeps documents apart, where they begin."""
        if self._document_end is None:
            return tokens
        return tokens, document_starts(tokens, self._document_end)

    def _mask(self, tokens: Tensor, labels: Tensor, counted: Tensor | None) -> Tensor:
        """Loss mask, True for a label that counts: [b, s]."""
        mask = labels != NOT_A_LABEL
        if self._masked_token is not None:
            mask &= tokens != self._masked_token
        return mask if counted is None else mask & counted[:, None]


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
