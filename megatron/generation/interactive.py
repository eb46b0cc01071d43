"""A conversation with a person at a terminal, or with a program that writes prompts to standard input."""

import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, Self

from megatron.config.schema.generation_keys import GenerationKeys
from megatron.errors import UserError
from megatron.generation.engine import Engine
from megatron.generation.prompts import Prompt
from megatron.generation.records import WHY_EMPTY
from megatron.generation.requests import Answer
from megatron.generation.samples import Sample, SampleMaker
from megatron.launch.protocol.heartbeat import CONVERSING, Heartbeat

END = "stop"  # typed alone, as in GPT-NeoX
REMEMBERED = 1000  # prompts in the history
COMMANDS = {
    "/chat": "begin a chat with the model's template, or end it",
    "/clear": "forget the messages of the chat",
    "/system": "TEXT sets the system message of the chat; without TEXT there is none",
    "/help": "list the commands",
}


class Interrupts:
    """Ctrl-C, counted since the last line was typed. It raises KeyboardInterrupt within `raised` only.

    So it never ends a step of the engine, in which all ranks take part.
    """

    def __init__(self) -> None:
        self.count = 0
        self._raises = False

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    @contextmanager
    def raised(self) -> Iterator[None]:
        """Raise KeyboardInterrupt in this block."""
        self._raises = True
        try:
            yield
        finally:
            self._raises = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        if self._raises:
            raise KeyboardInterrupt


class Session:
    """Prompts typed on rank 0, and texts shown as they are generated."""

    def __init__(self, engine: Engine, maker: SampleMaker, keys: GenerationKeys) -> None:
        """maker: of the engine's model."""
        self._engine, self._maker = engine, maker
        self._keys = keys.model_copy(update={"num_samples": 1, "return_logits": False, "logprobs": None})
        self._messages: list[dict[str, Any]] = []
        self._system: list[dict[str, Any]] = []
        self._chats = keys.chat
        self._interrupts = Interrupts()

    def run(self) -> None:
        """Answer until the input ends, with Ctrl-D, "stop" or Ctrl-C twice."""
        Heartbeat.of_this_process().beat(CONVERSING, 0)
        end = "Enter" if self._keys.prompt_end == "\n" else repr(self._keys.prompt_end)
        print(f'{end} ends a prompt; Ctrl-C stops a text; Ctrl-D or "{END}" ends; /help lists commands', flush=True)
        with self._interrupts, _history():
            number = 0
            while self._interrupts.count < 2 and (typed := self._ask()) is not None:
                try:
                    if _is_command(typed):
                        self._obey(*typed.split(maxsplit=1))
                    else:
                        self._answer(typed, number)
                        number += 1
                except UserError as error:
                    print(error, flush=True)

    def _ask(self) -> str | None:
        """The next prompt, stripped and not empty; None: the input has ended."""
        lines: list[str] = []
        while True:
            try:
                with self._interrupts.raised():
                    lines.append(input("... " if lines else ">>> "))
            except EOFError:
                print(flush=True)
                return "\n".join(lines).strip() or None
            except KeyboardInterrupt:
                if self._interrupts.count > 1:
                    print(flush=True)
                    return None
                print("\n(Ctrl-C once more ends)", flush=True)
                lines = []
                continue
            self._interrupts.count = 0
            if (prompt := self._prompt(lines)) is None:
                continue
            if prompt:
                return None if prompt == END else prompt
            lines = []

    def _prompt(self, lines: list[str]) -> str | None:
        """What was typed before `prompt_end`; None: it has not been typed yet."""
        end = self._keys.prompt_end
        text = "\n".join(lines)
        if len(lines) == 1 and _is_command(text):
            return text.strip()
        for typed in (f"{text}\n", text):
            if typed.endswith(end):
                return typed.removesuffix(end).strip()
        return None

    def _obey(self, command: str, rest: str = "") -> None:
        """Raises UserError where the model has no chat template."""
        if command == "/help":
            print("\n".join(f"{name:8} {what}" for name, what in COMMANDS.items()), flush=True)
            return
        if command == "/chat":
            _ = self._maker.chat
            self._chats = not self._chats
        elif command == "/system":
            self._system = [{"role": "system", "content": rest}] if rest else []
        if command != "/system":
            self._messages = []
        state = "on" if self._chats else "off"
        system = self._system[0]["content"] if self._system else "none"
        print(f"(chat: {state}, {len(self._messages)} messages, system message: {system})", flush=True)

    def _answer(self, typed: str, number: int) -> None:
        """Show the text that follows. Raises UserError for a prompt that cannot be continued."""
        if not self._chats:
            [sample] = self._maker.samples_of(Prompt("", self._keys, typed), number)
            self._shown(sample)
            return
        self._messages.append({"role": "user", "content": typed})
        try:
            [sample] = self._maker.samples_of(Prompt("", self._keys, messages=tuple(self._fitting())), number)
            answer = self._shown(sample)
        except UserError:
            self._messages.pop()
            raise
        self._messages.append({"role": "assistant", "content": answer.text})

    def _fitting(self) -> list[dict[str, Any]]:
        """The messages of the chat, without the oldest ones where they leave no room for an answer."""
        room = self._maker.context - min(self._keys.maximum_tokens, self._maker.context // 4)
        while len(self._messages) > 1 and self._maker.length([*self._system, *self._messages]) > room:
            del self._messages[:2]
            print("(the oldest messages no longer fit into the context and are left out)", flush=True)
        return [*self._system, *self._messages]

    def _shown(self, sample: Sample) -> Answer:
        """Generate the text and show it as it comes, until Ctrl-C."""
        number, answer = self._engine.submit(sample.request), Answer()
        cancelled = False
        while answer.reason is None:
            if self._interrupts.count and not cancelled:
                cancelled = True
                self._engine.cancel(number)
            for update in self._engine.step():
                answer.add(update)
                print(update.text, end="", flush=True)
        if not answer.text and answer.reason != "cancelled":
            print(f"no text: {WHY_EMPTY[answer.reason]}", end="")
        print(flush=True)
        return answer


def _is_command(typed: str) -> bool:
    return any(word in COMMANDS for word in typed.split(maxsplit=1)[:1])


@contextmanager
def _history() -> Iterator[None]:
    """On a terminal: editing of lines, and the prompts of earlier sessions; a file of the user's keeps them."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if not sys.stdin.isatty():
        yield
        return
    import readline

    home = os.environ.get("HOME", os.devnull)  # without a home folder nothing is kept
    file = Path(os.environ.get("XDG_STATE_HOME") or f"{home}/.local/state", "deepy", "prompts")
    with suppress(OSError):
        readline.read_history_file(file)
    readline.set_history_length(REMEMBERED)
    try:
        yield
    finally:
        with suppress(OSError):
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            readline.write_history_file(file)
