"""Between the event loop and the engine: every text gets its news, and none holds a slot that nobody waits for."""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from megatron.config.schema.generation_keys import GenerationKeys
from megatron.generation.engine import Engine, EngineSettings
from megatron.generation.requests import Answer, Request, Sampling
from megatron.launch.protocol.heartbeat import Heartbeat, read_rank_status
from megatron.serving.app import Served, State, make_app
from megatron.serving.conversion import Converter, Limits
from megatron.serving.errors import ApiError
from megatron.serving.loop import Batch, EngineLoop
from megatron.serving.metrics import Metrics
from tests.trained import one_rank_model

PATIENCE = 60.0


@pytest.fixture(scope="module")
def model():
    with one_rank_model(max_position_embeddings=512) as model:
        yield model


def generated(loop: EngineLoop) -> float:
    """Tokens of all texts so far."""
    lines = loop._metrics.page().decode().splitlines()
    return float(next(line for line in lines if line.startswith("deepy_generated_tokens_total ")).split()[1])


def request(text: str, tokens: int = 8, seed: str = "0") -> Request:
    return Request(tuple(text.encode()), tokens, Sampling(temperature=1.0), seed=seed, ignore_end=True)


@contextmanager
def running(engine: Engine, most: int = 8, timeout: float = PATIENCE) -> Iterator[EngineLoop]:
    """A loop that drives the engine in a thread, which ends with the context."""
    loop, stop_at = EngineLoop(Metrics(), most, timeout), [float("inf")]

    thread = threading.Thread(target=loop.run, args=(engine, lambda: stop_at[0], Heartbeat(0, None)))
    thread.start()
    while thread.is_alive() and loop._refusal is not None:
        time.sleep(0.001)
    yield loop
    stop_at[0] = time.monotonic() + PATIENCE
    thread.join(PATIENCE)
    assert not thread.is_alive()


def inside(work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    return asyncio.run(asyncio.wait_for(work(), PATIENCE))


async def answers(batch: Batch) -> list[Answer]:
    found = [Answer() for _ in batch.requests]
    async for place, update in batch.updates():
        found[place].add(update)
    return found


def test_every_text_gets_the_news_that_the_engine_has_of_it(model):
    engine = Engine(model, EngineSettings(2, 64))
    requests = [request(text, seed=text) for text in ("one", "two", "three")]
    expected = [answer.ids for answer in engine.run(requests)]
    with running(engine) as loop:

        async def ask() -> list[list[Answer]]:
            batches = [loop.submit(requests), loop.submit(requests[::-1])]
            return list(await asyncio.gather(*map(answers, batches)))

        first, second = inside(ask)
    assert [answer.ids for answer in first] == expected
    assert [answer.ids for answer in second] == expected[::-1]


def test_a_batch_that_is_given_up_frees_its_slots_and_the_others_go_on(model):
    engine = Engine(model, EngineSettings(2, 512))
    with running(engine) as loop:

        async def ask() -> list[Answer]:
            left = loop.submit([request("left", 400), request("waiting", 400), request("waiting", 400)])
            stays = loop.submit([request("stays", 30)])
            await anext(left.updates())
            loop.give_up(left)
            return await answers(stays)

        [answer] = inside(ask)
        assert (answer.reason, len(answer.tokens)) == ("length", 30)
    assert engine.is_idle and engine.slots_in_use == 0
    assert generated(loop) < 1200


def test_a_client_that_leaves_while_news_that_had_to_wait_are_written_is_counted(model):
    """The thread of HTTP stands still until the engine is done, and then has all news at once."""
    with running(Engine(model, EngineSettings(1, 512))) as loop:
        converter = Converter(model.tokenizer, Limits(512, 512, 1), "no chats", GenerationKeys())
        state = State()
        state.served = Served("small", 512, converter, lambda request: None)
        app = make_app(state, loop, loop._metrics, log_prompts=False)
        body = {"prompt": "a", "maximum_tokens": 200, "ignore_eos": True, "temperature": 1, "stream": True}
        written: list[bytes] = []

        async def ask() -> None:
            left, asked = asyncio.Event(), [{"type": "http.request", "body": json.dumps(body).encode()}]

            async def receive() -> Any:
                if not asked:
                    await left.wait()
                return asked.pop() if asked else {"type": "http.disconnect"}

            async def send(message: Any) -> None:
                if message.get("body"):
                    written.append(message["body"])
                    while generated(loop) < 200:
                        time.sleep(0.001)
                    if len(written) > 1:
                        left.set()

            headers = [(b"content-type", b"application/json")]
            scope = {"type": "http", "method": "POST", "path": "/generate", "query_string": b"", "headers": headers}
            await app(scope, receive, send)

        inside(ask)
    assert b'"reason"' not in written[-1]
    assert "deepy_disconnects_total 1.0" in loop._metrics.page().decode()


def test_texts_beyond_the_queue_are_refused_together_and_taken_when_there_is_room(model):
    engine = Engine(model, EngineSettings(1, 64))
    with running(engine, most=3) as loop:

        async def ask() -> None:
            first = loop.submit([request("a", 40), request("b", 40)])
            with pytest.raises(ApiError, match="2 texts are computed or wait") as caught:
                loop.submit([request("c"), request("d")])
            assert caught.value.status == 429
            one_more = loop.submit([request("e")])
            await answers(first)
            await answers(one_more)
            await answers(loop.submit([request("c"), request("d"), request("f")]))

        inside(ask)


def test_a_batch_that_takes_too_long_gets_an_error_and_gives_up_its_slot(model):
    engine = Engine(model, EngineSettings(1, 512))
    with running(engine, timeout=0.05) as loop:

        async def ask() -> None:
            with pytest.raises(ApiError, match=r"more than 0\.05 s") as caught:
                await answers(loop.submit([request("a", 500), request("b", 500)]))
            assert caught.value.status == 503

        inside(ask)
    assert engine.is_idle
    assert generated(loop) < 1000


def test_when_the_engine_fails_everyone_who_waits_hears_it_and_so_do_later_ones(model):
    class Failing(Engine):
        def step(self) -> Any:
            raise ZeroDivisionError

    loop = EngineLoop(Metrics(), 8, PATIENCE)
    engine = Failing(model, EngineSettings(1, 64))

    def drive() -> None:
        with pytest.raises(ZeroDivisionError):
            loop.run(engine, lambda: float("inf"), Heartbeat(0, None))
        loop.fail(ApiError(500, "the model failed"))

    async def ask() -> None:
        thread = threading.Thread(target=drive)
        thread.start()
        while loop._refusal is not None:
            await asyncio.sleep(0.001)
        with pytest.raises(ApiError, match="the model failed"):
            await answers(loop.submit([request("a")]))
        with pytest.raises(ApiError, match="the model failed"):
            loop.submit([request("b")])
        thread.join(PATIENCE)

    inside(ask)


def test_nothing_is_taken_before_the_engine_runs_and_after_its_end(model):
    loop = EngineLoop(Metrics(), 8, PATIENCE)
    with pytest.raises(ApiError, match="being loaded") as caught:
        loop.check_open()
    assert caught.value.status == 503
    loop.run(Engine(model, EngineSettings(1, 64)), lambda: 0.0, Heartbeat(0, None))
    with pytest.raises(ApiError, match="shutting down"):
        loop.check_open()


def test_a_server_that_nobody_asks_still_tells_the_watchdog_that_it_is_well(model, tmp_path):
    loop, checks = EngineLoop(Metrics(), 8, PATIENCE), []

    def stop_at() -> float:
        status = read_rank_status(tmp_path, 0)
        checks.append(status)
        return 0.0 if len(checks) == 4 else float("inf")

    started = time.monotonic()
    loop.run(Engine(model, EngineSettings(1, 64)), stop_at, Heartbeat(0, tmp_path))
    waited = time.monotonic() - started
    assert [status.phase for status in checks[1:]] == ["waiting"] * 3
    assert checks[-1].age < waited / 2  # the last beat is younger than the wait since the first
