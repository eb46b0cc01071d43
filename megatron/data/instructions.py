"""Instruction data: text of which only the answers are learned, as token files with label files beside them.

A record becomes segments of text, each learned or not. Segments are tokenized one by one, so that no token lies across
the border. `P_text_document` holds the ids, `P_label_document` the label of each: the id itself, or -100 where nothing
is to be learned. `train_data_paths` and `train_label_data_paths` name them. Floor 2; no torch.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from megatron.data.indexed import IndexedWriter, best_dtype
from megatron.data.inputs import Span
from megatron.data.reading import Chunk, read_chunks
from megatron.data.windows import NOT_A_LABEL
from megatron.errors import RunError, UserError
from megatron.text import well_formed
from megatron.tokenizer.base import Tokenizer

Record = Mapping[str, Any]
Segments = list[tuple[str, bool]]  # text, and whether it is learned
TOGETHER = 1000  # records that are tokenized at once


class BadRecordError(Exception):
    """A record that is not as it should be; the message says why."""


@dataclass(frozen=True)
class PromptAndCompletion:
    """Records with a prompt, which is given, and a completion, which is learned."""

    prompt_key: str
    completion_key: str

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys that a record must have."""
        return self.prompt_key, self.completion_key

    def __call__(self, record: Record) -> Segments:
        """Raises BadRecordError."""
        for key in self.keys:
            if not isinstance(record.get(key), str):
                raise BadRecordError(f'no text under the key "{key}" (keys: {", ".join(record)})')
        return [(record[self.prompt_key], False), (record[self.completion_key], True)]


class Chat:
    """Records with a list of messages, written out by a template in Jinja as Hugging Face's tokenizers have it.

    What the template adds for each message of the assistant, from where an answer is asked for, is learned.
    """

    def __init__(self, key: str, template: str, names: Mapping[str, str]) -> None:
        """key: of the messages. names: what templates find there, such as bos_token. Raises UserError."""
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        environment.globals["raise_exception"] = _refuse
        self.keys, self._error = (key,), TemplateError
        try:
            self._template = environment.from_string(template, globals=dict(names))
        except TemplateError as error:
            raise UserError(f"the chat template cannot be used: {error}") from error

    def __call__(self, record: Record) -> Segments:
        """Raises BadRecordError, for a template that rewrites earlier messages too: what is learned is unclear then."""
        messages = record.get(self.keys[0])
        if not isinstance(messages, list) or not all(isinstance(each, dict) and "role" in each for each in messages):
            raise BadRecordError(f'no list of messages with roles under the key "{self.keys[0]}"')
        written, segments = "", []
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                asked = self._written(messages[:number], ask=True)
                answered = self._written(messages[: number + 1])
                segments += [(_added(written, asked), False), (_added(asked, answered), True)]
                written = answered
        return [*segments, (_added(written, self._written(messages)), False)]

    def _written(self, messages: Sequence[Any], ask: bool = False) -> str:
        try:
            return self._template.render(messages=messages, add_generation_prompt=ask)
        except self._error as error:
            raise BadRecordError(f"the chat template: {error}") from error


def chat_template(key: str, file: Path | None, vocab_file: str | None) -> Chat:
    """The template in `file`, else the one beside the tokenizer: chat_template.jinja, or in tokenizer_config.json.

    Raises UserError where there is none.
    """
    folder = Path(vocab_file).parent if vocab_file else Path("nowhere")
    settings = folder / "tokenizer_config.json"
    config: dict[str, Any] = json.loads(settings.read_text("utf-8")) if settings.is_file() else {}
    source = file or folder / "chat_template.jinja"
    if file is not None and not file.is_file():
        raise UserError(f"--chat-template ({file}) is not a file")
    template = source.read_text("utf-8") if source.is_file() else config.get("chat_template")
    if isinstance(template, list):  # several with names
        template = next((each["template"] for each in template if each["name"] == "default"), None)
    if template is None:
        raise UserError(f"there is no chat template in {folder}; give one with --chat-template FILE")
    tokens = {name: value for name, value in config.items() if name.endswith("_token")}
    names = {name: value["content"] if isinstance(value, dict) else value for name, value in tokens.items()}
    return Chat(key, template, {name: value for name, value in names.items() if isinstance(value, str)})


@dataclass
class InstructionTotals:
    """What became of the records. without_answer: left out, because nothing in them is learned."""

    documents: int = 0
    tokens: int = 0
    learned: int = 0
    without_answer: int = 0
    bad: list[str] = field(default_factory=list)


def write_instructions(
    paths: Iterable[str],
    output_prefix: str,
    tokenizer: Tokenizer,
    segments_of: PromptAndCompletion | Chat,
    skip_bad_lines: bool = False,
) -> InstructionTotals:
    """Write `output_prefix`_text_document and _label_document; each record ends with the end-of-document token.

    Raises RunError at the first bad record, unless they are skipped and counted.
    """
    totals = InstructionTotals()
    text = IndexedWriter(f"{output_prefix}_text_document", best_dtype(tokenizer.vocab_size))
    labels = IndexedWriter(f"{output_prefix}_label_document", np.int32)
    with text, labels:
        documents = _documents(_records(paths, segments_of.keys), segments_of, totals, skip_bad_lines)
        while batch := list(islice(documents, TOGETHER)):
            for ids, learned in _encoded(batch, tokenizer):
                text.add_document(ids)
                labels.add_document(np.where(learned, ids, NOT_A_LABEL))
                totals.documents += 1
                totals.tokens += len(ids)
                totals.learned += int(learned.sum())
    return totals


def _documents(
    records: Iterable[tuple[str, Record | None]],
    segments_of: Callable[[Record], Segments],
    totals: InstructionTotals,
    skip_bad_lines: bool,
) -> Iterator[Segments]:
    """The segments of each record that has something to learn."""
    for name, record in records:
        try:
            if record is None:
                raise BadRecordError("not a JSON object")
            segments = [(well_formed(text), learned) for text, learned in segments_of(record) if text]
        except BadRecordError as error:
            if not skip_bad_lines:
                raise RunError(f"{name}: {error}") from error
            totals.bad.append(f"{name}: {error}")
            continue
        if any(learned for _, learned in segments):
            yield segments
        else:
            totals.without_answer += 1


def _encoded(batch: Sequence[Segments], tokenizer: Tokenizer) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Ids of each document, int64, and which of them are learned; the end of the document is what its last text is."""
    pieces = iter(tokenizer.encode_bare([text for segments in batch for text, _ in segments]))
    before, after = tokenizer.affixes
    for segments in batch:
        runs = [(list(before), False)]
        runs += [(next(pieces), learned) for _, learned in segments]
        runs.append(([*after, tokenizer.end_of_document], segments[-1][1]))
        ids = np.concatenate([np.array(run, dtype=np.int64) for run, _ in runs])
        yield ids, np.repeat([learned for _, learned in runs], [len(run) for run, _ in runs])


def _records(paths: Iterable[str], keys: Sequence[str]) -> Iterator[tuple[str, Record | None]]:
    """Each record with its place; None for a line that is no JSON object."""
    for path in paths:
        for chunk in read_chunks(Span(path), list(keys)):
            yield from _in_chunk(chunk)


def _in_chunk(chunk: Chunk) -> Iterator[tuple[str, Record | None]]:
    if chunk.is_text:
        raise UserError(f"{chunk.source} is plain text; instruction data have prompts and answers: JSON lines, parquet")
    if chunk.columns:
        for number, row in enumerate(zip(*chunk.columns.values(), strict=True), start=chunk.start.line + 1):
            yield f"{chunk.source}, row {number}", dict(zip(chunk.columns, row, strict=True))
        return
    for number, line in enumerate(chunk.data.split(b"\n"), start=chunk.start.line + 1):
        if line.strip():
            yield f"{chunk.source}, line {number}", _parsed(line)


def _parsed(line: bytes) -> Record | None:
    try:
        record = json.loads(line.decode("utf-8-sig", "replace"))
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _added(before: str, after: str) -> str:
    if not after.startswith(before):
        raise BadRecordError("the chat template changes what it wrote for earlier messages")
    return after[len(before) :]


def _refuse(message: str) -> None:
    raise BadRecordError(message)
