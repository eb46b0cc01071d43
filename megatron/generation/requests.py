"""What is asked of the decoding engine and what it answers.

Names and meanings follow Transformers' GenerationConfig and OpenAI's completions API where they have the notion.
Everything here is plain data, sent between ranks by pickling.
"""

from dataclasses import dataclass, field
from typing import Literal

# end: the model ended the document. stop: a stop string or token. length: maximum_tokens, or a full context.
# cancelled: by `Engine.cancel`.
Reason = Literal["end", "stop", "length", "cancelled"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from the logits. All at their defaults: greedy.

    The order is that of the fields, as in Transformers: bias and penalties on the logits, temperature, then the limits.

    logit_bias: (token id, what is added to its logit).
    repetition_penalty: logits of tokens that the prompt or the text has are divided by it where positive, multiplied
    where negative (https://arxiv.org/abs/1909.05858); 1: off.
    presence_penalty: subtracted from the logits of tokens that the text, without the prompt, has.
    frequency_penalty: subtracted times the number of occurrences in the text, without the prompt.
    temperature: divides the logits; 0: greedy, except that 0 with top_k, top_p or min_p counts as 1, as in GPT-NeoX.
    top_k: the likeliest k tokens only; 0: all.
    top_p: the fewest likeliest tokens that reach this probability (https://arxiv.org/abs/1904.09751); 0 or 1: all.
    min_p: tokens with this share of the likeliest one's probability (https://arxiv.org/abs/2407.01082); 0: all.
    """

    logit_bias: tuple[tuple[int, float], ...] = ()
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 0.0
    min_p: float = 0.0

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is chosen, after penalties and bias."""
        return self.temperature == 0 and self.top_k == 0 and self.top_p == 0 and self.min_p == 0


@dataclass(frozen=True)
class Constraint:
    """Text that the answer must be. kind: json_schema, json (any object) or regex. text: the schema or expression."""

    kind: Literal["json_schema", "json", "regex"]
    text: str = ""


@dataclass(frozen=True)
class Beams:
    """Beam search with Transformers' meanings. count: beams; the score is log-likelihood / length^length_penalty."""

    count: int
    length_penalty: float = 1.0
    early_stopping: bool = False


@dataclass(frozen=True)
class Request:
    """A text to continue, or to score.

    ids: at least one, at most the model's context. seed: of sampling; the answer depends on the request alone, up to
    rounding, not on what is computed beside it. maximum_tokens: 0 only scores. minimum_tokens: before them neither the
    end of the document nor a stop token is chosen. stop_strings: end the text, and are not part of it. stop_tokens:
    the same for ids. ignore_end: the end of the document is a token like any other. alternatives: likeliest tokens
    reported with each token and its log-probability; None: neither. score_from: report the log-probability of
    ids[score_from:], each from the ids before it; at least 1; None: of none. keep_logits: report all logits of each
    generated token.
    """

    ids: tuple[int, ...]
    maximum_tokens: int
    sampling: Sampling = Sampling()
    seed: str = ""
    minimum_tokens: int = 0
    stop_strings: tuple[str, ...] = ()
    stop_tokens: frozenset[int] = frozenset()
    ignore_end: bool = False
    alternatives: int | None = None
    score_from: int | None = None
    constraint: Constraint | None = None
    beams: Beams | None = None
    keep_logits: bool = False


@dataclass(frozen=True)
class Token:
    """A token of an answer or of a scored prompt.

    The last three are there only where they were asked for. log_probability: in nats, of the model's own distribution,
    before penalties, temperature and limits. greedy: whether it is the likeliest. alternatives: (id, log-probability),
    the likeliest first. logits: [v].
    """

    id: int
    log_probability: float | None = None
    greedy: bool = False
    alternatives: tuple[tuple[int, float], ...] = ()
    logits: tuple[float, ...] = ()


@dataclass(frozen=True)
class Update:
    """News of a request.

    request: its number, from `Engine.submit`. tokens: new ones, without the one that ended or stopped the text, but
    with those of a stop string. text: what can be shown now. It lags behind the tokens where a character is incomplete
    or a stop string may have begun; the texts of all updates joined are the answer. scored: of the prompt, once, in
    order. reason: None until the last. cached: tokens of the prompt that had been read for another request, in the
    first update. seconds: in the last update, from the beginning of the reading to the end, beside other requests; no
    two runs have the same, so it is not compared.
    """

    request: int
    tokens: tuple[Token, ...] = ()
    text: str = ""
    scored: tuple[Token, ...] = ()
    reason: Reason | None = None
    cached: int = 0
    seconds: float = field(default=0.0, compare=False)


@dataclass
class Answer:
    """All updates of a request together."""

    tokens: list[Token] = field(default_factory=list)
    text: str = ""
    scored: tuple[Token, ...] = ()
    reason: Reason | None = None
    cached: int = 0
    seconds: float = field(default=0.0, compare=False)

    def add(self, update: Update) -> None:
        """Append the news."""
        self.tokens += update.tokens
        self.text += update.text
        self.scored = self.scored or update.scored
        self.reason = update.reason
        self.cached = self.cached or update.cached
        self.seconds = update.seconds

    @property
    def ids(self) -> list[int]:
        """The ids of the text."""
        return [token.id for token in self.tokens]
