"""From a body to requests of the decoding engine."""

import json
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from megatron.config.schema.generation_keys import GenerationKeys
from megatron.errors import UserError
from megatron.generation.chat import ChatFormat
from megatron.generation.requests import Constraint, Request, Sampling
from megatron.serving.errors import ApiError
from megatron.serving.schemas import (
    ChatBody,
    CompletionBody,
    GenerateBody,
    Message,
    OpenAIBody,
    ResponseFormat,
    Sampled,
    message_fields,
)
from megatron.tokenizer.base import Tokenizer

T = TypeVar("T")

COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens
LOWEST_TEMPERATURE = 1e-3  # logits divided by less could be infinite
UNSUPPORTED_IN_MESSAGES = ("audio", "function_call", "tool_calls", "refusal")


@dataclass(frozen=True)
class Limits:
    """What a request may ask for. context: tokens of prompt and answer together. tokens: of an answer."""

    context: int
    tokens: int
    choices: int


@dataclass(frozen=True)
class Converter:
    """Makes requests of the engine from bodies. All methods raise ApiError for what cannot be answered.

    chat: the chat format, or why there is none. defaults: for /generate.
    """

    tokenizer: Tokenizer
    limits: Limits
    chat: ChatFormat | str
    defaults: GenerationKeys

    def completion(self, body: CompletionBody) -> list[Request]:
        """A request for each prompt and choice, in the order of the choices of the answer."""
        body.check_other_fields()
        asked = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        if asked == 0 and not body.echo:
            raise ApiError(400, "max_tokens (0) needs echo (true), or there is nothing to answer", "max_tokens")
        prompts = self._prompts(body.prompt)
        self._check_choices(len(prompts) * (body.n or 1))
        scores = body.echo and body.logprobs is not None
        found = []
        for number, ids in enumerate(prompts):
            room = self._room(len(ids))
            if body.max_tokens is not None:
                self._check_tokens(asked, room, len(ids), "max_tokens")
            fields = self._sampled(body, min(asked, room)) | {"ids": tuple(ids), "alternatives": body.logprobs}
            fields["score_from"] = 1 if scores and len(ids) > 1 else None
            found += _choices(fields, body, str(number))
        return found

    def chat_completion(self, body: ChatBody) -> list[Request]:
        """A request for each choice."""
        body.check_other_fields()
        self._check_choices(body.n or 1)
        if isinstance(self.chat, str):
            raise ApiError(400, self.chat, code="no_chat_template")
        try:
            ids = self.chat.encode(self.chat.prompt([_checked(message) for message in body.messages]))
            stop_strings, stop_tokens = self.chat.end_of_answer
        except UserError as error:
            raise ApiError(400, str(error), "messages", "template_error") from error
        asked = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        room = self._checked_prompt(ids or [self.tokenizer.end_of_document], "messages")
        if asked is not None:
            self._check_tokens(asked, room, len(ids), "max_completion_tokens")
        fields = self._sampled(body, room if asked is None else asked)
        fields["ids"] = tuple(ids or [self.tokenizer.end_of_document])
        fields["stop_strings"] += stop_strings
        fields["stop_tokens"] |= stop_tokens
        fields["alternatives"] = (body.top_logprobs or 0) if body.logprobs else None
        fields["constraint"] = fields["constraint"] or _constraint(body.response_format)
        return _choices(fields, body, "chat")

    def generation(self, body: GenerateBody) -> list[Request]:
        """The request for a plain prompt."""
        body.check_other_fields()
        [ids] = self._prompts(body.prompt)
        room = self._room(len(ids))
        if body.maximum_tokens is not None:
            self._check_tokens(body.maximum_tokens, room, len(ids), "maximum_tokens")
        tokens = min(_given(body.maximum_tokens, self.defaults.maximum_tokens), room)
        usual = _usual(self.defaults) | {"min_tokens": min(self.defaults.minimum_tokens, tokens)}
        given = {name: _given(getattr(body, name), value) for name, value in usual.items()}
        fields = self._sampled(body.model_copy(update=given), tokens)
        return [Request(ids=tuple(ids), seed=_seed(body.seed), **fields)]

    def _prompts(self, prompt: str | list[str] | list[int] | list[list[int]]) -> list[list[int]]:
        """Ids of each prompt; an empty one is the end of a document, after which a new one begins."""
        prompts: Sequence[Any] = [prompt] if isinstance(prompt, str) or _are_ids(prompt) else prompt
        if not prompts:
            raise ApiError(400, "prompt is an empty list", "prompt")
        found = []
        for one in prompts:
            if isinstance(one, str):
                try:
                    [ids] = self.tokenizer.encode_openings([one])
                except UserError as error:
                    raise ApiError(400, str(error), "prompt") from error
            else:
                ids = list(one)
                unknown = [token for token in ids if not 0 <= token < self.tokenizer.vocab_size]
                if unknown:
                    ids_end = self.tokenizer.vocab_size - 1
                    raise ApiError(400, f"prompt has the id {unknown[0]}; ids go from 0 to {ids_end}", "prompt")
            found.append(ids or [self.tokenizer.end_of_document])
            self._checked_prompt(found[-1], "prompt")
        return found

    def _checked_prompt(self, ids: Sequence[int], param: str) -> int:
        """How many tokens may follow a prompt; at least one."""
        if len(ids) >= self.limits.context:
            raise ApiError(
                400,
                f"{param} has {len(ids)} tokens; with at least one of the answer that is more than the "
                f"{self.limits.context} of this model's context",
                param,
                "context_length_exceeded",
            )
        return self._room(len(ids))

    def _room(self, tokens: int) -> int:
        return min(self.limits.context - tokens, self.limits.tokens)

    def _check_tokens(self, asked: int, room: int, prompt: int, param: str) -> None:
        if asked <= room:
            return
        if asked > self.limits.tokens:
            raise ApiError(
                400, f"{param} ({asked}) is more than the {self.limits.tokens} that this server allows", param
            )
        raise ApiError(
            400,
            f"the prompt has {prompt} tokens and {param} is {asked}: together more than the {self.limits.context} of "
            f"this model's context; {room} would fit",
            param,
            "context_length_exceeded",
        )

    def _check_choices(self, count: int) -> None:
        if count > self.limits.choices:
            raise ApiError(
                400, f"{count} answers are asked for (prompts times n); this server allows {self.limits.choices}", "n"
            )

    def _sampled(self, body: Sampled, tokens: int) -> dict[str, Any]:
        """The fields of a request that do not depend on its prompt."""
        stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
        if (body.min_tokens or 0) > tokens:
            raise ApiError(
                400, f"min_tokens ({body.min_tokens}) is more than the answer's {tokens} tokens", "min_tokens"
            )
        self._check_ids(body.stop_token_ids or [], "stop_token_ids")
        regex = body.guided_regex
        return {
            "maximum_tokens": tokens,
            "minimum_tokens": body.min_tokens or 0,
            "sampling": self._sampling(body),
            "stop_strings": tuple(stop),
            "stop_tokens": frozenset(body.stop_token_ids or ()),
            "ignore_end": bool(body.ignore_eos),
            "constraint": None if regex is None else Constraint("regex", regex),
        }

    def _sampling(self, body: Sampled) -> Sampling:
        """With temperature or top_p 0 the likeliest token is chosen, whatever else limits the choice."""
        temperature, top_p = _given(body.temperature, 1.0), _given(body.top_p, 1.0)
        greedy = temperature < LOWEST_TEMPERATURE or top_p == 0
        return Sampling(
            repetition_penalty=_given(body.repetition_penalty, 1.0),
            presence_penalty=_given(body.presence_penalty, 0.0),
            frequency_penalty=_given(body.frequency_penalty, 0.0),
            logit_bias=self._bias(body.logit_bias or {}),
            temperature=0.0 if greedy else temperature,
            top_k=0 if greedy else max(0, body.top_k or 0),
            top_p=0.0 if greedy or top_p == 1 else top_p,
            min_p=0.0 if greedy else body.min_p or 0.0,
        )

    def _bias(self, given: dict[str, float]) -> tuple[tuple[int, float], ...]:
        wrong = [name for name in given if not (name.isascii() and name.isdigit() and len(name) < 12)]
        if wrong:
            raise ApiError(400, f'logit_bias has "{wrong[0]}" where the id of a token is needed', "logit_bias")
        self._check_ids(map(int, given), "logit_bias")
        return tuple((int(name), value) for name, value in given.items())

    def _check_ids(self, ids: Iterable[int], param: str) -> None:
        for token in ids:
            if token >= self.tokenizer.vocab_size:
                end = self.tokenizer.vocab_size - 1
                raise ApiError(400, f"{param} has the id {token}; ids go from 0 to {end}", param)


def _usual(keys: GenerationKeys) -> dict[str, Any]:
    """The configuration's settings as fields of a body.

    Like generate.py, it samples at temperature 1 if it limits the choice and names no temperature.
    """
    limited = keys.top_k > 0 or keys.top_p > 0 or keys.min_p > 0
    same = ("top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    return {name: getattr(keys, name) for name in same} | {
        "temperature": 1.0 if limited and keys.temperature == 0 else keys.temperature,
        "top_p": keys.top_p or 1.0,
        "logit_bias": {str(token): value for token, value in (keys.logit_bias or {}).items()},
        "stop": list(keys.stop),
        "stop_token_ids": list(keys.stop_token_ids),
        "ignore_eos": keys.ignore_end_of_document,
        "guided_regex": keys.regex,
    }


def _choices(fields: dict[str, Any], body: OpenAIBody, prompt: str) -> list[Request]:
    """The same request n times, each with a seed of its own."""
    seed = _seed(body.seed)
    return [Request(seed=f"{seed}/{prompt}/{number}", **fields) for number in range(body.n or 1)]


def _seed(given: int | None) -> str:
    return secrets.token_hex(8) if given is None else str(given)


def _given(value: T | None, default: T) -> T:
    return default if value is None else value


def _are_ids(prompt: Sequence[Any]) -> bool:
    return bool(prompt) and isinstance(prompt[0], int)


def _checked(message: Message) -> dict[str, Any]:
    for name in UNSUPPORTED_IN_MESSAGES:
        if (message.model_extra or {}).get(name):
            raise ApiError(400, f"{name} in a message is not supported by this server", "messages", "unsupported_field")
    return message_fields(message)


def _constraint(form: ResponseFormat | None) -> Constraint | None:
    if form is None or form.type == "text":
        return None
    if form.json_schema is None:
        return Constraint("json")
    return Constraint("json_schema", json.dumps(form.json_schema.schema_))
