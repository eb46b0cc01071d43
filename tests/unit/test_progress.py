"""Progress of work that takes long: a bar on a terminal, a line now and then elsewhere, nothing for short work."""

import subprocess
import sys

import pytest

from megatron import progress as module
from megatron.generation.progress import TextProgress
from megatron.preprocessing.commands import progress as preprocessing
from megatron.preprocessing.job import Totals
from megatron.progress import Progress, bar, counted
from tests.terminals import Terminal, output_to, terminal


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when they are added."""
    seconds = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: seconds[0])
    monkeypatch.delenv("RANK", raising=False)
    return seconds


def test_short_work_shows_nothing_and_long_work_its_share_rate_and_time_left(clock):
    with Progress("loading", 4e9, "B") as progress:
        progress.add(1_000_000_000)
        clock[0] = 1.9
        assert progress.lines(79) == []
        clock[0] = 4.0
        assert [line.plain for line in progress.lines(79)] == [
            "loading  ━━━━━────────────── 25%  1.00 GB of 4.00 GB  250 MB/s  12s left"
        ]


def test_on_a_pipe_there_is_a_line_every_half_minute(clock, capsys):
    with Progress("writing", 1000, "tensors") as progress:
        for second in range(70):
            clock[0] = float(second)
            progress.add(10)
    assert capsys.readouterr() == (
        "",
        "writing: 31% | 310 of 1.00k tensors | 10.3 tensors/s | 1m 7s left\n"
        "writing: 61% | 610 of 1.00k tensors | 10.2 tensors/s | 38s left\n",
    )


def test_work_of_half_a_minute_has_no_line_on_a_pipe_and_other_ranks_none_at_all(clock, capsys, monkeypatch):
    with Progress("short", 10) as progress:
        clock[0] = 29.0
        progress.add(5)
    monkeypatch.setenv("RANK", "1")
    with Progress("long", 10) as progress:
        clock[0] = 600.0
        progress.add(5)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("progress", "line"),
    [
        (Progress("evaluating"), "evaluating | 1m"),
        (Progress("reading", unit="documents"), "reading | 600 documents | 10 documents/s | 1m"),
        (Progress("all", 600, "texts"), "all: 100% | 600 of 600 texts | 10 texts/s"),
        (Progress("more", 1200, "texts", done=600), "more: 100% | 1.20k of 1.20k texts | 10 texts/s"),
        (Progress("half", 1200), "half: 50% | 1m left"),
    ],
)
def test_what_is_known_is_told(clock, progress, line):
    with progress:
        clock[0] += 60
        progress.add(600)
        assert progress.line == line


def test_a_note_follows_the_figures(clock):
    with Progress("generating", 10, "texts") as progress:
        progress.note = "12 tokens/s"
        clock[0] = 5
        progress.add(5)
        assert progress.line == "generating: 50% | 5 of 10 texts | 1 texts/s | 12 tokens/s | 5s left"


def test_items_are_counted_as_they_are_gone_through(monkeypatch):
    added = []
    monkeypatch.setattr(Progress, "add", lambda self, amount=1: added.append(self.total))
    assert list(counted("abc", "reading", "letters")) == ["a", "b", "c"]
    assert list(counted(iter("ab"), "reading", "letters", total=7)) == ["a", "b"]
    assert added == [3, 3, 3, 7, 7]


def test_preprocessing_counts_bytes_or_documents(monkeypatch):
    monkeypatch.setattr(module, "SHOWN_AFTER_SECONDS", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    with terminal(120, 5) as window, output_to(window), preprocessing(2_000_000, None, 10) as show:
        show(Totals(documents=3, tokens=70, input_bytes=500_000))
        show(Totals(documents=5, tokens=90, input_bytes=1_000_000))
        window.wait_for(lambda screen: "50%" in screen[0], seconds=5)
        assert screen_has(window, "preprocessing", "1.00 MB of 2.00 MB", "5 documents, 90 tokens")


def test_generation_tells_tokens_beside_texts(clock):
    with TextProgress(2, 10) as progress:
        clock[0] = 4.0
        progress.generated(100, 0)
        progress.generated(20, 2)
        assert progress.line == "generating: 40% | 4 of 10 texts | 0.500 texts/s | 30 tokens/s | 12s left"
        assert progress.summary() == "2 texts, 120 tokens in 4.0 s (30.0 tokens/s)"


def screen_has(window: Terminal, *words: str) -> bool:
    return all(word in window.screen[0] for word in words)


def test_a_bar_is_filled_by_halves_and_never_beyond_its_end():
    assert [bar(share, 4).plain for share in (-1, 0, 0.125, 0.5, 1, 7)] == [
        "────", "────", "╸───", "━━──", "━━━━", "━━━━",
    ]  # fmt: skip


def test_neither_torch_nor_rich_is_imported_to_count():
    code = "import sys; from megatron.progress import Progress; print({'torch', 'rich', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
