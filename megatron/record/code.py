"""Which code runs: the commit, and the changes since."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from megatron.record.secrets import has_secret, without_secrets

GIT_SECONDS = 5.0
MOST_CHANGES = 2 << 20  # bytes of a patch that is kept
MOST_UNTRACKED = 100


@dataclass(frozen=True)
class Code:
    """commit: None outside of a repository. remote: its address, if it has one. patch: `git diff HEAD --binary`.

    note: what is missing, and why.
    """

    folder: str
    commit: str | None = None
    branch: str | None = None
    remote: str | None = None
    patch: bytes = b""
    changed_files: int = 0
    untracked: tuple[str, ...] = ()
    note: str | None = None


def code_of(folder: Path) -> Code:
    """The state of the code in `folder`, the root of its repository. Never raises."""
    try:
        return _code(folder)
    except subprocess.TimeoutExpired:
        return Code(str(folder), note=f"git did not answer within {GIT_SECONDS:.0f} s")
    except OSError as error:
        return Code(str(folder), note=f"git cannot be asked: {error.strerror}")


def _code(folder: Path) -> Code:
    # A package in .venv may lie in the repository of something else.
    if not (folder / ".git").exists():
        return Code(str(folder), note="the code is not in a repository of its own")
    commit, problem = _git(folder, "rev-parse", "HEAD")
    if problem:
        return Code(str(folder), note=f"git: {problem}")
    branch, _ = _git(folder, "rev-parse", "--abbrev-ref", "HEAD")
    remote, _ = _git(folder, "config", "--get", "remote.origin.url")
    others, _ = _git(folder, "ls-files", "--others", "--exclude-standard")
    patch, note = _changes(folder)
    return Code(
        folder=str(folder),
        commit=commit.strip(),
        branch=branch.strip() or None,
        remote=without_secrets(remote.strip()) or None,
        patch=patch,
        changed_files=patch.count(b"\ndiff --git ") + patch.startswith(b"diff --git "),
        untracked=tuple(others.splitlines()[:MOST_UNTRACKED]),
        note=note,
    )


def _changes(folder: Path) -> tuple[bytes, str | None]:
    """The patch, and why it is not kept. Its size is not known before it is read."""
    # in the form that `git apply` reads, whatever the user has configured
    form = ("--no-color", "--no-ext-diff", "--no-textconv", "--src-prefix=a/", "--dst-prefix=b/", "--submodule=short")
    with _start(folder, "diff", "HEAD", "--binary", *form) as process:
        patch = process.stdout.read(MOST_CHANGES + 1) if process.stdout else b""
        if len(patch) > MOST_CHANGES:
            process.kill()
    if process.returncode and len(patch) <= MOST_CHANGES:
        return b"", f"`git diff HEAD` ended with code {process.returncode}, so changes since the commit are not kept"
    if len(patch) > MOST_CHANGES:
        return b"", f"the changes since the commit are more than {MOST_CHANGES >> 20} MiB, and are not kept"
    if has_secret(patch.decode(errors="replace")):
        return b"", "the changes since the commit hold what looks like a key or a password, and are not kept"
    return patch, None


def _git(folder: Path, *words: str) -> tuple[str, str]:
    """What git prints, and its last complaint if it fails."""
    process = _start(folder, *words)
    try:
        out, errors = process.communicate(timeout=GIT_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    complaint = errors.decode(errors="replace").strip().rpartition("\n")[2]
    return ("", complaint or f"code {process.returncode}") if process.returncode else (out.decode(errors="replace"), "")


def _start(folder: Path, *words: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        ["git", "-C", str(folder), *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE if words[0] != "diff" else subprocess.DEVNULL,
        env=os.environ | {"GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C", "GIT_TERMINAL_PROMPT": "0"},
    )
