"""Alerts reach a real server and a real command, are bounded, and no failure of theirs reaches the run."""

import json
import logging
import math
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from megatron.alerts import channels, sender
from megatron.alerts.channels import Webhook
from megatron.alerts.limits import PERIOD, Limits
from megatron.alerts.sender import Alerts, open_alerts
from megatron.config.load import config_from_flat
from megatron.config.schema.run_keys import AlertKeys
from megatron.errors import UserError
from megatron.events import EVENTS_FILE, EventLog
from tests.webhook import Server

VARIABLE = "OUR_WEBHOOK"


@pytest.fixture
def serve(monkeypatch) -> Iterator:
    monkeypatch.setattr(channels, "PAUSES", (0.01, 0.01))
    monkeypatch.setattr(sender, "POLL_SECONDS", 0.02)
    servers = []

    def start(*answers: int) -> Server:
        server = Server(*answers)
        monkeypatch.setenv(VARIABLE, server.address)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def keys(**given) -> AlertKeys:
    return AlertKeys.model_validate({"alert_webhook": VARIABLE} | given)


def opened(folder, follow=False, **given) -> Alerts:
    return open_alerts(keys(**given), folder, follow=follow)


def test_what_rank_0_records_in_the_file_and_the_launcher_itself_is_posted_once_and_in_order(serve, tmp_path):
    server = serve()
    EventLog(tmp_path).record("spike", "of an earlier run", 5)
    with opened(tmp_path, follow=True) as alerts:
        launcher, rank_0 = EventLog(tmp_path, [alerts.hear]), EventLog(tmp_path)
        rank_0.record("checkpoint", "step 10 saved", 10)  # not among the kinds to send
        rank_0.record("spike", "loss 9.1 < 20 & bad", 12, loss=9.1)
        launcher.record("finish", "done", code=0)
    spike, finish = server.bodies
    assert (spike["kind"], spike["step"], spike["text"]) == ("spike", 12, "loss 9.1 < 20 & bad")
    assert (spike["details"], spike["run"], spike["host"]) == ({"loss": 9.1}, str(tmp_path), socket.gethostname())
    assert spike["time"].endswith("+00:00")
    assert (finish["kind"], finish["step"]) == ("finish", None)


def test_a_loss_that_is_no_number_is_null_and_a_file_that_was_rotated_is_read_from_its_beginning(serve, tmp_path):
    server, log = serve(), EventLog(tmp_path)
    for number in range(9):
        log.record("checkpoint", "saved", number)
    with opened(tmp_path, follow=True):
        (tmp_path / EVENTS_FILE).rename(tmp_path / "events.jsonl.1")
        log.record("spike", "loss nan", 9, loss=math.nan, losses=[math.inf, 2.0])
    assert [body["details"] for body in server.bodies] == [{"loss": None, "losses": [None, 2.0]}]
    assert "NaN" not in (tmp_path / EVENTS_FILE).read_text()


def test_half_a_line_of_the_file_is_sent_when_the_rest_is_there(serve, tmp_path):
    server, path = serve(), tmp_path / EVENTS_FILE
    line = json.dumps({"kind": "straggler", "text": "rank 3", "step": 7, "time": 0.0, "details": {}}) + "\n"
    with opened(tmp_path, follow=True):
        for part in (line[:20], line[20:] + "no event\n"):
            with path.open("a") as file:
                file.write(part)
            time.sleep(0.1)
    assert [body["text"] for body in server.bodies] == ["rank 3"]


def test_slack_gets_one_escaped_text(serve, tmp_path):
    server = serve()
    with opened(tmp_path, alert_format="slack") as alerts:
        log = EventLog(None, [alerts.hear])
        log.record("spike", "loss <9> & more", 1200)
        log.record("failure", "rank 1 failed\nTraceback", code=1)
    where = f"in {tmp_path} on {socket.gethostname()}"
    assert server.bodies == [
        {"text": f"*spike* at step 1,200 {where}: loss &lt;9&gt; &amp; more"},
        {"text": f"*failure* {where}\n```rank 1 failed\nTraceback```"},
    ]


def test_a_failing_server_is_asked_again_and_reported_once_until_it_works_without_its_address(serve, tmp_path, caplog):
    server = serve(500, 429, 200, *[503] * 6, 200, *[503] * 3)
    with caplog.at_level(logging.WARNING), opened(tmp_path) as alerts:
        log = EventLog(None, [alerts.hear])
        for text in ("at the third attempt", "lost", "lost too", "again", "lost again"):
            log.record("spike", text, 1)
    assert [body["text"] for body in server.bodies] == ["at the third attempt", "again"]
    assert [record.getMessage() for record in caplog.records] == [
        "an alert (spike) is not sent: the webhook at 127.0.0.1 answered 503; silent about further ones"
    ] * 2


@pytest.mark.parametrize("answer", [404, 302])
def test_an_address_that_refuses_or_redirects_is_not_asked_again(serve, tmp_path, caplog, answer):
    server = serve(answer)
    with caplog.at_level(logging.WARNING), opened(tmp_path) as alerts:
        EventLog(None, [alerts.hear]).record("spike", "one", 1)
    assert not server.bodies and not server.answers
    assert f"answered {answer}" in caplog.text and "s3cr3t" not in caplog.text


def test_nobody_waits_for_a_server_that_hangs(serve, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(channels, "ANSWER_SECONDS", 0.1)
    monkeypatch.setattr(sender, "LAST_SECONDS", 0.6)
    server = serve()
    server.may_answer.clear()
    with caplog.at_level(logging.WARNING), opened(tmp_path, alert_limit=1000) as alerts:
        log = EventLog(None, [alerts.hear])
        for number in range(300):
            log.record("spike", "one of many", number)
    assert server.bodies == []
    server.may_answer.set()
    assert "did not answer within" in caplog.text and "the last alerts are not sent" in caplog.text


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "http://no-such-host.invalid/x"])
def test_an_address_that_cannot_be_reached_is_warned_of(serve, tmp_path, caplog, monkeypatch, address):
    monkeypatch.setenv(VARIABLE, address)
    with caplog.at_level(logging.WARNING), opened(tmp_path) as alerts:
        EventLog(None, [alerts.hear]).record("finish", "done")
    assert "cannot be reached" in caplog.text


def test_alerts_of_a_kind_are_bounded_and_what_was_left_out_is_told_at_the_end(serve, tmp_path):
    server = serve()
    with opened(tmp_path, alert_limit=2) as alerts:
        log = EventLog(None, [alerts.hear])
        for number in range(9):
            log.record("spike", f"number {number}", number)
        log.record("straggler", "rank 3", 9)
        log.record("failure", "rank 0 was killed", code=1)
    assert [body["kind"] for body in server.bodies] == ["spike", "spike", "straggler", "failure"]
    assert server.bodies[2]["text"] == "rank 3\n(not sent: 7 spike)"
    assert server.bodies[3]["text"] == "rank 0 was killed"


def test_what_was_left_out_is_told_also_without_a_last_alert(serve, tmp_path):
    server = serve()
    with opened(tmp_path, alert_limit=1, alert_kinds=("spike",)) as alerts:
        log = EventLog(None, [alerts.hear])
        for number in range(3):
            log.record("spike", "up", number)
        log.record("finish", "done")
    assert [(body["kind"], body["text"]) for body in server.bodies] == [
        ("spike", "up"),
        ("summary", "not sent: 2 spike"),
    ]


def test_limits_hold_for_any_24_hours_for_one_kind_and_for_all():
    limits = Limits(2)
    assert [limits.allow("spike", now) for now in (0, 1, 2)] == [True, True, False]
    others = ("not_finite", "not_finite", "straggler", "straggler", "rewind")
    assert [limits.allow(kind, 3) for kind in others] == [True] * 4 + [False]
    assert limits.allow("finish", 4) and limits.allow("failure", 4)
    assert limits.summary() == "not sent: 1 rewind, 1 spike" and limits.summary() == ""
    serious = ("hang", "replicas_differ", "restart", "restart", "restart")
    assert [limits.allow(kind, 5) for kind in serious] == [True] * 4 + [False], "few, which no others keep back"
    assert limits.allow("spike", PERIOD + 0.5) and not limits.allow("spike", PERIOD + 0.6)


def test_a_command_gets_the_alert_and_its_failures_are_warned_of_once(tmp_path, caplog):
    keep = f"cat >> {tmp_path}/got; echo >> {tmp_path}/got"
    command = f'{keep}; echo "$DEEPY_ALERT_KIND" >&2; test "$DEEPY_ALERT_KIND" = finish'
    with caplog.at_level(logging.WARNING), opened(tmp_path, alert_webhook=None, alert_command=command) as alerts:
        log = EventLog(None, [alerts.hear])
        log.record("spike", "up", 3)
        log.record("spike", "up", 4)
        log.record("finish", "done")
    got = [json.loads(line) for line in (tmp_path / "got").read_text().splitlines()]
    assert [(alert["kind"], alert["step"]) for alert in got] == [("spike", 3), ("spike", 4), ("finish", None)]
    assert [record.getMessage() for record in caplog.records] == [
        "an alert (spike) is not sent: alert_command ended with code 1: spike; silent about further ones"
    ]


def test_a_command_that_does_not_end_is_killed_with_its_children(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(channels, "COMMAND_SECONDS", 2.0)
    command = f"sleep 77 & echo $! > {tmp_path}/child; wait"
    with caplog.at_level(logging.WARNING), opened(tmp_path, alert_webhook=None, alert_command=command) as alerts:
        EventLog(None, [alerts.hear]).record("finish", "done")
    assert "alert_command did not end within 2 s, and was killed" in caplog.text
    child, deadline = int((tmp_path / "child").read_text()), time.monotonic() + 60
    while _runs(child):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _runs(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as file:  # noqa: PTH123
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_long_texts_and_details_are_shortened(serve, tmp_path):
    server = serve()
    with opened(tmp_path) as alerts:
        EventLog(None, [alerts.hear]).record("failure", f"rank 3 failed{'x' * 9000}the reason", samples=["y" * 9000])
    [body] = server.bodies
    assert body["text"].startswith("rank 3 failed") and body["text"].endswith("the reason")
    assert len(body["text"]) < 2100 and body["details"] == {"left_out": "9,017 characters; they are in events.jsonl"}


def test_without_channels_no_thread_is_started(tmp_path):
    before = set(threading.enumerate())
    with open_alerts(AlertKeys(), tmp_path, follow=True) as alerts:
        EventLog(None, [alerts.hear]).record("finish", "done")
        assert not set(threading.enumerate()) - before


@pytest.mark.parametrize(
    "held", [None, "", "hooks.slack.com/services", "ftp://a/b", "http://", "http://a:b/", "http://a b/"]
)
def test_a_variable_without_an_address_is_refused_and_not_shown(tmp_path, monkeypatch, held):
    monkeypatch.delenv(VARIABLE, raising=False)
    if held is not None:
        monkeypatch.setenv(VARIABLE, held)
    with pytest.raises(UserError, match=f"alert_webhook \\({VARIABLE}\\)") as caught:
        opened(tmp_path)
    assert not held or held not in str(caught.value).replace("http://...", "")


MODEL = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 32, "train_iters": 1}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"alert_webhook": "https://hooks.slack.com/T0/s3cr3t", "save": "x"}, "must be the name of an environment"),
        ({"alert_webhook": "HOOK"}, r"alert_webhook \(HOOK\) needs save or log_dir"),
        ({"alert_command": "mail me", "alert_kinds": ["finish"]}, "alert_command needs save or log_dir"),
    ],
)
def test_alerts_that_could_not_work_are_refused(given, message):
    flat = MODEL | {"data_impl": "mock", "train_batch_size": 1, "optimizer": {"type": "Adam", "params": {"lr": 0.1}}}
    config_from_flat(flat | given | {"save": "x", "alert_webhook": "HOOK"}, script="train.py")
    with pytest.raises(UserError, match=message) as caught:
        config_from_flat(flat | given, script="train.py")
    assert "s3cr3t" not in str(caught.value)


def test_a_text_arrives_in_any_script(serve):
    server = serve()
    Webhook(server.address, "json").send(channels.Alert("run", "host", "spike", 1, "now", "é \U0001f600", {}))
    assert server.bodies[0]["text"] == "é \U0001f600"
