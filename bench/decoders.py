"""The contenders of bench/generate.py: each is a separate process that answers prompts on request.

deepy: the decoding engine, with weights packed as by open_trained_model; keys may name a quantization.
transformers.generate: the same weights in Transformers' GPT-NeoX, greedy, a batch after the other, each padded on the
left to its longest prompt; a batch runs until its last answer is complete.

A question is a line of JSON: prompts (ids), tokens (of each answer) and batch (texts at once). The answer is seconds
and the ids of all answers. Weights are those that every process draws from the same seed. With the key `sharp`, the
head knows the successor of each token by heart, so that the likeliest one leads by more than bf16 rounds off.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from contenders import plan_of

from megatron.config.plan import Plan
from megatron.convert.families.gpt_neox import FAMILY
from megatron.engine.distributed import start
from megatron.engine.inference import InferenceEngine
from megatron.engine.settings import DTYPES
from megatron.generation.engine import Engine, EngineSettings
from megatron.generation.requests import Request
from megatron.inference import TrainedModel
from megatron.model.gpt import gpt_layers
from megatron.tokenizer.base import Tokenizer

SHARPNESS = 20.0  # of the token vectors, over their initial values: a few times what the blocks add to them
Answers = list[list[int]]
Contender = Callable[[Sequence[Sequence[int]], Sequence[int], int], Answers]


class Numbers(Tokenizer):
    """The text of an id is its number."""

    fingerprint = "numbers"

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size, self.end_of_document = vocab_size, vocab_size - 1

    def describe(self) -> str:
        """See `Tokenizer`."""
        return "tokenizer: numbers"

    def token_bytes(self) -> list[bytes]:
        """See `Tokenizer`."""
        return [f" {number}".encode() for number in range(self.vocab_size)]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [[int(word) for word in text.split()] for text in texts]

    def _decode(self, ids: list[int]) -> str:
        return "".join(f" {number}" for number in ids)


def drawn(plan: Plan, sharp: bool) -> InferenceEngine:
    """Our model with its initial weights."""
    grid = start()
    engine = InferenceEngine(gpt_layers(plan.model, grid, seed=1), grid, DTYPES[plan.engine.precision])
    if sharp:
        weights = {parameter.global_name: parameter.data for parameter in engine.module.parameters()}  # type: ignore[attr-defined]
        weights["embedding.weight"] *= SHARPNESS
        weights["head.weight"].copy_(weights["embedding.weight"].roll(1, 0))
    return engine


def deepy(plan: Plan, keys: dict[str, Any]) -> Contender:
    """The decoding engine."""
    engine = drawn(plan, keys["sharp"])
    engine.pack_weights(keys["quantization"])
    model = TrainedModel(engine, engine.grid, plan, Numbers(plan.model.vocab_size))
    engines: dict[int, Engine] = {}

    def answer(prompts: Sequence[Sequence[int]], tokens: Sequence[int], batch: int) -> Answers:
        if batch not in engines:
            engines[batch] = Engine(model, EngineSettings(batch, model.context))
        requests = [Request(tuple(ids), count, ignore_end=True) for ids, count in zip(prompts, tokens, strict=True)]
        return [found.ids for found in engines[batch].run(requests)]

    return answer


def transformers_generate(plan: Plan, keys: dict[str, Any]) -> Contender:
    """Transformers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    engine, parameters = drawn(plan, keys["sharp"]), FAMILY.parameters(plan.model)
    ours = {parameter.global_name: parameter.data for parameter in engine.module.parameters()}  # type: ignore[attr-defined]
    theirs = {
        name: tensor
        for entry in parameters.entries
        for name, tensor in zip(entry.theirs, entry.split([ours[name] for name in entry.ours]), strict=True)
    }
    settings = {name: value for name, value in FAMILY.config(plan.model).items() if name != "architectures"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=engine.dtype).eval()
    model.load_state_dict(theirs)

    def answer(prompts: Sequence[Sequence[int]], tokens: Sequence[int], batch: int) -> Answers:
        answers: Answers = []
        for first in range(0, len(prompts), batch):
            part, counts = prompts[first : first + batch], tokens[first : first + batch]
            width = max(map(len, part))
            ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in part])
            mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in part])
            found = model.generate(
                ids, attention_mask=mask, max_new_tokens=max(counts), do_sample=False, eos_token_id=None, pad_token_id=0
            )
            answers += [row[width : width + count].tolist() for row, count in zip(found, counts, strict=True)]
        return answers

    return answer


def serve(name: str, keys: dict[str, Any]) -> None:
    """Answer each line of standard input."""
    answers, sys.stdout = sys.stdout, sys.stderr
    own = {"sharp": keys.pop("sharp"), "quantization": keys.pop("quantization", None)}
    build = transformers_generate if name == "transformers.generate" else deepy
    contender = build(plan_of(keys), own)
    for line in sys.stdin:
        question = json.loads(line)
        began = time.perf_counter()
        found = contender(question["prompts"], question["tokens"], question["batch"])
        print(json.dumps([time.perf_counter() - began, found]), file=answers, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], json.loads(sys.argv[2]))
