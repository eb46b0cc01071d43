"""The HTTP endpoints, except for what `gate` decides."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST

from megatron.generation import requests as engine
from megatron.serving.answer_schemas import ChatAnswer, CompletionAnswer, Health, PlainAnswer, ServedModel, ServedModels
from megatron.serving.answers import Json, PlainWriter, Writer
from megatron.serving.conversion import Converter
from megatron.serving.errors import ApiError, JsonAnswer, answer_errors, to_json
from megatron.serving.loop import Batch, EngineLoop
from megatron.serving.metrics import Metrics
from megatron.serving.openai_answers import ChatWriter, CompletionWriter
from megatron.serving.schemas import ChatBody, CompletionBody, ErrorBody, GenerateBody, OpenAIBody, Sampled

log = logging.getLogger(__name__)

BodyT = TypeVar("BodyT", bound=Sampled)

# The page loads nothing from elsewhere, and no other page may frame it.
PAGE_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
PAGE_POLICY += "img-src data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
STREAM_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # proxies must not hold events back
GONE = ApiError(499, "the client left", code="client_closed_request")  # 499 as in nginx: only metrics and log see it
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text}
    for status, text in {
        400: "The request cannot be answered as it is",
        401: "The key is missing or wrong",
        404: "There is no such model",
        408: "The body did not come in time",
        413: "The body is too large",
        422: "A field has a wrong type or value",
        429: "Too many requests wait already",
        503: "The model is being loaded, the server shuts down, or the answer took too long",
    }.items()
}
EVENTS: dict[int | str, dict[str, Any]] = {
    200: {"description": "The answer, or server-sent events with its parts", "content": {"text/event-stream": {}}}
}


@dataclass(frozen=True)
class Served:
    """What the endpoints serve. context: tokens of prompt and answer. check: raises ApiError for a bad request."""

    name: str
    context: int
    converter: Converter
    check: Callable[[engine.Request], None]


class State:
    """What changes while the server runs: set by the main thread, read by the endpoints."""

    served: Served | None = None  # once the model has been loaded


def make_app(state: State, loop: EngineLoop, metrics: Metrics, log_prompts: bool) -> FastAPI:
    """The application. It answers 503 until `state.served` is set and `loop` runs."""
    app = FastAPI(title="Deepy", docs_url=None, redoc_url=None, default_response_class=JsonAnswer, responses=ERRORS)
    answer_errors(app)
    started = int(time.time())
    page = files(__package__).joinpath("page.html").read_text(encoding="utf-8")

    def served() -> Served:
        loop.check_open()
        if state.served is None:
            raise ApiError(503, "the model is being loaded", code="not_ready")
        return state.served

    def described(model: Served) -> Json:
        has_chat = not isinstance(model.converter.chat, str)
        most = min(model.context - 1, model.converter.limits.tokens)
        details = {"max_model_len": model.context, "max_tokens": most, "chat": has_chat}
        return {"id": model.name, "object": "model", "created": started, "owned_by": "deepy", **details}

    def checked(body: OpenAIBody) -> Served:
        model = served()
        if body.model is not None and body.model != model.name:
            message = f'there is no model "{body.model}"; this server has "{model.name}"'
            raise ApiError(404, message, "model", "model_not_found")
        return model

    async def converted(
        model: Served, convert: Callable[[BodyT], Sequence[engine.Request]], body: BodyT
    ) -> Sequence[engine.Request]:
        def work() -> Sequence[engine.Request]:
            found = convert(body)
            for request in found:
                model.check(request)
            return found

        requests = await asyncio.to_thread(work)  # a long prompt takes a while to tokenize
        metrics.observe_prompt(sum(len(request.ids) for request in requests))
        if log_prompts:
            for request in requests:
                log.info("prompt: %r", model.converter.tokenizer.decode(request.ids))
        return requests

    # Endpoints return answers, not models: these only describe the answers.

    @app.get("/health", summary="200 while requests are taken, else 503", response_model=Health)
    async def health() -> Response:
        served()
        return JsonAnswer({"status": "ready"})

    @app.get("/metrics", summary="Figures for Prometheus", response_class=Response)
    async def figures() -> Response:
        return Response(metrics.page(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    async def page_to_try() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": PAGE_POLICY})

    @app.get("/v1/models", summary="The model that is served", response_model=ServedModels)
    async def models() -> Response:
        return JsonAnswer({"object": "list", "data": [described(served())]})

    @app.get("/v1/models/{model:path}", summary="The model, by its name", response_model=ServedModel)
    async def one_model(model: str) -> Response:
        return JsonAnswer(described(checked(OpenAIBody(model=model))))

    summary = "Continue prompts, as OpenAI's API does"

    @app.post("/v1/completions", summary=summary, responses=EVENTS, response_model=CompletionAnswer)
    async def completions(body: CompletionBody, request: Request) -> Response:
        model = checked(body)
        requests = await converted(model, model.converter.completion, body)
        writer = CompletionWriter(model.converter.tokenizer, model.name, requests, body)
        return await _answer(request, writer, loop, requests, bool(body.stream), metrics)

    summary = "Answer a chat, as OpenAI's API does"

    @app.post("/v1/chat/completions", summary=summary, responses=EVENTS, response_model=ChatAnswer)
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        model = checked(body)
        requests = await converted(model, model.converter.chat_completion, body)
        writer = ChatWriter(model.converter.tokenizer, model.name, requests, body)
        return await _answer(request, writer, loop, requests, bool(body.stream), metrics)

    summary = "Continue one prompt, in a few plain fields"

    @app.post("/generate", summary=summary, responses=EVENTS, response_model=PlainAnswer)
    async def generate(body: GenerateBody, request: Request) -> Response:
        model = served()
        requests = await converted(model, model.converter.generation, body)
        return await _answer(request, PlainWriter(requests), loop, requests, bool(body.stream), metrics)

    return app


async def _answer(
    request: Request,
    writer: Writer,
    loop: EngineLoop,
    requests: Sequence[engine.Request],
    stream: bool,
    metrics: Metrics,
) -> Response:
    """Have the requests computed, and answer at their end or, with `stream`, as they go."""
    batch = loop.submit(requests)
    watcher = asyncio.create_task(_watch(request, batch, loop, metrics))
    if stream:
        events = _events(batch, watcher, writer, loop, metrics)
        return StreamingResponse(events, media_type="text/event-stream", headers=STREAM_HEADERS)
    try:
        async for place, update in batch.updates():
            writer.add(place, update)
    finally:
        watcher.cancel()
        loop.give_up(batch)
    return JsonAnswer(writer.whole())


async def _watch(request: Request, batch: Batch, loop: EngineLoop, metrics: Metrics) -> None:
    """Give up the batch when the client leaves."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    metrics.observe_disconnect()
    loop.give_up(batch)
    batch.news.put_nowait(GONE)


async def _events(
    batch: Batch, watcher: asyncio.Task[None], writer: Writer, loop: EngineLoop, metrics: Metrics
) -> AsyncIterator[bytes]:
    """Server-sent events. An error is the last one, as the status has been sent already."""
    try:
        for event in writer.opening():
            yield _sse(event)
        async with aclosing(batch.updates()) as updates:
            async for place, update in updates:
                writer.add(place, update)
                if (found := writer.event(place, update)) is not None:
                    yield _sse(found)
        for last in writer.closing():
            yield _sse(last)
    except ApiError as error:
        metrics.observe_error(error.code or str(error.status))
        yield _sse(error.body)
    finally:
        watcher.cancel()
        loop.give_up(batch)


def _sse(content: Json | str) -> bytes:
    return b"data: " + (content.encode() if isinstance(content, str) else to_json(content)) + b"\n\n"
