"""Where a configuration comes from: the command, and the texts of its files as they were read."""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megatron.files import is_file

MOST_TEXT = 64 * 1024  # characters of all files together, which travel on the command line of each rank


@dataclass(frozen=True)
class Origin:
    """A command as it was given.

    command: program and arguments. files: absolute path and text of each file that was merged. A text is None where
    there is none to be had again: of a pipe, or beyond 64 KiB in all.
    """

    command: tuple[str, ...]
    working_folder: str
    files: tuple[tuple[str, str | None], ...]
    overrides: tuple[str, ...]  # "key=value", flags included


def origin_of(command: Sequence[str], paths: Sequence[Path], overrides: Sequence[str]) -> Origin:
    """The origin of what this process reads from `paths`."""
    left, files = MOST_TEXT, []
    for path in paths:
        text = None
        if is_file(path):
            with suppress(OSError, UnicodeError):
                text = path.read_text(encoding="utf-8")
        if text is not None and len(text) > left:
            text = None
        left -= len(text or "")
        files.append((os.path.abspath(path), text))  # noqa: PTH100 (resolve would follow links)
    return Origin(tuple(command), os.getcwd(), tuple(files), tuple(overrides))  # noqa: PTH109 (as text)
