"""Speed of serve.py compared with Transformers behind FastAPI, and a soak.

    python bench/serve.py [--quick] [--only throughput] [--clients 1 4 16 64] [--rounds 3] [--minutes 40] [--write]

Both servers serve the same folder in fp32, on 127.0.0.1 of this machine: ours with continuous batching
(`load: hf:FOLDER`), the other one (bench/plain_server.py) with one `generate` at a time, as guides write it. The
clients (bench/http_load.py) send one request after another: a prompt of 16 to 96 tokens, and a greedy answer of 48,
read as a stream. The servers are asked in turn, with the same prompts; the ratio of requests/s is computed in each
round. The texts of both are compared.

The soak sends 2,000 requests of which a tenth disconnect after three tokens. It passes if nothing else fails, all slots
are free at the end, and the server's memory (resident, all of its processes) has grown by at most 32 MiB in the second
half; the memory of fewer than 1,000 requests is not judged. Nothing new starts after --minutes. --write writes the
tables into bench/results/. The last line is one JSON object.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from http_load import Asked, Seen, load
from prometheus_client.parser import text_string_to_metric_families
from serve_model import SHAPES, write_model
from train_step import machine, ratio

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 300.0
SLOTS = 64  # of our server
CONTEXT = 256  # of a slot
ANSWER = 48
SERVED = f"""
load: hf:{{model}}
num_gpus: 1
precision: fp32
serve_port: 0
generation_batch_size: {SLOTS}
serve_context: {CONTEXT}
"""
SOAK_CLIENTS = 16
SOAK_PARTS = 10
GROWTH = 32 * 2**20
SETTLED = 1000  # requests; fewer do not tell growth from caches that fill
OWN, PLAIN = "serve.py", "Transformers"


@dataclass(frozen=True)
class Server:
    """A server that runs. process: its first one. output: the file with all that it printed."""

    url: str
    process: psutil.Process
    output: int

    def resident(self) -> int:
        """Bytes of all processes."""
        return sum(one.memory_info().rss for one in [self.process, *self.process.children(recursive=True)])

    def figures(self) -> dict[str, dict[str, float]]:
        """The figures of /metrics: name -> labels -> value."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as answer:
            families = list(text_string_to_metric_families(answer.read().decode()))
        found: dict[str, dict[str, float]] = {}
        for sample in (sample for family in families for sample in family.samples):
            found.setdefault(sample.name, {})[",".join(sample.labels.values())] = sample.value
        return found


@contextmanager
def server(name: str, model: Path) -> Iterator[Server]:
    """Start a server and wait until it answers; end it at the end."""
    own, plain = ["deepy.py", "serve.py", str(model / "served.yml")], ["bench/plain_server.py", str(model)]
    with tempfile.TemporaryFile("w+") as output:
        command = [sys.executable, *(own if name == OWN else plain)]
        process = psutil.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        try:
            yield Server(_address(process, output.fileno(), name), process, output.fileno())
        finally:
            processes = [process, *process.children(recursive=True)] if process.is_running() else []
            for one in processes[:1]:
                one.terminate()
            for one in psutil.wait_procs(processes, timeout=60)[1]:
                one.kill()


def _address(process: psutil.Process, output: int, name: str) -> str:
    deadline = time.monotonic() + START_SECONDS
    while True:
        text = _printed(output)
        if " at http://" in text:
            return "http://" + text.rpartition(" at http://")[2].split()[0]
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE or time.monotonic() > deadline:
            raise SystemExit(f"{name} did not start: ...{text[-2000:]}")
        time.sleep(0.1)


def _printed(output: int) -> str:
    return os.pread(output, os.fstat(output).st_size, 0).decode()


def throughput(servers: dict[str, Server], clients: int, rounds: int, deadline: float) -> dict[str, Any]:
    """The figures with so many clients at a time; {} where no round was measured in time."""
    seen: dict[str, list[Seen]] = {name: [] for name in servers}
    count = max(2 * clients, 8)
    for number in range(rounds):
        if time.monotonic() > deadline:
            print(f"  round {number + 1} and later ones skipped: no time left", flush=True)
            break
        first = (clients * 100 + number) * 1000  # prompts that no round before had: beginnings are kept
        asked = [Asked(seed, random.Random(seed).randint(16, 96), ANSWER) for seed in range(first, first + count)]
        for name in list(servers) if number % 2 else list(servers)[::-1]:
            seen[name].append(load(servers[name].url, iter(asked), clients))
            rate = count / seen[name][-1].seconds
            print(f"  {clients} clients, round {number + 1}, {name}: {rate:.2f} requests/s", flush=True)
    return _figures(seen, count) if seen[OWN] else {}


def _figures(seen: dict[str, list[Seen]], count: int) -> dict[str, Any]:
    figures: dict[str, Any] = {"ratio": ratio(*([one.seconds for one in seen[name]] for name in (PLAIN, OWN)))}
    pairs = zip(seen[OWN], seen[PLAIN], strict=True)
    figures["same_texts"] = sum(own.texts[seed] == plain.texts.get(seed) for own, plain in pairs for seed in own.texts)
    figures["requests"] = count * len(seen[OWN])
    for name, rounds in seen.items():
        first = [value for one in rounds for value in one.first]
        between = [value for one in rounds for value in one.between]
        figures[name] = {
            "requests_per_second": round(statistics.median(count / one.seconds for one in rounds), 3),
            "first_ms": [_milliseconds(first, share) for share in (50, 99)],
            "between_ms": [_milliseconds(between, share) for share in (50, 99)],
            "errors": [error for one in rounds for error in one.errors],
        }
    return figures


def _milliseconds(seconds: list[float], percentile: int) -> float | None:
    return round(1000 * statistics.quantiles(seconds, n=100)[percentile - 1], 1) if len(seconds) > 1 else None


def throughput_table(figures: dict[int, dict[str, Any]]) -> str:
    """The table, in Markdown."""
    head = "| clients | server | requests/s | first token, ms | between tokens, ms | ratio of requests/s | same texts |"
    lines = [head, "|---|---|---|---|---|---|---|"]
    for clients, found in figures.items():
        compared = (
            f"{found['ratio']['median']} {found['ratio']['spread']}",
            f"{found['same_texts']} of {found['requests']}",
        )
        for name, (ratios, texts) in ((OWN, compared), (PLAIN, ("", ""))):
            one = found[name]
            first, between = (" / ".join(map(str, one[key])) for key in ("first_ms", "between_ms"))
            row = (clients, name, one["requests_per_second"], first, between, ratios, texts)
            lines.append(f"| {' | '.join(map(str, row))} |")
    return "\n".join([*lines, "", "Times: median / 99th percentile. Ratio: median and spread over the rounds."])


def soak(own: Server, count: int, deadline: float) -> dict[str, Any]:
    """Ask and disconnect; the figures, with what is wrong."""
    memory, left, sent, problems = [], 0, 0, []
    began = time.monotonic()
    for part in range(SOAK_PARTS):
        if time.monotonic() > deadline:
            problems.append(f"only {sent} of {count} requests were sent: no time left")
            break
        seeds = range(count * part // SOAK_PARTS, count * (part + 1) // SOAK_PARTS)
        seen = load(own.url, _with_leavers(seeds), SOAK_CLIENTS)
        problems += seen.errors
        left, sent = left + seen.left, sent + len(seeds)
        memory.append(own.resident())
        print(f"  soak: {sent} requests, {left} left, {memory[-1] / 2**20:.1f} MiB", flush=True)
    problems += _wrong_at_the_end(own)
    grown = memory[-1] - memory[len(memory) // 2 - 1] if len(memory) > 1 else 0
    if sent >= SETTLED and grown > GROWTH:
        problems.append(f"memory grew by {grown / 2**20:.1f} MiB in the second half")
    mib = [round(value / 2**20, 1) for value in memory]
    minutes = round((time.monotonic() - began) / 60, 1)
    noticed = own.figures()["deepy_disconnects_total"][""]
    counts = {"requests": sent, "left": left, "noticed": noticed}
    return {**counts, "minutes": minutes, "memory_mib": mib, "problems": problems}


def _with_leavers(seeds: Iterable[int]) -> Iterator[Asked]:
    for seed in seeds:
        draw = random.Random(seed)
        prompt = draw.choice((8, 16, 32, 64))  # few, so that the caches of oneDNN, by shape, fill early
        if seed % 10 == 0:
            yield Asked(seed, prompt, CONTEXT - 64, leave_after=3)
        else:
            yield Asked(seed, prompt, draw.randint(2, 32))


def _wrong_at_the_end(own: Server) -> list[str]:
    """What /metrics and the log say that should not be, once the last disconnect has been noticed."""
    deadline = time.monotonic() + 10
    while (now := own.figures())["deepy_slots_in_use"][""] and time.monotonic() < deadline:
        time.sleep(0.1)
    errors = {code: value for code, value in now.get("deepy_errors_total", {}).items() if "closed" not in code}
    wrong = [f"{name} is {now[name]['']:g}" for name in ("deepy_slots_in_use", "deepy_texts_waiting") if now[name][""]]
    wrong += [f"{value:g} errors {code}" for code, value in errors.items()]
    return [*wrong, "a traceback in the server's log"] if "Traceback" in _printed(own.output) else wrong


def soak_line(figures: dict[str, Any]) -> str:
    """The figures in words."""
    verdict = "passed" if not figures["problems"] else f"failed: {'; '.join(figures['problems'][:5])}"
    memory = ", ".join(f"{value}" for value in figures["memory_mib"])
    left = f"{figures['left']} of which disconnected ({figures['noticed']:g} counted by the server)"
    words = f"{figures['requests']} requests, {left}, in {figures['minutes']} minutes"
    return f"Soak {verdict}. {words}; resident memory after each tenth, MiB: {memory}"


def main() -> int:
    """Measure and print; 1 if the soak failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("throughput", "soak")
    parser.add_argument("--only", nargs="*", default=parts, choices=parts)
    parser.add_argument("--clients", nargs="*", type=int, help="at a time (default: 1 4 16 64)")
    parser.add_argument("--rounds", type=int, help="(default: 3)")
    parser.add_argument("--requests", type=int, help="of the soak (default: 2000)")
    parser.add_argument("--minutes", type=float, default=40.0, help="start nothing new after this")
    parser.add_argument("--quick", action="store_true", help="a tiny model, 1 and 4 clients, one round, 100 requests")
    parser.add_argument("--write", action="store_true", help="write the tables into bench/results/")
    given = parser.parse_args()
    clients = given.clients or ([1, 4] if given.quick else [1, 4, 16, 64])
    rounds = given.rounds or (1 if given.quick else 3)
    requests = given.requests or (100 if given.quick else 2000)
    shape = "2x64" if given.quick else "6x512"
    deadline = time.monotonic() + 60 * given.minutes
    head = f"{machine()}; {shape}, {' x '.join(map(str, SHAPES[shape]))}"
    print(head, flush=True)
    figures: dict[str, Any] = {}
    tables = []
    with ExitStack() as stack:
        model = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "model"
        write_model(model, shape)
        (model / "served.yml").write_text(SERVED.format(model=model))
        own = stack.enter_context(server(OWN, model))
        if "throughput" in given.only:
            with server(PLAIN, model) as plain:
                servers = {OWN: own, PLAIN: plain}
                for one in servers.values():
                    load(one.url, iter([Asked(seed, 64, ANSWER) for seed in range(2)]), 1)  # warm up
                measured = {count: throughput(servers, count, rounds, deadline) for count in clients}
            figures["throughput"] = {count: found for count, found in measured.items() if found}
            tables.append(throughput_table(figures["throughput"]))
            print(tables[-1], flush=True)
        if "soak" in given.only:
            figures["soak"] = soak(own, requests, deadline)
            tables.append(soak_line(figures["soak"]))
            print(tables[-1], flush=True)
    if given.write:
        path = ROOT / "bench" / "results" / f"serve-{datetime.now(UTC).date()}-cpu.md"
        with path.open("a") as file:  # keep earlier runs of the day
            text = "\n\n".join([f"# Serving\n\n{head}; `python {' '.join(sys.argv)}`", *tables])
            file.write(f"{text}\n\n")
        print(f"written: {path.relative_to(ROOT)}")
    print(json.dumps(figures))
    return bool(figures.get("soak", {}).get("problems"))


if __name__ == "__main__":
    sys.exit(main())
