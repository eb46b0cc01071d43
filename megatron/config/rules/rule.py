"""A cross-key rule, declared by a decorator on its check."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from megatron.config.schema.config import Config

Check = Callable[[Config], Iterable[str]]


@dataclass(frozen=True)
class Rule:
    """The keys that a rule reads, and a function that yields a message for each way in which it is broken."""

    keys: tuple[str, ...]
    check: Check
    scripts: tuple[str, ...] = ()  # scripts that need the rule; (): all
    for_plans: bool = True  # whether --dry-run and --print-config need it


def rule(
    rules: list[Rule], *keys: str, scripts: tuple[str, ...] = (), for_plans: bool = True
) -> Callable[[Check], Check]:
    """Add the decorated check of `keys` to `rules`."""

    def add(check: Check) -> Check:
        rules.append(Rule(keys, check, scripts, for_plans))
        return check

    return add
