"""Rank 0 of serve.py: HTTP in a thread, the decoding engine in this one."""

import logging
import signal
import time
from pathlib import Path
from types import FrameType

from megatron.config.schema.config import Config
from megatron.errors import RunError, UserError
from megatron.generation.chat import ChatFormat, open_chat
from megatron.generation.engine import Engine, EngineSettings
from megatron.generation.requests import Request
from megatron.inference import FoundModel, open_trained_model
from megatron.launch.protocol.heartbeat import Heartbeat
from megatron.serving.address import api_keys, listen, shown
from megatron.serving.app import Served, State, make_app
from megatron.serving.conversion import Converter, Limits
from megatron.serving.errors import ApiError
from megatron.serving.gate import Gate
from megatron.serving.http_thread import HttpThread
from megatron.serving.loop import EngineLoop
from megatron.serving.metrics import Metrics

log = logging.getLogger(__name__)


def lead(config: Config, found: FoundModel, settings: EngineSettings) -> None:
    """Listen, load the model, and serve until a signal. Raises UserError before anything is served."""
    keys = config.serving
    context = settings.capacity
    limits = Limits(context, keys.serve_max_tokens or context, keys.serve_max_choices)
    converter = Converter(found.tokenizer, limits, _chat(config, found), config.generation)
    allowed, listener = api_keys(keys), listen(keys)
    metrics, state = Metrics(), State()
    texts = settings.slots * found.plan.layout.data + keys.serve_max_waiting
    loop = EngineLoop(metrics, texts, keys.serve_request_timeout)
    app = make_app(state, loop, metrics, keys.serve_log_prompts)
    paths = [getattr(route, "path", "") for route in app.routes]
    with HttpThread(Gate(app, paths, allowed, keys.serve_max_body, metrics), listener) as http:
        model = open_trained_model(found, config.launcher.distributed_backend)
        engine = Engine(model, settings)
        metrics.set_slots(engine.slots)
        name = keys.serve_model_name or _folder_name(config, found)
        state.served = Served(name, context, converter, lambda request: _check(engine, request))
        access = f"{len(allowed)} keys" if allowed else "no key needed"
        log.info('serving "%s" at %s (%s)', name, shown(listener), access)
        _run(loop, engine, http, keys.serve_shutdown_timeout)
        engine.close()


def _run(loop: EngineLoop, engine: Engine, http: HttpThread, patience: float) -> None:
    """Drive the engine until a signal, and then until what runs has been answered, or for `patience` seconds."""
    received: list[int] = []
    stop_at = float("inf")

    def note(number: int, _: FrameType | None) -> None:
        nonlocal stop_at
        stop_at = time.monotonic() + (0 if received else patience)
        received.append(number)

    def deadline() -> float:
        if not http.is_alive:
            raise RunError("the thread that answers HTTP has ended; its error is above")
        return stop_at

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)
    try:
        loop.run(engine, deadline, Heartbeat.of_this_process())
    except BaseException:
        loop.fail(ApiError(500, "the model failed; the server's log says why", code="internal_error"))
        raise
    log.info("%s: the server has ended", signal.Signals(received[0]).name)


def _check(engine: Engine, request: Request) -> None:
    try:
        engine.check(request)
    except UserError as error:
        raise ApiError(400, str(error), code="invalid_request") from error


def _chat(config: Config, found: FoundModel) -> ChatFormat | str:
    """The chat format, or why there is none. Raises UserError for a template that is named and cannot be used."""
    try:
        chat = open_chat(config.tokenizer, found.tokenizer)
        _ = chat.end_of_answer
    except UserError as error:
        if config.tokenizer.chat_template is not None:
            raise
        log.info("no chats: %s", error)
        return str(error)
    return chat


def _folder_name(config: Config, found: FoundModel) -> str:
    folder = config.checkpoint.load or config.checkpoint.save or str(found.checkpoint)
    return Path(folder.removeprefix("hf:")).name or found.checkpoint.name
