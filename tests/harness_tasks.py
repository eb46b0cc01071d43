"""Small tasks of every kind for the harness, written to a folder, and a model that both the harness and we can run."""

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import processors
from torch import Tensor

from megatron.config.load import config_from_flat
from megatron.config.plan import Plan
from megatron.config.resolve import resolve
from megatron.engine.inference import InferenceEngine
from megatron.engine.training import TrainingEngine
from megatron.inference import TrainedModel
from megatron.model.gpt import gpt_layers
from megatron.parallel.grid import ParallelGrid
from megatron.parallel.parameter import load_state
from megatron.tokenizer.base import Tokenizer
from megatron.tokenizer.build import build_tokenizer
from megatron.training.hooks.base import Run
from tests import tiny
from tests.ranks.run import one_rank
from tests.tokenizer_files import TEXT, bpe_file

CONTEXT = 48
QUESTIONS, TEXTS = 14, 5
BEGINNING = "<|begin|>"
WORDS = " ".join(TEXT[:3]).split()

CHOICE = """
task: {name}
tag: own_tag
{data}
output_type: multiple_choice
training_split: train
test_split: test
fewshot_split: train
num_fewshot: 2
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
metadata: {{version: 1}}
"""
TEXT_TASK = """
task: own_text
{data}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: byte_perplexity}}, {{metric: bits_per_byte}}]
metadata: {{version: 1}}
"""
CONTINUATION = """
task: own_continuation
{data}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n", "e", "again"], max_gen_toks: {tokens}, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1}}
"""
GROUP = """
group: own_group
task: [own_choice, own_letters]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
metadata: {version: 1}
"""


def write_tasks(folder: Path, tokens: int = 9) -> Path:
    """A folder of tasks: own_choice, own_letters (own_group, own_tag), own_text and own_continuation of `tokens`."""
    chance = random.Random(5)

    def words(count: int) -> str:
        return " ".join(chance.choice(WORDS) for _ in range(count))

    def question(choices: list[str]) -> dict[str, Any]:
        return {"question": words(chance.randint(2, 12)), "choices": choices, "answer": chance.randrange(len(choices))}

    def task(name: str, template: str, rows: list[dict[str, Any]], **more: object) -> None:
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"{name}_train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[::-1]))
        files = {"test": f"{folder}/{name}.jsonl", "train": f"{folder}/{name}_train.jsonl"}
        settings = json.dumps({"data_files": files, "cache_dir": f"{folder}/cache"})
        data = f"dataset_path: json\ndataset_kwargs: {settings}"
        (folder / f"{name}.yaml").write_text(template.format(name=name, data=data, **more))

    folder.mkdir()
    task("own_choice", CHOICE, [question([words(n) for n in (1, 2, 4)]) for _ in range(QUESTIONS)])
    task("own_letters", CHOICE, [question(["a", "b", "c", "d"]) for _ in range(QUESTIONS)])
    task("own_text", TEXT_TASK, [{"text": words(count)} for count in (0, 1, 5, 40, 90)])
    task("own_continuation", CONTINUATION, [question([""]) for _ in range(QUESTIONS)], tokens=tokens)
    (folder / "own_group.yaml").write_text(GROUP)
    return folder


def requests(folder: Path) -> dict[str, list[Any]]:
    """Requests of each kind as the harness makes them, and some that no task above makes."""
    questions = [json.loads(line) for line in (folder / "own_choice.jsonl").read_text().splitlines()]
    asked = [(row["question"], f" {choice}") for row in questions for choice in row["choices"]]
    asked += [
        (f"{BEGINNING}the fox", " jumps"),
        ("the fox", " jumps over"),  # shares a row with the next, which asks for less of it
        ("the fox jumps", " over"),
        ("", "dog"),
        ("", "<|endoftext|>dog"),
        ("the fox  ", "jumps"),
        ("The quick " * 60, "brown"),
    ]
    texts = [json.loads(line)["text"] for line in (folder / "own_text.jsonl").read_text().splitlines()]
    greedy = {"until": ["\n", "e"], "max_gen_toks": 9}
    continued = [(row["question"], greedy) for row in questions] + [("The quick " * 60, {**greedy, "until": "again"})]
    kinds = {"loglikelihood": asked, "loglikelihood_rolling": [(text,) for text in texts], "generate_until": continued}
    return {kind: [SimpleNamespace(args=one, task_name=kind) for one in all_] for kind, all_ in kinds.items()}


@dataclass(frozen=True)
class Weights:
    """A model's weights, and what it takes to build it on any rank."""

    keys: dict[str, Any]  # of the configuration
    vocabulary: str  # a tokenizer.json
    state: dict[str, Tensor]

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer in `vocabulary`."""
        return build_tokenizer("HFTokenizer", self.vocabulary)

    def plan(self, tensor: int = 1, ranks: int = 1) -> Plan:
        """The plan that the keys give on `ranks` ranks."""
        keys = self.keys | {"model_parallel_size": tensor, "make_vocab_size_divisible_by": 8}
        return resolve(config_from_flat(keys), ranks, self.tokenizer.vocab_size, inference=True)

    def on(self, grid: ParallelGrid) -> TrainedModel:
        """The model, cut over the tensor-parallel ranks of `grid`."""
        plan = self.plan(grid.size("tensor"), grid.size("tensor") * grid.size("data"))
        engine = InferenceEngine(gpt_layers(plan.model, grid, seed=3), grid, torch.float32)
        load_state(engine.module, self.state)
        return TrainedModel(engine, grid, plan, self.tokenizer)


@contextmanager
def training_run(weights: Weights) -> Iterator[Run]:
    """The run that hooks see, with an engine that trains such a model on this process alone, from a seed."""
    with pytest.MonkeyPatch.context() as patch, one_rank() as grid:
        patch.setenv("LOCAL_RANK", "0")  # which DeepSpeed demands
        model = weights.plan().model
        plan = replace(tiny.plan(), model=model)
        engine = TrainingEngine(gpt_layers(model, grid, 5), grid, plan)
        yield replace(tiny.run(engine, plan, 0, 4), tokenizer=weights.tokenizer)


def vocabulary(folder: Path, beginning: bool = False) -> str:
    """A tokenizer.json; with `beginning`, one that puts a token before each text, as Llama's does."""
    from tokenizers import Tokenizer as Backend

    path = bpe_file(folder)
    if beginning:
        backend = Backend.from_file(path)
        backend.add_special_tokens([BEGINNING])
        pieces = [(BEGINNING, backend.token_to_id(BEGINNING))]
        backend.post_processor = processors.TemplateProcessing(single=f"{BEGINNING} $A", special_tokens=pieces)
        backend.save(path)
    return path
