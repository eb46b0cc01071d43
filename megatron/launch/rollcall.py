"""The roll call of a hang: what each rank was doing, derived from its Python stacks.

    ranks 0, 2, 3 wait in all_reduce (optimizer step, step 1201); rank 1 is in data loading (windows.py:88)

Standard library only.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.launch.protocol.heartbeat import RankStatus
from megatron.launch.protocol.records import RankStacks

FRAME = re.compile(r'^  File "(?P<file>.*)", line (?P<line>\d+) in (?P<function>.+)$')
# The file at the bottom of the stack of a rank's main thread.
ENTRY = "megatron/launch/node/rank.py"
STOPPED = ("T", "t")
COLLECTIVE_FILES = ("distributed_c10d.py", "_functional_collectives.py", "deepspeed/comm/")
LIBRARIES = ("site-packages/", "/lib/python", "<frozen", "megatron/launch/")
WAITING_FOR_GPU = {"synchronize": "the GPU", "item": "the GPU", "tolist": "the GPU"}
# Functions that stand for a part of a step, with everything they call; the innermost one is used.
PARTS = (
    (re.compile(r"_exec_optimizer_step|_take_model_step|_optimizer_step|^step$|clip|norm"), "optimizer step"),
    (re.compile(r"backward|_exec_reduce"), "backward"),
    (re.compile(r"_exec_(send|recv)"), "pipeline transfer"),
    (re.compile(r"forward"), "forward"),
    (re.compile(r"save_checkpoint"), "saving a checkpoint"),
    (re.compile(r"evaluate_batch"), "validation"),
)


@dataclass(frozen=True)
class Frame:
    """One line of a stack."""

    file: str
    line: int
    function: str


def roll_call(statuses: Mapping[int, RankStatus], stacks: Sequence[RankStacks], hosts: Mapping[int, str]) -> str:
    """One sentence, with ranks in the same state grouped. hosts: of each rank, shown if there are several."""
    answers = {answer.rank: answer for answer in stacks}
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for rank, status in sorted(statuses.items()):
        groups[_doing(status, answers.get(rank))].append(rank)
    several = len(set(hosts.values())) > 1
    return "; ".join(_clause(ranks, hosts if several else {}, *doing.split(" ", 1)) for doing, ranks in groups.items())


def culprits(statuses: Mapping[int, RankStatus], stacks: Sequence[RankStacks]) -> tuple[int, ...]:
    """The ranks that others wait for, in order; none where all ranks do the same, as when a cable is cut."""
    answers = {answer.rank: answer for answer in stacks}
    waits = {rank: _doing(status, answers.get(rank)).startswith("wait") for rank, status in sorted(statuses.items())}
    return tuple(rank for rank, waiting in waits.items() if not waiting) if any(waits.values()) else ()


def main_stack(text: str) -> list[Frame]:
    """The frames of the main thread, innermost first, from the text of faulthandler."""
    threads = re.split(r"^(?=Thread |Current thread )", text, flags=re.MULTILINE)
    stacks = [_frames(thread) for thread in threads]
    return next((stack for stack in stacks if stack and stack[-1].file.endswith(ENTRY)), stacks[-1])


def _frames(text: str) -> list[Frame]:
    found = map(FRAME.match, text.splitlines())
    return [Frame(match["file"], int(match["line"]), match["function"]) for match in found if match]


def _doing(status: RankStatus, answer: RankStacks | None) -> str:
    """What a rank does, as a phrase in the plural with the verb first: "wait in ..." or "are in ..."."""
    if answer is not None and answer.state in STOPPED:
        return f"are stopped by a signal or a debugger ({status.phase}, step {status.step})"
    stack = main_stack(answer.text) if answer is not None else []
    if not stack:
        return f"do not answer ({status.phase}, step {status.step})"
    part = next((words for frame in stack for pattern, words in PARTS if pattern.search(frame.function)), status.phase)
    collective = next((frame for frame in stack[:12] if any(name in frame.file for name in COLLECTIVE_FILES)), None)
    if collective is not None:
        return f"wait in {collective.function} ({part}, step {status.step})"
    if stack[0].function in WAITING_FOR_GPU:
        return f"wait for {WAITING_FOR_GPU[stack[0].function]} ({part}, step {status.step})"
    own = next((frame for frame in stack if not any(name in frame.file for name in LIBRARIES)), stack[0])
    part = status.phase if status.phase == "data loading" else part
    return f"are in {part} ({Path(own.file).name}:{own.line}, step {status.step})"


def _clause(ranks: Sequence[int], hosts: Mapping[int, str], verb: str, doing: str) -> str:
    names = ", ".join(map(str, ranks))
    where = f" on {', '.join(dict.fromkeys(hosts[rank] for rank in ranks))}" if hosts else ""
    if len(ranks) > 1:
        return f"ranks {names}{where} {verb} {doing}"
    singular = {"are": "is", "wait": "waits", "do": "does"}[verb]
    return f"rank {names}{where} {singular} {doing}"
