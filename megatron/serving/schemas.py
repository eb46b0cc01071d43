"""The bodies of requests: OpenAI's fields, and those in which other servers extend them.

Fields that are not listed here have no effect, except those in UNSUPPORTED, which would change the answer, and those
whose name looks like a slip of the keyboard: they are refused.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from megatron.registry import nearest
from megatron.serving.errors import ApiError

LARGEST_SEED = 2**63 - 1
MOST_ALTERNATIVES = 20

# Fields that would change the answer, by value that asks for nothing.
UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "audio": (),
    "best_of": (1,),
    "chat_template": (),
    "documents": ([],),
    "function_call": ("none",),
    "functions": ([],),
    "grammar": (),
    "guided_choice": (),
    "guided_grammar": (),
    "length_penalty": (1,),
    "lora": (),
    "modalities": (["text"],),
    "moderation": (),
    "num_beams": (1,),
    "prediction": (),
    "prompt_logprobs": (),
    "reasoning_effort": ("none",),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "truncate_prompt_tokens": (),
    "typical_p": (1,),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
# Fields of OpenAI's API that do not change the answer.
HARMLESS = {"metadata", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"}
HARMLESS |= {"safety_identifier", "service_tier", "store", "user"}

Temperature = Annotated[float, Field(ge=0, le=2)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
StopString = Annotated[str, Field(min_length=1, max_length=1000)]


class Body(BaseModel):
    """Base of the bodies."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)

    def check_other_fields(self) -> None:
        """Raise ApiError for a field that would have to change the answer, or is nearly the name of one that does."""
        for name, value in (self.model_extra or {}).items():
            if name in UNSUPPORTED and value is not None and value not in UNSUPPORTED[name]:
                raise ApiError(400, f"{name} is not supported by this server; leave it out", name, "unsupported_field")
            near = None if name in UNSUPPORTED or name in HARMLESS else nearest(name, type(self).model_fields)
            if near is not None:
                raise ApiError(400, f"there is no field {name}; {near} is meant, perhaps", name, "unknown_field")


class StreamOptions(BaseModel):
    """How an answer is streamed."""

    include_usage: bool | None = None
    """Whether a last event has the numbers of tokens."""


class Sampled(Body):
    """What all requests for text have in common: how tokens are chosen, and where the text ends."""

    temperature: Temperature | None = None
    """0, and anything below 0.001: the likeliest token."""
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Only the likeliest tokens that have this probability together."""
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    """Only so many of the likeliest tokens; 0 and -1: all."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Only tokens with this share of the likeliest one's probability."""
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    """What is added to the logits of tokens, by id."""
    seed: Annotated[int, Field(ge=-LARGEST_SEED - 1, le=LARGEST_SEED)] | None = None
    """The same seed gives the same text."""
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    """Strings that end the text, and are not part of it."""
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=64)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    """Before so many tokens the text does not end."""
    ignore_eos: bool | None = None
    """Whether the end of the document is a token like any other."""
    guided_regex: Annotated[str, Field(min_length=1, max_length=1000)] | None = None
    """A regular expression that the whole text must match."""


class OpenAIBody(Sampled):
    """What completions and chats have in common."""

    model: str | None = None
    """The name of the model, as GET /v1/models gives it."""
    n: Count | None = None
    """Number of answers."""
    stream: bool | None = None
    """Whether the answer is sent as server-sent events while it is generated."""
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _options_have_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream (true)")
        return self


class CompletionBody(OpenAIBody):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    """A text, or the ids of one; or several of the same."""
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    """Longest answer; 16 by default. 0, with echo: only the prompt."""
    logprobs: Annotated[int, Field(ge=0, le=MOST_ALTERNATIVES)] | None = None
    """Report the log-probability of each token, and so many of the likeliest ones."""
    echo: bool | None = None
    """Whether the prompt is put before the answer."""


class TextPart(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(extra="allow")
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A message of a chat."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None


class JsonSchema(BaseModel):
    """A schema for the answer."""

    model_config = ConfigDict(populate_by_name=True)
    name: str | None = None
    schema_: dict[str, JsonValue] = Field(alias="schema")


class ResponseFormat(BaseModel):
    """The form of the answer: any text, any JSON object, or JSON that a schema allows."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_is_given(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("type json_schema needs json_schema, and json_schema needs that type")
        return self


class ChatBody(OpenAIBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    """Longest answer. Unset: as long as the context and the server allow."""
    max_tokens: Count | None = None
    """The older name of max_completion_tokens."""
    logprobs: bool | None = None
    """Whether to report the log-probability of each token."""
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_ALTERNATIVES)] | None = None
    """Report so many of the likeliest tokens as well."""
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs (true)")
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise ValueError("max_tokens and max_completion_tokens differ; keep one of them")
        constrained = self.response_format is not None and self.response_format.type != "text"
        if constrained and self.guided_regex is not None:
            raise ValueError("response_format and guided_regex exclude each other")
        return self


class GenerateBody(Sampled):
    """POST /generate: a plain prompt. Settings that are not given are those of the server's configuration."""

    prompt: str
    maximum_tokens: Count | None = None
    """Longest text."""
    stream: bool | None = None
    """Whether the text is sent as server-sent events while it is generated."""


def as_text(content: str | list[TextPart]) -> str:
    """The text of a message."""
    return content if isinstance(content, str) else "".join(part.text for part in content)


def message_fields(message: Message) -> dict[str, Any]:
    """The message as chat templates read it. OpenAI's "developer" is the newer word for "system"."""
    role = "system" if message.role == "developer" else message.role
    return {**message.model_dump(exclude_none=True), "role": role, "content": as_text(message.content)}


class ErrorDetail(BaseModel):
    """What is wrong. param: the field. code: a word for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every error."""

    error: ErrorDetail
