"""The harness's results as JSON and as a table."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm_eval.utils import handle_non_serializable, make_table


def as_json(results: Mapping[str, Any]) -> str:
    """The results as the harness writes them."""
    return json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False) + "\n"


def write_samples(results: dict[str, Any], target: Path) -> list[Path]:
    """Move the samples in `results`, if there are any, to JSON lines next to `target`, a file for each task."""
    written = []
    for task, samples in results.pop("samples", {}).items():
        name = target.name.replace("eval_results", f"eval_samples_{task.replace('/', '_')}")
        written.append(target.with_name(name).with_suffix(".jsonl"))
        lines = (json.dumps(each, default=handle_non_serializable, ensure_ascii=False) + "\n" for each in samples)
        written[-1].write_text("".join(lines), encoding="utf-8")
    return written


def metrics_of(results: Mapping[str, Any]) -> dict[str, float]:
    """The scores of all tasks and groups by name, such as tasks/piqa/acc, without their standard errors."""
    return {
        f"tasks/{task}/{name.removesuffix(',none')}": float(value)
        for task, scores in results["results"].items()
        for name, value in scores.items()
        if "," in name and "_stderr," not in name and isinstance(value, int | float)
    }


def as_table(results: Mapping[str, Any]) -> str:
    """The harness's tables, with the number of documents beside each name."""
    columns = [column for column in ("results", "groups") if results.get(column)]
    return "\n".join(make_table({**results, column: _with_counts(results, column)}, column) for column in columns)


def _with_counts(results: Mapping[str, Any], column: str) -> dict[str, Any]:
    return {
        name: {**scores, "alias": f"{scores.get('alias', name)} ({_documents(results, name)})"}
        for name, scores in results[column].items()
    }


def _documents(results: Mapping[str, Any], name: str) -> str:
    """How many documents a score is over: "1,838 documents", or "10 of 1,838 documents"."""
    used, there = _count(results, name)
    return f"{used:,} documents" if used == there else f"{used:,} of {there:,} documents"


def _count(results: Mapping[str, Any], name: str) -> tuple[int, int]:
    """Documents used and documents available; for a group, the sums over its tasks."""
    counts = results["n-samples"].get(name)
    if counts is not None:
        return counts["effective"], counts["original"]
    parts = [_count(results, part) for part in results.get("group_subtasks", {}).get(name, ())]
    return sum(used for used, _ in parts), sum(there for _, there in parts)
