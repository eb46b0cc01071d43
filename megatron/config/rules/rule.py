"""The shape of a cross-key rule."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from megatron.config.schema.config import Config


@dataclass(frozen=True)
class Rule:
    """One rule: the keys it reads, and a function that yields a message for each way in which it is broken."""

    keys: tuple[str, ...]
    check: Callable[[Config], Iterable[str]]
