"""Find the folder of a published model: a path, or the name of a repository on the Hugging Face hub."""

import re
from pathlib import Path

from megatron.errors import UserError, first_line
from megatron.files import exists, is_folder

NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
SMALL_FILES = ("*.json", "*.jinja", "*.model", "merges.txt", "tokenizer*")


def find_folder(model: str) -> Path:
    """The folder that `model` is, or that holds the repository of this name, downloaded where it is not in the cache.

    HF_HUB_OFFLINE=1 forbids to ask the hub, HF_HOME moves the cache. Raises UserError if there is neither.
    """
    if is_folder(model):
        return Path(model)
    if exists(model):
        raise UserError(f"{model} is a file; name the folder of the model, with config.json in it")
    if not NAME.fullmatch(model) or model.startswith("."):
        raise UserError(f"there is no folder {model}")
    return _downloaded(model)


def _downloaded(name: str) -> Path:
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError as error:
        raise UserError(f"there is no folder {name}; names on the hub need pip install 'deepy[convert]'") from error
    try:
        folder = Path(snapshot_download(name, allow_patterns=[*SMALL_FILES, "model*.safetensors"]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=[*SMALL_FILES, "pytorch_model*.bin"]))
    except errors.GatedRepoError as error:
        raise UserError(
            f"{name} on the Hugging Face hub is open only to those who asked for it: `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(f"there is no folder {name}, and no repository of this name on the Hugging Face hub") from error
    except Exception as error:  # of many kinds: no network, no such name, a proxy's answer
        raise UserError(
            f"there is no folder {name}, it is not in the cache of the Hugging Face hub, and the hub cannot be reached "
            f"({first_line(error)})"
        ) from error
    return folder
