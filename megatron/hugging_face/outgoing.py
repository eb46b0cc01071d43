"""One of our models becomes a folder of Hugging Face, which transformers loads with nothing of ours installed.

config.json, generation_config.json, weights in safetensors, the tokenizer with its chat template, and README.md, which
says how the model was trained.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron import registry
from megatron.checkpoint.adapter_base import read_base
from megatron.checkpoint.converted import StoredWeight, checkpoint_weights
from megatron.checkpoint.folder import find_checkpoint, read_document
from megatron.checkpoint.state import TrainState
from megatron.checkpoint.store import checkpoint_config
from megatron.config.plan import ModelPlan
from megatron.config.resolve import resolve
from megatron.convert.family import KIND, Family, families_for
from megatron.convert.parameters import ParameterMap
from megatron.engine.settings import DTYPES
from megatron.errors import UserError
from megatron.hugging_face.incoming import (
    NOT_CHECKED,
    refuse_existing,
    require_space,
    unfinished,
)
from megatron.hugging_face.model_card import model_card
from megatron.hugging_face.parity import compare
from megatron.hugging_face.published import expected_shapes, require_transformers, without_padding
from megatron.hugging_face.safetensors_writer import write_shards
from megatron.hugging_face.tokenizer_files import (
    folder_of,
    read_optional,
    token_ids,
    write_json,
    write_tokenizer,
)
from megatron.progress import Progress
from megatron.resources import BEHAVIOR_GROUPS, open_tokenizer, written_config
from megatron.tokenizer.base import Tokenizer

LARGEST = 5 * 10**9  # bytes of a file, as transformers writes them


@dataclass(frozen=True)
class TrainedWeights:
    """What an export is made from.

    weights: by global name, whole, without padding of the vocabulary. keys: the flat configuration of the run. base:
    where that of adapters was when they were trained: the path of a checkpoint, or hf:MODEL.
    """

    model: ModelPlan
    weights: Mapping[str, StoredWeight]
    tokenizer: Tokenizer
    keys: Mapping[str, Any]
    state: TrainState
    validation_loss: float | None = None
    base: str | None = None

    @property
    def vocab_file(self) -> str | None:
        """The tokenizer's file."""
        found: str | None = self.keys.get("vocab_file")
        return found


@dataclass(frozen=True)
class Export:
    """A checked plan of an export: nothing is written yet, and nothing is missing.

    config: of config.json. shapes: of their tensors, in the order in which they are written.
    """

    family: Family
    model: ModelPlan
    config: dict[str, Any]
    parameters: ParameterMap
    shapes: dict[str, tuple[int, ...]]
    dtype: torch.dtype


def open_checkpoint(folder: Path, iteration: int | None, changes: Mapping[str, Any]) -> TrainedWeights:
    """The weights of a checkpoint in `folder`, with its tokenizer. changes: keys to replace, such as vocab_file.

    Raises UserError.
    """
    path = find_checkpoint(folder, iteration)
    if path is None:
        raise UserError(f"{folder} has no checkpoint")
    flat = checkpoint_config(path) | dict(changes)
    config = written_config(flat, str(path / "config.json"), BEHAVIOR_GROUPS | {"tokenizer"})
    tokenizer = open_tokenizer(config)
    model = resolve(config, config.parallelism.model_parallel_size, tokenizer.vocab_size, inference=True).model
    document = read_document(path / "progress.json")
    state = TrainState.of({"step": 0, "consumed_samples": 0, "consumed_tokens": 0} | document)
    base = read_base(path)["path"] if model.lora is not None else None
    return TrainedWeights(
        model, checkpoint_weights(path), tokenizer, flat, state, document.get("validation_loss"), base
    )


def plan_export(
    model: ModelPlan, vocab_file: str | None, tokenizer: Tokenizer, dtype: str, family: str | None = None
) -> Export:
    """What an export of `model`, with adapters merged, consists of.

    dtype: "fp32", "bf16" or "fp16". family: the model_type to write; None: that of the published model whose tokenizer
    this is, if it fits, or else the first that does.
    Raises UserError where no architecture, or not the chosen one, can hold the model.
    """
    model = replace(without_padding(model), lora=None)
    chosen, published = architecture_for(model, vocab_file, family)
    names = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
    kind = DTYPES[dtype]
    config = chosen.config(model) | {"dtype": names[kind]} | token_ids(tokenizer, published)
    parameters = chosen.parameters(model)
    return Export(chosen, model, config, parameters, expected_shapes(parameters, model), kind)


def architecture_for(
    model: ModelPlan, vocab_file: str | None, family: str | None = None
) -> tuple[Family, dict[str, Any] | None]:
    """The architecture of an export, and the config.json of the published model whose tokenizer this is, or None.

    As for `plan_export`.
    """
    require_transformers("an export to Hugging Face")
    origin = folder_of(vocab_file)
    published = read_optional(origin / "config.json") if origin is not None else None
    return _family(model, family, (published or {}).get("model_type")), published


def export_model(
    trained: TrainedWeights,
    export: Export,
    output: Path,
    largest: int = LARGEST,
    check: bool = True,
    tell: Callable[[str], object] = print,
) -> None:
    """Write the folder `output`, with nothing left behind on failure.

    largest: bytes of a file of weights. check: compare the logits of both sides before the folder gets its name.
    Raises UserError before anything is written; RunError if the disk fails or the two sides differ.
    """
    refuse_existing(output)
    _require_same_parameters(trained, export)
    require_space(output, sum(math.prod(shape) for shape in export.shapes.values()) * export.dtype.itemsize)
    stored = {export.parameters.in_files.get(name, name): shape for name, shape in export.shapes.items()}
    with unfinished(output) as folder:
        write_json(folder / "config.json", export.config)
        write_tokenizer(trained.tokenizer, trained.vocab_file, folder)
        if not (folder / "generation_config.json").is_file():
            ids = {name: value for name, value in export.config.items() if name.endswith("_token_id")}
            write_json(
                folder / "generation_config.json", {name: value for name, value in ids.items() if value is not None}
            )
        with Progress(f"writing {output}", len(stored), "tensors") as progress:
            write_shards(folder, stored, _their_tensors(trained, export), export.dtype, largest, progress.add)
        card = model_card(
            output.name, export.family, export.model, trained.keys, trained.state, trained.validation_loss
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
        line = NOT_CHECKED
        if check:
            parity = compare(export.model, trained.weights, folder, export.family, rounding=export.dtype)
            line = parity.require(str(output))
    tell(f"{output}: {export.family.architecture} in {export.config['dtype']}")
    tell(line)


def _family(model: ModelPlan, asked: str | None, origin: str | None) -> Family:
    if asked is not None:
        family: Family = registry.resolve(KIND, asked)
        family.config(model)
        return family
    fitting = families_for(model)
    if not fitting:
        raise _no_family(model)
    return next((family for family in fitting if family.model_type == origin), fitting[0])


def _no_family(model: ModelPlan) -> UserError:
    """The reasons of the architecture that is nearest."""
    reasons: list[tuple[str, ...]] = []
    for name in registry.names(KIND):
        family: Family = registry.resolve(KIND, name)
        try:
            family.config(model)
        except UserError as error:
            reasons.append(error.problems)
    nearest = min(reasons, key=len)
    return UserError("no architecture of Hugging Face that Deepy knows holds this model; the nearest:", *nearest[:6])


def _require_same_parameters(trained: TrainedWeights, export: Export) -> None:
    needed = {name for entry in export.parameters.entries for name in entry.ours}
    problems = [f"  {name}: the checkpoint has no such tensor" for name in sorted(needed - set(trained.weights))]
    problems += [
        f"  {name}: {export.family.name} has no place for it" for name in sorted(set(trained.weights) - needed)
    ]
    if problems:
        raise UserError("these weights are not those of the model that the configuration describes:", *problems[:6])


def _their_tensors(trained: TrainedWeights, export: Export) -> Iterator[tuple[str, Tensor]]:
    """Their tensors in the order of the map, of which one entry is in memory at a time."""
    for entry in export.parameters.entries:
        parts = list(entry.split([trained.weights[name].read() for name in entry.ours]))
        for name in entry.theirs:
            yield export.parameters.in_files.get(name, name), parts.pop(0)
