"""Folders of small models of Hugging Face with a tokenizer, as they are published."""

import json
from pathlib import Path
from typing import Any

from tests.families import FIRST, their_config, their_model
from tests.tokenizer_files import bpe_file

VOCABULARY = 411  # rows; the tokenizer has 400 ids
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def write_model(folder: Path, family: str = "llama", **saving: Any) -> Path:
    """A model with random weights, a tokenizer, a chat template and settings of generation."""
    config = their_config(FIRST[family])
    config.vocab_size = VOCABULARY
    their_model(config).save_pretrained(folder, **saving)
    bpe_file(folder)
    write(
        folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    )
    write(folder / "generation_config.json", {"eos_token_id": 0, "temperature": 0.7, "do_sample": True})
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content))


def change(path: Path, **fields: Any) -> None:
    """Replace fields of a JSON file."""
    write(path, json.loads(path.read_text()) | fields)
