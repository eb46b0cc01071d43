"""The bodies of answers, as GET /openapi.json describes them: OpenAI's fields, and /generate's few.

The writers make JSON without these models: they describe it, and take no part in an answer.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict

Finish = Literal["stop", "length"]


class Answer(BaseModel):
    """Base of the bodies, which have no other fields."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class CachedTokens(Answer):
    """What a prompt has in common with texts before it."""

    cached_tokens: int
    """Tokens that had been read for another request."""


class Usage(Answer):
    """Numbers of tokens. A prompt with several answers counts once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class CompletionLogprobs(Answer):
    """The tokens of a completion, one entry of each list for each. -9999 stands for no probability at all."""

    tokens: list[str]
    token_logprobs: list[float | None]
    """null: the first token of a prompt (echo)."""
    top_logprobs: list[dict[str, float] | None]
    """The likeliest tokens, by text."""
    text_offset: list[int]
    """Where each token begins, in characters."""


class CompletionChoice(Answer):
    """A completion of one of the prompts."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finish


class OpenAIAnswer(Answer):
    """What completions and chats have in common."""

    id: str
    created: int
    """Seconds since 1970."""
    model: str
    usage: Usage


class CompletionAnswer(OpenAIAnswer):
    """POST /v1/completions."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class LikelyToken(Answer):
    """A token and its log-probability. -9999 stands for no probability at all."""

    token: str
    logprob: float
    bytes: list[int] | None
    """Of the text in UTF-8; null: the token is a part of a character."""


class ChosenToken(LikelyToken):
    """A token of the answer."""

    top_logprobs: list[LikelyToken]


class ChatLogprobs(Answer):
    """The tokens of an answer."""

    content: list[ChosenToken]
    refusal: None


class ChatMessage(Answer):
    """The answer to a chat."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(Answer):
    """One of the answers."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finish


class ChatAnswer(OpenAIAnswer):
    """POST /v1/chat/completions."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class PlainAnswer(Answer):
    """POST /generate."""

    text: str
    reason: Literal["end", "stop", "length"]
    """end: of the document. stop: a stop string or token. length: maximum_tokens, or a full context."""
    prompt_tokens: int
    generated_tokens: int


class ServedModel(Answer):
    """The model that is served."""

    id: str
    object: Literal["model"]
    created: int
    """When the server began, in seconds since 1970."""
    owned_by: str
    max_model_len: int
    """Tokens of prompt and answer together."""
    max_tokens: int
    """Tokens of an answer."""
    chat: bool
    """Whether the model has chats."""


class ServedModels(Answer):
    """GET /v1/models."""

    object: Literal["list"]
    data: list[ServedModel]


class Health(Answer):
    """GET /health, while requests are taken."""

    status: Literal["ready"]
