"""From the engine's news to the bodies and events of an answer."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron.generation.requests import Answer, Request, Update
from megatron.tokenizer.base import Tokenizer

Json = dict[str, Any]


class Writer(ABC):
    """Writes the answer to one HTTP request, as a whole or as events. Takes every update once, in order."""

    def __init__(self, requests: Sequence[Request]) -> None:
        """requests: of the engine, the choices of the answer."""
        self._requests = requests
        self._answers = [Answer() for _ in requests]

    def add(self, place: int, update: Update) -> None:
        """Take note of news of the request at `place`."""
        self._answers[place].add(update)

    @property
    def generated(self) -> int:
        """Tokens so far."""
        return sum(len(found.tokens) for found in self._answers)

    @abstractmethod
    def whole(self) -> Json:
        """The body of the answer, after all news."""

    def opening(self) -> list[Json]:
        """Events before any news."""
        return []

    @abstractmethod
    def event(self, place: int, update: Update) -> Json | None:
        """The event of some news that `add` has got, if there is anything to tell."""

    @abstractmethod
    def closing(self) -> list[Json | str]:
        """Events after all news. Text is sent as it is."""


class PlainWriter(Writer):
    """Answers of /generate: one text."""

    def whole(self) -> Json:
        """Text, reason and numbers of tokens."""
        return {"text": self._answers[0].text, **self._end()}

    def event(self, place: int, update: Update) -> Json | None:
        """The new text; the last one with the reason and numbers of tokens."""
        if update.reason is not None:
            return {"text": update.text, **self._end()}
        return {"text": update.text} if update.text else None

    def closing(self) -> list[Json | str]:
        """Nothing: the last event is the one with the reason."""
        return []

    def _end(self) -> Json:
        prompt, found = len(self._requests[0].ids), self._answers[0]
        return {"reason": found.reason, "prompt_tokens": prompt, "generated_tokens": len(found.tokens)}


@dataclass
class TokenTexts:
    """The text of tokens in their order, each after the one before it. before: the id of that one."""

    tokenizer: Tokenizer
    before: int | None = None

    def __call__(self, token: int) -> str:
        """What `token` would add to the text."""
        return self.tokenizer.decode_continuation([] if self.before is None else [self.before], [token])

    def advance(self, token: int) -> str:
        """What `token` adds to the text."""
        text = self(token)
        self.before = token
        return text
