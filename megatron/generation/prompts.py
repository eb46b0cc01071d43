"""Prompts: from a file, from the terminal, or the empty one of unconditional generation."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

import torch.distributed as dist

from megatron.errors import UserError
from megatron.text_files import read_text
from megatron.tokenizer.base import Tokenizer, UnknownTextError


def read_prompts(path: Path, prompt_end: str) -> list[str]:
    """The prompts of a text file: split at `prompt_end`, stripped, without empty ones.

    Raises UserError for a file that cannot be read, is not text or holds no prompt.
    """
    text = read_text(path, "sample_input_file")
    parts = text.split(prompt_end) if prompt_end else [text]
    prompts = [part.strip() for part in parts if part.strip()]
    if not prompts:
        raise UserError(f"sample_input_file ({path}) holds no prompt")
    return prompts


def encode_prompts(prompts: Sequence[str], tokenizer: Tokenizer, context: int) -> list[list[int]]:
    """Ids of each prompt; without any, the end of a document, after which a new one begins.

    Raises UserError, naming each prompt that is longer than `context` tokens or that the vocabulary has no tokens for.
    """
    encoded, problems = [], []
    for number, prompt in enumerate(prompts, 1):
        try:
            encoded += [ids or [tokenizer.end_of_document] for ids in tokenizer.encode_openings([prompt])]
        except UnknownTextError as error:
            encoded.append([])
            problems.append(f"prompt {number}: {error}")
    problems += [
        f"prompt {number} has {len(ids)} tokens, but the model's context is {context} (max_position_embeddings): "
        f'"{prompts[number - 1][:40]}..."'
        for number, ids in enumerate(encoded, 1)
        if len(ids) > context
    ]
    if problems:
        raise UserError(*problems)
    return encoded


def typed_prompts(prompt_end: str, source: TextIO = sys.stdin) -> Iterator[str]:
    """Prompts typed in on rank 0, on every rank; ends with the input (Ctrl-D) or with "stop".

    prompt_end: ends a prompt; empty lines between prompts are skipped. Collective: a broadcast for each prompt.
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
