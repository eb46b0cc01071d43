"""Write the report of runs as files."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from megatron.errors import UserError
from megatron.files import exists, is_folder, replaced_when_complete
from megatron.report.document import Report, make_report, markdown, page, write_csv
from megatron.report.run_folder import RunFolder, RunRecord

Argument = TypeVar("Argument")
Result = TypeVar("Result")

# How each file begins: a report replaces nothing but a report.
_BEGINNINGS = {
    ".html": b"<!doctype html><!-- Deepy report",
    ".md": b"# Deepy report",
    ".csv": b"run,step,tokens,seconds",
}


def open_runs(paths: Sequence[Path]) -> list[RunFolder]:
    """The folders of runs. Raises UserError with what is wrong with each of them."""
    return _each(RunFolder, paths)


def read_runs(folders: Sequence[RunFolder], may_be_empty: bool = False) -> list[RunRecord]:
    """The records of runs. Raises UserError with what is wrong with each of them, such as that no step was logged."""

    def read(folder: RunFolder) -> RunRecord:
        record = folder.read()
        if not len(record.steps) and not may_be_empty:
            raise UserError(f"{folder.path}: {record.notes[0]}; wait for the first log line, or follow it with --watch")
        return record

    return _each(read, folders)


def _each(function: Callable[[Argument], Result], arguments: Sequence[Argument]) -> list[Result]:
    """The result for each argument. Raises UserError with the problems of all."""
    results: list[Result] = []
    problems: list[str] = []
    for argument in arguments:
        try:
            results.append(function(argument))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    return results


def check_output(path: Path) -> None:
    """Raise UserError if the report may not be written to `path`."""
    if path.suffix != ".html":
        raise UserError(f"--output ({path}) must end in .html; the .md and .csv are written beside it")
    problems = []
    for suffix, beginning in _BEGINNINGS.items():
        file = path.with_suffix(suffix)
        if is_folder(file):
            problems.append(f"--output: {file} is a folder; choose another name")
        elif exists(file) and not _begins_with(file, beginning):
            problems.append(f"--output: {file} is there and is no report; choose another name, or remove it")
    if problems:
        raise UserError(*problems)


def _begins_with(path: Path, beginning: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(beginning)) in (beginning, b"")


def write_report(records: Sequence[RunRecord], path: Path) -> Report:
    """Write `path` (.html) and the .md and .csv beside it, each replaced as a whole. Raises OSError."""
    report = make_report(records)
    for suffix, write in (
        (".html", lambda file: file.write(page(report))),
        (".md", lambda file: file.write(markdown(report))),
        (".csv", lambda file: write_csv(report, file)),
    ):
        file = path.with_suffix(suffix)
        partial = file.with_name(f".{file.name}.{os.getpid()}")  # another process may write the same report
        with replaced_when_complete(file, partial=partial) as opened:
            write(opened)
    return report
