"""A multiple-choice task of the lm-evaluation-harness with our model, compared with the harness's own `hf` model.

    python bench/harness.py [--questions 500] [--rounds 3] [--precision fp32] [--batch-sizes 8 32] [--quick] [--write]

The task is made up: questions of about 100 to 200 tokens with four answers of a few tokens each, which are 2,000
requests of 500 questions. Both contenders score the same weights, a GPT-NeoX of 6 layers of 512 with a vocabulary of
50,304, written by transformers and read by each. Each is a process that runs the whole evaluation on request, prompts
and metrics included. They run alternately, so that other load affects both; a ratio is computed in each round, and its
median and spread over the rounds are printed. `hf` (HFLM, what `lm_eval --model hf` runs) gets the best of
--batch-sizes, tried on a few questions. Scores are compared: the accuracy, and the likelihood of every answer.
--write writes the table into bench/results/. The last line is one JSON object.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from train_step import machine, ratio  # noqa: E402

from megatron.launch.protocol.environment import rank_environment  # noqa: E402

VOCABULARY, CONTEXT = 50304, 512
WARM_UP = 4  # questions
TASK = """
task: bench
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/questions.jsonl}, cache_dir: FOLDER/cache}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
Evaluation = Callable[[int | None], dict[str, Any]]  # of so many questions; None: all


def prepare(folder: Path, questions: int, precision: str) -> None:
    """Weights, a tokenizer, and the task in `folder`."""
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

    from megatron.tokenizer.train import train_byte_level_bpe

    text = "\n".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))
    words = sorted({word for word in text.split() if word.isalpha()})
    train_byte_level_bpe(text.splitlines(), 8000, str(folder / "tokenizer.json"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{folder}/tokenizer.json", eos_token="<|endoftext|>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    sizes = {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 2048}
    config = GPTNeoXConfig(**sizes, vocab_size=VOCABULARY, max_position_embeddings=CONTEXT, initializer_range=0.1)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    GPTNeoXForCausalLM(config).to(dtype).save_pretrained(folder)
    chance = random.Random(1)
    rows = [
        {
            "question": " ".join(chance.choices(words, k=chance.randint(40, 80))),
            "choices": [" ".join(chance.choices(words, k=chance.randint(2, 5))) for _ in range(4)],
            "answer": chance.randrange(4),
        }
        for _ in range(questions)
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "model.yml").write_text(f"load: hf:{folder}\neval_tasks: [bench]\n")
    (folder / "bench.yaml").write_text(TASK.replace("FOLDER", str(folder)))


def deepy(folder: Path, precision: str, options: str) -> Evaluation:
    """Our model, as evaluate.py opens it."""
    from lm_eval.tasks import TaskManager

    from megatron.config.load import load_config
    from megatron.harness.run import harness_model, run_harness
    from megatron.inference import find_trained_model

    keys = [f"precision={'bfloat16' if precision == 'bf16' else 'fp32'}", *options.split()]
    config = load_config([str(folder / "model.yml")], overrides=keys, script="evaluate.py")
    model = harness_model(config, find_trained_model(config))
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return lambda limit: run_harness(model, ["bench"], manager, log_samples=True, limit=limit)


def hf(folder: Path, precision: str, options: str) -> Evaluation:
    """The harness's own model. options: the batch size."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    dtype = "bfloat16" if precision == "bf16" else "float32"
    model = HFLM(str(folder), dtype=dtype, device="cpu", batch_size=int(options))
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return lambda limit: simple_evaluate(model, tasks=["bench"], task_manager=manager, log_samples=True, limit=limit)


def serve(name: str, folder: Path, precision: str, options: str) -> None:
    """For each line of the input, a number of questions or null, answer with seconds, accuracy and likelihoods."""
    answers, sys.stdout = sys.stdout, sys.stderr
    evaluate = {"deepy": deepy, "hf": hf}[name](folder, precision, options)
    for line in sys.stdin:
        began = time.perf_counter()
        results = evaluate(json.loads(line))
        seconds = time.perf_counter() - began
        nats = [float(each[0][0]) for row in results["samples"]["bench"] for each in row["resps"]]
        print(json.dumps([seconds, results["results"]["bench"]["acc,none"], nats]), file=answers, flush=True)


class Contender:
    """A process that evaluates on request."""

    def __init__(self, name: str, folder: Path, precision: str, options: str) -> None:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
        if name == "deepy":
            environment = rank_environment(environment, "cpu", os.cpu_count() or 1)
        command = [sys.executable, __file__, "--serve", name, str(folder), precision, options]
        self.process = subprocess.Popen(
            command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )  # fmt: skip

    def evaluate(self, questions: int | None = None) -> tuple[float, float, list[float]]:
        """Seconds, accuracy, and the likelihood of each answer in nats."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{json.dumps(questions)}\n")
        self.process.stdin.flush()
        seconds, accuracy, nats = json.loads(self.process.stdout.readline())
        return seconds, accuracy, nats

    def end(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Figures of all rounds."""
    tried = {}
    for size in arguments.batch_sizes if len(arguments.batch_sizes) > 1 else ():
        contender = Contender("hf", folder, arguments.precision, str(size))
        contender.evaluate(WARM_UP)
        tried[size] = contender.evaluate(4 * WARM_UP)[0]
        contender.end()
        print(f"  hf, batch size {size}: {tried[size]:.1f} s", flush=True)
    best = min(tried, key=lambda size: tried[size], default=arguments.batch_sizes[0])
    contenders = {
        name: Contender(name, folder, arguments.precision, options)
        for name, options in (("deepy", arguments.options), ("hf", str(best)))
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    found: dict[str, tuple[float, list[float]]] = {}
    try:
        for contender in contenders.values():
            contender.evaluate(WARM_UP)
        for number in range(arguments.rounds):
            for name in list(contenders)[:: 1 if number % 2 else -1]:
                took, *found[name] = contenders[name].evaluate()
                seconds[name].append(took)
                print(f"  {name}: {took:.1f} s", flush=True)
    finally:
        for contender in contenders.values():
            contender.end()
    (ours, our_nats), (theirs, their_nats) = found["deepy"], found["hf"]
    return {
        "seconds": {name: [round(each, 2) for each in values] for name, values in seconds.items()},
        "hf_batch_size": best,
        "over_hf": ratio(seconds["hf"], seconds["deepy"]),
        "accuracy": [ours, theirs],
        "largest_difference_nats": round(max(abs(a - b) for a, b in zip(our_nats, their_nats, strict=True)), 5),
        "largest_likelihood_nats": round(max(map(abs, their_nats)), 1),
    }


def table(figures: dict[str, Any], requests: int) -> str:
    """The figures in Markdown."""
    lines = ["", "| | s for the task [least, most] | requests/s |", "|---|---|---|"]
    for name, values in figures["seconds"].items():
        median = sorted(values)[len(values) // 2]
        label = f"hf, batch size {figures['hf_batch_size']}" if name == "hf" else name
        lines.append(f"| {label} | {median:.1f} [{min(values):.1f}, {max(values):.1f}] | {requests / median:.1f} |")
    over, accuracy = figures["over_hf"], figures["accuracy"]
    differ, largest = figures["largest_difference_nats"], figures["largest_likelihood_nats"]
    lines += [
        "",
        f"Over `hf`: {over['median']} {over['spread']}. Accuracy {accuracy[0]} and {accuracy[1]}; likelihoods",
    ]
    return "\n".join([*lines, f"of up to {largest} nats differ by {differ} at most."])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="fp32")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 32], help="of hf, the best of which counts")
    parser.add_argument("--options", default="", help='more keys of our configuration, as "key=value key=value"')
    parser.add_argument("--quick", action="store_true", help="50 questions, one round")
    parser.add_argument("--write", action="store_true", help="write the table into bench/results/")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.questions, arguments.rounds = 50, 1
    head = f"{machine()}, {arguments.precision}, {4 * arguments.questions:,} requests"
    print(head, flush=True)
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name), arguments.questions, arguments.precision)
        figures = measure(Path(name), arguments)
    print(table(figures, 4 * arguments.questions))
    if arguments.write:
        path = ROOT / "bench" / "results" / f"harness-{datetime.now(UTC).date()}-cpu.md"
        with path.open("a") as file:  # keep earlier runs of the day
            file.write(f"# Tasks of the harness\n\n{head}; `python {' '.join(sys.argv)}`\n")
            file.write(table(figures, 4 * arguments.questions) + "\n\n")
        print(f"written: {path.relative_to(ROOT)}")
    print(json.dumps(figures))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], Path(sys.argv[3]), *sys.argv[4:])
    else:
        main()
