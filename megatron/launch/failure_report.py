"""The report on how a run ended: rank, host and likely cause, the first traceback last. Standard library only."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from megatron.errors import DONE, FAILED, WRONG
from megatron.launch.failure_causes import LOST_CONNECTION, OF_OTHERS, cause_in_words, death_in_words
from megatron.launch.protocol.records import NodeRecord, RankRecord
from megatron.terminal import ERASE_BELOW, can_redraw


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
    culprits: tuple[int, ...] = ()  # ranks on which the others waited when the run hung, as far as that is known

    def step_of(self, rank: int | None) -> int:
        """The last step that `rank` has begun, from 1, or where that is not known any rank; 0: none."""
        steps = {int(one): step for node in self.nodes for one, step in node.steps.items()}
        return steps.get(-1 if rank is None else rank, max(steps.values(), default=0))

    @property
    def abandoned(self) -> tuple[tuple[str, int], ...]:
        """Machine and number of the process of rank 0, which holds the lock of `save`, if its node has not said that
        it ended; else nothing. The other ranks lock nothing, and all of them would not fit into a variable.
        """
        open_ended = [node for node in self.nodes if node.code is None and not node.problem]
        ranks = [(node.machine, one) for node in open_ended for one in node.ranks]
        return tuple((machine, one.process) for machine, one in ranks if one.rank == 0 and one.code is None)

    def hosts_of(self, ranks: Sequence[int]) -> tuple[str, ...]:
        """The hosts of ranks, each once."""
        return tuple(node.host for node in self.nodes if node.rank_numbers & set(ranks))


@dataclass(frozen=True)
class Ending:
    """How a run ended. code: of the process. text: why it failed, for people; empty if it did not.

    is_said: a rank has printed the text already. is_accident: another attempt may do better, as after the death of a
    process or a node, a hang, or an exception. A stop, a wrong command, and a failure that a rank itself put into words
    (divergence, a full disk) are none: they were wanted, or would come again. rank, hosts: where it began, as far as
    that is known.
    """

    code: int
    text: str = ""
    is_said: bool = False
    is_accident: bool = False
    rank: int | None = None
    hosts: tuple[str, ...] = ()

    @property
    def reason(self) -> str:
        """The text in one line."""
        lines = self.text.strip().splitlines() or [f"exit code {self.code}"]
        return f"{lines[0]} {lines[-1]}" if lines[0].endswith(":") else lines[0]


def report(outcome: Outcome) -> Ending:
    """Print on stderr why the run failed, unless a rank has done so, and return how it ended."""
    ending = ending_of(outcome)
    if ending.text and not ending.is_said:
        say(ending.text)
    return ending


def ending_of(outcome: Outcome) -> Ending:
    """The exit code and the reason."""
    if outcome.at_once:
        return Ending(FAILED, f"stopped by {outcome.stopped_by}")
    if outcome.hung:
        text = "the run hung and was terminated (watchdog_action: wait keeps it)"
        return _accident(text, next(iter(outcome.culprits), None), outcome.hosts_of(outcome.culprits))
    if outcome.lost:
        text = "\n".join(_loss_in_words(*node) for node in outcome.lost)
        return _accident(text, hosts=tuple(host for host, _, _ in outcome.lost))
    problems = dict.fromkeys(node.problem for node in outcome.nodes if node.problem)
    if problems:
        where = {node.problem: node.host for node in reversed(outcome.nodes) if node.problem}
        hosts = tuple(node.host for node in outcome.nodes if node.problem)
        return Ending(WRONG, "\n".join(f"{where[text]}: {text}" for text in problems), hosts=hosts)
    ranks = [rank for node in outcome.nodes for rank in node.ranks]
    gone = [node for node in outcome.nodes if node.gone]
    # Ranks that ended without a record usually ended first, and the others failed because of it.
    return _of_gone(outcome, gone) if gone and not _failed_before(ranks, gone) else _of_failure(outcome, ranks)


def _accident(text: str, rank: int | None = None, hosts: tuple[str, ...] = ()) -> Ending:
    return Ending(FAILED, text, is_accident=True, rank=rank, hosts=hosts)


def say(text: str) -> None:
    """Print on stderr, in the place of what rank 0 has drawn at the bottom of a terminal."""
    write_error((ERASE_BELOW if can_redraw(sys.stderr) else "") + text.rstrip() + "\n")


def write_error(text: str) -> None:
    """Write to stderr if somebody still reads it: Ctrl-C also ends the `tee` behind a pipe, and must not cost the save.

    Once nobody does, stderr is /dev/null, so that Python's last flush does not change the exit code.
    """
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stderr.fileno())
        os.close(nowhere)
    except OSError:  # a full disk
        return


def _first_failure(ranks: Sequence[RankRecord]) -> RankRecord | None:
    """The failed rank that ended first; one that failed because of another only if there is none but such.

    Each machine has its own clock, so the time alone may name a rank that only noticed the end of the first.
    """
    failed = [rank for rank in ranks if rank.failed]
    return min(failed, key=lambda rank: (cause_in_words(rank.text) in OF_OTHERS, rank.ended_at), default=None)


def _failed_before(ranks: Sequence[RankRecord], gone: Sequence[NodeRecord]) -> bool:
    """Whether a rank recorded a failure whose cause is not that another rank had ended."""
    failure = _first_failure(ranks)
    if failure is None:
        return False
    return cause_in_words(failure.text) != LOST_CONNECTION


def _loss_in_words(host: str, said: str, had_started: bool) -> str:
    why = f" ({said})" if said else ""
    if had_started:
        return f"lost the node {host}: its processes ended or it no longer answers{why}"
    return f"cannot start on {host}: its agent did not report{why}; try `ssh {host} true`"


def _of_gone(outcome: Outcome, gone: Sequence[NodeRecord]) -> Ending:
    node = gone[0]
    who = " or ".join(f"rank {record.rank}" for record in node.gone)
    # DeepSpeed's launcher exits with minus the signal's number, which the system shows modulo 256.
    code = node.code if node.code is None or node.code <= 128 else node.code - 256
    known = next((record.code for record in node.gone if record.code is not None), code)
    last = node.last_lines.get(str(node.gone[0].rank), "")
    where = f" on {node.host}" if outcome.several_hosts else ""
    cause = cause_in_words(last)
    lines = [f"{who}{where} {death_in_words(known, node.killed_for_memory)}"]
    lines += [f"cause: {cause}"] if cause else []
    lines += [f"its last lines:\n{last}"] if last else []
    return _accident("\n".join(lines), node.gone[0].rank, tuple(one.host for one in gone))


def _of_failure(outcome: Outcome, ranks: Sequence[RankRecord]) -> Ending:
    failure = _first_failure(ranks)
    if failure is None:
        return _without_failure(outcome, ranks)
    host = next(node.host for node in outcome.nodes if failure in node.ranks)
    who = f"rank {failure.rank} of {outcome.world_size}" + (f" on {host}" if outcome.several_hosts else "")
    cause = cause_in_words(failure.text)
    of_others = cause in OF_OTHERS
    place = (None, ()) if of_others else (failure.rank, (host,))
    if failure.end == "exception":
        return _accident(f"{who} failed" + (f": {cause}" if cause else ":") + f"\n{failure.text}", *place)
    code = WRONG if failure.code == WRONG else FAILED
    said_by_first = next((record.text for record in ranks if record.rank == 0), "")
    is_said = failure.rank == 0 or failure.text.strip() in said_by_first
    text = failure.text.strip() if is_said else f"{who}:\n{failure.text}"
    return Ending(code, text, is_said, of_others and code == FAILED, *place)


def _without_failure(outcome: Outcome, ranks: Sequence[RankRecord]) -> Ending:
    if len(ranks) == outcome.world_size and all(rank.code == 0 for rank in ranks):
        return Ending(DONE)
    code = next((node.code for node in outcome.nodes if node.code), outcome.code)
    # An agent that is killed takes its ranks along, and nobody is left to report them.
    when = "while its ranks ran" if ranks else "before its ranks could start"
    return Ending(FAILED, f"the run ended with code {code} {when}", is_accident=bool(ranks) and not outcome.stopped_by)
