"""serve.py as a process: who may ask, how it starts and ends, other layouts, requests that nobody thought of."""

import json
import signal
import socket
import sys

import httpx
import openai
import pytest
import schemathesis
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from megatron import doors
from tests.end_to_end.commands import ROOT
from tests.end_to_end.processes import deepy, end
from tests.end_to_end.serving import CONTEXT, PATIENCE, Server, make_model, serving

KEYS = {"DEEPY_API_KEYS": "first-key, second-key"}
LONG = {"prompt": "The", "maximum_tokens": CONTEXT - 8, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serving")
    make_model(folder)
    return folder


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_keys_are_needed_where_there_are_some_and_sigterm_finishes_what_runs(folder):
    with serving(folder, "serve_host=0.0.0.0", "serve_shutdown_timeout=100", **KEYS) as server:
        only_keys_let_in(server)
        with httpx.stream(
            "POST",
            f"{server.url}/generate",
            json=LONG | {"maximum_tokens": 1000},
            headers=bearer("first-key"),
            timeout=PATIENCE,
        ) as one:
            events = (json.loads(line.removeprefix("data: ")) for line in one.iter_lines() if line)
            next(events)
            server.process.terminate()
            refused = httpx.get(f"{server.url}/health", timeout=PATIENCE)
            while refused.status_code == 200:  # the signal takes a moment
                refused = httpx.get(f"{server.url}/health", timeout=PATIENCE)
            assert "shutting down" in refused.json()["error"]["message"]
            key = bearer("second-key")
            later = httpx.post(f"{server.url}/generate", json={"prompt": "x"}, headers=key, timeout=PATIENCE)
            assert (later.status_code, later.json()["error"]["code"]) == (503, "not_ready")
            *_, last = events
        assert (last["reason"], last["generated_tokens"]) == ("length", 1000)
        server.process.join(PATIENCE)
        assert server.process.exitcode == 0
        assert "SIGTERM: the server has ended" in server.output.read_text()


def only_keys_let_in(server: Server) -> None:
    def status(path: str, headers: dict[str, str]) -> int:
        return httpx.get(f"{server.url}{path}", headers=headers, timeout=PATIENCE).status_code

    for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing"):
        for headers in ({}, bearer("first"), bearer("first-key,second-key"), {"Authorization": "first-key"}):
            assert status(path, headers) == 401
    assert {status("/v1/models", bearer(key)) for key in ("first-key", "second-key")} == {200}
    assert {status(path, {}) for path in ("/", "/health")} == {200}
    with pytest.raises(openai.AuthenticationError, match="not one of this server's"):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong").models.list()
    assert openai.OpenAI(base_url=f"{server.url}/v1", api_key="first-key").models.list().data


def test_answers_that_take_too_long_are_ended(folder):
    with serving(folder, "serve_request_timeout=0.5", "serve_shutdown_timeout=0") as server:
        late = httpx.post(f"{server.url}/generate", json=LONG | {"stream": False}, timeout=PATIENCE)
        assert (late.status_code, late.json()["error"]["code"]) == (503, "timeout")
        with httpx.stream("POST", f"{server.url}/generate", json=LONG, timeout=PATIENCE) as answer:
            lines = [line for line in answer.iter_lines() if line]
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "timeout"
        with httpx.stream("POST", f"{server.url}/generate", json=LONG, timeout=PATIENCE) as answer:
            lines = answer.iter_lines()
            first = next(lines)  # an error, where it took too long
            assert server.end() == 0  # at once, as serve_shutdown_timeout is 0
            *_, last = [line for line in (first, *lines) if line]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] in ("shutting_down", "timeout")


REFUSED = {
    "an address that others reach": (["serve_host=0.0.0.0"], "DEEPY_API_KEYS"),
    "an address of another machine": (["serve_host=192.0.2.1", "serve_port=80"], "serve_host (192.0.2.1)"),
    "a name that is none": (["serve_host=no.such.host.invalid"], "serve_host (no.such.host.invalid)"),
    "a port that is taken": (["serve_port={taken}"], "serve_port ({taken})"),
    "a context beyond the model's": ([f"serve_context={CONTEXT + 1}"], f"the model's context ({CONTEXT})"),
    "a template that is broken": (["chat_template=broken.jinja"], "chat template cannot be used"),
    "more choices than may wait": (["serve_max_waiting=0"], "serve_max_choices (16)"),
    "no checkpoint": (["load=nowhere"], "nowhere"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_served_is_exit_code_two_and_a_clear_line(folder, case, monkeypatch, capsys):
    """In this process, past the door's `enter`: a process for each case would take long."""
    words, named = REFUSED[case]
    (folder / "broken.jinja").write_text("{% if %}")
    monkeypatch.chdir(folder)
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = str(other.getsockname()[1])
        filled = [word.replace("{taken}", taken) for word in words]
        load = [] if case == "no checkpoint" else ["load=trained"]
        monkeypatch.setattr(sys, "argv", ["serve.py", "served", *load, *filled])
        assert doors.run(str(ROOT / "serve.py"), "megatron.serving.server:serve") == 2
    said = capsys.readouterr().err
    assert named.replace("{taken}", taken) in said
    assert len(said.strip().splitlines()) <= 2, said
    assert not dist.is_initialized()


# all are long: a server that ends at SIGTERM with code zero is above, and the launcher has tests of its own
LAYOUTS = {
    "one rank": [],
    "tensor 2": ["num_gpus=2", "model_parallel_size=2"],
    "pipeline 2": ["num_gpus=2", "pipe_parallel_size=2"],
    "data 2": ["num_gpus=2"],
}


@pytest.mark.long
@pytest.mark.parametrize("layout", LAYOUTS)
def test_deepy_serves_and_ends_with_code_zero_and_ranks_do_not_change_the_text(folder, layout):
    with deepy(folder, "serve.py", "served", "load=trained", "chat_template=chat.jinja", *LAYOUTS[layout]) as process:
        line = ""
        while " at http://" not in line:
            line = process.stdout.readline()
            assert line or process.poll() is None, process.communicate()
        url = f"http://{line.rpartition(' at http://')[2].split()[0]}"
        texts = completed(url)
        code, _, said = end(process, signal.SIGTERM)
    assert code == 0, said
    assert "the server takes no more requests" in said
    with serving(folder) as alone:
        assert texts == completed(alone.url)


def completed(url: str) -> list[str]:
    """Greedy texts and sampled ones, several at once."""
    asked = {"prompt": ["The quick brown", "def encode", "again"], "max_tokens": 24, "seed": 6, "n": 2}
    both = [httpx.post(f"{url}/v1/completions", json=asked | {"temperature": t}, timeout=PATIENCE) for t in (0, 1)]
    return [choice["text"] for answer in both for choice in answer.json()["choices"]]


@pytest.mark.long
def test_no_request_that_the_description_suggests_makes_the_server_fail(folder):
    with serving(folder, "serve_max_tokens=3", "serve_context=64", "chat_template=chat.jinja") as server:
        described = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
        operations = [found.ok() for found in described.get_all_operations()]
        assert len(operations) >= 7
        for operation in operations:

            @settings(max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck))
            @given(operation.as_strategy())
            def answered(case: schemathesis.Case) -> None:
                case.call_and_validate(timeout=PATIENCE, excluded_checks=[positive_data_acceptance])

            answered()
