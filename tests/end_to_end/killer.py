"""A plugin that ends the run it is loaded into with signal 9, in the middle of a kind of work that is chosen by name.

What a rank does is seen in the files it touches (Python tells audit hooks of each) or, for a step, by a hook of the
training. The seed decides which touch it is, how long after it, and whether one rank dies or all of them. A run that
starts again by itself is left alone from then on.
"""

import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from megatron.launch.protocol.attempt import Attempt

ORDER = "KILL"  # environment: JSON of moment, seed, and the file in which to say what happened
DEEPY_REGISTRY = {"hook": {"killer": "killer:build_hook"}}

# part of a path that shows the work, the touches to choose from, the seconds afterwards to choose from
SIGNS = {
    "loading": ("/state/", 3, 0.05),
    "saving": (".unfinished", 60, 0.05),
    "asynchronous saving": (".unfinished", 60, 0.05),
    "pruning": (".deleted", 40, 0.0),
    "training": ("step", 12, 0.1),
}
REMOVALS = {"os.remove", "os.rmdir"}  # of what is in a folder: their path is relative to it


class Killer:
    """Counts the touches of the chosen work, and ends the run at the chosen one."""

    def __init__(self, moment: str, seed: int, report: str) -> None:
        choice = random.Random(seed)
        self.moment, self._report = moment, report
        self._sign, touches, longest = SIGNS[moment]
        self._left = choice.randint(1, touches)
        self._delay = choice.uniform(0, longest)
        self._everyone = choice.random() < 0.5
        # only rank 0 prunes, and it makes most of the files of a checkpoint
        self._armed = os.environ["RANK"] == ("0" if moment == "pruning" else str(choice.randrange(2)))
        self._pruning = False

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Python's audit hook."""
        if not self._armed or not (event in {"open", "shutil.rmtree"} or event.startswith("os.")):
            return
        named = any(self._sign in str(argument) for argument in arguments[:2])
        if self.moment == "loading" and ".unfinished" in str(arguments[0]):
            return
        self._pruning |= named and self.moment == "pruning"
        if named or (self._pruning and event in REMOVALS):
            self.touch(f"{event} {arguments[0]}")

    def touch(self, what: str) -> None:
        """One more of the chosen moments has come."""
        self._left -= 1
        if self._armed and self._left <= 0:
            self._armed = False
            if self._delay:
                threading.Thread(target=self._kill, args=(what,), daemon=True).start()
            else:
                self._kill(what)

    def _kill(self, what: str) -> None:
        time.sleep(self._delay)
        own = os.getpid()
        victims = [child.pid for child in psutil.Process(os.getppid()).children()] if self._everyone else []
        Path(self._report).write_text(f"{self.moment}: {what}, {1e3 * self._delay:.0f} ms later, {victims or own}")
        for victim in [pid for pid in victims if pid != own] + [own]:
            os.kill(victim, signal.SIGKILL)


def build_hook(_: Any) -> Any:
    """A hook that tells the killer of steps."""
    from megatron.training.hooks.base import Hook  # which takes seconds to import, and the launcher needs none of it

    class Steps(Hook):
        def after_step(self, step: Any) -> dict[str, float]:
            if KILLER is not None and KILLER.moment == "training":
                KILLER.touch(f"step {step.state.step}")
            return {}

    return Steps()


IS_VICTIM = ORDER in os.environ and "RANK" in os.environ and Attempt.of_this_process().number == 1
KILLER = Killer(*json.loads(os.environ[ORDER])) if IS_VICTIM else None
if KILLER is not None and KILLER.moment != "training":
    sys.addaudithook(KILLER.audit)
