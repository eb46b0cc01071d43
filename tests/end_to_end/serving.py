"""Servers for tests: serve.py as a process of the fork server, on a small model that is trained for a step."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import httpx

from tests.end_to_end.commands import ENVIRONMENT, ROOT, run
from tests.forking import as_script, fork_server
from tests.tokenizer_files import bpe_file

PATIENCE = 300.0
CONTEXT = 2048  # an answer of so many tokens takes seconds, in which a test can act
MODEL = f"""
num_layers: 2
hidden_size: 32
num_attention_heads: 4
seq_length: {CONTEXT}
pos_emb: rotary
rotary_pct: 0.5
tokenizer_type: HFTokenizer
vocab_file: tokenizer.json
data_impl: mock
num_workers: 0
train_batch_size: 1
train_iters: 1
optimizer: {{type: Adam, params: {{lr: 1e-3}}}}
init_method: normal
init_method_std: 0.3
serve_port: 0
"""
TEMPLATE = """
{%- if messages[-1].role == 'assistant' and add_generation_prompt %}
{{- raise_exception('the last message must not be the assistant\\'s') }}
{%- endif %}
{%- for message in messages %}{{ message.role }}: {{ message.content }}<|endoftext|>
{% endfor %}
{%- if add_generation_prompt %}assistant: {% endif %}"""


def make_model(folder: Path) -> None:
    """The checkpoint `trained`, its tokenizer, and served.yml for all commands."""
    bpe_file(folder)
    (folder / "served.yml").write_text(MODEL)
    (folder / "chat.jinja").write_text(TEMPLATE)
    run(folder, "train.py", "served", "save=trained", "eval_iters=0")


@dataclass
class Server:
    """A server that runs."""

    url: str
    process: BaseProcess
    output: Path

    def end(self, number: signal.Signals = signal.SIGTERM) -> int | None:
        """Signal the server, and wait for its exit code."""
        os.kill(self.process.pid or 0, number)
        self.process.join(PATIENCE)
        return self.process.exitcode

    def figure(self, name: str, **client: object) -> float:
        """A figure of /metrics."""
        lines = httpx.get(f"{self.url}/metrics", timeout=PATIENCE, **client).text.splitlines()
        return float(next(line for line in lines if line.startswith(f"{name} ")).split()[1])


@contextmanager
def serving(folder: Path, *words: str, **environment: str) -> Iterator[Server]:
    """Start serve.py with the model in `folder`, and wait until it is ready."""
    number = len(list(folder.glob("server_*.out")))
    outputs = folder / f"server_{number}.out", folder / f"server_{number}.err"
    arguments = ["served", "load=trained", *words]
    process = fork_server().Process(
        target=as_script, args=(ROOT / "serve.py", arguments, folder, os.environ | ENVIRONMENT | environment, outputs)
    )
    process.start()
    try:
        wait_for(lambda: " at http://" in (outputs[0].read_text() if outputs[0].exists() else ""), process, outputs)
        url = outputs[0].read_text().rpartition(" at http://")[2].split()[0]
        yield Server(f"http://{url}", process, outputs[0])
    finally:
        if process.exitcode is None:
            process.kill()
        process.join(PATIENCE)


def wait_for(condition: Callable[[], object], process: BaseProcess, outputs: tuple[Path, ...] = ()) -> None:
    """Wait until the condition holds, while the process runs."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.exitcode is None, [path.read_text() for path in outputs]
        assert time.monotonic() < deadline, f"the condition was not met within {PATIENCE:.0f} s"
        time.sleep(0.02)
