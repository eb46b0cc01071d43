"""Prompts with their settings: from a text file, JSON lines or standard input, or the empty one."""

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, ValidationError

from megatron import registry
from megatron.config.messages import validation_problem
from megatron.config.rules.generation_rules import broken_answer_rules
from megatron.config.schema.generation_keys import AnswerKeys, GenerationKeys
from megatron.config.schema.key_group import NotNegativeInt
from megatron.config.yaml_file import Entries, Location
from megatron.errors import UserError
from megatron.text import well_formed
from megatron.text_files import decode_text, read_text

STANDARD_INPUT = "-"  # as sample_input_file
MOST_PROBLEMS = 20  # named in one message


@dataclass(frozen=True)
class Prompt:
    """What is to be continued. place: of it in the input, for messages. messages: of a chat; then `text` is empty.

    seed: of its own; None: it follows from the run's seed and the prompt's number.
    """

    place: str
    settings: AnswerKeys
    text: str = ""
    messages: tuple[Mapping[str, Any], ...] = ()
    seed: int | None = None


def _message(message: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(message.get("role"), str) or "content" not in message:
        raise ValueError('each message needs a "role", which is text, and a "content"')
    return message


class PromptLine(AnswerKeys):
    """A line of a JSON Lines file: a text or a chat, and settings of its own."""

    prompt: str | None = None
    messages: tuple[Annotated[dict[str, Any], AfterValidator(_message)], ...] | None = None
    seed: NotNegativeInt | None = None


def read_prompts(keys: GenerationKeys) -> list[Prompt]:
    """The prompts of `sample_input_file`.

    Raises UserError for a file that cannot be read, is not text or holds no prompt, and for every line of JSON that
    cannot be used.
    """
    path = keys.sample_input_file or STANDARD_INPUT
    if path == STANDARD_INPUT:
        source = "standard input"
        text = decode_text(sys.stdin.buffer.read(), f"{source} (sample_input_file: -)").replace("\r\n", "\n")
    else:
        source, text = path, read_text(Path(path), "sample_input_file")
    kind = keys.sample_input_format or ("jsonl" if path.lower().endswith(".jsonl") else "text")
    prompts = _of_json_lines(text, source, keys) if kind == "jsonl" else list(_of_text(text, keys))
    if not prompts:
        raise UserError(f"sample_input_file ({path}) holds no prompt")
    return prompts


def _of_text(text: str, keys: GenerationKeys) -> Iterator[Prompt]:
    """The parts between `prompt_end`, stripped, without empty ones."""
    parts = text.split(keys.prompt_end) if keys.prompt_end else [text]
    for number, part in enumerate(filter(None, map(str.strip, parts)), 1):
        yield written_prompt(part, keys, f"prompt {number}")


def written_prompt(text: str, keys: GenerationKeys, place: str) -> Prompt:
    """A text as a prompt: with `chat` a message of the user."""
    if keys.chat:
        return Prompt(place, keys, messages=({"role": "user", "content": text},))
    return Prompt(place, keys, text)


def _of_json_lines(text: str, source: str, keys: GenerationKeys) -> list[Prompt]:
    prompts: list[Prompt] = []
    problems: list[str] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            prompts.append(_of_line(line, Location(source, number), keys))
        except UserError as error:
            problems += error.problems
    if problems:
        raise several_problems(problems)
    return prompts


def several_problems(problems: list[str]) -> UserError:
    """The error that names the first problems and counts the others."""
    further = len(problems) - MOST_PROBLEMS
    return UserError(*problems[:MOST_PROBLEMS], *([f"and {further} more"] if further > 0 else []))


def _of_line(line: str, place: Location, keys: GenerationKeys) -> Prompt:
    """Raises UserError with everything that is wrong with the line."""
    fields = _json_object(line, place)
    problems = [f"{place}: {problem}" for problem in _wrong_names(fields)]
    if isinstance(fields.get("json_schema"), dict):
        fields["json_schema"] = json.dumps(fields["json_schema"])
    known = {key: fields[key] for key in fields if key in PromptLine.model_fields}
    try:
        read = PromptLine.model_validate({key: tuple(v) if isinstance(v, list) else v for key, v in known.items()})
    except ValidationError as error:
        entries = Entries(locations={(): place})
        raise UserError(*problems, *(validation_problem(detail, entries) for detail in error.errors())) from error
    own = {key: getattr(read, key) for key in read.model_fields_set & AnswerKeys.model_fields.keys()}
    settings = keys.model_copy(update=own)
    problems += [f"{place}: {problem}" for problem in broken_answer_rules(settings)]
    if not problems and (read.prompt is None) == (not read.messages):
        problems.append(f"{place}: a line has either a prompt (text) or messages (a list of at least one)")
    if problems:
        raise UserError(*problems)
    written = written_prompt(well_formed(read.prompt or ""), keys, str(place))
    messages = read.messages or written.messages
    return Prompt(str(place), settings, "" if messages else written.text, messages, read.seed)


def _json_object(line: str, place: Location) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg} (column {error.colno})" if isinstance(error, json.JSONDecodeError) else str(error)
        raise UserError(f"{place}: this is not JSON: {reason}") from error
    if not isinstance(found, dict):
        raise UserError(f'{place}: a line is an object, such as {{"prompt": "Once"}}, not {type(found).__name__}')
    return found


def _wrong_names(fields: Mapping[str, Any]) -> Iterator[str]:
    for name in fields:
        if name in PromptLine.model_fields:
            continue
        near = registry.nearest(name, PromptLine.model_fields)
        hint = f'Did you mean "{near}"?' if near else f"A line has {', '.join(PromptLine.model_fields)}"
        if name in GenerationKeys.model_fields:
            hint = "It is the same for all prompts: set it in the configuration"
        yield f'unknown key "{name}". {hint}'
