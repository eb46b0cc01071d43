"""Continue prompts until certain text appears. No harness in here."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron.generation.decoding import DecodingSettings, continue_texts
from megatron.generation.sampling import Sampling
from megatron.inference import TrainedModel
from megatron.tokenizer.base import Tokenizer


@dataclass(frozen=True)
class Wish:
    """What a task asks of a continuation. until: texts that end it and are no part of it."""

    sampling: Sampling
    maximum_tokens: int
    until: tuple[str, ...]


@dataclass(frozen=True)
class Opening:
    """Tokens to continue. seed: of the random numbers, if the wish is for any."""

    ids: tuple[int, ...]
    wish: Wish
    seed: str


def continue_openings(model: TrainedModel, openings: Sequence[Opening]) -> list[str]:
    """The text after each opening; all have the same wish. Collective over the tensor-parallel group."""
    wish = openings[0].wish
    found = continue_texts(
        model,
        [opening.ids for opening in openings],
        DecodingSettings(wish.sampling, wish.maximum_tokens),
        [opening.seed for opening in openings],
        EndsWith(wish.until, model.tokenizer),
    )
    return [cut(model.tokenizer.decode(continuation.tokens), wish.until) for continuation in found]


def cut(text: str, until: Sequence[str]) -> str:
    """`text` up to the first place where one of `until` begins."""
    for end in until:
        text = text.split(end)[0]
    return text


class EndsWith:
    """Whether tokens came to the end that is wished for.

    Only as many of the last tokens are looked at as the longest end can have: one for each of its bytes, and two more
    for those that it begins and ends in. Should a tokenizer hide an end so, the text is longer and is cut later.
    """

    def __init__(self, until: Sequence[str], tokenizer: Tokenizer) -> None:
        self._until, self._tokenizer = until, tokenizer
        self._reach = max((len(end.encode()) for end in until), default=0) + 2

    def __call__(self, tokens: Sequence[int]) -> bool:
        """tokens: all that were generated for one text."""
        tail = self._tokenizer.decode(tokens[-self._reach :])
        return any(end in tail for end in self._until)
