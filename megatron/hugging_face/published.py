"""A published model: its folder as one of our models, with its weights, its tokenizer and its configuration.

published = open_published("meta-llama/Llama-3.2-1B")  # or a folder
published.model                                        # ModelPlan
published.keys()                                       # our configuration
published.weights()                                    # our parameters, read one by one
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import tokenizers
import torch
from torch import Tensor

from megatron import registry
from megatron.checkpoint.chunks import local_chunks
from megatron.checkpoint.converted import StoredWeight
from megatron.config.plan import ModelPlan
from megatron.convert.family import KIND, Family, family_of, what_computes
from megatron.convert.model_keys import model_keys
from megatron.convert.parameters import Entry, ParameterMap
from megatron.engine.inference import InferenceEngine
from megatron.engine.optimizer_state import MASTER
from megatron.engine.training import TrainingEngine
from megatron.errors import UserError
from megatron.hugging_face.folder import find_folder
from megatron.hugging_face.stored import DTYPES, StoredTensors, read_json
from megatron.hugging_face.tokenizer_files import tokenizer_keys, without_tokens_beyond
from megatron.model.gpt import parameter_shapes
from megatron.tokenizer.base import Tokenizer
from megatron.tokenizer.build import build_tokenizer
from megatron.tokenizer.huggingface import HuggingFaceTokenizer

PREFIX = "hf:"  # in `load`


@dataclass(frozen=True)
class PublishedModel:
    """A folder of Hugging Face that has been checked: every tensor of the model is there and has the right shape."""

    folder: Path
    config: dict[str, Any]  # config.json
    family: Family
    model: ModelPlan
    parameters: ParameterMap
    tensors: StoredTensors
    stored_names: dict[str, str]  # in the map of parameters -> in the files

    def keys(self, folder: Path | None = None) -> dict[str, Any]:
        """The keys of our configuration for the model and its tokenizer.

        folder: where the tokenizer's files will lie; None: where they are.
        """
        return model_keys(self.model) | tokenizer_keys(self.folder, folder or self.folder)

    def read(self, name: str) -> Tensor:
        """Their tensor, by its name in the map of parameters."""
        return self.tensors.read(self.stored_names[name])

    def weights(self) -> dict[str, StoredWeight]:
        """Our parameters by global name."""
        shapes = parameter_shapes(self.model)
        return {
            name: StoredWeight(shapes[name], partial(self._joined, entry, index))
            for entry in self.parameters.entries
            for index, name in enumerate(entry.ours)
        }

    def _joined(self, entry: Entry, index: int) -> Tensor:
        return entry.join([self.read(name) for name in entry.theirs])[index]


def published_name(load: str | None) -> str | None:
    """The folder or name in the value `hf:...` of the key `load`; None for a folder of checkpoints."""
    return load.removeprefix(PREFIX) if load is not None and load.startswith(PREFIX) else None


def open_published(model: str) -> PublishedModel:
    """The published model in a folder, or of a name on the hub. Raises UserError with everything that is wrong."""
    require_transformers("a model of Hugging Face")
    folder = find_folder(model)
    config = read_config(folder)
    family = family_of_folder(config, folder)
    plan = family.model(config)
    parameters = family.parameters(plan)
    tensors = StoredTensors(folder)
    try:
        names = parameters.find(tensors.tensors)
    except UserError as error:
        raise _too_many(f"{folder} does not hold the model of its config.json:", error.problems) from error
    published = PublishedModel(folder, config, family, plan, parameters, tensors, names)
    if problems := _tensor_problems(published):
        raise _too_many(f"{folder} does not hold the model of its config.json:", problems)
    _check_tokenizer(published)
    return published


def check_same_published(model: ModelPlan, published: PublishedModel, any_behavior: bool = False) -> None:
    """Raise UserError where `model` is not the published one: its shapes or, unless `any_behavior`, what it computes.

    The context may be another one where no weights depend on it.
    """
    here, there = what_computes(model), what_computes(published.model)
    differing = [
        f"  {name} is {here[name]!r} here, and {there[name]!r} there"
        for name in here
        if here[name] != there[name] and (name != "max_position_embeddings" or model.position_embedding == "learned")
    ]
    shapes = parameter_shapes(without_padding(model)) != parameter_shapes(published.model)
    if shapes or (differing and not any_behavior):
        way_out = [] if shapes else ["to load its weights nevertheless: allow_changes=[model]"]
        raise UserError(
            f"{published.folder} holds another model than the configuration describes:", *differing, *way_out
        )


def load_published(engine: TrainingEngine | InferenceEngine, published: PublishedModel) -> None:
    """Load the weights into `engine`, under any layout. Collective.

    Each rank reads the tensors that it holds a part of, one after another; of those that need no reordering the files'
    mapped pages hold no more than its part.
    """
    held = local_chunks(engine.state.fragments(), engine.grid, owned_only=False, replicated_over_data=False)
    for entry in published.parameters.entries:
        targets = [held.get(f"{name}/{MASTER}") for name in entry.ours]
        if not any(targets):
            continue
        wholes = entry.join([published.read(name) for name in entry.theirs])
        for whole, local in zip(wholes, targets, strict=True):
            for offsets, chunk in local.chunks.items() if local else ():
                part = tuple(slice(at, at + size) for at, size in zip(offsets, chunk.shape, strict=True))
                chunk.copy_(whole[part])
    engine.state.finish_loading()


def configuration_keys(model: str) -> dict[str, Any]:
    """Registry entry: the keys that `load: hf:MODEL` stands for, of the model and its tokenizer. Reads no weights."""
    require_transformers(f"load: {PREFIX}{model}")
    folder = find_folder(model)
    config = read_config(folder)
    return model_keys(family_of_folder(config, folder).model(config)) | tokenizer_keys(folder, folder)


def require_transformers(what: str) -> None:
    """Raise UserError where the packages are missing that read and write models of Hugging Face.

    transformers then only reports errors: it would warn of special tokens that a small vocabulary has not.
    """
    try:
        import safetensors  # noqa: F401
        import transformers

        transformers.logging.set_verbosity_error()
    except ImportError as error:
        raise UserError(f"{what} needs the package {error.name}: pip install 'deepy[convert]'") from error


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a folder. Raises UserError."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json: it is no folder of a model of Hugging Face")
    return read_json(folder / "config.json")


def family_of_folder(config: dict[str, Any], folder: Path) -> Family:
    """The family of a config.json. Raises UserError if there is none, or if the model runs code of its own."""
    kind = config.get("model_type")
    if "auto_map" in config and kind not in registry.names(KIND):
        raise UserError(
            f"{folder}: this model ({kind}) runs Python of its own (auto_map, trust_remote_code), which is never run; "
            f"known architectures: {', '.join(registry.names(KIND))}"
        )
    return family_of(config)


def expected_shapes(parameters: ParameterMap, model: ModelPlan) -> dict[str, tuple[int, ...]]:
    """The shapes of their tensors, in the order in which they are written."""
    ours = {name: torch.empty(shape, device="meta") for name, shape in parameter_shapes(model).items()}
    return {
        name: tuple(part.shape)
        for entry in parameters.entries
        for name, part in zip(entry.theirs, entry.split([ours[name] for name in entry.ours]), strict=True)
    }


def _tensor_problems(published: PublishedModel) -> list[str]:
    problems = []
    for name, shape in expected_shapes(published.parameters, published.model).items():
        stored = published.tensors.tensors[published.stored_names[name]]
        if stored.dtype is None:
            known = ", ".join(DTYPES)
            problems.append(f"{name} is stored as {stored.kind}, which is no type of weights here (known: {known})")
        elif stored.shape != shape:
            problems.append(f"{name} is {list(stored.shape)} in {stored.file.name}, config.json makes it {list(shape)}")
    return problems


def _check_tokenizer(published: PublishedModel) -> None:
    """Raise UserError if the tokenizer cannot be read, or produces ids that the model does not know."""
    keys = tokenizer_keys(published.folder, published.folder)
    if not keys:
        return
    tokenizer = build_tokenizer(
        keys["tokenizer_type"], keys["vocab_file"], keys.get("merge_file"), keys.get("end_of_document_token")
    )
    size = published.model.vocab_size
    if tokenizer.end_of_document >= size or _ids_for(tokenizer, size) > size:
        raise UserError(
            f"{keys['vocab_file']} has {tokenizer.vocab_size} ids, more than vocab_size in config.json "
            f"({size}): this tokenizer does not belong to this model"
        )


def _ids_for(tokenizer: Tokenizer, vocab_size: int) -> int:
    """The ids of a tokenizer without added tokens that a model of `vocab_size` rows cannot embed."""
    if not isinstance(tokenizer, HuggingFaceTokenizer) or tokenizer.vocab_size <= vocab_size:
        return tokenizer.vocab_size
    fitting = json.dumps(without_tokens_beyond(tokenizer.definition(), vocab_size))
    return max(tokenizers.Tokenizer.from_str(fitting).get_vocab().values()) + 1


def _too_many(heading: str, problems: Sequence[str]) -> UserError:
    more = [f"  ... and {len(problems) - 6} more"] if len(problems) > 6 else []
    return UserError(heading, *(f"  {problem}" for problem in problems[:6]), *more)


def without_padding(model: ModelPlan) -> ModelPlan:
    """The model as Hugging Face has it: no rows beyond the vocabulary, no kernels but the plain ones."""
    kinds = tuple("local" if kind == "local" else "global" for kind in model.attention_kinds)
    return replace(model, padded_vocab_size=model.vocab_size, attention_kinds=kinds, float8=False)
