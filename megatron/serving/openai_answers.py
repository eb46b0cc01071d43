"""Answers in the form of OpenAI's API (https://platform.openai.com/docs/api-reference)."""

import secrets
import time
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from megatron.generation.requests import Request, Token, Update
from megatron.serving.answers import Json, TokenTexts, Writer
from megatron.serving.schemas import ChatBody, CompletionBody, OpenAIBody
from megatron.text import well_formed
from megatron.tokenizer.base import Tokenizer

FINISH = {"end": "stop", "stop": "stop", "length": "length"}
LOWEST = -9999.0  # stands for -inf, which JSON does not have, as in OpenAI's API


class OpenAIWriter(Writer):
    """What completions and chats have in common."""

    kind: str  # of the whole answer
    event_kind: str
    prefix: str  # of ids

    def __init__(self, model: str, requests: Sequence[Request], body: OpenAIBody) -> None:
        """model: its name."""
        super().__init__(requests)
        self._choices_per_prompt = body.n or 1
        self._with_usage = body.stream_options is not None and body.stream_options.include_usage
        self._head = {"id": f"{self.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def whole(self) -> Json:
        """All choices, and the usage."""
        choices = [
            self._choice(place, Update(0, tuple(found.tokens), found.text, found.scored, found.reason))
            for place, found in enumerate(self._answers)
        ]
        return {**self._head, "object": self.kind, "choices": choices, "usage": self._usage()}

    def closing(self) -> list[Json | str]:
        """The usage if it is wanted, and OpenAI's mark of the end."""
        usage = [{**self._event([]), "usage": self._usage()}] if self._with_usage else []
        return [*usage, "[DONE]"]

    @abstractmethod
    def _choice(self, place: int, news: Update) -> Json:
        """A choice of the whole answer. news: all of it."""

    def _event(self, choices: list[Json]) -> Json:
        usage = {"usage": None} if self._with_usage else {}
        return {**self._head, "object": self.event_kind, "choices": choices, **usage}

    def _usage(self) -> Json:
        """The numbers of tokens. A prompt with several choices counts once."""
        prompt = sum(len(one.ids) for one in islice(self._requests, 0, None, self._choices_per_prompt))
        cached = sum(found.cached for found in islice(self._answers, 0, None, self._choices_per_prompt))
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.generated,
            "total_tokens": prompt + self.generated,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


@dataclass
class _Progress:
    """How far a choice has been written. echo: text that is put before the answer, until it has been written."""

    texts: TokenTexts
    echo: str | None
    offset: int = 0


class CompletionWriter(OpenAIWriter):
    """Answers of /v1/completions."""

    kind = event_kind = "text_completion"
    prefix = "cmpl"

    def __init__(self, tokenizer: Tokenizer, model: str, requests: Sequence[Request], body: CompletionBody) -> None:
        """body: of the request, whose prompts `requests` continue."""
        super().__init__(model, requests, body)
        self._has_logprobs = body.logprobs is not None
        prompts: list[Any] = [body.prompt] if isinstance(body.prompt, str) else list(body.prompt)
        prompts = [prompts] if isinstance(prompts[0], int) else prompts
        self._progress = []
        for place, request in enumerate(requests):
            prompt = prompts[place // self._choices_per_prompt]
            text = well_formed(prompt) if isinstance(prompt, str) else tokenizer.decode(prompt)
            texts = TokenTexts(tokenizer, None if body.echo else request.ids[-1])
            self._progress.append(_Progress(texts, text if body.echo else None))

    def event(self, place: int, update: Update) -> Json | None:
        """A choice with the new text."""
        choice = self._choice(place, update)
        told = choice["text"] or choice["finish_reason"] or (choice["logprobs"] and choice["logprobs"]["tokens"])
        return self._event([choice]) if told else None

    def _choice(self, place: int, news: Update) -> Json:
        progress, tokens = self._progress[place], news.tokens
        echo, progress.echo = progress.echo, None
        if echo is not None:
            first, *rest = self._requests[place].ids
            tokens = (Token(first), *(news.scored or map(Token, rest)), *tokens)
        logprobs = self._described(progress, tokens) if self._has_logprobs else None
        finish = None if news.reason is None else FINISH[news.reason]
        return {"index": place, "text": (echo or "") + news.text, "logprobs": logprobs, "finish_reason": finish}

    def _described(self, progress: _Progress, tokens: Sequence[Token]) -> Json:
        found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            others = [(progress.texts(other), value) for other, value in token.alternatives]
            text = progress.texts.advance(token.id)
            likely: dict[str, float] = {}
            for name, value in [(text, token.log_probability), *others]:
                if value is not None:
                    likely.setdefault(name, _finite(value))
            found["tokens"].append(text)
            found["token_logprobs"].append(likely.get(text))
            found["top_logprobs"].append(likely or None)
            found["text_offset"].append(progress.offset)
            progress.offset += len(text)
        return found


class ChatWriter(OpenAIWriter):
    """Answers of /v1/chat/completions."""

    kind, event_kind = "chat.completion", "chat.completion.chunk"
    prefix = "chatcmpl"

    def __init__(self, tokenizer: Tokenizer, model: str, requests: Sequence[Request], body: ChatBody) -> None:
        """body: of the request."""
        super().__init__(model, requests, body)
        self._has_logprobs = bool(body.logprobs)
        self._texts = [TokenTexts(tokenizer, request.ids[-1]) for request in requests]

    def opening(self) -> list[Json]:
        """The role of each choice."""
        delta = {"role": "assistant", "content": ""}
        return [
            self._event([{"index": place, "delta": delta, "logprobs": None, "finish_reason": None}])
            for place in range(len(self._requests))
        ]

    def event(self, place: int, update: Update) -> Json | None:
        """A choice with the new text."""
        logprobs = self._described(place, update.tokens)
        if not update.text and update.reason is None and not (logprobs and logprobs["content"]):
            return None
        delta = {"content": update.text} if update.text else {}
        finish = None if update.reason is None else FINISH[update.reason]
        return self._event([{"index": place, "delta": delta, "logprobs": logprobs, "finish_reason": finish}])

    def _choice(self, place: int, news: Update) -> Json:
        message = {"role": "assistant", "content": news.text, "refusal": None}
        logprobs = self._described(place, news.tokens)
        finish = None if news.reason is None else FINISH[news.reason]
        return {"index": place, "message": message, "logprobs": logprobs, "finish_reason": finish}

    def _described(self, place: int, tokens: Sequence[Token]) -> Json | None:
        if not self._has_logprobs:
            return None
        texts, content = self._texts[place], []
        for token in tokens:
            likely = [_entry(texts(other), value) for other, value in token.alternatives]
            content.append({**_entry(texts.advance(token.id), token.log_probability), "top_logprobs": likely})
        return {"content": content, "refusal": None}


def _entry(text: str, value: float | None) -> Json:
    """A token of a chat. bytes: null for a token that is a part of a character."""
    parts = None if "\ufffd" in text else list(text.encode("utf-8", "replace"))
    return {"token": text, "logprob": None if value is None else _finite(value), "bytes": parts}


def _finite(value: float) -> float:
    return max(value, LOWEST)
