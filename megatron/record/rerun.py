"""The commands that make a run again, from the record of its starts: a shell script with comments."""

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from megatron.config.schema.config import fields_at
from megatron.config.schema.key_group import expanded_path
from megatron.events import read_events
from megatron.record.start import CONFIG, PACKAGES, PATCH, Start

# The folders that a run writes, all of which get another place.
OUTPUTS = ("save", "log_dir", "tensorboard_dir", "save_hf", "memory_profiling_path")
# Settings of the first machine and of who watched the run there.
DROPPED = (
    *("hostfile", "include", "exclude", "master_addr", "master_port", "num_nodes", "launcher", "launcher_args"),
    *("alert_webhook", "alert_command", "prometheus_port", "prometheus_textfile"),
)
WHEELS = "https://download.pytorch.org/whl/"


@dataclass(frozen=True)
class Place:
    """Where a run is made again.

    into: folder of its checkpoints and logs. moved: old and new beginnings of the paths of what it reads. python: that
    has the packages; None: a new environment. code: a checkout of the same code; None: a new one, inside `into`.
    """

    into: Path
    moved: tuple[tuple[str, str], ...] = ()
    python: str | None = None
    code: str | None = None

    def of_input(self, path: str) -> str:
        """The new path of something that is read."""
        for old, new in self.moved:
            if path == old or path.startswith(old.rstrip("/") + "/") or (path.startswith(old) and old[-1:] != "/"):
                return new + path[len(old) :]
        return path


@dataclass(frozen=True)
class Rerun:
    """The starts of a run, to be made again in a place."""

    starts: Sequence[Start]
    place: Place
    notes: Sequence[str] = field(default=())  # further comments at the beginning

    @cached_property
    def parts(self) -> list[tuple[Start, int | None]]:
        """The starts whose steps count, each with the step from which the next of them went on."""
        kept: list[Start] = []
        for start in self.starts:
            # What a start did beyond the step that a later one resumed from was done again.
            kept = [earlier for earlier in kept if earlier.step < start.step] + [start]
        ends = [start.step for start in kept[1:]]
        return list(zip(kept, [*ends, None], strict=True))

    @property
    def problems(self) -> list[str]:
        """Why these commands do not make the same run, as far as the record shows."""
        found, first = [], self.parts[0][0]
        load = first.facts["config"].get("load")
        if first.step and load and self._is_output(self._absolute(first, load)):
            found.append(
                f"NOT HERE: the start that made step {first.step} is not recorded. Copy its checkpoint "
                f"({first.facts.get('checkpoint')}) into {self.settings(first)['load']}, or training begins at step 0"
            )
        for (start, _), (following, _) in pairwise(self.parts):
            steps = following.step - start.step
            trained = steps * start.facts["batch"]["global_size"]
            left_out = following.facts["consumed_samples"] - start.facts["consumed_samples"] - trained
            if left_out != _left_out_before(start, following):
                found.append(
                    f"NOT THE SAME: start {start.folder.name} went back from a loss spike and left {left_out:,} "
                    f"samples out before start {following.folder.name} went on from step {following.step}, which it "
                    "had reached before; these commands end it the first time that it reaches this step"
                )
        return found

    def script(self) -> str:
        """All commands, for a shell."""
        lines = ["#!/usr/bin/env bash", *self._heading(), "set -eu", f"mkdir -p {_quoted(self.place.into)}"]
        before: Start | None = None
        for start, end in self.parts:
            lines += self._code(start, before) + self._packages(start, before)
            lines += ["", *self._run(start, end)]
            before = start
        return "\n".join([*lines, ""])

    def settings(self, start: Start) -> dict[str, Any]:
        """The keys of the configuration that are different in the new place; None: unset."""
        config, changed = start.facts["config"], dict[str, Any]()
        for key, value in config.items():
            if key in OUTPUTS and value is not None:
                changed[key] = self._of_output(start, value)
            elif key in DROPPED and value is not None:
                changed[key] = None
            elif key in path_keys() and value:
                new = self._input(start, key, value)
                changed |= {key: new} if new != value else {}
        hosts = start.facts["hosts"]
        return changed | {"num_gpus": start.facts["layout"]["world_size"] // len(hosts)}

    def _heading(self) -> Iterator[str]:
        first, hardware = self.starts[0], self.starts[0].facts.get("hardware", {})
        cards = ", ".join(sorted({card["name"] for card in hardware.get("devices", [])}))
        yield f"# {len(self.starts)} starts of a run, the first on {_date(first)}:"
        for start in self.starts:
            layout, counts = start.facts["layout"], any(start is part for part, _ in self.parts)
            done_again = "" if counts else " (all its steps were done again by a later start)"
            yield (
                f"#   {start.folder.name}: from step {start.step} on {layout['world_size']} ranks of "
                f"{', '.join(start.facts['hosts'])}{done_again}"
            )
        machine = f"{hardware.get('processor')}, {hardware.get('threads')} threads per rank"
        yield _comment(f"Hardware: {machine}{f', {cards}' if cards else ''}; {hardware.get('system')}")
        yield "# The losses are the same bit for bit on the same hardware with the same packages and threads."
        yield from map(_comment, self.notes)

    def _code(self, start: Start, before: Start | None) -> list[str]:
        facts = start.facts["code"]
        if before is not None and _same_code(start, before):
            return []
        branch = f", branch {facts['branch']}" if facts.get("branch") else ""
        lines = ["", _comment(f"The code of start {start.folder.name}, which was in {facts['folder']}{branch}")]
        if facts.get("note"):
            lines += [_comment(f"NOT RECORDED: {facts['note']}")]
        if facts.get("untracked"):
            files = ", ".join(facts["untracked"])
            lines += [_comment(f"Files that git did not know, which are not recorded: {files}")]
        if self.place.code is not None:
            return [*lines, f"cd {_quoted(self.place.code)}"] if before is None else lines
        if facts.get("commit") is None:
            return [*lines, "# Bring this code into the folder, then go on:", f"cd {self._new_code}"]
        if before is None:
            source = facts.get("remote") or facts["folder"]
            lines += [f"git clone --quiet --no-checkout {_quoted(source)} {self._new_code}", f"cd {self._new_code}"]
        commit, folder = facts["commit"], _quoted(facts["folder"])
        if facts.get("remote"):  # to which the commit may never have been pushed
            lines += [f"git cat-file -e {commit} 2>/dev/null || git fetch --quiet {folder} {commit}"]
        lines += [f"git checkout --quiet --force --detach {commit}"]
        if facts.get("patch"):
            patch = _quoted(start.folder.resolve() / PATCH)
            lines += [f"git apply --index {patch}  # {facts['changed_files']} changed files"]
        return lines

    @property
    def _new_code(self) -> str:
        return _quoted(self.place.into / "code")

    def _packages(self, start: Start, before: Start | None) -> list[str]:
        packages = start.folder.resolve() / PACKAGES
        if before is not None:
            same = _text(packages) == _text(before.folder / PACKAGES)
            return [] if same else [f"# This start had other packages: {packages}"]
        python = start.facts["versions"]["python"]
        if self.place.python is not None:
            return ["", f"# The packages: Python {python} with {_quoted(packages)}, as {self.place.python} should have"]
        short = ".".join(python.split(".")[:2])
        torch = start.facts["versions"]["torch"]
        local = torch.partition("+")[2]
        index = f" --extra-index-url {WHEELS}{local}" if re.fullmatch(r"cpu|cu\d+|rocm[\d.]+", local) else ""
        pip = f"{self._python} -m pip install --quiet{index}"
        return [
            "",
            f"# The packages; it was Python {python}",
            f"python{short} -m venv {_quoted(self.place.into / 'venv')}",
            f"{pip} setuptools wheel ninja torch=={torch}",
            f"{pip} --no-build-isolation -r {_quoted(packages)}",
        ]

    @property
    def _python(self) -> str:
        return _quoted(self.place.python or self.place.into / "venv" / "bin" / "python")

    def _run(self, start: Start, end: int | None) -> Iterator[str]:
        facts = start.facts
        yield f"# Start {start.folder.name}, from step {start.step}" + (f" to step {end}" if end is not None else "")
        if facts.get("command"):
            yield _comment(f"was: {shlex.join(facts['command'])}")
        yield _comment(facts["beginning"])
        if len(facts["hosts"]) > 1:
            yield f"# It ran on {len(facts['hosts'])} nodes: add hostfile=FILE with as many, or num_gpus on one machine"
        yield "("
        environment = {"OMP_NUM_THREADS": str(facts["hardware"]["threads"])} | facts["environment"]
        for name, value in environment.items():
            # A path of the first machine is for people to judge.
            yield _comment(f"{name} was {value}") if "/" in value else f"export {name}={shlex.quote(value)}"
        changed = self.settings(start) | ({} if end is None else {"exit_interval": end})
        words = [_override(key, value) for key, value in changed.items()]
        command = [self._python, "deepy.py", "train.py", _quoted(start.folder.resolve() / CONFIG), *words]
        yield " ".join(command)
        yield ")"

    def _of_output(self, start: Start, value: str) -> str:
        """The new place of a folder that was written: one inside another stays inside."""
        path, into = self._absolute(start, value), self.place.into
        others = {self._absolute(other, found) for other in self.starts for found in _outputs(other)}
        outer = min((other for other in others if _is_inside(path, other)), key=len)
        tops = sorted(other for other in others if not any(_is_inside(other, top) for top in others - {other}))
        name = Path(outer).name
        alike = [top for top in tops if Path(top).name == name]
        name = name if len(alike) == 1 else f"{name}-{alike.index(outer) + 1}"
        return str(into / name / Path(path).relative_to(outer))

    def _input(self, start: Start, key: str, value: Any) -> Any:
        if key == "sample_prompts" and isinstance(value, list):
            return value  # texts
        if isinstance(value, list):
            return [self._input(start, key, one) for one in value]
        scheme, colon, rest = value.partition(":") if re.match(r"[a-z]+:", value) else ("", "", value)
        path = self._absolute(start, rest)
        if key == "load" and self._is_output(path):
            return self._of_output(start, value)
        # The name of an encoding or a model is no path.
        is_path = "/" in rest or key in DATA or Path(path).exists()
        return f"{scheme}{colon}{self.place.of_input(path)}" if is_path else value

    def _is_output(self, path: str) -> bool:
        """Whether an absolute path lies in a folder that the run writes."""
        outputs = (self._absolute(other, each) for other in self.starts for each in _outputs(other))
        return any(_is_inside(path, output) for output in outputs)

    def _absolute(self, start: Start, value: str) -> str:
        return str(Path(start.facts.get("working_folder") or "/", value))


DATA = ("data_path", *(f"{part}{what}_data_paths" for part in ("train", "valid", "test") for what in ("", "_label")))


def path_keys() -> frozenset[str]:
    """The flat keys whose values are paths."""
    return frozenset(key for key, kind in fields_at(()).items() if _is_path(kind))


def _is_path(kind: FieldInfo | Any) -> bool:
    metadata = getattr(kind, "metadata", getattr(kind, "__metadata__", ()))
    if any(getattr(one, "func", None) is expanded_path for one in metadata):
        return True
    inner = [kind.annotation] if isinstance(kind, FieldInfo) else getattr(kind, "__args__", ())
    return any(_is_path(part) for part in inner)


def _outputs(start: Start) -> list[str]:
    return [value for key in OUTPUTS if (value := start.facts["config"].get(key))]


def _is_inside(path: str, folder: str) -> bool:
    return Path(path).is_relative_to(folder)


def _left_out_before(start: Start, following: Start) -> int:
    """The samples that `start` left out when it went back from steps before the one that `following` went on from."""
    times = range(int(start.facts["time"]), int(following.facts["time"]) + 1)
    pairs = [
        event.details["skipped_samples"]
        for event in read_events(start.folder.parents[1])
        if event.kind == "rewind" and int(event.time) in times and (event.step or 0) < following.step
    ]
    return sum(end - begin for begin, end in pairs)


def _same_code(one: Start, other: Start) -> bool:
    here, there = one.facts["code"], other.facts["code"]
    same = here.get("commit") == there.get("commit") and here.get("note") == there.get("note")
    return same and _text(one.folder / PATCH) == _text(other.folder / PATCH)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _override(key: str, value: Any) -> str:
    if value is None:
        return f"{key}=null"
    is_plain = isinstance(value, int) or (isinstance(value, str) and re.fullmatch(r"[\w./-]*[a-zA-Z/][\w./-]*", value))
    return shlex.quote(f"{key}={value if is_plain else json.dumps(value, ensure_ascii=False)}")


def _comment(text: str) -> str:
    """One line, whatever it holds: a second one would be a command."""
    return f"# {' '.join(text.splitlines())}"


def _quoted(path: str | Path) -> str:
    return shlex.quote(str(path))


def _date(start: Start) -> str:
    return f"{datetime.fromtimestamp(start.facts['time'], UTC):%d %B %Y, %H:%M} UTC"


def flat_config(start: Start, changed: Mapping[str, Any]) -> dict[str, Any]:
    """The flat keys of a start in its new place, without those that are unset."""
    return {key: value for key, value in {**start.facts["config"], **changed}.items() if value is not None}
