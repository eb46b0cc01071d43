"""Load a trained model for generation and evaluation.

Shapes: b texts, s columns, h hidden, v vocabulary.
`find_trained_model` checks the configuration and the checkpoint before the process group starts; `open_trained_model`
starts it and loads the weights, or `start_ranks` and `load_trained_model` do so one after the other.
"""

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from megatron.checkpoint.folder import find_checkpoint
from megatron.checkpoint.store import agree_on_checkpoint, load_weights
from megatron.config.plan import Plan
from megatron.config.resolve import resolve
from megatron.config.schema.config import Config
from megatron.config.schema.generation_keys import Quantization
from megatron.engine.distributed import choose_matmul_precision, start
from megatron.engine.inference import InferenceEngine
from megatron.engine.settings import DTYPES
from megatron.errors import UserError
from megatron.hugging_face.published import (
    PublishedModel,
    base_of_adapters,
    check_same_published,
    load_published,
    open_published,
    published_name,
)
from megatron.model.cache import KVCache
from megatron.model.gpt import gather_logits, gpt_layers
from megatron.model.positions import document_starts
from megatron.parallel.grid import ParallelGrid
from megatron.resources import check_same_model, open_tokenizer
from megatron.tokenizer.base import Tokenizer

log = logging.getLogger(__name__)

SMALLEST_WIDTH = 128  # a block of the attention kernels


@dataclass(frozen=True)
class FoundModel:
    """A checked model whose weights are not loaded yet."""

    plan: Plan
    tokenizer: Tokenizer
    checkpoint: Path
    published: PublishedModel | None = None  # whose folder `checkpoint` is
    base: str | None = None  # the folder of the base of adapters, if it has moved
    quantization: Quantization | None = None  # the type that weights are rounded to


@dataclass(frozen=True)
class TrainedModel:
    """A model with its weights on the ranks of `grid`; each data-parallel replica computes independently.

    All ranks of a replica make the same calls. Of a pipeline only the last stage has logits (`grid.is_last_stage`).
    few_widths: pad sequences to few widths, for each of which kernels are compiled; without a cache only.
    """

    engine: InferenceEngine
    grid: ParallelGrid
    plan: Plan
    tokenizer: Tokenizer
    few_widths: bool = False

    @property
    def context(self) -> int:
        """The context length in tokens."""
        return self.plan.model.max_position_embeddings

    def hidden(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """The input of the head for int64 tokens [b, s]: [b, s, h]. With a cache: the step it has begun."""
        if cache is not None:
            return self.engine.hidden(tokens, cache)
        return self.engine.hidden(self._padded(tokens))[:, : tokens.shape[1]]

    def hidden_of_documents(self, tokens: Tensor) -> Tensor:
        """`hidden` of text with several documents, with attention kept within each if the model is trained so."""
        if not self.plan.model.keeps_documents_apart:
            return self.hidden(tokens)
        padded = self._padded(tokens)
        start = document_starts(padded, self.tokenizer.end_of_document)
        return self.engine.hidden(padded, document_start=start)[:, : tokens.shape[1]]

    def logits_of(self, hidden: Tensor) -> Tensor:
        """All logits at any positions: [..., h] -> float32 [..., v], the same bits on every tensor-parallel rank."""
        return gather_logits(self.engine.logits(hidden), self.grid, self.plan.model.vocab_size).float()

    def logits(self, tokens: Tensor, columns: slice = slice(None)) -> Tensor:
        """`logits_of` the given columns of int64 tokens [b, s]; no other logit is computed."""
        return self.logits_of(self.hidden(tokens)[:, columns])

    def from_last_stage(self, tensor: Tensor) -> Tensor:
        """The last stage's `tensor` on all stages of a pipeline, whose own may be overwritten. A broadcast."""
        tensor = tensor.contiguous()
        if self.grid.size("pipe") > 1:
            dist.broadcast(tensor, group=self.grid.group("pipe"), group_src=self.grid.size("pipe") - 1)
        return tensor

    def _padded(self, tokens: Tensor) -> Tensor:
        """Pad on the right, where no token attends, to one of a few widths: see `few_widths`."""
        length = tokens.shape[1]
        return pad(tokens, (0, width_for(length, self.context) - length)) if self.few_widths else tokens

    def new_cache(self, slots: int, capacity: int, longest_step: int | None = None) -> KVCache:
        """An empty cache for `slots` texts of up to `capacity` tokens, on this stage; see `KVCache`."""
        kv_heads = self.plan.model.kv_heads_on_rank(self.grid.size("tensor"))
        return KVCache(
            self.plan.model,
            slots,
            capacity,
            kv_heads,
            self.engine.dtype,
            self.grid.device,
            longest_step=longest_step,
            layers=self.engine.blocks,
        )


def find_trained_model(config: Config) -> FoundModel:
    """Tokenizer, plan and checkpoint of the model that `config` describes. `load` defaults to `save`.

    Raises UserError where they are missing or do not match.
    """
    keys, rank = config.checkpoint, config.tuning.lora.rank
    folder = keys.load or keys.save
    if (name := published_name(folder)) is not None:
        if not rank:
            return _find_published(config, name)
        folder = keys.save  # of the adapters, which began there
        if folder is None:
            raise UserError(f"lora.rank ({rank}) with load ({keys.load}) needs save, the folder of the adapters")
    if folder is None:
        raise UserError("load is not set: name the folder of the model's checkpoints")
    checkpoint = find_checkpoint(Path(folder), keys.iteration, keys.verify)
    if checkpoint is None:
        raise UserError(f"there is no checkpoint in {folder}: train first, or set load to a folder that has one")
    tokenizer = open_tokenizer(config)
    plan = resolve(config, int(os.environ.get("WORLD_SIZE", "1")), tokenizer.vocab_size, inference=True)
    if "model" not in keys.allow_changes:
        check_same_model(plan.model, checkpoint)
    quantization = config.generation.quantization
    return FoundModel(plan, tokenizer, checkpoint, base=base_of_adapters(config), quantization=quantization)


def _find_published(config: Config, name: str) -> FoundModel:
    published = open_published(name)
    tokenizer = open_tokenizer(config)
    plan = resolve(config, int(os.environ.get("WORLD_SIZE", "1")), tokenizer.vocab_size, inference=True)
    check_same_published(plan.model, published, any_behavior="model" in config.checkpoint.allow_changes)
    return FoundModel(plan, tokenizer, published.folder, published, quantization=config.generation.quantization)


def open_trained_model(found: FoundModel, backend: str | None, timeout_minutes: float = 30) -> TrainedModel:
    """Start the process group, build the model and load its weights. Collective.

    backend: of torch.distributed, or None for the default. timeout_minutes: of collectives.
    """
    return load_trained_model(found, start_ranks(found, backend, timeout_minutes))


def start_ranks(found: FoundModel, backend: str | None, timeout_minutes: float = 30) -> ParallelGrid:
    """Start the process group alone, with the model's layout; see `open_trained_model`. Collective."""
    return start(found.plan.layout.pipe, found.plan.layout.tensor, backend, timeout_minutes)


def load_trained_model(found: FoundModel, grid: ParallelGrid) -> TrainedModel:
    """Build the model on the ranks of `grid` and load its weights. Collective."""
    model = found.plan.model
    products = choose_matmul_precision(found.plan.engine, grid.device)
    precision = DTYPES[found.plan.engine.precision]
    engine = InferenceEngine(gpt_layers(model, grid, seed=None), grid, precision, model.hidden_size)
    if found.published is not None:
        load_published(engine, found.published)
    else:
        agree_on_checkpoint(found.checkpoint)
        load_weights(engine, found.checkpoint, found.base)
    products += engine.pack_weights(found.quantization)
    log.info("%s", found.tokenizer.describe())
    log.info("model: weights of %s in %s", found.checkpoint, found.plan.engine.precision)
    for line in products:
        log.info("%s", line)
    return TrainedModel(engine, grid, found.plan, found.tokenizer, few_widths=grid.device.type == "cuda")


def width_for(length: int, context: int) -> int:
    """The width to which `length` columns are padded: 128, 256, 384, 512, 768, 1024, 1536, ... or the context.

    Two in each doubling: above 256 columns at most half as many again are computed in vain.
    """
    power = max(SMALLEST_WIDTH, 1 << (length - 1).bit_length())
    width = power // 4 * 3 if length <= power // 4 * 3 and power > 2 * SMALLEST_WIDTH else power
    return max(length, min(width, context))
