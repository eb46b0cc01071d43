"""Clients of bench/serve.py: each sends one request after another, and reads the answer as a stream."""

import asyncio
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import aiohttp
from serve_model import WORDS

PATIENCE = 600.0  # seconds that an answer may take


@dataclass(frozen=True)
class Asked:
    """A request: a prompt of so many tokens, which `seed` draws. leave_after: events, then the client disconnects."""

    seed: int
    prompt: int
    tokens: int
    leave_after: int | None = None

    @property
    def body(self) -> dict[str, object]:
        """A greedy continuation of exactly `tokens` tokens."""
        text = "".join(random.Random(self.seed).choices(WORDS, k=self.prompt))
        ends = {"min_tokens": self.tokens, "temperature": 0}
        return {"prompt": text, "max_tokens": self.tokens, "stream": True, **ends}


@dataclass
class Seen:
    """What the clients saw.

    seconds: until the last answer. first, between: seconds to the first token and between two.
    """

    seconds: float = 0.0
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    texts: dict[int, str] = field(default_factory=dict)  # by seed
    errors: list[str] = field(default_factory=list)
    left: int = 0


def load(url: str, requests: Iterator[Asked], clients: int) -> Seen:
    """Send all requests with so many clients at a time."""
    return asyncio.run(_load(url, requests, clients))


async def _load(url: str, requests: Iterator[Asked], clients: int) -> Seen:
    seen = Seen()
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=PATIENCE)
    async with aiohttp.ClientSession(url, connector=connector, timeout=timeout) as session:

        async def client() -> None:
            for asked in requests:  # shared: each takes the next one
                await _ask(session, asked, seen)

        began = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        seen.seconds = time.perf_counter() - began
    return seen


async def _ask(session: aiohttp.ClientSession, asked: Asked, seen: Seen) -> None:
    began, times, text = time.perf_counter(), [], ""
    try:
        async with session.post("/v1/completions", json=asked.body) as answer:
            answer.raise_for_status()
            async for line in answer.content:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line.removeprefix(b"data: "))
                times.append(time.perf_counter())
                text += event["choices"][0]["text"]
                if len(times) == asked.leave_after:
                    seen.left += 1
                    answer.close()
                    return
    except (aiohttp.ClientError, TimeoutError, KeyError) as error:  # an event without choices tells an error
        seen.errors.append(f"request {asked.seed}: {type(error).__name__} {error}")
        return
    seen.texts[asked.seed] = text
    seen.first.append(times[0] - began)
    seen.between += [later - earlier for earlier, later in pairwise(times)]
