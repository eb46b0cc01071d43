"""Find the requested tasks among the harness's own and those of `eval_include_path`."""

from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron.errors import UserError
from megatron.files import is_folder
from megatron.harness.problems import broken_files
from megatron.registry import nearest


def check_harness(include_path: str | None) -> None:
    """Raise UserError where the harness is not installed or `include_path` is not a folder."""
    if find_spec("lm_eval") is None:
        raise UserError('eval_tasks needs the lm-evaluation-harness: pip install "lm-eval>=0.4.9", or -e ".[eval]"')
    if include_path is not None and not is_folder(include_path):
        raise UserError(f"eval_include_path ({include_path}) is not a folder")


def open_tasks(include_path: str | None, include_defaults: bool = True) -> Any:
    """The harness's TaskManager, with the tasks in `include_path`. Raises UserError where they cannot be read."""
    from lm_eval.tasks import TaskManager

    try:
        return TaskManager(include_path=include_path, include_defaults=include_defaults)
    except Exception as error:  # of any kind: the harness reads all files of the folder
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        problems = broken_files(Path(include_path)) if include_path else []
        raise UserError(*problems or [f"the harness cannot read the tasks in eval_include_path ({reason})"]) from error


def find_tasks(patterns: Sequence[str], manager: Any) -> list[str]:
    """Names of tasks, groups and tags that match `patterns` (`*` and `?` as in file names), each once.

    patterns: names or comma-separated lists of names. manager: the harness's TaskManager. Raises UserError with the
    nearest name for each pattern without a match.
    """
    words = [word.strip() for pattern in patterns for word in pattern.split(",") if word.strip()]
    if not words:
        raise UserError("eval_tasks names no task")
    matches = {word: manager.match_tasks([word]) for word in words}
    problems = [_no_such_task(pattern, manager.all_tasks) for pattern, names in matches.items() if not names]
    if problems:
        folder = manager.include_path
        raise UserError(*problems, *(broken_files(Path(folder)) if isinstance(folder, str) else ()))
    return list(dict.fromkeys(name for names in matches.values() for name in names))


def configurations(names: Sequence[str], manager: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Names and settings of the tasks that `names`, groups and tags among them, stand for. Nothing is loaded."""
    for name in names:
        entry = manager.task_index.get(name)
        if entry is None:
            continue
        settings = entry.cfg or {}
        if entry.kind.name == "TAG":
            yield from configurations(sorted(entry.tags), manager)
        elif entry.kind.name == "GROUP":
            members = settings["task"] if isinstance(settings.get("task"), list) else []
            named = [each if isinstance(each, str) else each.get("task", each.get("group")) for each in members]
            yield from configurations([each for each in named if isinstance(each, str) and each != name], manager)
        else:
            yield name, settings


def texts(value: Any) -> Iterator[str]:
    """All texts in nested lists and dictionaries, such as the files of a dataset."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | Sequence):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from texts(each)


def _no_such_task(pattern: str, known: Sequence[str]) -> str:
    near = nearest(pattern, known)
    hint = f' Did you mean "{near}"?' if near else " eval_include_path names a folder with tasks of your own."
    return f'eval_tasks: the harness has no task "{pattern}".{hint}'
