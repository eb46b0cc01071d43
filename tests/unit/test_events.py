"""Events are recorded one a line, read back, and told to listeners."""

import logging

import pytest

from megatron.events import EVENTS_FILE, Event, EventLog, read_events


def test_what_is_recorded_is_read_back_in_order(tmp_path):
    events = EventLog(tmp_path)
    events.record("checkpoint", "step 10 saved", 10, seconds=1.5)
    EventLog(tmp_path).record("restart", "after a failure", hosts=["a", "b"])
    first, second = read_events(tmp_path)
    assert (first.kind, first.text, first.step, first.details) == ("checkpoint", "step 10 saved", 10, {"seconds": 1.5})
    assert (second.kind, second.step, second.details) == ("restart", None, {"hosts": ["a", "b"]})
    assert 0 < first.time <= second.time


def test_a_folder_without_events_has_none(tmp_path):
    assert read_events(tmp_path) == []


@pytest.mark.parametrize(
    "line",
    ['{"kind": "checkpoint", "te', "[]", "3", '{"kind": "party", "text": "a"}', '{"kind": "spike", "what": 1}', "\x00"],
)
def test_lines_that_are_no_events_are_passed_over(tmp_path, line):
    EventLog(tmp_path).record("start", "begins")
    with (tmp_path / EVENTS_FILE).open("a") as file:
        file.write(line + "\n")
    EventLog(tmp_path).record("finish", "ends")
    assert [event.kind for event in read_events(tmp_path)] == ["start", "finish"]


def test_listeners_hear_every_event_also_without_a_file():
    heard: list[Event] = []
    events = EventLog(None, [heard.append])
    events.record("spike", "loss 9", 3)
    events.listen(heard.append)
    events.record("spike", "loss 8", 4)
    assert [event.step for event in heard] == [3, 4, 4]


def test_after_a_full_disk_events_are_recorded_again_and_a_torn_line_costs_no_other(tmp_path, caplog):
    events, file = EventLog(tmp_path), tmp_path / EVENTS_FILE
    file.mkdir()  # where nothing can be written
    with caplog.at_level(logging.WARNING):
        events.record("spike", "lost", 1)
    file.rmdir()
    file.write_text('{"kind": "spike", "te')
    events.record("rewind", "kept", 2)
    EventLog(tmp_path).record("finish", "kept too")
    assert [event.kind for event in read_events(tmp_path)] == ["rewind", "finish"]
    file.unlink()
    file.mkdir()
    with caplog.at_level(logging.WARNING):
        events.record("spike", "lost again", 3)
    assert caplog.text.count("events are not recorded: ") == 2


def test_a_file_that_cannot_be_written_is_warned_of_once_and_listeners_still_hear(tmp_path, caplog):
    heard: list[Event] = []
    events = EventLog(tmp_path / "missing", [heard.append])
    with caplog.at_level(logging.WARNING):
        events.record("spike", "one", 1)
        events.record("spike", "two", 2)
    assert len(caplog.records) == 1 and "missing" in caplog.text
    assert len(heard) == 2
