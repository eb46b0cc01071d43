"""One JSON object per generated text, with GPT-NeoX's fields."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron.errors import UserError
from megatron.generation.decoding import Continuation
from megatron.tokenizer.base import Tokenizer


def record(context: str, found: Continuation, tokenizer: Tokenizer, seconds: float) -> dict[str, Any]:
    """The object for one text.

    context: the prompt ("" for none). text: the continuation, so that context and text joined are the whole; null
    where there is none. length: its tokens. finished: the model ended the document itself; false means that
    maximum_tokens came first. message: null, or why there is no text. duration_seconds: of the batch that the text was
    part of. logits: only if kept, [length][v].
    """
    before = tokenizer.encode_openings([context])[0]
    fields: dict[str, Any] = {
        "context": context,
        "text": tokenizer.decode_continuation(before, found.tokens) if found.tokens else None,
        "length": len(found.tokens),
        "finished": found.finished,
        "message": None if found.tokens else "no text: the first token generated was the end of the document",
        "duration_seconds": round(seconds, 6),
    }
    if found.logits:
        fields["logits"] = found.logits
    return fields


class JsonLinesFile:
    """The output file, opened before the work begins and flushed after every batch."""

    def __init__(self, path: Path) -> None:
        """Create or truncate `path`. Raises UserError where it cannot be written."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("w", encoding="utf-8")
        except OSError as error:
            raise UserError(f"sample_output_file ({path}): {error.strerror}") from error

    def __enter__(self) -> "JsonLinesFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def write(self, records: Sequence[dict[str, Any]]) -> None:
        """Append one line for each object."""
        self._file.writelines(json.dumps(fields, ensure_ascii=False) + "\n" for fields in records)
        self._file.flush()
