"""evaluate.py with tasks of the harness, as users run it, scores a checkpoint as the harness's own model does."""

import json

import pytest
import transformers
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from megatron.checkpoint.store import load_weights
from megatron.config.load import load_config
from megatron.convert.families import gpt_neox
from megatron.engine.inference import InferenceEngine
from megatron.harness.run import run_harness
from megatron.inference import find_trained_model
from megatron.model.gpt import gpt_layers
from tests.end_to_end.commands import SMALL, json_lines, losses, run
from tests.harness_tasks import CONTEXT, QUESTIONS, vocabulary, write_tasks
from tests.ranks.run import one_rank

pytestmark = pytest.mark.long  # the harness reads 14,000 task files at its start
MODEL = SMALL.replace("tokenizer_type: CharLevelTokenizer", "tokenizer_type: HFTokenizer").replace(
    "seq_length: 32", f"seq_length: {CONTEXT}\nvocab_file: tokenizer.json\ninit_method_std: 0.4"
)
WORDS = (
    "--eval_tasks",
    "own_text",
    "own_group",
    "own_cont*",
    "--include_path",
    "tasks",
    "--eval_results_prefix",
    "own",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A trained model and tasks; nothing may be fetched."""
    folder = tmp_path_factory.mktemp("harness")
    vocabulary(folder)
    write_tasks(folder / "tasks")
    (folder / "small.yml").write_text(MODEL + "save: run\n")
    run(folder, "deepy.py", "train.py", "small", "train_iters=3", "num_gpus=1", "eval_iters=0")
    return folder


@pytest.fixture(scope="module")
def expected(folder):
    """The scores of the harness's own model with the weights of the checkpoint."""

    overrides = [f"vocab_file={folder}/tokenizer.json", f"load={folder}/run"]
    found = find_trained_model(load_config([str(folder / "small.yml")], overrides=overrides))
    plan = found.plan.model
    config = transformers.GPTNeoXConfig(
        vocab_size=plan.vocab_size,
        hidden_size=plan.hidden_size,
        num_hidden_layers=plan.num_layers,
        num_attention_heads=plan.num_attention_heads,
        intermediate_size=plan.ffn_hidden_size,
        max_position_embeddings=CONTEXT,
        rotary_pct=1.0,
        use_parallel_residual=False,
        tie_word_embeddings=plan.tied_embeddings,
    )
    model = transformers.GPTNeoXForCausalLM(config).eval()
    with one_rank() as grid:
        engine = InferenceEngine(gpt_layers(plan, grid, seed=0), grid)
        load_weights(engine, found.checkpoint)
    state = {p.global_name: p.detach()[: p.global_shape[0]] for p in engine.module.parameters()}
    model.load_state_dict(gpt_neox.FAMILY.parameters(plan).to_hugging_face(state), strict=False)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=f"{folder}/tokenizer.json", eos_token="<|endoftext|>"
    )
    manager = TaskManager(include_path=f"{folder}/tasks", include_defaults=False)
    names = ["own_text", "own_group", "own_continuation"]
    return run_harness(
        HFLM(model, tokenizer=tokenizer, device="cpu", batch_size=4, logits_cache=False), names, manager
    )["results"]


@pytest.mark.parametrize("layout", ["model_parallel_size=2", "model_parallel_size=1"])
def test_two_processes_give_the_scores_of_the_harness_own_model(folder, expected, layout, monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    prefix = ("--eval_results_prefix", f"{folder}/{layout}/own")
    said = run(folder, "deepy.py", "evaluate.py", "small", "num_gpus=2", layout, *WORDS, *prefix).stdout
    [path] = (folder / layout).glob("own_eval_results_*.json")
    document = json.loads(path.read_text())
    for task, scores in expected.items():
        for name, value in scores.items():
            same = pytest.approx(value, rel=1e-4) if isinstance(value, float) else value
            assert document["results"][task][name] == same, (task, name)
    assert said.count(f"own_group ({2 * QUESTIONS} documents)") == 2
    assert said.count("written to") == 1
    assert document["config"]["model_args"]["eval_tasks"] == ["own_text", "own_group", "own_cont*"]


def test_a_task_that_is_not_there_ends_all_ranks_with_exit_code_2(folder):
    words = ("--eval_tasks", "lambada_openia", "own_txet", "--include_path", "tasks")
    said = run(folder, "deepy.py", "evaluate.py", "small", "num_gpus=2", *words, expect=2)
    assert said.stderr == (
        'eval_tasks: the harness has no task "lambada_openia". Did you mean "lambada_openai"?\n'
        'eval_tasks: the harness has no task "own_txet". Did you mean "own_text"?\n'
    )


def test_few_shot_and_limit_of_the_command_line_reach_the_harness(folder):
    words = ("--eval_tasks", "own_choice", "--include_path", "tasks", "--num_fewshot", "1", "--limit", "5")
    said = run(folder, "evaluate.py", "small.yml", *words).stdout
    assert f"own_choice (5 of {QUESTIONS} documents)" in said
    assert "|     1|acc " in said


def test_scores_in_training_are_those_of_its_checkpoint_and_leave_the_losses_as_they_are(folder):
    tasks = ("eval_tasks=own_group,own_continuation", "eval_include_path=tasks", "eval_limit=6")
    steps = ("train_iters=4", "eval_iters=0", "hidden_dropout=0.1")
    run(folder, "train.py", "small.yml", *steps, "save=plain")
    run(folder, "train.py", "small.yml", *steps, *tasks, "eval_tasks_interval=2", "save=scored")
    assert losses(folder / "scored") == losses(folder / "plain")
    rows = json_lines(folder / "scored" / "logs" / "metrics.jsonl")
    scores = [{name: row[name] for name in row if name.startswith("tasks/")} for row in rows]
    assert [bool(each) for each in scores] == [False, True, False, True]
    prefix = ("--eval_results_prefix", f"{folder}/scored/own")
    run(folder, "evaluate.py", "small.yml", *tasks, "load=scored", *prefix)
    [path] = (folder / "scored").glob("own_eval_results_*.json")
    found = json.loads(path.read_text())["results"]
    expected = {name: found[name.split("/")[1]][name.split("/")[2] + ",none"] for name in scores[-1]}
    assert scores[-1] == expected and {name.split("/")[1] for name in expected} == set(found)
