"""Between HTTP, which is one thread with an event loop, and the decoding engine, which the main thread drives."""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field

from megatron.generation.engine import Engine
from megatron.generation.requests import Request, Update
from megatron.launch.protocol.heartbeat import Heartbeat
from megatron.serving.errors import ApiError
from megatron.serving.metrics import Metrics

log = logging.getLogger(__name__)

IDLE_SECONDS = 0.25  # between two looks at whether to stop, while nothing is asked


@dataclass(eq=False)
class Batch:
    """The requests of one HTTP request, which are computed side by side."""

    requests: Sequence[Request]
    events: asyncio.AbstractEventLoop
    news: asyncio.Queue[tuple[int, Update] | ApiError] = field(default_factory=asyncio.Queue)
    submitted_at: float = field(default_factory=time.monotonic)
    numbers: dict[int, int] = field(default_factory=dict)  # of the engine's requests that are unfinished -> place
    last_token_at: dict[int, float] = field(default_factory=dict)  # by place
    unfinished: int = 0
    closed: bool = False  # finished or given up
    is_heard: bool = True  # until it is given up
    timer: asyncio.TimerHandle | None = None

    async def updates(self) -> AsyncGenerator[tuple[int, Update], None]:
        """News with the place of their request in `requests`, until all are finished. Raises ApiError."""
        left = len(self.requests)
        while left:
            found = await self.news.get()
            if isinstance(found, ApiError):
                raise found
            left -= found[1].reason is not None
            yield found
            # Otherwise news that had to wait are taken all at once, and a client that leaves meanwhile is not noticed.
            await asyncio.sleep(0)


class EngineLoop:
    """Takes batches from the event loop, runs the engine in the calling thread, and hands the news back."""

    def __init__(self, metrics: Metrics, most_unfinished: int, timeout: float) -> None:
        """most_unfinished: texts that may be computed or wait. timeout: seconds that a batch may take."""
        self._metrics, self._most_unfinished, self._timeout = metrics, most_unfinished, timeout
        self._changed = threading.Condition()
        self._submitted: deque[Batch] = deque()
        self._given_up: deque[Batch] = deque()
        self._batches: dict[int, Batch] = {}  # by the engine's numbers of their requests
        self._unfinished = 0  # texts; guarded by _changed, like the two queues
        self._refusal: str | None = "the model is being loaded"

    # in the thread of the event loop

    def submit(self, requests: Sequence[Request]) -> Batch:
        """Have the requests computed. Raises ApiError: 429 where too many wait, 503 where nothing is taken."""
        batch = Batch(requests, asyncio.get_running_loop(), unfinished=len(requests))
        with self._changed:
            self.check_open()
            if self._unfinished + len(requests) > self._most_unfinished:
                raise ApiError(
                    429, f"{self._unfinished} texts are computed or wait already; try again later", code="queue_full"
                )
            self._unfinished += len(requests)
            self._submitted.append(batch)
            self._changed.notify()
        expired = ApiError(503, f"the answer took more than {self._timeout:g} s", code="timeout")
        batch.timer = batch.events.call_later(self._timeout, self._expire, batch, expired)
        return batch

    def check_open(self) -> None:
        """Raise ApiError where no request is taken."""
        if self._refusal is not None:
            raise ApiError(503, self._refusal, code="not_ready")

    def give_up(self, batch: Batch) -> None:
        """Free what the batch still holds, within a step of the engine. Call it for every batch at its end."""
        if batch.timer is not None:
            batch.timer.cancel()
        with self._changed:
            if not batch.closed:
                batch.closed, batch.is_heard = True, False
                self._given_up.append(batch)
                self._changed.notify()

    def _expire(self, batch: Batch, error: ApiError) -> None:
        if not batch.closed:
            batch.news.put_nowait(error)
            self.give_up(batch)

    # in the thread that runs the engine

    def run(self, engine: Engine, stop_at: Callable[[], float], heartbeat: Heartbeat) -> None:
        """Serve until `stop_at`, seconds of the monotonic clock, is finite; then finish what runs until that time."""
        with self._changed:
            self._refusal = None
        steps = 0
        while True:
            if stop_at() < float("inf"):
                with self._changed:
                    self._refusal = "the server is shutting down"
                    if self._unfinished == 0:
                        return
                if time.monotonic() > stop_at():
                    self.fail(ApiError(503, "the server is shutting down", code="shutting_down"))
                    return
            if not self._take(engine):
                heartbeat.beat("waiting", steps)
                self._metrics.observe_load(0, 0)
                continue
            steps += 1
            heartbeat.beat("decoding", steps)
            self._deliver(engine.step())
            self._metrics.observe_load(self._unfinished - engine.waiting, engine.waiting)

    def fail(self, error: ApiError) -> None:
        """Take nothing more, and answer everything that is unfinished with `error`."""
        with self._changed:
            self._refusal = error.message
            batches = {*self._submitted, *self._batches.values()}
        for batch in batches:
            batch.events.call_soon_threadsafe(batch.news.put_nowait, error)

    def _take(self, engine: Engine) -> bool:
        """Give the engine what was submitted and given up; wait for it while nothing is computed. False: none came."""
        with self._changed:
            if not self._submitted and not self._given_up and engine.is_idle:
                self._changed.wait(IDLE_SECONDS)
            submitted, given_up = list(self._submitted), list(self._given_up)
            self._submitted.clear()
            self._given_up.clear()
        for batch in submitted:
            for place, request in enumerate(batch.requests):
                number = engine.submit(request)
                batch.numbers[number] = place
                self._batches[number] = batch
        for batch in given_up:
            for number in batch.numbers:
                engine.cancel(number)
        return not engine.is_idle or bool(submitted or given_up)

    def _deliver(self, updates: Sequence[Update]) -> None:
        by_batch: dict[Batch, list[tuple[int, Update]]] = {}
        for update in updates:
            batch = self._batches[update.request]
            place = batch.numbers[update.request]
            by_batch.setdefault(batch, []).append((place, update))
            self._measure(batch, place, update)
            if update.reason is not None:
                del self._batches[update.request], batch.numbers[update.request]
                with self._changed:
                    self._unfinished -= 1
                    batch.unfinished -= 1
                    batch.closed |= batch.unfinished == 0
        for batch, news in by_batch.items():
            if batch.is_heard:
                batch.events.call_soon_threadsafe(_put_all, batch, news)

    def _measure(self, batch: Batch, place: int, update: Update) -> None:
        if not update.tokens:
            return
        now = time.monotonic()
        before = batch.last_token_at.get(place)
        batch.last_token_at[place] = now
        self._metrics.observe_tokens(len(update.tokens), now - (before or batch.submitted_at), is_first=before is None)


def _put_all(batch: Batch, news: Sequence[tuple[int, Update]]) -> None:
    for one in news:
        batch.news.put_nowait(one)
