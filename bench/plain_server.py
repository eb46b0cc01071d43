"""The reference of bench/serve.py: a model behind Transformers and FastAPI, as guides write it.

    python bench/plain_server.py MODEL

One `generate` at a time answers one request; the others wait for a lock. The body has the fields that bench/serve.py
needs. The first line of the output is the address.
"""

import asyncio
import json
import socket
import sys
from collections.abc import AsyncIterator
from threading import Thread

import torch
import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.concurrency import iterate_in_threadpool
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer


class Body(BaseModel):
    """A greedy continuation of exactly `max_tokens` tokens, which is what all requests of the benchmark ask for."""

    prompt: str
    max_tokens: int


def make_app(folder: str) -> FastAPI:
    """The application, with the model in fp32 on the GPU if there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    app, lock = FastAPI(), asyncio.Lock()

    async def events(body: Body) -> AsyncIterator[str]:
        inputs = tokenizer(body.prompt, return_tensors="pt").to(device)
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
        length = {"min_new_tokens": body.max_tokens, "max_new_tokens": body.max_tokens}
        settings = {**inputs, **length, "streamer": streamer, "do_sample": False}
        async with lock:
            thread = Thread(target=model.generate, kwargs=settings)
            thread.start()
            async for text in iterate_in_threadpool(streamer):
                if text:
                    yield f"data: {json.dumps({'choices': [{'text': text}]})}\n\n"
            thread.join()
        yield "data: [DONE]\n\n"

    @app.post("/v1/completions")
    async def completions(body: Body) -> StreamingResponse:
        return StreamingResponse(events(body), media_type="text/event-stream")

    return app


if __name__ == "__main__":
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    app = make_app(sys.argv[1])
    print(f"plain at http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="error")).run([listener])
