"""The output: one JSON object per generated text, with GPT-NeoX's fields, in a file that a later run continues."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megatron.errors import UserError
from megatron.files import FileLock
from megatron.generation.requests import Answer, Token
from megatron.generation.samples import Sample
from megatron.tokenizer.base import Tokenizer

BEGINNING = b'{"context": '  # of each line
WHY_EMPTY = {
    "end": "the first token generated was the end of the document",
    "stop": "it began with a stop string or token",
    "length": "its tokens stand for no text",
}


def record(sample: Sample, answer: Answer, tokenizer: Tokenizer, identity: str) -> dict[str, Any]:
    """The object for one text.

    context: the prompt ("" for none; of a chat what the template wrote). text: the continuation, so that context and
    text joined are the whole; null where there is none. length: its tokens. finished: the text came to its end; false
    means that maximum_tokens came first. message: null, or why there is no text. duration_seconds: from the beginning
    of the reading of its prompt to its end, beside other texts. reason: end (of the document), stop (a stop string or
    token) or length. prompt, sample: numbers from 0. identity: of the request and the model. logprobs, logits: of each
    token, if asked for.
    """
    assert answer.reason is not None
    fields: dict[str, Any] = {
        "context": sample.context,
        "text": answer.text or None,
        "length": len(answer.tokens),
        "finished": answer.reason != "length",
        "message": None if answer.text else f"no text: {WHY_EMPTY[answer.reason]}",
        "duration_seconds": round(answer.seconds, 6),
        "reason": answer.reason,
        "prompt": sample.prompt,
        "sample": sample.number,
        "identity": identity,
    }
    if sample.request.alternatives is not None:
        fields["logprobs"] = [_log_probability(token, tokenizer) for token in answer.tokens]
    if sample.request.keep_logits:
        fields["logits"] = [token.logits for token in answer.tokens]
    return fields


def _log_probability(token: Token, tokenizer: Tokenizer) -> dict[str, Any]:
    """The fields of OpenAI's chat API, and the ids."""

    def fields(id: int, logprob: float | None) -> dict[str, Any]:
        return {"token": tokenizer.decode([id]), "id": id, "logprob": logprob}

    return fields(token.id, token.log_probability) | {"top_logprobs": [fields(*pair) for pair in token.alternatives]}


class SamplesFile:
    """The output file, opened before the work begins and unchanged until `begin`."""

    def __init__(self, path: Path, identities: Sequence[str], overwrite: bool = False) -> None:
        """identities: of the texts of this job, in order; those that the file begins with are kept.

        overwrite: replace what the file has of another job. Raises UserError for such a file without it, for one that
        cannot be written, and for one that another run writes to.
        """
        self.path, self._identities = path, identities
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab")
        except OSError as error:
            raise UserError(f"sample_output_file ({path}): {error.strerror}") from error
        self._regular = path.is_file()  # not a terminal or pipe
        self._lock = FileLock(path.with_name(f"{path.name}.lock"), f"sample_output_file ({path})", temporary=True)
        self.kept, self._size = 0, 0
        if not self._regular:
            return
        try:
            self._lock.take()
            self._look(overwrite)
        except UserError:
            self.close()
            raise

    def _look(self, overwrite: bool) -> None:
        """Find out how much of the file is to be kept."""
        with self.path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n") and (line.startswith(BEGINNING) or BEGINNING.startswith(line)):
                    break  # the run was killed while it wrote
                if (problem := self._problem(line)) is None:
                    self.kept, self._size = self.kept + 1, self._size + len(line)
                elif overwrite:
                    self.kept, self._size = 0, 0
                    break
                else:
                    raise UserError(
                        f"sample_output_file ({self.path}) has {problem} in line {self.kept + 1}; choose another "
                        "file, or set overwrite_samples: true"
                    )

    def _problem(self, line: bytes) -> str | None:
        try:
            fields = json.loads(line)
        except ValueError:
            fields = None
        if not isinstance(fields, dict) or "identity" not in fields or not line.endswith(b"\n"):
            return "something else than a generated text"
        if self.kept == len(self._identities):
            return f"a text more than the {self.kept} of this job"
        if fields["identity"] != self._identities[self.kept]:
            return "the text of another prompt, model or setting"
        return None

    def begin(self) -> None:
        """Cut off what is not kept: a line that is not whole, or the texts of another job."""
        if self._regular:
            os.ftruncate(self._file.fileno(), self._size)

    def write(self, fields: dict[str, Any]) -> None:
        """Append one line, and flush it."""
        self._file.write(json.dumps(fields, ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file, and let other runs write to it."""
        self._file.close()
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
