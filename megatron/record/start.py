"""The record of each start of a run, in its log folder: starts/0001/start.json and files beside it.

start.json      everything that is known about the start; written last
config.yml      the merged configuration, without defaults; deepy.py reads it
config/1-a.yml  the texts of the files, as they were given
changes.patch   the changes of the code since its commit
packages.txt    the installed packages, as pip reads them
"""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any, Self

from megatron.config.schema.config import Config
from megatron.config.yaml_file import yaml_text
from megatron.errors import UserError
from megatron.files import replaced_when_complete
from megatron.record.code import Code, code_of
from megatron.record.machine import hardware, installed_packages
from megatron.record.secrets import values_without_secrets, without_secrets, words_without_secrets

STARTS, START, CONFIG, PATCH, PACKAGES = "starts", "start.json", "config.yml", "changes.patch", "packages.txt"
FORMAT = 1
JOIN_SECONDS = 2.0


class Surroundings:
    """Code, packages and hardware, looked up in a thread while a run is set up."""

    def __init__(self, code: Path) -> None:
        """code: the folder of the program."""
        self._code = Code(str(code), note="git did not answer in time")
        self._packages: dict[str, str] = {}
        self._hardware: dict[str, Any] = {}
        self._thread = Thread(target=self._look, args=(code,), name="surroundings", daemon=True)

    def _look(self, code: Path) -> None:
        self._packages, self._hardware = installed_packages(), hardware()
        self._code = code_of(code)

    @classmethod
    def looked_up(cls, code: Path) -> Self:
        """Begin to look."""
        surroundings = cls(code)
        surroundings._thread.start()
        return surroundings

    def found(self) -> tuple[Code, dict[str, str], dict[str, Any]]:
        """Code, packages and hardware; waits until they are known, for at most 2 seconds."""
        self._thread.join(JOIN_SECONDS)
        return self._code, self._packages, self._hardware


@dataclass(frozen=True)
class Start:
    """A start that was recorded. folder: of its files. facts: start.json."""

    folder: Path
    facts: Mapping[str, Any]

    @property
    def step(self) -> int:
        """Steps done when training began."""
        return int(self.facts["step"])


def write_start(log_folder: Path, config: Config, surroundings: Surroundings, facts: Mapping[str, Any]) -> Path:
    """Record a start, and return its folder. facts: what else is known, plain data.

    Raises OSError where it cannot be written.
    """
    code, packages, machine = surroundings.found()
    folder = _new_folder(log_folder / STARTS)
    flat = values_without_secrets(config.to_flat())
    _write(folder / CONFIG, yaml_text(flat))
    _write(folder / PACKAGES, "".join(f"{name}=={version}\n" for name, version in packages.items()))
    if code.patch:
        with replaced_when_complete(folder / PATCH, "wb") as file:
            file.write(code.patch)
    origin = config.origin
    versions = {name: packages[name] for name in ("deepspeed", "numpy") if name in packages}
    document = {
        "format": FORMAT,
        "number": int(folder.name),
        "time": time.time(),
        "command": words_without_secrets(origin.command) if origin else None,
        "working_folder": origin.working_folder if origin else None,
        "config_files": _given_files(folder, config),
        "overrides": words_without_secrets(origin.overrides) if origin else None,
        "code": {
            "folder": code.folder,
            "commit": code.commit,
            "branch": code.branch,
            "remote": code.remote,
            "changed_files": code.changed_files,
            "patch": PATCH if code.patch else None,
            "untracked": list(code.untracked),
            "note": code.note,
        },
        **facts,
        "versions": versions | facts.get("versions", {}),
        "hardware": machine | facts.get("hardware", {}),
        "config": flat,
    }
    _write(folder / START, json.dumps(document, indent=1))
    return folder


def read_starts(log_folder: Path) -> list[Start]:
    """The starts recorded in a log folder, in order; those that were not written whole are passed over."""
    starts = []
    for path in sorted((log_folder / STARTS).glob(f"*/{START}")):
        try:
            start = Start(path.parent, json.loads(path.read_text(encoding="utf-8")))
            _ = start.step
        except (OSError, ValueError, KeyError, TypeError):
            continue
        starts.append(start)
    return starts


def find_starts(run: Path) -> list[Start]:
    """The starts of a run: of its log folder, or of its checkpoint folder with `logs` in it. Raises UserError."""
    for folder in (run, run / "logs"):
        if starts := read_starts(folder):
            return starts
    raise UserError(f"{run} holds no record of a run: no {STARTS}/0001/{START}, neither in it nor in its folder logs")


def _new_folder(starts: Path) -> Path:
    """A folder with the next number. Another run in the same log folder may take it at the same time."""
    starts.mkdir(parents=True, exist_ok=True)
    number = max((int(path.name) for path in starts.iterdir() if path.name.isdecimal()), default=0)
    while True:
        number += 1
        folder = starts / f"{number:04d}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder


def _given_files(folder: Path, config: Config) -> list[dict[str, str | None]]:
    given: list[dict[str, str | None]] = []
    for number, (path, text) in enumerate(config.origin.files if config.origin else (), 1):
        copy = None
        if text is not None:
            copy = f"config/{number}-{Path(path).name}"
            _write(folder / copy, without_secrets(text))
        given.append({"path": path, "copy": copy})
    return given


def _write(path: Path, text: str) -> None:
    with replaced_when_complete(path) as file:
        file.write(text)
