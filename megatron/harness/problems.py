"""Say in one line per task why the harness fails before it computes anything."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from megatron.errors import UserError


def task_problems(names: Sequence[str], manager: Any, error: Exception, limit: float | None = None) -> list[str]:
    """One line for each task among `names`, or in a group of them, that cannot be loaded or asked.

    error: what the harness raised for all of them together; used where no single task fails.
    """
    problems = [line for name in names for line in _problems_of(name, manager, limit)]
    return list(dict.fromkeys(problems)) or [f"eval_tasks: {_reason(error)}"]


def refuse_unusable(names: Sequence[str], manager: Any, limit: float | None = None) -> None:
    """Load the tasks called `names` and build their requests. Raises UserError with a line for each that fails."""
    problems = [line for name in names for line in _problems_of(name, manager, limit)]
    if problems:
        raise UserError(*dict.fromkeys(problems))


def broken_files(folder: Path) -> list[str]:
    """One line for each YAML file under `folder` with a syntax error, whose tasks the harness leaves out."""
    problems = []
    for path in sorted([*folder.rglob("*.yaml"), *folder.rglob("*.yml")]):
        try:
            for _ in YAML(typ="safe", pure=True).parse(path.read_bytes()):
                pass
        except MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            problems.append(f"eval_include_path: {path}, line {line}: not YAML: {error.problem}")
        except (YAMLError, OSError) as error:
            problems.append(f"eval_include_path: {path} cannot be read as YAML: {_one_line(error)}")
    return problems


def _problems_of(name: str, manager: Any, limit: float | None) -> Iterator[str]:
    """The lines about a task, or about the members of a group or tag."""
    from lm_eval.tasks import get_task_dict

    members = _members(name, manager)
    missing = [member for member in members if member not in manager.all_tasks]
    if missing:
        yield f"eval_tasks: {name} names {', '.join(missing)}, which the harness does not have"
        return
    found = [line for member in members for line in _problems_of(member, manager, limit)]
    yield from found
    if found:
        return
    failure = _failure(lambda: _ask(get_task_dict([name], manager), limit))
    if failure is not None:
        yield f"eval_tasks: {name}: {_reason(failure)}"


def _members(name: str, manager: Any) -> list[str]:
    """The names that a group lists, if the harness shows them."""
    config = getattr(getattr(manager, "task_index", {}).get(name), "cfg", None)
    listed = config.get("task") if isinstance(config, dict) and "group" in config else None
    return [each for each in listed if isinstance(each, str)] if isinstance(listed, list) else []


def _ask(tasks: Any, limit: float | None) -> None:
    """Build the requests of all tasks in the harness's nested dictionary."""
    for task in tasks.values():
        if isinstance(task, dict):
            _ask(task, limit)
        else:
            count = len(task.eval_docs)
            task.build_all_requests(
                limit=None if limit is None else max(1, int(limit if limit >= 1 else limit * count)),
                rank=0,
                world_size=1,
            )


def _failure(work: Callable[[], None]) -> Exception | None:
    try:
        work()
    except Exception as error:  # the harness runs code of tasks, which can raise anything
        return error
    return None


def _reason(error: Exception) -> str:
    """What an exception of the harness means."""
    from jinja2 import TemplateSyntaxError, UndefinedError

    message = _one_line(error)
    if isinstance(error, StopIteration):
        return "its dataset has no documents"
    if isinstance(error, IndexError):
        return f"a document has an empty choice, or a target that is not among its choices ({message})"
    if isinstance(error, UndefinedError):
        return f"a template uses a field that a document lacks ({message})"
    if isinstance(error, TemplateSyntaxError):
        return f"a template cannot be parsed ({message})"
    if isinstance(error, KeyError):
        named = " ".join(str(error.args[0]).split()) if error.args and error.args[0] is not None else ""
        return f"the harness does not have what it names ({named})" if named else "it names an unknown metric or filter"
    if isinstance(error, OSError) or "datasets" in type(error).__module__:
        return f"its dataset cannot be read ({message})"
    return f"the harness cannot use it ({message})"


def _one_line(error: Exception) -> str:
    cause = f" ({type(error.__cause__).__name__}: {error.__cause__})" if error.__cause__ is not None else ""
    return " ".join(f"{type(error).__name__}: {error}{cause}".split())
