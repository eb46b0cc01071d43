"""Where prompts come from: a file, or nowhere (unconditional), or the terminal."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

import torch.distributed as dist

from megatron.errors import UserError
from megatron.tokenizer.base import Tokenizer


def read_prompts(path: Path, prompt_end: str) -> list[str]:
    """The prompts of a UTF-8 file: parted by `prompt_end`, stripped, empty ones left out.

    Raises UserError for a file that cannot be read, is no UTF-8 or holds no prompt.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"sample_input_file ({path}): {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"sample_input_file ({path}) is not UTF-8: byte {error.start} cannot be decoded") from error
    parts = text.split(prompt_end) if prompt_end else [text]
    prompts = [part.strip() for part in parts if part.strip()]
    if not prompts:
        raise UserError(f"sample_input_file ({path}) holds no prompt")
    return prompts


def encode_prompts(prompts: Sequence[str], tokenizer: Tokenizer, context: int) -> list[list[int]]:
    """Ids of each prompt; an empty one is the end of a document, after which a new one begins.

    Raises UserError, naming each prompt longer than `context` tokens.
    """
    encoded = [ids or [tokenizer.end_of_document] for ids in tokenizer.encode_batch(list(prompts))]
    problems = [
        f"prompt {number} has {len(ids)} tokens, but the model's context is {context} (max_position_embeddings): "
        f'"{prompts[number - 1][:40]}..."'
        for number, ids in enumerate(encoded, 1)
        if len(ids) > context
    ]
    if problems:
        raise UserError(*problems)
    return encoded


def typed_prompts(prompt_end: str, source: TextIO = sys.stdin) -> Iterator[str]:
    """Prompts as they are typed in on rank 0, on every rank; ends with the input (Ctrl-D) or with "stop".

    prompt_end: ends a prompt; empty lines between prompts are passed over. Collective: a broadcast for each prompt.
    """
    while True:
        message = [_ask(prompt_end, source) if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(message, src=0)
        if message[0] is None:
            return
        yield message[0]


def _ask(prompt_end: str, source: TextIO) -> str | None:
    print('Context prompt (Ctrl-D or "stop" ends) >>> ', end="", flush=True)
    typed = ""
    for line in source:
        typed += line
        ended = typed.endswith(prompt_end) or (prompt_end != "\n" and typed.rstrip("\n").endswith(prompt_end))
        if ended and typed.replace(prompt_end, "").strip():
            prompt = typed.rstrip("\n").removesuffix(prompt_end).strip()
            return None if prompt == "stop" else prompt
    rest = typed.strip()
    return rest or None
