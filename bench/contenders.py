"""The contenders of bench/train_step.py: each is a separate process that runs a step on request.

deepy: Config, Plan and TrainingEngine, in the environment that deepy.py gives its ranks.
bare: the same compiled blocks, loss, fp32 masters and optimizer in a plain loop, to show the engine's overhead.
transformers: torch.compile(AutoModelForCausalLM.from_config(...)) under autocast, in the user's environment.
same-malloc: the same in the environment of deepy's ranks.
products: only the matrix products of a step, into preallocated buffers: the upper bound.
"""

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.optim import Optimizer  # noqa: E402

from megatron.config.load import config_from_flat  # noqa: E402
from megatron.config.plan import ModelPlan, Plan  # noqa: E402
from megatron.config.resolve import resolve  # noqa: E402
from megatron.estimate.memory import fits, stage_memories  # noqa: E402
from megatron.launch.protocol.environment import rank_environment  # noqa: E402

if TYPE_CHECKING:
    from megatron.engine.training import TrainingEngine

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
    """Configuration of a model and its micro-batch."""
    return family | {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "seq_length": length,
        "train_micro_batch_size_per_gpu": micro,
        "padded_vocab_size": VOCABULARY,
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
    "llama-7B": shape(LLAMA, 32, 4096, 32, 2048, 1) | {"ffn_hidden_size": 11008},
}
NAMES = ("deepy", "bare", "transformers", "same-malloc", "products")
CLIP, RATE, BETAS, DECAY = 1.0, 1e-4, (0.9, 0.95), 0.1
QUERIES = {"cpu": 128, "cuda": 1024}  # in a block of the attention products
Step = Callable[[], float]


def plan_of(keys: dict[str, Any]) -> Plan:
    """The plan for one rank."""
    return resolve(config_from_flat(keys), 1, keys["padded_vocab_size"])


def free_gpu_memory() -> float | None:
    """Free memory of the GPU in GiB; None on a CPU, whose memory others may give back."""
    return torch.cuda.mem_get_info()[0] / 2**30 if torch.cuda.is_available() else None


def why_too_large(plan: Plan, gpu_memory: float | None) -> str | None:
    """Why a shape is skipped: its estimated peak does not fit into `gpu_memory` GiB; None if it fits."""
    peak = stage_memories(plan)[0].peak
    if gpu_memory is None or fits(peak, gpu_memory):
        return None
    return f"its estimated peak of {peak / 2**30:.1f} GiB does not fit into {gpu_memory:.1f} GiB"


def batch_of(plan: Plan, device: torch.device) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Random tokens, their labels and weights."""
    size, length = plan.batch.micro_size, plan.batch.sequence_length
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, plan.model.vocab_size, (size, length + 1), generator=generator).to(device)
    weights = torch.full((size, length), 1 / (size * length), device=device)
    return ids[:, :-1].contiguous(), (ids[:, 1:].contiguous(), weights)


def engine_of(plan: Plan) -> "TrainingEngine":
    """Deepy's engine."""
    from megatron.engine.distributed import start
    from megatron.engine.training import TrainingEngine
    from megatron.model.gpt import gpt_layers

    grid = start()
    return TrainingEngine(gpt_layers(plan.model, grid, 1), grid, plan)


def deepy(plan: Plan, device: torch.device) -> Step:
    """A step of Deepy."""
    engine = engine_of(plan)
    batch, count = batch_of(plan, device), iter(range(10**9))
    return lambda: float(engine.train_batch([batch], step=next(count), learning_rate=RATE).loss)


def bare(plan: Plan, device: torch.device) -> Step:
    """A step with the same layers, loss and masters, without engine and DeepSpeed."""
    from megatron.engine.compiling import compiled_layers
    from megatron.engine.distributed import start
    from megatron.engine.master_weights import MasterWeights
    from megatron.engine.modules import Sequential
    from megatron.model.gpt import gpt_layers
    from megatron.parallel.initial_values import initialise

    grid = start()
    model = Sequential(compiled_layers(gpt_layers(plan.model, grid, 1))).to(device).train()
    initialise(model)
    masters = MasterWeights(model, torch.bfloat16)
    optimizer = _adamw(masters.masters)
    masters.attach(optimizer)
    tokens, targets = batch_of(plan, device)
    return _plain_step(model, optimizer, lambda: model(tokens, targets=targets))


def transformers(plan: Plan, device: torch.device) -> Step:
    """A step of Transformers."""
    from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig

    model = plan.model
    common = {
        "vocab_size": model.vocab_size,
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
    built = AutoModelForCausalLM.from_config(settings, attn_implementation="sdpa").to(device).train()
    run, (tokens, (labels, _)) = torch.compile(built), batch_of(plan, device)

    def forward() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            # the model would shift `labels`; `shift_labels` are used as they are
            loss: Tensor = run(input_ids=tokens, labels=tokens, shift_labels=labels).loss
        return loss

    return _plain_step(built, _adamw(list(built.parameters())), forward)


def _adamw(parameters: list[nn.Parameter]) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=RATE, betas=BETAS, weight_decay=DECAY, fused=True)


def _plain_step(model: nn.Module, optimizer: Optimizer, forward: Callable[[], Tensor]) -> Step:
    """Forward, backward, clip, step."""

    def step() -> float:
        loss = forward()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        model.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def products(plan: Plan, device: torch.device) -> Step:
    """The matrix products of linear layers and causal attention in a step: one forward and two backward each."""
    model, tokens = plan.model, plan.batch.micro_size * plan.batch.sequence_length
    width = model.num_attention_heads * model.head_size
    inner = (2 if model.norm == "rmsnorm" else 1) * model.ffn_hidden_size
    fused = width + 2 * model.num_kv_heads * model.head_size
    block = [(model.hidden_size, fused), (width, model.hidden_size), (model.hidden_size, inner)]
    block.append((model.ffn_hidden_size, model.hidden_size))
    works = [_linear(tokens, *sizes, device) for sizes in block]
    works.append(_attention(model, plan.batch.micro_size, plan.batch.sequence_length, device))
    head = _linear(tokens, model.hidden_size, model.padded_vocab_size, device)

    def step() -> float:
        for work in works * model.num_layers:
            work()
        head()
        return 0.0

    return step


def _random(device: torch.device, *sizes: int) -> Tensor:
    return torch.randn(*sizes, device=device).bfloat16()


def _linear(tokens: int, inputs: int, outputs: int, device: torch.device) -> Callable[[], None]:
    sizes = (tokens, inputs), (outputs, inputs), (tokens, outputs)
    x, weight, gradient = (_random(device, *size) for size in sizes)
    results = [_random(device, *size) for size in (sizes[2], sizes[0], sizes[1])]

    def work() -> None:
        torch.mm(x, weight.t(), out=results[0])
        torch.mm(gradient, weight, out=results[1])
        torch.mm(gradient.t(), x, out=results[2])

    return work


def _attention(model: ModelPlan, micro: int, length: int, device: torch.device) -> Callable[[], None]:
    """The products of scores and values, over blocks of queries and the keys before them."""
    heads, queries = micro * model.num_attention_heads, min(length, QUERIES[device.type])
    keys = _random(device, heads, length, model.head_size)
    query = _random(device, heads, queries, model.head_size)
    steps = []
    for end in range(queries, length + 1, queries):
        scores, seen = _random(device, heads, queries, end), keys[:, :end]
        like_keys = _random(device, heads, end, model.head_size)
        steps.append((scores, seen, like_keys))
    like_query = torch.empty_like(query)

    def work() -> None:
        for scores, seen, like_keys in steps:
            for _ in range(2):  # forward and backward; twice as many backward as forward
                torch.bmm(query, seen.transpose(1, 2), out=scores)
                torch.bmm(scores, seen, out=like_query)
            for _ in range(2):
                torch.bmm(scores.transpose(1, 2), query, out=like_keys)

    return work


def serve(contender: str, keys: dict[str, Any]) -> None:
    """In a contender's process: run a step for each input line; answer with seconds, loss and peak bytes."""
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


class ContenderError(Exception):
    """A contender ended or did not answer in time; with the end of its output."""


class Contender:
    """A process that runs steps on request."""

    def __init__(self, name: str, keys: dict[str, Any], script: str = __file__) -> None:
        """script: runs the contender of this name, with the keys as JSON."""
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
        environment = dict(os.environ)
        if name != "transformers":
            environment = rank_environment(environment, accelerator, os.cpu_count() or 1)
        command = [sys.executable, script, name, json.dumps(keys)]
        self.name, self._errors = name, tempfile.TemporaryFile("w+")  # noqa: SIM115  # a pipe could fill up
        self.process = subprocess.Popen(
            command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors
        )

    def step(self, limit: float) -> list[float]:
        """Seconds, loss and peak bytes on the device of one step; see `ask`."""
        answer: list[float] = self.ask("", limit)
        return answer

    def ask(self, question: str, limit: float) -> Any:
        """The answer to a line.

        Raises ContenderError if the process ends, or gives no answer within `limit` seconds and is killed.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(question + "\n")
            self.process.stdin.flush()
            # an answer is one line, so nothing is left in the buffer before it
            if not select.select([self.process.stdout], [], [], limit)[0]:
                raise self._error(f"was killed, because a step took more than {limit:.0f} s")
            return json.loads(self.process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            raise self._error("failed") from None

    def _error(self, what: str) -> ContenderError:
        self.end()
        self._errors.seek(0)
        return ContenderError(f"{self.name} {what}: ...{self._errors.read().strip()[-1500:]}")

    def end(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()


if __name__ == "__main__":
    serve(sys.argv[1], json.loads(sys.argv[2]))
