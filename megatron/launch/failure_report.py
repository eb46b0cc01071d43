"""The report on how a run ended: rank, host and likely cause, the first traceback last. Standard library only."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from megatron.errors import DONE, FAILED, WRONG
from megatron.launch.failure_causes import cause_in_words, death_in_words
from megatron.launch.protocol.records import NodeRecord, RankRecord, first_failure


@dataclass(frozen=True)
class Outcome:
    """What is known after the run. lost: host, the message of its connection, whether it had reported before."""

    world_size: int
    nodes: tuple[NodeRecord, ...]
    lost: tuple[tuple[str, str, bool], ...]
    code: int | None  # of the program that started the agents
    stopped_by: str | None  # the first signal
    at_once: bool  # stopped without waiting for a step boundary
    hung: bool
    several_hosts: bool


def report(outcome: Outcome) -> int:
    """Print on stderr why the run failed, and return the exit code."""
    if outcome.at_once:
        return say(f"stopped by {outcome.stopped_by}")
    if outcome.hung:
        return say("the run hung and was terminated (watchdog_action: wait keeps it)")
    if outcome.lost:
        return _report_lost(outcome.lost)
    problems = dict.fromkeys(node.problem for node in outcome.nodes if node.problem)
    if problems:
        where = {node.problem: node.host for node in reversed(outcome.nodes) if node.problem}
        return say("\n".join(f"{where[text]}: {text}" for text in problems), WRONG)
    ranks = [rank for node in outcome.nodes for rank in node.ranks]
    gone = [node for node in outcome.nodes if node.gone]
    # Ranks that ended without a record usually ended first, and the others failed because of it.
    return _report_gone(outcome, gone) if gone and not _failed_before(ranks, gone) else _report_failure(outcome, ranks)


def say(text: str, code: int = FAILED) -> int:
    """Print on stderr; returns `code`."""
    print(text.rstrip(), file=sys.stderr, flush=True)
    return code


def _failed_before(ranks: Sequence[RankRecord], gone: Sequence[NodeRecord]) -> bool:
    """Whether a rank recorded a failure whose cause is not that another rank had ended."""
    failure = first_failure(ranks)
    if failure is None:
        return False
    return failure.end == "exit" or "lost its connection" not in (cause_in_words(failure.text) or "")


def _report_lost(lost: Sequence[tuple[str, str, bool]]) -> int:
    for host, said, had_started in lost:
        why = f" ({said})" if said else ""
        if had_started:
            say(f"lost the node {host}: its processes ended or it no longer answers{why}")
        else:
            say(f"cannot start on {host}: its agent did not report{why}; try `ssh {host} true`")
    return 1


def _report_gone(outcome: Outcome, gone: Sequence[NodeRecord]) -> int:
    node = gone[0]
    who = " or ".join(f"rank {record.rank}" for record in node.gone)
    # DeepSpeed's launcher exits with minus the signal's number, which the system shows modulo 256.
    code = node.code if node.code is None or node.code <= 128 else node.code - 256
    known = next((record.code for record in node.gone if record.code is not None), code)
    lines = node.last_lines.get(str(node.gone[0].rank), "")
    where = f" on {node.host}" if outcome.several_hosts else ""
    cause = cause_in_words(lines)
    say(f"{who}{where} {death_in_words(known, node.killed_for_memory)}" + (f"\ncause: {cause}" if cause else ""))
    return say(f"its last lines:\n{lines}") if lines else 1


def _report_failure(outcome: Outcome, ranks: Sequence[RankRecord]) -> int:
    failure = first_failure(ranks)
    if failure is None:
        return _without_failure(outcome, ranks)
    host = next(node.host for node in outcome.nodes if failure in node.ranks)
    who = f"rank {failure.rank} of {outcome.world_size}" + (f" on {host}" if outcome.several_hosts else "")
    if failure.end == "exception":
        cause = cause_in_words(failure.text)
        return say(f"{who} failed" + (f": {cause}" if cause else ":") + f"\n{failure.text}")
    said_by_first = next((record.text for record in ranks if record.rank == 0), "")
    if failure.rank != 0 and failure.text.strip() not in said_by_first:
        say(f"{who}:\n{failure.text}")
    return WRONG if failure.code == WRONG else 1


def _without_failure(outcome: Outcome, ranks: Sequence[RankRecord]) -> int:
    if len(ranks) == outcome.world_size and all(rank.code == 0 for rank in ranks):
        return DONE
    code = next((node.code for node in outcome.nodes if node.code), outcome.code)
    return say(f"the run ended with code {code} before its ranks could start")
