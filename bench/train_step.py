"""Training speed beside compiled Hugging Face Transformers and beside the matrix products alone.

    python bench/train_step.py [--quick] [--shapes neox-6x512 ...] [--rounds 7]

Every contender is a process of its own with a model of the same shape, fp32 master weights, bf16 compute, clipping and
fused AdamW. They make one step each by turns, one at a time, so that what else the machine does meets all of them; a
ratio is formed in each round, and its median and spread over the rounds are printed.

  deepy         through Config, Plan and TrainingEngine, in the environment that deepy.py gives its ranks
  bare          the same compiled blocks and loss in a plain training loop under autocast: what the engine costs
  transformers  torch.compile(AutoModelForCausalLM.from_config(...)) under autocast, as a user starts it
  same-malloc   the same in the environment of deepy's ranks
  products      the matrix products of the step's linear layers alone, into buffers that exist: the ceiling

TFLOP/s count 6 N + 12 L n d T a token (megatron/metrics/flops.py). The last line is one JSON object.
On a GPU the shapes are larger and utilization is of the card's peak.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from megatron.config.estimate import flops_per_token  # noqa: E402
from megatron.config.load import config_from_flat  # noqa: E402
from megatron.config.plan import Plan  # noqa: E402
from megatron.config.resolve import resolve  # noqa: E402
from megatron.launch.environment import for_ranks  # noqa: E402
from megatron.metrics.flops import peak_flops  # noqa: E402

VOCABULARY = 50304
NEOX = {"gpt_j_residual": True, "pos_emb": "rotary", "rotary_pct": 0.25, "no_weight_tying": True}
LLAMA = NEOX | {
    "gpt_j_residual": False,
    "norm": "rmsnorm",
    "activation": "swiglu",
    "rotary_pct": 1.0,
    "use_bias_in_attn_linear": False,
    "use_bias_in_mlp": False,
}


def shape(family: dict[str, Any], layers: int, hidden: int, heads: int, length: int, micro: int) -> dict[str, Any]:
    """Keys of a model and its micro-batch."""
    return family | {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "seq_length": length,
        "train_micro_batch_size_per_gpu": micro,
        "precision": "bfloat16",
        "compile": True,
    }


ON_CPU = {
    "neox-6x512": shape(NEOX, 6, 512, 8, 512, 4),
    "neox-12x768": shape(NEOX, 12, 768, 12, 1024, 2),
    "llama-6x512": shape(LLAMA, 6, 512, 8, 512, 4) | {"num_kv_heads": 4, "ffn_hidden_size": 1408},
}
ON_GPU = {
    "neox-125M": shape(NEOX, 12, 768, 12, 2048, 16),
    "neox-350M": shape(NEOX, 24, 1024, 16, 2048, 16),
    "neox-1.3B": shape(NEOX, 24, 2048, 16, 2048, 8),
    "llama-7B": shape(LLAMA, 32, 4096, 32, 2048, 2) | {"ffn_hidden_size": 11008},
}
CONTENDERS = ("deepy", "bare", "transformers", "same-malloc", "products")
CLIP, RATE = 1.0, 1e-4
Step = Callable[[], float]


def plan_of(keys: dict[str, Any]) -> Plan:
    """The plan for one rank."""
    return resolve(config_from_flat(keys), 1, VOCABULARY)


def batch_of(plan: Plan, device: torch.device) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Random tokens, their labels and weights."""
    size, length = plan.batch.micro_size, plan.batch.sequence_length
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (size, length + 1), generator=generator).to(device)
    weights = torch.full((size, length), 1 / (size * length), device=device)
    return ids[:, :-1].contiguous(), (ids[:, 1:].contiguous(), weights)


def deepy(plan: Plan, device: torch.device) -> Step:
    """A step of ours."""
    from megatron.engine.distributed import start
    from megatron.engine.training import TrainingEngine
    from megatron.model.gpt import gpt_layers, make_loss

    grid = start()
    engine = TrainingEngine(gpt_layers(plan.model, grid, 1), make_loss(plan.model, grid), grid, plan)
    batch, count = batch_of(plan, device), iter(range(10**9))
    return lambda: float(engine.train_batch([batch], step=next(count), learning_rate=RATE).loss)


def bare(plan: Plan, device: torch.device) -> Step:
    """The same layers and loss without DeepSpeed."""
    from megatron.engine.compiling import compiled, compiled_blocks
    from megatron.engine.distributed import start
    from megatron.engine.modules import Sequential
    from megatron.model.gpt import gpt_layers, make_loss

    grid = start()
    model = Sequential(compiled_blocks(gpt_layers(plan.model, grid, 1))).to(device)
    loss, (tokens, targets) = compiled(make_loss(plan.model, grid)), batch_of(plan, device)
    return _plain_step(model, lambda: loss(model(tokens), targets), device)


def transformers(plan: Plan, device: torch.device) -> Step:
    """A step of Transformers."""
    from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig

    model = plan.model
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "intermediate_size": model.ffn_hidden_size,
        "max_position_embeddings": model.max_position_embeddings,
        "tie_word_embeddings": model.tied_embeddings,
        "use_cache": False,
    }
    if model.norm == "rmsnorm":
        settings = LlamaConfig(**common, num_key_value_heads=model.num_kv_heads)
    else:
        settings = GPTNeoXConfig(**common, rotary_pct=model.rotary_fraction, use_parallel_residual=True)
    built = AutoModelForCausalLM.from_config(settings, attn_implementation="sdpa").to(device)
    run, (tokens, (labels, _)) = torch.compile(built), batch_of(plan, device)
    # `labels` are shifted by the model: give it what the batch's first label continues
    return _plain_step(built, lambda: run(input_ids=tokens, labels=tokens, shift_labels=labels).loss, device)


def _plain_step(model: nn.Module, forward: Callable[[], Tensor], device: torch.device) -> Step:
    """Forward under autocast, backward, clip, fused AdamW."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> float:
        with torch.autocast(device.type, torch.bfloat16):
            loss = forward()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def products(plan: Plan, device: torch.device) -> Step:
    """Output, input gradient and weight gradient of every linear layer; attention's own products are not in it."""
    model, tokens = plan.model, plan.batch.micro_size * plan.batch.sequence_length
    width = model.num_attention_heads * model.head_size
    inner = (2 if model.norm == "rmsnorm" else 1) * model.ffn_hidden_size
    fused = width + 2 * model.num_kv_heads * model.head_size
    block = [(model.hidden_size, fused), (width, model.hidden_size), (model.hidden_size, inner)]
    block.append((model.ffn_hidden_size, model.hidden_size))
    works = [_triple(tokens, *sizes, device) for sizes in (*block, (model.hidden_size, model.padded_vocab_size))]

    def step() -> float:
        for work in works[:-1] * model.num_layers + works[-1:]:
            work()
        return 0.0

    return step


def _triple(tokens: int, inputs: int, outputs: int, device: torch.device) -> Callable[[], None]:
    def buffer(*sizes: int) -> Tensor:
        return torch.randn(*sizes, device=device).bfloat16()

    x, weight, gradient = buffer(tokens, inputs), buffer(outputs, inputs), buffer(tokens, outputs)
    results = buffer(tokens, outputs), buffer(tokens, inputs), buffer(outputs, inputs)

    def work() -> None:
        torch.mm(x, weight.t(), out=results[0])
        torch.mm(gradient, weight, out=results[1])
        torch.mm(gradient.t(), x, out=results[2])

    return work


def serve(contender: str, keys: dict[str, Any]) -> None:
    """In a contender's process: make a step for every line that comes in, and answer with seconds and loss."""
    answers, sys.stdout = sys.stdout, sys.stderr
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    build = {"same-malloc": transformers}.get(contender) or globals()[contender]
    step = build(plan_of(keys), device)
    for _ in sys.stdin:
        began = time.perf_counter()
        loss = step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
        print(json.dumps([time.perf_counter() - began, loss, peak]), file=answers, flush=True)


class Contender:
    """A process that makes steps when asked."""

    def __init__(self, name: str, keys: dict[str, Any]) -> None:
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
        environment = dict(os.environ)
        if name != "transformers":
            environment = for_ranks(environment, accelerator, os.cpu_count() or 1)
        command = [sys.executable, __file__, "--serve", name, json.dumps(keys)]
        self.process = subprocess.Popen(
            command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self.name = name

    def step(self) -> list[float]:
        """Seconds, loss and bytes on the device at most, of one step."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
            answer: list[float] = json.loads(self.process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            error = self.process.communicate()[1]
            raise SystemExit(f"{self.name} failed:\n{error[-3000:]}") from None
        return answer

    def end(self) -> None:
        """Let the process end."""
        self.process.kill()
        self.process.communicate()


def race(keys: dict[str, Any], rounds: int, warm_up: int = 3) -> dict[str, list[float]]:
    """Seconds of every round for every contender; prints the losses of the first step, which must be alike."""
    contenders = [Contender(name, keys) for name in CONTENDERS]
    try:
        for contender in contenders:  # compiling, one after the other
            first = [contender.step() for _ in range(warm_up)]
            print(f"  {contender.name:13} ready; first losses {first[0][1]:.3f} {first[-1][1]:.3f}", flush=True)
        seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
        for number in range(rounds):
            turn = contenders[number % len(contenders) :] + contenders[: number % len(contenders)]
            for contender in turn:
                seconds[contender.name].append(contender.step()[0])
        return seconds
    finally:
        for contender in contenders:
            contender.end()


def ratio(above: list[float], below: list[float]) -> dict[str, Any]:
    """Median, least and greatest of the quotients of each round."""
    quotients = [a / b for a, b in zip(above, below, strict=True)]
    spread = [round(f(quotients), 3) for f in (min, max)]
    return {"median": round(statistics.median(quotients), 3), "spread": spread}


def report(name: str, plan: Plan, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Print the table of a shape; its figures for the last line."""
    tokens = plan.batch.tokens_per_step
    flops = flops_per_token(plan.model, plan.batch.sequence_length) * tokens
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peak = peak_flops(None, device, half_precision=True)
    for contender, values in seconds.items():
        median = statistics.median(values)
        rate = f"  {tokens / median:10.0f} tokens/s  {flops / median / 1e12:8.3f} TFLOP/s"
        spread = f"[{min(values) * 1e3:.1f}, {max(values) * 1e3:.1f}]"
        print(f"  {contender:13} {median * 1e3:8.1f} ms {spread}{rate if contender != 'products' else ''}")
    own = seconds["deepy"]
    figures = {
        "over_transformers": ratio(seconds["transformers"], own),
        "over_transformers_same_malloc": ratio(seconds["same-malloc"], own),
        "share_of_products": ratio(seconds["products"], own),
        "engine_overhead": ratio(own, seconds["bare"]),
        "tokens_per_second": round(tokens / statistics.median(own), 1),
        "tflops": round(flops / statistics.median(own) / 1e12, 4),
    }
    if peak:
        figures["utilization"] = round(flops / statistics.median(own) / peak, 4)
    for label in ("over_transformers", "over_transformers_same_malloc", "share_of_products", "engine_overhead"):
        print(f"  {label}: {figures[label]['median']} {figures[label]['spread']}")
    return figures


def main() -> None:
    """Race the shapes and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = ON_GPU if torch.cuda.is_available() else ON_CPU
    parser.add_argument("--shapes", nargs="*", default=list(shapes), choices=list(shapes))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="the first shape, 3 rounds")
    parser.add_argument("--serve", nargs=2, metavar=("CONTENDER", "KEYS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        return serve(arguments.serve[0], json.loads(arguments.serve[1]))
    figures = {}
    names, rounds = (arguments.shapes[:1], 3) if arguments.quick else (arguments.shapes, arguments.rounds)
    for name in names:
        print(f"{name} (torch {torch.__version__}, load {os.getloadavg()[0]:.1f})", flush=True)
        figures[name] = report(name, plan_of(shapes[name]), race(shapes[name], rounds))
    print(json.dumps(figures))
    return None


if __name__ == "__main__":
    main()
