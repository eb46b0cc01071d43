"""Decoding with a key-value cache against the memory bandwidth of the device.

    python -m bench.gpu_steps.decoding [--quick]

A token reads every weight once, except for the embedding, of which it reads a row; so the time of a token is at least
those bytes over the bandwidth, which a copy of a large tensor measures (it reads and writes each byte).
"""

import argparse
import sys

import torch
from contenders import plan_of

from bench.gpu_steps.common import DEVICE, free, keys_of, record, seconds_of
from megatron.config.load import config_from_flat
from megatron.config.parameter_counts import embedding_parameters, parameter_count
from megatron.config.plan import ModelPlan
from megatron.engine.distributed import start, stop
from megatron.engine.inference import InferenceEngine
from megatron.generation.engine import Engine, EngineSettings
from megatron.generation.requests import Answer, Request
from megatron.inference import TrainedModel
from megatron.model.gpt import gpt_layers
from megatron.resources import open_tokenizer

PROMPT = 128


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    bandwidth = copy_bandwidth(2**26 if quick else 2**31)
    print(f"Bandwidth of a copy: {bandwidth / 1e9:,.0f} GB/s\n")
    print("| shape | texts | ms a token [prompt, ms] | tokens/s | weights read, GB/s | share of the copy |")
    print("|---|---|---|---|---|---|", flush=True)
    for name in ("neox-125M", "neox-1.3B"):
        plan = plan_of(keys_of(name, quick))
        grid = start()
        engine = InferenceEngine(gpt_layers(plan.model, grid, 1), grid, torch.bfloat16)
        tokenizer = open_tokenizer(config_from_flat(keys_of(name, quick) | {"tokenizer_type": "CharLevelTokenizer"}))
        model = TrainedModel(engine, grid, plan, tokenizer)
        label = "tiny" if quick else name
        for texts in (1, 16):
            first, each = decode(model, texts, 8 if quick else 64)
            rate = bytes_per_token(plan.model) / each
            print(
                f"| {label} | {texts} | {each * 1e3:.2f} [{PROMPT}, {first * 1e3:.1f}] | {texts / each:,.0f} "
                f"| {rate / 1e9:,.0f} | {rate / bandwidth:.0%} |", flush=True,
            )  # fmt: skip
            record(
                shape=label, texts=texts, seconds_a_token=each, prompt_seconds=first, bandwidth=bandwidth,
                share=round(rate / bandwidth, 4),
            )  # fmt: skip
        del engine, model
        stop()
        free()
        if quick:
            break
    return 0


def decode(model: TrainedModel, texts: int, tokens: int) -> tuple[float, float]:
    """Seconds of the prompt with its first token, and of each further token."""
    draw = torch.Generator().manual_seed(1)
    length = min(PROMPT, model.context // 2)
    engine = Engine(model, EngineSettings(texts, length + tokens))

    def generate(count: int) -> float:
        """Seconds of greedy decoding, of as many tokens for each text."""
        found: list[Answer] = []
        # others each time: the slots still hold what they have read
        prompts = torch.randint(0, model.plan.model.vocab_size, (texts, length), generator=draw).tolist()
        requests = [Request(tuple(ids), count, ignore_end=True) for ids in prompts]
        seconds = seconds_of(lambda: found.extend(engine.run(requests)))
        assert all(len(answer.tokens) == count for answer in found)
        return seconds

    generate(tokens)  # kernels are chosen and loaded, and steps recorded
    first = generate(1)
    return first, (generate(tokens) - first) / (tokens - 1)


def bytes_per_token(model: ModelPlan) -> int:
    """Bytes of the bf16 weights that a token reads; a tied embedding is read whole by the head."""
    read = parameter_count(model) - (0 if model.tied_embeddings else embedding_parameters(model))
    return 2 * read


def copy_bandwidth(size: int) -> float:
    """Bytes per second that the device's memory reads and writes, in the best of ten copies of `size` bytes."""
    source = torch.empty(size, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * size / min(seconds_of(lambda: target.copy_(source)) for _ in range(10))


if __name__ == "__main__":
    sys.exit(main())
