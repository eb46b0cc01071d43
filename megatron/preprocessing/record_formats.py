"""How a record of instruction data becomes text of which a part is learned: prompt and completion, or a conversation.

No torch.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron.errors import UserError

Record = Mapping[str, Any]
Segments = list[tuple[str, bool]]  # text, and whether it is learned


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


@dataclass(frozen=True)
class Chat:
    """Records with a list of messages, written out by a template in Jinja as Hugging Face's tokenizers have it.

    What the template adds for each message of the assistant, from where an answer is asked for, is learned.
    key: of the messages. names: what templates find there, such as bos_token. Raises UserError for a broken template.
    """

    key: str
    template: str
    names: dict[str, str]

    def __post_init__(self) -> None:
        from jinja2 import TemplateError

        try:
            _ = self._compiled
        except TemplateError as error:
            raise UserError(f"the chat template cannot be used: {error}") from error

    def __reduce__(self) -> tuple[type["Chat"], tuple[str, str, dict[str, str]]]:
        return Chat, (self.key, self.template, self.names)  # what is compiled cannot be sent to a worker

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys that a record must have."""
        return (self.key,)

    def __call__(self, record: Record) -> Segments:
        """Raises BadRecordError for messages that the template cannot write, and where it rewrites earlier ones."""
        messages = record.get(self.key)
        if not isinstance(messages, list) or not all(isinstance(each, dict) and "role" in each for each in messages):
            raise BadRecordError(f'no list of messages with roles under the key "{self.key}"')
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
            return str(self._compiled.render(messages=messages, add_generation_prompt=ask))
        except (BadRecordError, MemoryError):
            raise
        except Exception as error:  # a template is a program: what is in a message can make it fail in any way
            raise BadRecordError(f"the chat template cannot write it: {type(error).__name__}: {error}") from error

    @cached_property
    def _compiled(self) -> Any:
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        environment.globals["raise_exception"] = _refuse
        return environment.from_string(self.template, globals=dict(self.names))


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


def _added(before: str, after: str) -> str:
    if not after.startswith(before):
        raise BadRecordError("the chat template changes what it wrote for earlier messages")
    return after[len(before) :]


def _refuse(message: str) -> None:
    raise BadRecordError(message)
