"""The files beside the weights of a published model: tokenizer, chat template, settings of generation."""

import json
import logging
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron.errors import UserError
from megatron.files import is_folder
from megatron.hugging_face.stored import read_json
from megatron.tokenizer.base import Tokenizer
from megatron.tokenizer.huggingface import SOURCES, HuggingFaceTokenizer

log = logging.getLogger(__name__)

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
SETTINGS = ("chat_template.jinja", "generation_config.json")


def tokenizer_keys(folder: Path, later: Path) -> dict[str, Any]:
    """The keys of the tokenizer in `folder`, with its files in the folder `later`; none if there is no tokenizer."""
    end = end_of_document(folder)
    keys = {"end_of_document_token": end} if end is not None else {}
    if (folder / "tokenizer.json").is_file():
        return {"tokenizer_type": "HFTokenizer", "vocab_file": str(later / "tokenizer.json")} | keys
    if any(all((folder / name).is_file() for name in names) for names in SOURCES):
        return {"tokenizer_type": "HFTokenizer", "vocab_file": str(later)} | keys
    return {}


def end_of_document(folder: Path) -> str | None:
    """The text of the token that ends a text, as the tokenizer's settings name it, or by its id in config.json."""
    if (folder / "tokenizer_config.json").is_file():
        named = read_json(folder / "tokenizer_config.json").get("eos_token")
        token = named.get("content") if isinstance(named, dict) else named
        if isinstance(token, str):
            return token
    if not (folder / "tokenizer.json").is_file() or not (folder / "config.json").is_file():
        return None
    end = read_json(folder / "config.json").get("eos_token_id")
    end = end[0] if isinstance(end, list) and end else end
    added = read_json(folder / "tokenizer.json").get("added_tokens")
    texts = {token.get("id"): token.get("content") for token in added or () if isinstance(token, dict)}
    return texts.get(end)


def copy_files(folder: Path, into: Path, names: Iterable[str] = (*TOKENIZER_FILES, *SETTINGS, "config.json")) -> None:
    """Copy those of the files that there are."""
    into.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, into / name)


def folder_of(vocab_file: str | None) -> Path | None:
    """The folder of a published model's tokenizer, whose file or folder `vocab_file` is; None for other tokenizers."""
    if vocab_file is None:
        return None
    folder = Path(vocab_file) if is_folder(vocab_file) else Path(vocab_file).parent
    return folder if any((folder / name).is_file() for name in ("config.json", "tokenizer_config.json")) else None


def write_tokenizer(tokenizer: Tokenizer, vocab_file: str | None, folder: Path) -> None:
    """Write the tokenizer of a model into `folder`, with all that lies beside that of a published model."""
    source = folder_of(vocab_file)
    if source is not None:
        copy_files(source, folder, (*TOKENIZER_FILES, *SETTINGS))
        return
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        log.warning("%s: transformers has no tokenizer of this kind; the export holds none", tokenizer.describe())
        return
    write_json(folder / "tokenizer.json", tokenizer.definition())
    end = tokenizer.decode([tokenizer.end_of_document])
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "clean_up_tokenization_spaces": False},
    )


def token_ids(tokenizer: Tokenizer, config: Mapping[str, Any] | None) -> dict[str, Any]:
    """The ids of special tokens for a config.json: of the published model's, or else of the tokenizer."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    if config is not None:
        return {name: config[name] for name in names if name in config}
    before = tokenizer.affixes[0]
    return {
        "bos_token_id": before[0] if before else None,
        "eos_token_id": tokenizer.end_of_document,
        "pad_token_id": None,
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object. Raises OSError."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_optional(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None where it is missing or damaged."""
    try:
        return read_json(path)
    except UserError:
        return None
