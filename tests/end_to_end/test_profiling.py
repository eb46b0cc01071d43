"""The keys `profile`, `memory_profiling` and `wall_clock_breakdown` through the real commands."""

import json

from tests.end_to_end.commands import SMALL, json_lines, run

KEYS = """
profile: true
memory_profiling: true
profile_step_start: 2
profile_step_stop: 4
wall_clock_breakdown: true
"""
FILES = (("trace", ".json"), ("kernels", ".txt"), ("memory", ".txt"))


def test_a_run_reports_its_slowest_kernels_its_memory_and_its_phases(tmp_path):
    (tmp_path / "model.yml").write_text(SMALL + KEYS)
    said = run(tmp_path, "train.py", "model", "log_dir=logs", "train_iters=6", ranks=2).stdout
    folder = tmp_path / "logs" / "profile"
    files = {f"{kind}_rank_{rank}{end}" for rank in (0, 1) for kind, end in FILES}
    assert {path.name for path in folder.iterdir()} == files
    for rank in (0, 1):
        events = json.loads((folder / f"trace_rank_{rank}.json").read_text())["traceEvents"]
        names = {event["name"] for event in events}
        assert names >= {"step 3", "step 4"}
        assert not names & {"step 2", "step 5"}
    table = (folder / "kernels_rank_0.txt").read_text()
    assert table in said + "\n"
    assert len(table.splitlines()) == 12, "what it is, names of columns, ten rows"
    assert "logs/profile/trace_rank_0.json" in said
    assert said.count("(data wait ") == 6
    for row in json_lines(tmp_path / "logs" / "metrics.jsonl"):
        phases = [row[f"runtime/{name}_seconds"] for name in ("data_wait", "forward", "backward", "optimizer")]
        assert 0 < sum(phases) <= row["runtime/iteration_time"] * 1.001, "parts of a step, which is a bit more"


def test_a_profile_without_a_place_or_without_steps_is_refused(tmp_path):
    (tmp_path / "model.yml").write_text(SMALL + KEYS.replace("stop: 4", "stop: 2"))
    said = run(tmp_path, "deepy.py", "train.py", "model", "train_iters=2", expect=2)
    assert "neither log_dir nor save is set" in said.stderr
    assert "profile_step_stop (2) must be above profile_step_start (2)" in said.stderr
