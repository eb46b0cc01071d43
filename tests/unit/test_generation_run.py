"""Jobs of generate.py with a real model: texts in order, whatever the batch, and after an interruption."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron.config.load import config_from_flat
from megatron.config.schema.generation_keys import AnswerKeys, GenerationKeys
from megatron.config.schema.run_keys import TokenizerKeys
from megatron.errors import UserError
from megatron.generation.engine import Engine, EngineSettings
from megatron.generation.prompts import Prompt
from megatron.generation.records import SamplesFile
from megatron.generation.run import Job, generate, ignored_at_a_prompt, prompt_source, write_samples
from megatron.generation.samples import SampleMaker
from tests.trained import one_rank_model

TEXTS = ["a", "be", "see", "d", "e f"]
KEYS = AnswerKeys(maximum_tokens=6, top_k=20, num_samples=2)


@pytest.fixture(scope="module")
def model():
    with one_rank_model() as model:
        yield model


def job_of(model, path: Path, texts: list[str], settings: AnswerKeys) -> Job:
    maker = SampleMaker(model.tokenizer, model.context, seed=1, keys=TokenizerKeys())
    # some of them much longer than others, so that they do not finish in order
    kept = [settings.model_copy(update={"maximum_tokens": 1 + 5 * (n % 3)}) for n in range(len(texts))]
    samples = maker.samples([Prompt("", keys, text) for text, keys in zip(texts, kept, strict=True)])
    identities = [sample.identity("model") for sample in samples]
    return Job(samples, identities, SamplesFile(path, identities), model.tokenizer)


def write(model, path: Path, slots: int, texts: list[str] = TEXTS, settings: AnswerKeys = KEYS) -> list[dict]:
    job = job_of(model, path, texts, settings)
    with job.output:
        write_samples(Engine(model, EngineSettings(slots, model.context)), job)
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_texts_are_written_in_the_order_of_the_prompts_whatever_the_batch(model, tmp_path):
    two, eight = (write(model, tmp_path / f"{slots}.txt", slots) for slots in (2, 8))
    assert [(row["prompt"], row["sample"]) for row in two] == [(n, sample) for n in range(5) for sample in range(2)]
    assert [row["context"] for row in two[::2]] == TEXTS
    assert [row["text"] for row in two] == [row["text"] for row in eight]
    assert two[4]["text"] != two[5]["text"]


def test_a_job_whose_output_is_complete_loads_no_model(model, tmp_path, monkeypatch, capsys):
    path = tmp_path / "out.txt"
    keys = {"sample_input_file": str(tmp_path / "prompts.txt"), "sample_output_file": str(path), "maximum_tokens": 2}
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    config = config_from_flat(keys | {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "seq_length": 8})
    found = SimpleNamespace(checkpoint=tmp_path / "run", tokenizer=model.tokenizer, plan=model.plan)
    loaded = []
    module = "megatron.generation.run"
    monkeypatch.setattr(f"{module}.find_trained_model", lambda config: found)
    monkeypatch.setattr(f"{module}.model_identity", lambda found: "model")
    monkeypatch.setattr(f"{module}.start_ranks", lambda found, backend: model.grid)
    monkeypatch.setattr(f"{module}.load_trained_model", lambda found, grid: loaded.append(grid) or model)
    monkeypatch.setattr(f"{module}.stop", lambda: None)  # the group is the fixture's
    generate(config)
    texts = path.read_text()
    path.write_text(texts + '{"context": "of a run that was ki')
    generate(config)
    assert (len(loaded), path.read_text()) == (1, texts)
    assert f"all 2 texts are in {path} already: nothing to do\n" in capsys.readouterr().out


def test_each_text_is_there_as_soon_as_those_before_it_are(model, tmp_path, monkeypatch):
    path, seen = tmp_path / "out.txt", []
    step = Engine.step

    def watched(engine: Engine):
        seen.append(len(path.read_text().splitlines()))
        return step(engine)

    monkeypatch.setattr(Engine, "step", watched)
    write(model, path, 2)
    assert seen == sorted(seen) and len(set(seen)) > 3


def test_a_job_that_was_interrupted_gives_the_texts_of_one_that_was_not(model, tmp_path):
    whole = write(model, tmp_path / "whole.txt", 4)
    lines = (tmp_path / "whole.txt").read_text().splitlines(keepends=True)
    path = tmp_path / "part.txt"
    path.write_text("".join(lines[:3]) + lines[3][:20])
    rows = write(model, path, 4)
    assert path.read_text().startswith("".join(lines[:3]))
    assert [row["text"] for row in rows] == [row["text"] for row in whole]
    assert write(model, path, 4) == rows


def test_the_duration_of_a_text_has_the_reading_of_its_prompt_in_chunks(model, tmp_path, monkeypatch):
    job = job_of(model, tmp_path / "out.txt", ["twelve bytes"], AnswerKeys(ignore_end_of_document=True))
    rounds, step = [0], Engine.step

    def counted(engine: Engine):
        rounds[0] += 1
        return step(engine)

    monkeypatch.setattr(Engine, "step", counted)
    monkeypatch.setattr("megatron.generation.text.perf_counter", lambda: float(rounds[0]))
    with job.output:
        write_samples(Engine(model, EngineSettings(1, model.context, chunk=4)), job)
    [row] = [json.loads(line) for line in (tmp_path / "out.txt").read_text().splitlines()]
    assert (row["length"], row["duration_seconds"]) == (1, 2.0)  # three rounds read four bytes each


def test_log_probabilities_and_logits_are_written_if_asked_for(model, tmp_path):
    settings = AnswerKeys(logprobs=2, return_logits=True)
    for row in write(model, tmp_path / "out.txt", 2, ["a", "b"], settings):
        assert len(row["logits"]) == len(row["logprobs"]) == row["length"] > 0
        for token, logits in zip(row["logprobs"], row["logits"], strict=True):
            assert len(logits) == model.tokenizer.vocab_size
            assert logits.index(max(logits)) == token["id"] == token["top_logprobs"][0]["id"]
            assert token["logprob"] == token["top_logprobs"][0]["logprob"] > token["top_logprobs"][1]["logprob"]


def test_prompts_of_one_job_may_be_searched_with_beams_and_held_to_an_expression(model, tmp_path):
    maker = SampleMaker(model.tokenizer, model.context, seed=1, keys=TokenizerKeys())
    settings = (AnswerKeys(num_beams=3, maximum_tokens=4), AnswerKeys(regex="[ab]{3}"), AnswerKeys(maximum_tokens=2))
    samples = maker.samples([Prompt("", keys, "a") for keys in settings])
    identities = [sample.identity("") for sample in samples]
    with SamplesFile(tmp_path / "out.txt", identities) as output:
        write_samples(
            Engine(model, EngineSettings(3, model.context)), Job(samples, identities, output, model.tokenizer)
        )
    rows = [json.loads(line) for line in (tmp_path / "out.txt").read_text().splitlines()]
    assert [row["length"] for row in rows] == [4, 3, 2]
    assert set(rows[1]["text"]) <= {"a", "b"} and rows[1]["reason"] == "end"


@pytest.mark.parametrize(
    ("keys", "source"),
    [
        ({}, "unconditional"),
        ({"sample_input_file": "a.txt"}, "input-file"),
        ({"text_gen_type": "interactive"}, "interactive"),
        ({"text_gen_type": "unconditional", "sample_input_file": "a.txt"}, "unconditional"),
    ],
)
def test_prompts_come_from_where_the_keys_say(keys, source):
    assert prompt_source(GenerationKeys(**keys)) == source


def test_what_has_no_effect_where_prompts_are_typed_in_is_said():
    keys = {"text_gen_type": "interactive", "temperature": 0.5}
    assert ignored_at_a_prompt(GenerationKeys(**keys)) == []
    assert ignored_at_a_prompt(GenerationKeys(**keys, num_samples=4, return_logits=True, sample_output_file="o")) == [
        "num_samples (4) has no effect: text_gen_type is interactive, each prompt gets one text",
        "return_logits (True) has no effect: text_gen_type is interactive, the text alone is shown",
        "sample_output_file (o) has no effect: text_gen_type is interactive, texts are shown, not written",
    ]


def test_output_does_not_overwrite_prompts_vocabulary_or_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prompts, checkpoint = tmp_path / "prompts.txt", tmp_path / "run" / "step7"
    prompts.write_text("one\n")
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights").write_bytes(b"w")
    (tmp_path / "link").symlink_to(prompts)
    found = SimpleNamespace(
        checkpoint=checkpoint, tokenizer=None, plan=SimpleNamespace(model=SimpleNamespace(max_position_embeddings=8))
    )
    monkeypatch.setattr("megatron.generation.run.find_trained_model", lambda config: found)
    sizes = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "seq_length": 8}
    for output, name in (
        (str(prompts), "sample_input_file"),
        ("./prompts.txt", "sample_input_file"),
        ("link", "sample_input_file"),
        ("run/../run/step7/weights", "weights of the checkpoint"),
    ):
        keys = sizes | {"sample_input_file": str(prompts), "sample_output_file": output}
        with pytest.raises(UserError, match=rf"sample_output_file \({output}\) is {name} "):
            generate(config_from_flat(keys))
    assert prompts.read_text() == "one\n" and (checkpoint / "weights").read_bytes() == b"w"
