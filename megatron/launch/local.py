"""All ranks on this machine, through DeepSpeed's launcher for one node.

Floor 2. DeepSpeed sets the ranks' environment and starts them; watching, stopping and reporting are done here, because
its own way takes up to 30 seconds and shows the wrong rank's traceback. Nothing here imports torch: DeepSpeed's
launcher, which does, is a process of its own.
"""

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron.config.command_line import MERGED_FLAG, merged_to_argument
from megatron.config.groups import Config
from megatron.errors import UserError
from megatron.launch import rank
from megatron.launch.devices import Placement, cores, place
from megatron.launch.processes import StopSignals, start_group, stop_group
from megatron.launch.records import RankRecord, first_failure, read_records, vanished

POLL_SECONDS = 0.02
# After the first failure the others have this long to say why they fail too.
LAST_WORDS_SECONDS = 1.0
# DeepSpeed's launcher looks at its children once a second; it may know what ended one of them.
LAUNCHER_SECONDS = 3.0
GRACE_SECONDS = 5.0
# Freshly mapped pages are dear: keep freed memory, and use huge pages.
ALLOCATOR = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=17179869184:glibc.malloc.trim_threshold=17179869184"
SIGNALS_IN_WORDS = {
    signal.SIGKILL: "usually because the machine ran out of memory",
    signal.SIGBUS: "usually because shared memory (/dev/shm) is too small",
    signal.SIGSEGV: "a crash in compiled code",
    signal.SIGABRT: "compiled code gave up",
}


def run_local(config: Config, script: Path) -> int:
    """Run `script` on all ranks of this machine until they have ended; returns the exit code.

    0: every rank returned 0. 2: a rank found the command or the input wrong. 1: a rank failed, or the run was stopped.
    Raises UserError before anything is started.
    """
    placement = place(config, script.name, os.environ)
    log_folder = _make_log_folder(config, script)
    with tempfile.TemporaryDirectory(prefix="deepy-") as folder, StopSignals() as signals:
        environment = rank_environment(os.environ, placement, Path(folder), log_folder)
        command = launcher_command(config, script, placement)
        group = start_group(command, environment)
        try:
            gone = _watch(group, Path(folder), signals)
        finally:
            if group.poll() != 0:
                stop_group(group, GRACE_SECONDS)
        records = read_records(Path(folder))
        if signals.received is not None:
            print(f"stopped by {signals.received.name}", file=sys.stderr, flush=True)
            return 1
        return _report(gone, records, group.returncode, log_folder or Path(folder))


def rank_environment(
    base: Mapping[str, str], placement: Placement, run_folder: Path, log_folder: Path | None
) -> dict[str, str]:
    """The environment of DeepSpeed's launcher and of every rank. What the user has set stays."""
    environment = {
        "OMP_NUM_THREADS": str(max(1, cores() // len(placement.devices))),
        "GLIBC_TUNABLES": ALLOCATOR,
        **base,
        "DS_ACCELERATOR": placement.accelerator,
        rank.RUN_FOLDER: str(run_folder),
    }
    environment.pop(rank.LOG_FOLDER, None)
    return environment | ({rank.LOG_FOLDER: str(log_folder)} if log_folder is not None else {})


def launcher_command(config: Config, script: Path, placement: Placement) -> list[str]:
    """DeepSpeed's launcher for one node, told to run `rank.py SCRIPT` on each device."""
    world = base64.urlsafe_b64encode(json.dumps({"localhost": placement.devices}).encode()).decode()
    keys = config.launcher
    return [
        *(sys.executable, "-P", "-m", "deepspeed.launcher.launch"),
        *(f"--world_info={world}", "--no_local_rank", "--log_level=critical"),
        *(f"--master_addr={keys.master_addr or '127.0.0.1'}", f"--master_port={keys.master_port or _free_port()}"),
        *(str(Path(rank.__file__).resolve()), str(script), MERGED_FLAG, merged_to_argument(config)),
    ]


def _watch(group: "subprocess.Popen[bytes]", folder: Path, signals: StopSignals) -> list[RankRecord]:
    """Wait until the run is over or lost; returns the ranks that a signal ended, if that is how it was lost."""
    gone: list[RankRecord] = []
    deadline = float("inf")
    while signals.received is None and group.poll() is None and time.monotonic() < deadline:
        records = read_records(folder)
        # Those that are gone first: DeepSpeed's launcher ends the others a moment later.
        gone = gone or vanished(records)
        if deadline == float("inf") and (gone or first_failure(records)):
            unclear = any(record.code is None for record in gone)
            deadline = time.monotonic() + (LAUNCHER_SECONDS if unclear else LAST_WORDS_SECONDS)
        time.sleep(POLL_SECONDS)
    return gone or vanished(read_records(folder))


def _report(gone: Sequence[RankRecord], records: Sequence[RankRecord], code: int, logs: Path) -> int:
    """Say why the run failed, the failing rank's traceback last, and return the exit code."""
    failure = first_failure(records)
    if failure is None and gone:
        who = " or ".join(f"rank {record.rank}" for record in gone)
        # DeepSpeed's launcher exits with minus the signal's number, which the system shows modulo 256.
        known = next((record.code for record in gone if record.code is not None), code - 256 if code > 128 else code)
        return _say(f"{who} {_death_in_words(known)}\n{_last_lines(logs / f'rank_{gone[0].rank}.log')}", 1)
    if failure is None:
        return 0 if code == 0 else _say(f"the run ended with code {code} before its ranks could start", 1)
    if failure.end == "exception":
        return _say(f"rank {failure.rank} of {len(records)} failed:\n{failure.text}", 1)
    said_by_first = next((record.text for record in records if record.rank == 0), "")
    if failure.rank != 0 and failure.text.strip() not in said_by_first:
        _say(f"rank {failure.rank} of {len(records)}:\n{failure.text}", 1)
    return 2 if failure.code == 2 else 1


def _death_in_words(code: int) -> str:
    """What an exit code means; a signal's number is negative."""
    try:
        number = signal.Signals(-code)
    except ValueError:
        return f"ended with code {code} without a word"
    reason = SIGNALS_IN_WORDS.get(number)
    return f"was ended by {number.name}" + (f", {reason}" if reason else "")


def _last_lines(log: Path, count: int = 20) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    return "\n".join(["its last lines:", *lines[-count:]]) if lines else ""


def _say(text: str, code: int) -> int:
    print(text.rstrip(), file=sys.stderr, flush=True)
    return code


def _make_log_folder(config: Config, script: Path) -> Path | None:
    """The folder of the ranks' logs. Reading a checkpoint writes nothing beside it unless log_dir says so."""
    name = config.log_folder if script.name == "train.py" else config.logging.log_dir
    if name is None:
        return None
    try:
        Path(name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"log_dir ({name}) cannot be made: {error.strerror}") from error
    return Path(name)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
