"""Hook: loss on a fixed set of held-out samples, every `eval_interval` steps."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from megatron.config.plan import BatchPlan
from megatron.data.build import Corpus
from megatron.data.windows import SampleSource
from megatron.engine.training import TrainingEngine
from megatron.training.batch import BatchBuilder
from megatron.training.clock import Clock
from megatron.training.hooks.base import NOTHING, FinishedStep, Hook, Run
from megatron.training.liveness import Liveness
from megatron.units import perplexity

log = logging.getLogger(__name__)


class Validation(Hook):
    """Computes the loss on the first samples of the validation split, in order, each once.

    For a blend of several datasets there is a loss for each, over its share of the batches but at least one batch; the
    loss of the split is their mean, weighted like the datasets.
    """

    def __init__(
        self,
        engine: TrainingEngine,
        source: SampleSource,
        builder: BatchBuilder,
        batch: BatchPlan,
        interval: int,
        max_batches: int,
        clock: Clock,
        liveness: Liveness | None = None,
        corpora: Sequence[Corpus] = (),
    ) -> None:
        """interval: in steps. max_batches: of `batch.global_size` samples; fewer if the split is smaller.

        corpora: the datasets that `source` blends, if it is a blend.
        """
        self._engine, self._builder, self._batch = engine, builder, batch
        self._interval, self._clock, self._liveness = interval, clock, liveness or Liveness()
        self._corpora = corpora or (Corpus("", 1.0, source),)
        shares = [max(1, round(max_batches * corpus.weight)) * batch.global_size for corpus in self._corpora]
        self._samples = [
            min(share, corpus.source.samples_per_epoch) for share, corpus in zip(shares, self._corpora, strict=True)
        ]

    def after_step(self, step: FinishedStep) -> Mapping[str, float]:
        """Validate if due, and at the last step, unless the run is being stopped early."""
        if step.is_stop or not step.is_due(self._interval):
            return NOTHING
        with self._clock.paused():
            losses = self.losses()
        loss = self._mean(losses)
        metrics = {"validation/lm_loss": loss, "validation/lm_loss_ppl": perplexity(loss)}
        log.info(
            "validation at step %d | loss %.4f | perplexity %.2f | %d samples",
            step.state.step, loss, metrics["validation/lm_loss_ppl"], sum(self._samples),
        )  # fmt: skip
        if len(losses) > 1:
            log.info("  %s", ", ".join(f"{name} {value:.4f}" for name, value in losses.items()))
            metrics |= {f"validation/lm_loss/{name}": value for name, value in losses.items()}
        return metrics

    def losses(self) -> dict[str, float]:
        """The loss of each dataset by name; the name is "" if the split is not a blend. Collective over all ranks.

        The device is read once, at the end.
        """
        batches = [
            (corpus.name, *self._evaluate(*batch))
            for corpus, size in zip(self._corpora, self._samples, strict=True)
            for batch in self._batches(corpus.source, size)
        ]
        means = torch.stack([mean for *_, mean in batches]).tolist() if batches else []
        totals = {corpus.name: (0.0, 0) for corpus in self._corpora}
        for (name, labels, _), mean in zip(batches, means, strict=True):
            total, count = totals[name]
            totals[name] = (total + labels * mean, count + labels)
        return {name: total / count if count else math.nan for name, (total, count) in totals.items()}

    def loss(self) -> float:
        """The loss of the split: the mean over the labels of all samples, in nats per token. Collective."""
        return self._mean(self.losses())

    def _mean(self, losses: Mapping[str, float]) -> float:
        return sum(corpus.weight * losses[corpus.name] for corpus in self._corpora)

    def _evaluate(self, samples: Sequence[Tensor], counted: Sequence[Tensor]) -> tuple[int, Tensor]:
        """The number of labels of a global batch, and their mean loss, still on the device."""
        self._liveness.begin("validation")
        batches, labels = self._builder.build(samples, counted)
        return labels, self._engine.evaluate_batch(batches)

    def _batches(self, source: SampleSource, size: int) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """This rank's micro-batches of each global batch, and which of their samples count.

        The last global batch is padded with samples that do not count.
        """
        grid, micro_size = self._engine.grid, self._batch.micro_size
        for start in range(0, size, self._batch.global_size):
            samples, counted = [], []
            for step in range(self._batch.accumulation_steps):
                first = start + (step * grid.size("data") + grid.rank("data")) * micro_size
                numbers = range(first, first + micro_size)
                ids = [torch.as_tensor(source[min(i, size - 1)]) for i in numbers]
                samples.append(torch.stack(ids))
                counted.append(torch.tensor([i < size for i in numbers]))
            yield samples, counted


def validation(run: Run) -> Validation | None:
    """Registry entry: with `eval_iters`, if the validation split has at least one sample."""
    keys, source = run.config.training, run.sources.valid
    if not keys.eval_iters:
        return None
    if source is None:
        log.warning("no validation, although eval_iters is %d: %s", keys.eval_iters, run.sources.reasons["valid"])
        return None
    builder, corpora = BatchBuilder.of(run), run.sources.corpora.get("valid", ())
    interval, batches = keys.eval_interval, keys.eval_iters
    return Validation(run.engine, source, builder, run.plan.batch, interval, batches, run.clock, run.liveness, corpora)
