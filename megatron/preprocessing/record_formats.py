"""Records of instruction data as text, part of which is learned: prompt and completion, or a chat. No torch."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron.errors import UserError
from megatron.files import is_file, is_folder
from megatron.preprocessing import chat_environment
from megatron.text_files import read_text

Record = Mapping[str, Any]
Segments = list[tuple[str, bool]]  # text, and whether it is learned
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")


class BadRecordError(Exception):
    """A record that cannot be used; the message says why."""


@dataclass(frozen=True)
class PromptAndCompletion:
    """Records with a prompt, which is given, and a completion, which is learned."""

    prompt_key: str
    completion_key: str

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys that a record must have."""
        return self.prompt_key, self.completion_key

    def settings(self) -> dict[str, Any]:
        """Everything that the output depends on, as JSON."""
        return asdict(self)

    def __call__(self, record: Record) -> Segments:
        """Raises BadRecordError."""
        for key in self.keys:
            if not isinstance(record.get(key), str):
                raise BadRecordError(f'no text under the key "{key}" (keys: {", ".join(record)})')
        return [(record[self.prompt_key], False), (record[self.completion_key], True)]


@dataclass(frozen=True)
class Chat:
    """Records with a list of messages, written out by a chat template in Jinja as transformers does.

    The text that the template adds for each message of the assistant, after the generation prompt, is learned; blocks
    marked `{% generation %}` do not change that. key: of the messages. names: variables of the template, such as
    bos_token. today: the date that `strftime_now` formats; without it the function is undefined, because data must not
    depend on the day. Raises UserError for a broken template, or one that calls `strftime_now` and has no fallback.
    """

    key: str
    template: str
    names: dict[str, str]
    today: date | None = None

    def __post_init__(self) -> None:
        from jinja2 import TemplateError

        try:
            _ = self._compiled
        except (TemplateError, RecursionError) as error:
            raise UserError(f"the chat template cannot be used: {error}") from error
        if self.today is None and chat_environment.needs_date(self.template):
            raise UserError(
                "the chat template writes the current date (strftime_now), so the data would depend on the day; "
                "fix the date with --chat-date YYYY-MM-DD"
            )

    def __reduce__(self) -> tuple[type["Chat"], tuple[str, str, dict[str, str], date | None]]:
        return Chat, (self.key, self.template, self.names, self.today)  # the compiled template cannot be pickled

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys that a record must have."""
        return (self.key,)

    def settings(self) -> dict[str, Any]:
        """Everything that the output depends on, as JSON."""
        fixed = {} if self.today is None else {"date": self.today.isoformat()}
        return {"key": self.key, "template": self.template, "names": self.names, **fixed}

    def __call__(self, record: Record) -> Segments:
        """Raises BadRecordError for messages that the template rejects, and where it rewrites earlier messages."""
        messages = record.get(self.key)
        if not isinstance(messages, list) or not all(isinstance(each, dict) and "role" in each for each in messages):
            raise BadRecordError(f'no list of messages with roles under the key "{self.key}"')
        written, segments = "", []
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                asked = self.render(messages[:number], ask=True)
                answered = self.render(messages[: number + 1])
                segments += [(_added(written, asked), False), (_added(asked, answered), True)]
                written = answered
        return [*segments, (_added(written, self.render(messages)), False)]

    def render(self, messages: Sequence[Any], ask: bool = False) -> str:
        """The text of the messages; ask: with the generation prompt. Raises BadRecordError."""
        from jinja2 import TemplateError, UndefinedError

        variables = {"messages": with_reasoning(messages), "tools": None, "documents": None}
        try:
            return str(self._compiled.render(**variables, add_generation_prompt=ask))
        except MemoryError:
            raise
        except Exception as error:  # a template is a program: what is in a message can make it fail in any way
            if isinstance(error, TemplateError) and not isinstance(error, UndefinedError):  # by raise_exception
                raise BadRecordError(f"the chat template rejects it: {error}") from error
            raise BadRecordError(f"the chat template cannot write it: {type(error).__name__}: {error}") from error

    @cached_property
    def _compiled(self) -> Any:
        found = chat_environment.environment()
        if self.today is not None:
            found.globals["strftime_now"] = self.today.strftime
        return found.from_string(self.template, globals=dict(self.names))


def chat_template(
    key: str, file: Path | None, vocab_file: str | None, today: date | None = None, option: str = "--chat-template"
) -> Chat:
    """The template in `file`, else the one next to the tokenizer: chat_template.jinja, or in tokenizer_config.json.

    vocab_file: of the tokenizer, or the folder of a model. option: the flag or key of `file`, for messages.
    today: the date for templates that write one. Raises UserError where there is no template, or it cannot be read.
    """
    folder = (Path(vocab_file) if is_folder(vocab_file) else Path(vocab_file).parent) if vocab_file else None
    config = _tokenizer_config(folder / "tokenizer_config.json") if folder else {}
    template: Any = config.get("chat_template")
    if file is not None:
        template = read_text(file, option)
    elif folder and is_file(folder / "chat_template.jinja"):
        template = read_text(folder / "chat_template.jinja", "the chat template")
    if isinstance(template, list):  # several with names
        named = {each.get("name"): each.get("template") for each in template if isinstance(each, dict)}
        template = named.get("default")
    if not isinstance(template, str):
        place = f"in {folder}" if folder else "without a vocabulary file"
        raise UserError(f"there is no chat template {place}; give the file of one with {option}")
    tokens = {name: value for name, value in config.items() if name.endswith("_token")}
    names = {name: value.get("content") if isinstance(value, dict) else value for name, value in tokens.items()}
    return Chat(key, template, {name: value for name, value in names.items() if isinstance(value, str)}, today)


def _tokenizer_config(path: Path) -> dict[str, Any]:
    if not is_file(path):
        return {}
    try:
        config = json.loads(read_text(path, "the tokenizer's settings"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} does not hold an object with settings of the tokenizer")
    return config


def with_reasoning(messages: Sequence[Any]) -> list[Any]:
    """Messages with their reasoning under each of the names that templates read, as transformers adds them."""
    found = []
    for message in messages:
        reasoning = next((message[name] for name in REASONING_KEYS if message.get(name) is not None), None)
        if reasoning is not None:
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        found.append(message)
    return found


def _added(before: str, after: str) -> str:
    if not after.startswith(before):
        raise BadRecordError("the chat template changes what it wrote for earlier messages")
    return after[len(before) :]
