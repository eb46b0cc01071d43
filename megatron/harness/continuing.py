"""Continue prompts until a stop string appears. Independent of the harness."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron.generation.decoding import DecodingSettings, continue_texts
from megatron.generation.requests import Sampling
from megatron.inference import TrainedModel
from megatron.tokenizer.base import Tokenizer


@dataclass(frozen=True)
class ContinuationSettings:
    """What a task asks of a continuation. until: stop strings, which are not part of it."""

    sampling: Sampling
    maximum_tokens: int
    until: tuple[str, ...]


@dataclass(frozen=True)
class Opening:
    """Tokens to continue. seed: for sampling."""

    ids: tuple[int, ...]
    settings: ContinuationSettings
    seed: str


def continue_openings(model: TrainedModel, openings: Sequence[Opening]) -> list[str]:
    """The text after each opening; all have the same settings. Collective over the tensor-parallel group."""
    settings = openings[0].settings
    found = continue_texts(
        model,
        [opening.ids for opening in openings],
        DecodingSettings(settings.sampling, settings.maximum_tokens),
        [opening.seed for opening in openings],
        StopsAt(settings.until, model.tokenizer),
    )
    decode = model.tokenizer.decode_continuation
    return [
        cut(decode(opening.ids, continuation.tokens), settings.until)
        for opening, continuation in zip(openings, found, strict=True)
    ]


def cut(text: str, until: Sequence[str]) -> str:
    """`text` up to the first stop string."""
    for end in until:
        text = text.split(end)[0]
    return text


class StopsAt:
    """Whether a continuation has a stop string near its end.

    Only as many of the last tokens are decoded as the longest stop string can have: one for each of its bytes, and two
    more for those that it begins and ends in. Where a tokenizer hides a stop string this way, the text is longer
    and is cut afterwards.
    """

    def __init__(self, until: Sequence[str], tokenizer: Tokenizer) -> None:
        self._until, self._tokenizer = until, tokenizer
        self._reach = max((len(end.encode()) for end in until), default=0) + 2

    def __call__(self, tokens: Sequence[int], generated: int) -> bool:
        """tokens: a prompt with its continuation. generated: the number of tokens of the latter."""
        start = len(tokens) - min(generated, self._reach)
        tail = self._tokenizer.decode_continuation(tokens[max(0, start - self._reach) : start], tokens[start:])
        return any(end in tail for end in self._until)
