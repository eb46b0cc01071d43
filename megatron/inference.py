"""Load a trained model for generation and evaluation.

Shapes: b texts, s columns, v vocabulary.
`find_trained_model` checks the configuration and the checkpoint before the process group starts; `open_trained_model`
loads the weights.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron.checkpoint.folder import find_checkpoint
from megatron.checkpoint.store import agree_on_checkpoint, load_weights
from megatron.config.plan import Plan
from megatron.config.resolve import resolve
from megatron.config.schema.config import Config
from megatron.engine.distributed import start
from megatron.engine.inference import InferenceEngine
from megatron.engine.settings import DTYPES
from megatron.errors import UserError
from megatron.model.cache import KVCache
from megatron.model.gpt import gather_logits, gpt_layers
from megatron.model.positions import document_starts
from megatron.parallel.grid import ParallelGrid
from megatron.resources import check_same_model, open_tokenizer
from megatron.tokenizer.base import Tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FoundModel:
    """A checked model whose weights are not loaded yet."""

    plan: Plan
    tokenizer: Tokenizer
    checkpoint: Path


@dataclass(frozen=True)
class TrainedModel:
    """A model with its weights on the ranks of `grid`; each data-parallel replica computes independently."""

    engine: InferenceEngine
    grid: ParallelGrid
    plan: Plan
    tokenizer: Tokenizer

    @property
    def context(self) -> int:
        """The context length in tokens."""
        return self.plan.model.max_position_embeddings

    def local_logits(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """This rank's shard of the logits for int64 tokens [b, s]: [b, s, v/tp]."""
        return self.engine.forward(tokens, cache)

    def local_logits_of_documents(self, tokens: Tensor) -> Tensor:
        """`local_logits` of text with several documents, with attention kept within each if the model is trained so."""
        start = None
        if self.plan.model.keeps_documents_apart:
            start = document_starts(tokens, self.tokenizer.end_of_document)
        return self.engine.forward(tokens, document_start=start)

    def logits(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """All logits for int64 tokens [b, s]: float32 [b, s, v], the same bits on every tensor-parallel rank."""
        return gather_logits(self.engine.forward(tokens, cache), self.grid, self.plan.model.vocab_size).float()

    def new_cache(self, padding: Sequence[int], columns: int) -> KVCache:
        """An empty cache for `len(padding)` texts of up to `columns` tokens; padding: columns to ignore on the left."""
        model = self.plan.model
        return KVCache(
            num_layers=model.num_layers,
            batch=len(padding),
            max_length=columns,
            kv_heads_local=model.num_kv_heads // self.grid.size("tensor"),
            head_size=model.head_size,
            dtype=self.engine.dtype,
            device=self.grid.device,
            padding=torch.tensor(list(padding), device=self.grid.device),
        )


def find_trained_model(config: Config) -> FoundModel:
    """Tokenizer, plan and checkpoint of the model that `config` describes. `load` defaults to `save`.

    Raises UserError where they are missing or do not match.
    """
    keys = config.checkpoint
    folder = keys.load or keys.save
    if folder is None:
        raise UserError("load is not set: name the folder of the model's checkpoints")
    checkpoint = find_checkpoint(Path(folder), keys.iteration, keys.verify)
    if checkpoint is None:
        raise UserError(f"there is no checkpoint in {folder}: train first, or set load to a folder that has one")
    tokenizer = open_tokenizer(config)
    plan = resolve(config, int(os.environ.get("WORLD_SIZE", "1")), tokenizer.vocab_size, inference=True)
    if "model" not in keys.allow_changes:
        check_same_model(plan.model, checkpoint)
    return FoundModel(plan, tokenizer, checkpoint)


def open_trained_model(found: FoundModel, backend: str | None, timeout_minutes: float = 30) -> TrainedModel:
    """Start the process group, build the model and load its weights. Collective.

    backend: of torch.distributed, or None for the default. timeout_minutes: of collectives.
    """
    grid = start(tensor=found.plan.layout.tensor, backend=backend, timeout_minutes=timeout_minutes)
    layers = gpt_layers(found.plan.model, grid, found.plan.engine.seed)
    engine = InferenceEngine(layers, grid, DTYPES[found.plan.engine.precision])
    agree_on_checkpoint(found.checkpoint)
    load_weights(engine, found.checkpoint)
    log.info("%s", found.tokenizer.describe())
    log.info("model: weights of %s in %s", found.checkpoint, found.plan.engine.precision)
    return TrainedModel(engine, grid, found.plan, found.tokenizer)
