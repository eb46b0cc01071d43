"""Checkpoints of other programs, recognized by the names of their files, so that messages can say whose they are.

Many of them share names with ours: DeepSpeed writes `latest` and `global_step1000` as well. Nothing is opened here.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron.errors import UserError
from megatron.files import is_folder

# Any of these in a step's folder makes it ours, whatever else somebody has put there.
OWN_NAMES = frozenset({"progress.json", "identity.json", "state"})

# Programs, and what files and folders are called that only their checkpoints hold. The first match counts.
_PROGRAMS = tuple(
    (program, re.compile(pattern))
    for program, pattern in (
        ("DeepSpeed (universal format)", r"latest_universal"),
        ("GPT-NeoX (DeepSpeed)", r"layer_\d+-model_\d+-model_states\.pt"),
        ("GPT-NeoX or another program with DeepSpeed", r"(.*_)?mp_rank_\d+_(model|optim)_states\.pt"),
        ("Megatron-core (torch_dist)", r"common\.pt"),
        ("Megatron-LM", r"mp_rank_\d+(_\d+)*|latest_checkpointed_iteration\.txt"),
        ("Megatron-LM", r"model_optim_rng\.pt|model_rng\.pt|distrib_optim\.pt"),
        ("OLMo-core", r"model_and_optim"),
        ("Orbax (JAX)", r"_CHECKPOINT_METADATA"),
        ("torch.distributed.checkpoint, such as torchtitan's", r"\.metadata|__\d+_\d+\.distcp"),
        ("LitGPT", r"lit_model\..*"),
        ("Llama in Meta's format", r"consolidated\.\d+\.pth?"),
        ("NeMo", r".*\.nemo"),
        ("PyTorch Lightning", r".*\.ckpt"),
        ("nanoGPT", r"ckpt\.pt"),
        ("Hugging Face", r".*\.safetensors(\.index\.json)?|(pytorch|adapter)_model.*\.bin(\.index\.json)?"),
        ("Hugging Face", r"tf_model\.h5|flax_model\.msgpack|trainer_state\.json"),
    )
)
# What brings a program's weights here, for messages.
_WAYS_IN = {
    "GPT-NeoX (DeepSpeed)": "tools/convert_from_neox.py converts it",
    "GPT-NeoX or another program with DeepSpeed": "tools/convert_from_neox.py converts one of GPT-NeoX",
    "Hugging Face": "tools/convert_from_hf.py converts a model",
    "LitGPT": "tools/convert_from_litgpt.py converts it",
    "Megatron-core (torch_dist)": "Megatron-Bridge's convert_checkpoints.py export writes it in Hugging Face's format",
}
_STEP = re.compile(
    r"((global_?step|iter(ation)?|steps?|checkpoint|ckpt|epoch)[-_=]?)?\d+.*|release|final|best|last", re.IGNORECASE
)


@dataclass(frozen=True)
class ForeignCheckpoint:
    """A checkpoint of another program: its file or folder that was recognized."""

    path: Path
    program: str

    def __str__(self) -> str:
        way = f" ({_WAYS_IN[self.program]})" if self.program in _WAYS_IN else ""
        return f"{self.path} is a checkpoint of {self.program}, which Deepy does not read{way}"


def names_in(folder: Path) -> list[str]:
    """Names of what is in `folder`, in order; none where it does not exist. Raises UserError if it is not readable."""
    if not is_folder(folder):
        return []
    try:
        return sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}") from error


def is_own(names: Iterable[str]) -> bool:
    """Whether a step's folder that holds these names was written by Deepy. It may be damaged."""
    return not OWN_NAMES.isdisjoint(names)


def recognize(path: Path) -> ForeignCheckpoint | None:
    """The foreign checkpoint that `path` is: a step's folder, or one of its files. None for all else."""
    names = names_in(path) if is_folder(path) else [path.name]
    if is_own(names):
        return None
    for program, pattern in _PROGRAMS:
        if any(pattern.fullmatch(name) for name in names):
            universal = "DeepSpeed" in program and "zero" in names
            return ForeignCheckpoint(path, "DeepSpeed (universal format)" if universal else program)
    return None


def foreign_checkpoint(folder: Path, pointed_to: str | None = None) -> ForeignCheckpoint | None:
    """The foreign checkpoint in `folder`, or the one that it is; None where there is none.

    Subfolders count if they are named like steps. pointed_to: the subfolder that `latest` names counts as well.
    """
    steps = [name for name in names_in(folder) if _STEP.fullmatch(name)]
    named = [pointed_to] if pointed_to and Path(pointed_to).name == pointed_to else []
    for name in (*named, *reversed(steps)):
        if is_folder(folder / name) and (found := recognize(folder / name)):
            return found
    return recognize(folder)
