"""The harness's scores with our models are those of its own `hf` model with the same weights.

Both compute the same sums in fp32 in another order, so that log-likelihoods of up to 800 nats agree within 1e-4 (half a
unit in the last place of such a sum is 3e-5), and which answer is likeliest is the same.
"""

import json
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer as Backend
from tokenizers import processors
from torch.utils import collect_env

from megatron.config.load import config_from_flat
from megatron.config.schema.run_keys import EvaluationKeys, TokenizerKeys
from megatron.convert.families import gpt_neox, llama
from megatron.convert.model_keys import model_keys
from megatron.errors import RunError, UserError
from megatron.generation.chat import open_chat
from megatron.generation.engine import Engine, EngineSettings
from megatron.generation.requests import Sampling
from megatron.harness.hub import require_datasets
from megatron.harness.language_model import HarnessModel, sampling
from megatron.harness.requests_cache import use_requests_cache
from megatron.harness.results import as_json, as_table, write_samples
from megatron.harness.run import AUTOMATIC_BATCH, engine_settings, evaluate_tasks, run_harness
from megatron.harness.tasks import check_harness, find_tasks, open_tasks
from megatron.tokenizer.build import build_tokenizer
from tests.harness_tasks import BEGINNING, CONTEXT, QUESTIONS, TEXTS, Weights, requests, vocabulary, write_tasks
from tests.models import random_tensor, spread
from tests.ranks.run import one_rank

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 72,
    "max_position_embeddings": CONTEXT,
}
CHAT = """{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}
{%- for m in messages %}{{ '[' + m.role + ']' + (m.content | trim) + '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"""
ALL = ["own_text", "own_continuation", "own_group"]
KINDS = {
    "NeoX": (gpt_neox.FAMILY, transformers.GPTNeoXForCausalLM, transformers.GPTNeoXConfig, {}),
    "Llama, whose texts have a first token": (
        llama.FAMILY,
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig,
        {"bos_token": BEGINNING},
    ),
}


@pytest.fixture(scope="module", autouse=True)
def the_machine_is_described_once():
    """The harness writes a description of the machine to every result, which it takes two seconds to find."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collect_env, "get_pretty_env_info", cache(collect_env.get_pretty_env_info))
        yield


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("harness") / "tasks")


@pytest.fixture(scope="module")
def manager(tasks):
    return TaskManager(include_path=str(tasks), include_defaults=False)


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """Weights for our model, and the harness's own model with the same."""
    return make_pair(tmp_path_factory.mktemp("vocabulary"), request.param)


def make_pair(folder, kind, more_ids=0):
    family, model_class, config_class, special = KINDS[kind]
    path = vocabulary(folder, beginning=bool(special))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=path, eos_token="<|endoftext|>", **special)
    config = config_class(vocab_size=len(tokenizer) + more_ids, **SIZES)
    theirs = model_class(config).eval().requires_grad_(False)
    for index, (name, parameter) in enumerate(theirs.named_parameters()):
        parameter.copy_(spread(name, random_tensor(parameter.shape, index)))
    weights = Weights(model_keys(family.model(config.to_dict())), path, {})
    mapped = family.parameters(weights.plan().model).from_hugging_face(theirs.state_dict())
    # Its cache of logits takes the wrong place where two answers of different lengths end a text alike (0.4.13).
    exact = HFLM(theirs, tokenizer=tokenizer, device="cpu", batch_size=4, logits_cache=False)
    return Weights(weights.keys, path, mapped), exact


def engine(weights, grid):
    """An engine with fewer slots and smaller steps than there is work."""
    return Engine(weights.on(grid), EngineSettings(slots=5, capacity=CONTEXT, chunk=64))


@pytest.fixture
def ours(pair):
    weights, _ = pair
    with one_rank() as grid:
        yield HarnessModel(weights.tokenizer, CONTEXT, 1234, lambda: engine(weights, grid))


def test_questions_as_chats_have_the_scores_of_the_harness_own_model(pair, manager, tmp_path):
    weights, theirs = pair
    (tmp_path / "chat.jinja").write_text(CHAT)
    chat = open_chat(TokenizerKeys(chat_template=f"{tmp_path}/chat.jinja"), weights.tokenizer)
    theirs.tokenizer.chat_template = CHAT
    with one_rank() as grid:
        ours = HarnessModel(weights.tokenizer, CONTEXT, 1234, lambda: engine(weights, grid), chat)
        options = {"apply_chat_template": True, "fewshot_as_multiturn": True, "num_fewshot": 1}
        found, expected = (run_harness(model, ["own_choice"], manager, **options) for model in (ours, theirs))
    assert found["results"]["own_choice"] == pytest.approx(expected["results"]["own_choice"])
    for system in ([{"role": "system", "content": "Be brief."}], []):  # the template rejects one
        for begun in ("The answer is ", "The"):
            chats = [*system, {"role": "user", "content": "Who?"}, {"role": "assistant", "content": begun}]
            for last, wanted in ((3, False), (2, True)):
                asked = chats[: last + len(system) - 1]
                written = [model.apply_chat_template(asked, add_generation_prompt=wanted) for model in (ours, theirs)]
                assert written[0] == written[1]


@pytest.mark.parametrize(("keys", "slots"), [({}, AUTOMATIC_BATCH), ({"eval_batch_size": 5}, 5)])
def test_the_batch_size_is_the_number_of_texts_at_once(keys, slots):
    assert engine_settings(EvaluationKeys(**keys), CONTEXT) == EngineSettings(slots, CONTEXT)


def unopened(**changes):
    """A model that must not be needed."""

    def fail():
        raise AssertionError("the ranks met")

    tokenizer = SimpleNamespace(
        affixes=((), ()), end_of_document=0, decode=lambda ids: "<eod>", encode_openings=lambda texts: [[1]]
    )
    return HarnessModel(tokenizer, changes.get("context", CONTEXT), 1234, fail)


def test_likelihoods_and_continuations_are_those_of_the_harness_own_model(ours, pair, tasks):
    _, theirs = pair
    asked = requests(tasks)
    found, expected = (model.loglikelihood(asked["loglikelihood"]) for model in (ours, theirs))
    assert [nats for nats, _ in found] == pytest.approx([nats for nats, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    rolling = asked["loglikelihood_rolling"]
    assert ours.loglikelihood_rolling(rolling) == pytest.approx(theirs.loglikelihood_rolling(rolling), abs=1e-4)
    texts = ours.generate_until(asked["generate_until"])
    assert texts == theirs.generate_until(asked["generate_until"])
    assert len(set(texts)) > QUESTIONS / 2


def test_likelihoods_count_ids_that_the_model_has_and_the_tokenizer_has_not(tasks, tmp_path):
    weights, theirs = make_pair(tmp_path, "NeoX", more_ids=3)
    asked = requests(tasks)["loglikelihood"][:6]
    with one_rank() as grid:
        found = HarnessModel(weights.tokenizer, CONTEXT, 1234, lambda: engine(weights, grid)).loglikelihood(asked)
    assert [nats for nats, _ in found] == pytest.approx([nats for nats, _ in theirs.loglikelihood(asked)], abs=1e-4)


def test_a_context_of_spaces_counts_as_none(ours):
    """The harness's own model fails there."""
    asked = [SimpleNamespace(args=(context, continuation)) for context, continuation in ((" ", "dog"), ("", " dog"))]
    one, other = ours.loglikelihood(asked)
    assert one == other


def test_tasks_have_the_scores_of_the_harness_own_model(ours, pair, manager):
    _, theirs = pair
    found, expected = (run_harness(model, ALL, manager) for model in (ours, theirs))
    assert set(found["results"]) == {*ALL, "own_choice", "own_letters"}
    for task, scores in expected["results"].items():
        close = 1e-4 if task == "own_text" else 0  # a perplexity is the exponential of nats per word or byte
        for name, value in scores.items():
            same = pytest.approx(value, rel=close) if isinstance(value, float) else value
            assert found["results"][task][name] == same, (task, name)
    for part in ("groups", "n-shot", "n-samples", "versions", "configs", "group_subtasks", "higher_is_better"):
        assert json.loads(as_json({"": found[part]})) == json.loads(as_json({"": expected[part]}))


def test_few_shot_and_limit_reach_the_harness_and_the_counts_stand_beside_the_scores(ours, manager):
    all_, few = (run_harness(ours, ALL, manager, **options) for options in ({}, {"num_fewshot": 1, "limit": 3}))
    assert all_["n-shot"]["own_choice"] == 2 and few["n-shot"]["own_choice"] == 1
    said = as_table(all_)
    for name, count in (("own_choice", QUESTIONS), ("own_text", TEXTS), ("own_group", 2 * QUESTIONS)):
        assert f"{name} ({count} documents)" in said
    said = as_table(few)
    assert f"own_choice (3 of {QUESTIONS} documents)" in said and f"own_group (6 of {2 * QUESTIONS} documents)" in said
    assert run_harness(ours, ["own_text"], manager, limit=0.5)["n-samples"]["own_text"]["effective"] == 3


def test_a_failure_after_the_ranks_met_is_no_wrong_command(ours, manager, monkeypatch):
    assert ours.engine
    monkeypatch.setattr(ours, "_context", 9)
    with pytest.raises(RunError, match="own_continuation wants up to 9 tokens"):
        run_harness(ours, ["own_continuation"], manager)


def test_tasks_are_found_by_name_and_pattern_and_the_nearest_is_named(manager):
    assert find_tasks(["own_text", "own_t*"], manager) == ["own_text", "own_tag"]
    with pytest.raises(UserError) as raised:
        find_tasks(["own_texts", "nothing_of_the_kind", "own_group"], manager)
    assert raised.value.problems == (
        'eval_tasks: the harness has no task "own_texts". Did you mean "own_text"?',
        'eval_tasks: the harness has no task "nothing_of_the_kind". eval_include_path names a folder with tasks of '
        "your own.",
    )


def test_a_folder_of_tasks_that_is_not_there_is_named(tmp_path):
    check_harness(str(tmp_path))
    with pytest.raises(UserError, match=r"eval_include_path \(.*/none\) is not a folder"):
        check_harness(f"{tmp_path}/none")


def test_without_the_harness_the_way_to_get_it_is_said(monkeypatch):
    monkeypatch.setattr("megatron.harness.tasks.find_spec", lambda name: None)
    keys = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "seq_length": 8, "eval_tasks": ["piqa"]}
    with pytest.raises(UserError, match="pip install"):
        evaluate_tasks(config_from_flat(keys), None, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("max_gen_toks: 9", "max_gen_toks: 48"), "own_continuation wants up to 48 tokens"),
        (("do_sample: false", "num_beams: 4"), "own_continuation asks for num_beams"),
        (("own_continuation.jsonl", "missing.jsonl"), "FileNotFoundError: .*missing.jsonl"),
        (("dataset_path: json", "dataset_path: nobody/nothing"), "eval_tasks: .*nobody/nothing"),
    ],
)
def test_what_is_wrong_with_a_task_is_said_before_the_ranks_meet(tmp_path, change, message, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    folder = write_tasks(tmp_path / "tasks")
    file = folder / "own_continuation.yaml"
    file.write_text(file.read_text().replace(*change))
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    with pytest.raises(UserError, match=message):
        run_harness(unopened(), ["own_continuation"], manager)


def test_an_answer_longer_than_the_context_is_refused():
    model = unopened(context=4)
    with pytest.raises(UserError, match="an answer of 5 tokens cannot be scored"):
        model._loglikelihood_tokens([(("question", "answer"), [1], [1, 2, 3, 4, 5])])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, Sampling()),
        ({"temperature": 0.0, "do_sample": False}, Sampling()),
        ({"temperature": 0.7}, Sampling(temperature=0.7)),
        ({"temperature": 0.7, "do_sample": False}, Sampling()),
        (
            {"do_sample": True, "temperature": 0.2, "top_p": 0.95, "top_k": 7},
            Sampling(temperature=0.2, top_k=7, top_p=0.95),
        ),
    ],
)
def test_sampling_is_what_a_task_asks_for(options, expected):
    assert sampling(options) == expected


ONE_TASK = """
task: mine
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}]
"""
DOCUMENT = {"question": "x", "choices": ["a", "b"], "answer": 0}


@pytest.mark.parametrize(
    ("documents", "change", "reason"),
    [
        ([], ("", ""), "its dataset has no documents"),
        ([DOCUMENT | {"choices": ["", "b"]}], ("", ""), "a document has an empty choice, or a target"),
        ([DOCUMENT | {"answer": 7}], ("", ""), "a document has an empty choice, or a target that is not among"),
        ([DOCUMENT], ("{{question}}", "{{gone}}"), "a template uses a field that a document lacks .*'gone' is undef"),
        ([DOCUMENT], ("{{question}}", "{{question"), "a template cannot be parsed"),
        ([DOCUMENT], ("test_split: test", "test_split: gone"), r"the harness does not have what it names \(gone\)"),
        ([DOCUMENT], ("metric: acc", "metric: gone"), "it names an unknown metric or filter"),
        (["no JSON"], ("", ""), "its dataset cannot be read .*JSON parse error"),
        ([DOCUMENT], ("metric_list", "other_key: 1\nmetric_list"), "the harness cannot use it .*other_key"),
    ],
)
def test_a_task_that_cannot_be_used_is_named_with_the_reason(tmp_path, documents, change, reason, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "mine.jsonl").write_text(
        "\n".join(each if isinstance(each, str) else json.dumps(each) for each in documents)
    )
    content = ONE_TASK.replace("FILE", str(tmp_path / "mine.jsonl")).replace(*change)
    (tmp_path / "mine.yaml").write_text(content)
    (tmp_path / "group.yaml").write_text("group: ours\ntask: [mine]\n")
    manager = open_tasks(str(tmp_path), include_defaults=False)
    for asked in ("mine", "ours"):
        with pytest.raises(UserError) as raised:
            run_harness(unopened(), [asked], manager)
        [line] = raised.value.problems
        assert re.match(f"eval_tasks: mine: .*({reason})", line) and "\n" not in line


def test_a_group_with_a_member_that_is_not_there_names_it(tmp_path):
    (tmp_path / "group.yaml").write_text("group: ours\ntask: [gone]\n")
    manager = open_tasks(str(tmp_path), include_defaults=False)
    with pytest.raises(UserError, match="eval_tasks: ours names gone, which the harness does not have"):
        run_harness(unopened(), ["ours"], manager)


def test_a_task_file_that_is_not_yaml_is_named_where_its_task_is_asked_for(tmp_path):
    (tmp_path / "mine.yaml").write_text("task: [mine\n x: :\n")
    with pytest.raises(UserError) as raised:
        find_tasks(["mine"], open_tasks(str(tmp_path), include_defaults=False))
    assert raised.value.problems[1].startswith(f"eval_include_path: {tmp_path}/mine.yaml, line 2: not YAML")


def test_tasks_may_be_separated_by_commas(manager):
    assert find_tasks(["own_text,own_t*", " own_group , "], manager) == ["own_text", "own_tag", "own_group"]
    with pytest.raises(UserError, match="names no task"):
        find_tasks([","], manager)


def test_contexts_do_not_end_with_the_token_that_a_template_puts_at_the_end(tmp_path):
    path = Path(vocabulary(tmp_path))
    backend = Backend.from_file(str(path))
    backend.post_processor = processors.TemplateProcessing("$A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)])
    backend.save(str(path))
    tokenizer = build_tokenizer("HFTokenizer", str(path))
    model = HarnessModel(tokenizer, CONTEXT, 1234, lambda: None)
    assert tokenizer.encode("dog")[-1] == 0
    assert model.tok_encode("dog") == tokenizer.encode("dog")[:-1]
    context, answer = model._encode_pair("the", " dog")
    assert 0 not in [*context, *answer] and tokenizer.decode([*context, *answer]) == "the dog"


NEWS = """
task: news
dataset_path: nobody/news
test_split: test
output_type: loglikelihood_rolling
doc_to_target: text
"""


def test_without_a_network_tasks_on_the_hub_are_named_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.load_dataset", None)
    folder = write_tasks(tmp_path / "tasks")
    (folder / "news.yaml").write_text(NEWS)
    address = NEWS.replace("news\n", "far\n").replace("nobody/far", "json")
    (folder / "far.yaml").write_text(address + "dataset_kwargs: {data_files: {test: 'https://example.org/a.json'}}\n")
    (folder / "here.yaml").write_text(NEWS.replace("task: news", "task: here").replace("nobody/news", str(tmp_path)))
    (folder / "mixed.yaml").write_text(
        "group: mixed\ntask: [own_choice, here, {group: inner, task: [own_text]}, news]\n"
    )
    manager = open_tasks(str(folder), include_defaults=False)
    require_datasets([*ALL, "here", "own_tag"], manager)
    with pytest.raises(UserError) as raised:
        require_datasets(["mixed", "far"], manager)
    needed = {"far": "https://example.org/a.json", "news": "nobody/news"}
    for (task, dataset), problem in zip(needed.items(), raised.value.problems, strict=True):
        assert problem.startswith(
            f"eval_tasks: {task} needs {dataset} from the Hugging Face hub, which cannot be reached"
        )
    (tmp_path / "cache/nobody___news/default/0.0.0/abc").mkdir(parents=True)
    require_datasets(["mixed"], manager)


def test_samples_are_lines_of_a_file_for_each_task(ours, manager, tmp_path):
    results = run_harness(ours, ["own_group"], manager, limit=3, log_samples=True)
    [choice, letters] = write_samples(results, tmp_path / "own_eval_results_1.json")
    assert [choice.name, letters.name] == [
        "own_eval_samples_own_choice_1.jsonl",
        "own_eval_samples_own_letters_1.jsonl",
    ]
    rows = [json.loads(line) for line in choice.read_text().splitlines()]
    assert [row["doc_id"] for row in rows] == [0, 1, 2]
    assert sum(row["acc"] for row in rows) / 3 == results["results"]["own_choice"]["acc,none"]
    assert "samples" not in results and as_json(results)


def test_requests_are_kept_until_the_task_or_its_documents_change(ours, tasks, tmp_path, monkeypatch):
    monkeypatch.setattr("lm_eval.caching.cache.PATH", None)  # set back after the test
    folder = write_tasks(tmp_path / "tasks")
    built = []

    def scores():
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        use_requests_cache(f"{tmp_path}/requests", ["own_choice"], manager)
        kept = len(list((tmp_path / "requests").rglob("*.pickle")))
        found = run_harness(ours, ["own_choice"], manager, cache_requests=True)["results"]
        built.append(len(list((tmp_path / "requests").rglob("*.pickle"))) - kept)
        return found

    first = scores()
    assert scores() == first and built == [1, 0]
    lines = (folder / "own_choice.jsonl").read_text().splitlines(keepends=True)
    (folder / "own_choice.jsonl").write_text("".join(lines[:5]))
    assert scores() != first and built == [1, 0, 1]
