"""A published model: its folder as one of our models, with its weights, its tokenizer and its configuration.

published = open_published("meta-llama/Llama-3.2-1B")  # or a folder
published.model                                        # ModelPlan
published.keys()                                       # our configuration
published.weights()                                    # our parameters, read one by one
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron import registry
from megatron.checkpoint.adapter_base import read_base
from megatron.checkpoint.chunks import local_chunks
from megatron.checkpoint.converted import StoredWeight
from megatron.config.plan import ModelPlan
from megatron.config.schema.config import Config
from megatron.convert.family import KIND, Family, family_of, what_computes
from megatron.convert.model_keys import model_keys
from megatron.convert.parameters import Entry, ParameterMap
from megatron.engine.inference import InferenceEngine
from megatron.engine.optimizer_state import MASTER
from megatron.engine.training import TrainingEngine
from megatron.errors import UserError
from megatron.files import is_folder
from megatron.hugging_face.folder import find_folder
from megatron.hugging_face.stored import DTYPES, StoredTensors, read_json
from megatron.hugging_face.tokenizer_files import tokenizer_keys
from megatron.model.gpt import parameter_shapes
from megatron.progress import counted
from megatron.tokenizer.huggingface import HuggingFaceTokenizer, build_hf_tokenizer

PREFIX = "hf:"  # in `load`
MIB = 2**20


@dataclass(frozen=True)
class PublishedModel:
    """A folder of Hugging Face that has been checked: every tensor of the model is there and has the right shape."""

    folder: Path
    name: str  # on the hub, or the absolute path of the folder
    config: dict[str, Any]  # config.json
    family: Family
    model: ModelPlan
    parameters: ParameterMap
    tensors: StoredTensors
    stored_names: dict[str, str]  # in the map of parameters -> in the files
    tokenizer: HuggingFaceTokenizer | None = None  # if Deepy can read it

    def keys(self, folder: Path | None = None) -> dict[str, Any]:
        """The keys of our configuration for the model and its tokenizer.

        folder: where the tokenizer's files will lie; None: where they are.
        """
        return model_keys(self.model) | tokenizer_keys(self.folder, folder or self.folder)

    def describe_base(self) -> dict[str, str]:
        """What a checkpoint of adapters says of this model as their base (`read_base`).

        The hash is of config.json and, of each file of weights, of its size and its first and last MiB: other weights
        differ there, and reading a few MiB takes no time.
        """
        state = hashlib.sha256((self.folder / "config.json").read_bytes())
        for path in sorted({tensor.file for tensor in self.tensors.tensors.values()}):
            size = path.stat().st_size
            state.update(f"{path.name} {size}".encode())
            with path.open("rb") as file:
                state.update(file.read(MIB))
                file.seek(max(0, size - MIB))
                state.update(file.read(MIB))
        return {"path": f"{PREFIX}{self.name}", "ends_sha256": state.hexdigest()}

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


def base_of_adapters(config: Config) -> str | None:
    """Where the base of adapters is, if it is not where it was: in `lora.base`, or in `load` if that is hf:MODEL."""
    load = config.checkpoint.load
    return config.tuning.lora.base or (load if published_name(load) is not None else None)


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
        stored_names = parameters.find(tensors.tensors)
    except UserError as error:
        raise _too_many(f"{folder} does not hold the model of its config.json:", error.problems) from error
    name = str(folder.resolve()) if is_folder(model) else model
    published = PublishedModel(folder, name, config, family, plan, parameters, tensors, stored_names)
    if problems := _tensor_problems(published):
        raise _too_many(f"{folder} does not hold the model of its config.json:", problems)
    return replace(published, tokenizer=_tokenizer_of(folder, plan))


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
    whole = replace(without_padding(model), lora=None)  # of which adapters would be no part
    shapes = parameter_shapes(whole) != parameter_shapes(published.model)
    if shapes or (differing and not any_behavior):
        way_out = [] if shapes else ["to load its weights nevertheless: allow_changes=[model]"]
        way_out.append("to use it as it is, leave these keys out of the configuration: load brings them")
        raise UserError(
            f"{published.folder} holds another model than the configuration describes:", *differing, *way_out
        )


def load_published(engine: TrainingEngine | InferenceEngine, published: PublishedModel) -> None:
    """Load the weights into `engine`, under any layout; adapters keep their values. Collective.

    Each rank reads the tensors that it holds a part of, one after another; of those that need no reordering the files'
    mapped pages hold no more than its part.
    """
    held = local_chunks(engine.state.fragments(), engine.grid, owned_only=False, replicated_over_data=False)
    for entry in counted(published.parameters.entries, f"loading {published.folder}", "tensors"):
        targets = [held.get(f"{name}/{MASTER}") for name in entry.ours]
        if not any(targets):
            continue
        wholes = entry.join([published.read(name) for name in entry.theirs])
        for whole, local in zip(wholes, targets, strict=True):
            for offsets, chunk in local.chunks.items() if local else ():
                part = tuple(slice(at, at + size) for at, size in zip(offsets, chunk.shape, strict=True))
                chunk.copy_(whole[part])
    engine.state.finish_loading()
    if engine.is_adapted:
        engine.base = published.describe_base()


def open_base(model: str, checkpoint: Path) -> PublishedModel:
    """The published model that is the base of the adapters in `checkpoint`. Raises UserError if it is another one."""
    try:
        published = open_published(model)
    except UserError as error:
        raise UserError(
            f"{checkpoint} holds adapters of {PREFIX}{model}; lora.base names it where it is now:", *error.problems
        ) from error
    there, here = read_base(checkpoint), published.describe_base()
    if here["ends_sha256"] != there.get("ends_sha256"):
        raise UserError(
            f"{checkpoint} holds adapters of a model that was in {there['path']}; what is in {published.folder} is "
            "another one"
        )
    return published


def load_base(engine: TrainingEngine | InferenceEngine, model: str, checkpoint: Path) -> None:
    """Registry entry: load `open_base` into `engine`. Collective. Raises UserError."""
    load_published(engine, open_base(model, checkpoint))


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


def _tokenizer_of(folder: Path, model: ModelPlan) -> HuggingFaceTokenizer | None:
    """The tokenizer in a folder, if any. Raises UserError if it cannot be read, or has ids unknown to the model."""
    keys = tokenizer_keys(folder, folder)
    if not keys:
        return None
    tokenizer = build_hf_tokenizer(keys["vocab_file"], None, keys.get("end_of_document_token"))
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"{keys['vocab_file']} has {tokenizer.vocab_size} ids, more than vocab_size in config.json "
            f"({model.vocab_size}): this tokenizer does not belong to this model"
        )
    return tokenizer


def _too_many(heading: str, problems: Sequence[str]) -> UserError:
    more = [f"  ... and {len(problems) - 6} more"] if len(problems) > 6 else []
    return UserError(heading, *(f"  {problem}" for problem in problems[:6]), *more)


def without_padding(model: ModelPlan) -> ModelPlan:
    """The model as Hugging Face has it: no rows beyond the vocabulary, no kernels but the plain ones."""
    kinds = tuple("local" if kind == "local" else "global" for kind in model.attention_kinds)
    return replace(model, padded_vocab_size=model.vocab_size, attention_kinds=kinds, float8=False)
