"""Instruction data: what is a label and what is not."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors

from megatron.data.build import Mixture, build_sources
from megatron.data.indexed import IndexedDataset
from megatron.data.windows import NOT_A_LABEL
from megatron.errors import RunError, UserError
from megatron.preprocessing.fast_encoding.checked import EncoderSettings
from megatron.preprocessing.fast_encoding.comparison import REFERENCE_ALONE, Comparison, choose
from megatron.preprocessing.job import Job, Texts, Totals
from megatron.preprocessing.pipeline import preprocess
from megatron.preprocessing.record_formats import Chat, PromptAndCompletion, chat_template
from megatron.tokenizer.build import TokenizerSettings
from tests.tokenizer_files import TEXT, bpe_file
from tests.unit.test_preprocessing_resume import Killed, stop_after

END = 256
BYTES = EncoderSettings(TokenizerSettings("CharLevelTokenizer"))
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }};{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def job(folder: Path, records: list, form: PromptAndCompletion | Chat, **settings: Any) -> Job:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n")
    return Job((str(folder / "a.jsonl"),), str(folder / "out"), form.keys, form, **settings)


def write(folder: Path, records: list, form: PromptAndCompletion | Chat, **settings: Any) -> Totals:
    return preprocess(job(folder, records, form, **settings), BYTES)


def read(folder: Path) -> list[tuple[str, str]]:
    """Each document, and it again with "_" where nothing is learned; the end of a document is "$"."""
    text, labels = (IndexedDataset(str(folder / f"out_{kind}_document")) for kind in ("text", "label"))
    assert text.sizes.tolist() == labels.sizes.tolist() and text.dtype.name == "uint16" and labels.dtype.name == "int32"
    shown = []
    for number in range(len(text)):
        pairs = list(zip(text.get(number).tolist(), labels.get(number).tolist(), strict=True))
        assert all(label in (token, NOT_A_LABEL) for token, label in pairs)
        letters = ["$" if token == END else chr(token) for token, _ in pairs]
        learned = [letter if label >= 0 else "_" for letter, (_, label) in zip(letters, pairs, strict=True)]
        shown.append(("".join(letters), "".join(learned)))
    return shown


def test_of_prompt_and_completion_the_completion_is_learned(tmp_path: Path) -> None:
    records = [{"q": "1+1=", "a": "2"}, {"q": "", "a": "yes"}, {"a": "", "q": "unanswered"}]
    totals = write(tmp_path, records, PromptAndCompletion("q", "a"))
    assert read(tmp_path) == [("1+1=2$", "____2$"), ("yes$", "yes$")]
    assert (totals.documents, totals.tokens, totals.learned, totals.without_answer) == (2, 10, 6, 1)


def test_of_a_chat_the_answers_are_learned_and_what_asks_for_them_is_not(tmp_path: Path) -> None:
    talk = [("system", "be"), ("user", " hi "), ("assistant", "ho"), ("user", "?"), ("assistant", "!"), ("user", "x")]
    messages = [{"role": role, "content": content} for role, content in talk]
    write(
        tmp_path, [{"messages": messages}, {"messages": messages[:3]}], Chat("messages", TEMPLATE, {"bos_token": "^"})
    )
    text, learned = read(tmp_path)[0]
    assert text == "^<system>be;<user>hi;<assistant>ho;<user>?;<assistant>!;<user>x;$"
    assert learned.replace("_", "") == "ho;!;" and learned[text.index("ho;") :].startswith("ho;")
    assert read(tmp_path)[1][1].replace("_", "") == "ho;$"  # the answer ends the document


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"q": "x"}, r'a.jsonl, line 2: no text under the key "a" \(keys: q\)'),
        ("[1]", "line 2: not a JSON object but list"),
        ("{", "line 2: not JSON"),
        ("[" * 100_000, "line 2: not readable: .*recursion"),
        ({"q": 3, "a": "x"}, 'no text under the key "q"'),
    ],
)
def test_a_bad_record_is_named_or_counted(tmp_path: Path, record: object, message: str) -> None:
    good, form = {"q": "a", "a": "b"}, PromptAndCompletion("q", "a")
    with pytest.raises(RunError, match=message):
        write(tmp_path, [good, record, good], form)
    assert not list(tmp_path.glob("out*"))
    assert write(tmp_path, [good, record, good], form, skip_bad_lines=True).documents == 2


def test_an_interrupted_run_goes_on_and_any_workers_write_the_same_files(tmp_path: Path) -> None:
    talk = [{"role": role, "content": f"{role} \ud800"} for role in ("user", "assistant") * 2]
    records = [{"messages": [*talk, {"role": "user", "content": "x" * (number % 50)}]} for number in range(400)]
    whole = job(tmp_path, records, Chat("messages", TEMPLATE, {"bos_token": "^"}), chunk_bytes=4000)
    expected = preprocess(whole, BYTES)
    assert (expected.documents, expected.repaired) == (400, 400)
    for workers, stops in ((1, (3, 9, None)), (2, (None,))):
        part = replace(whole, output_prefix=str(tmp_path / f"{workers}"), checkpoint_seconds=0, workers=workers)
        for chunks in stops:
            try:
                totals = preprocess(part, BYTES, stop_after(chunks) if chunks else lambda totals: None, resume=True)
            except Killed:
                assert Path(f"{part.output_prefix}.journal").exists()
        assert [Path(path).read_bytes() for path in part.outputs] == [Path(path).read_bytes() for path in whole.outputs]
        assert replace(totals, seconds=0) == replace(expected, seconds=0)
    manifest = json.loads((tmp_path / "1_manifest.json").read_text())
    assert manifest["work"]["settings"]["form"]["template"] == TEMPLATE and len(manifest["outputs"]) == 4
    assert manifest["counts"]["learned"] == expected.learned and len(manifest["inputs"][0]["sha256"]) == 64


def test_a_template_that_changes_what_it_wrote_is_refused(tmp_path: Path) -> None:
    forgetful = "{% for m in messages %}{% if loop.last %}{{ m['content'] }}{% endif %}{% endfor %}"
    talk = [{"role": role, "content": role} for role in ("user", "assistant", "user", "assistant")]
    with pytest.raises(RunError, match="changes what it wrote for earlier messages"):
        write(tmp_path, [{"m": talk}], Chat("m", forgetful, {}))
    with pytest.raises(RunError, match="line 1: the chat template rejects it: no system, please"):
        write(tmp_path, [{"m": [{"role": "assistant"}]}], Chat("m", "{{ raise_exception('no system, please') }}", {}))
    with pytest.raises(UserError, match="the chat template cannot be used"):
        Chat("m", "{% if %}", {})


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"content": None}, 'TypeError: can only concatenate str .not "NoneType".'),
        ({"content": ["a part"]}, 'TypeError: can only concatenate str .not "list".'),
        ({}, "UndefinedError: .* has no attribute 'content'"),
    ],
)
def test_messages_that_the_template_cannot_write_are_a_bad_record(tmp_path: Path, message: dict, reason: str) -> None:
    form = Chat("m", "{% for m in messages %}{{ '<' + m['content'] + '>' }}{% endfor %}", {})
    good = {"m": [{"role": "assistant", "content": "hi"}]}
    bad = {"m": [{"role": "assistant"} | message]}
    with pytest.raises(RunError, match=f"a.jsonl, line 2: the chat template cannot write it: {reason}.*--skip-bad"):
        write(tmp_path, [good, bad, good], form)
    totals = write(tmp_path, [good, bad, good], form, skip_bad_lines=True)
    assert (totals.documents, totals.bad_lines) == (2, 1)


def test_the_template_is_found_beside_the_tokenizer(tmp_path: Path) -> None:
    vocabulary = str(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match="there is no chat template in"):
        chat_template("m", None, vocabulary)
    config = {"chat_template": TEMPLATE, "bos_token": {"content": "^"}, "eos_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    record = {"m": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    assert chat_template("m", None, vocabulary)(record) == [("^<user>a;<assistant>", False), ("b;", True), ("", False)]
    assert chat_template("m", None, str(tmp_path)).template == TEMPLATE  # the folder of a model
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    assert chat_template("m", None, vocabulary)(record) == [("a", False), ("b", True), ("", False)]


def test_a_tokenizer_that_begins_texts_begins_documents_and_a_backend_changes_nothing(tmp_path: Path) -> None:
    content = json.loads(Path(bpe_file(tmp_path)).read_text())
    begin = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = TokenizerSettings("HFTokenizer", str(tmp_path / "tokenizer.json"))
    records = [{"q": f"{TEXT[number % 3]} {number}", "a": TEXT[number % 7]} for number in range(300)]
    found = []
    for comparison in (REFERENCE_ALONE, Comparison("gigatoken", cuts=True)):
        totals = preprocess(
            job(tmp_path, records, PromptAndCompletion("q", "a"), workers=2),
            EncoderSettings(tokenizer, comparison),
        )
        found.append(
            [
                IndexedDataset(str(tmp_path / f"out_{kind}_document")).tokens(0, 10**6).tolist()
                for kind in ("text", "label")
            ]
        )
        assert totals.contain_eod == 0
    assert found[0] == found[1]
    bare = tokenizer().encode_bare([records[0]["q"], records[0]["a"]])
    size = len(bare[0]) + len(bare[1]) + 2
    assert found[0][0][:size] == [0, *bare[0], *bare[1], 0]
    assert found[0][1][:size] == [-100] * (1 + len(bare[0])) + [*bare[1], 0]


def test_a_run_reads_the_two_files(tmp_path: Path) -> None:
    write(tmp_path, [{"q": "ab", "a": "cd"}] * 4, PromptAndCompletion("q", "a"))
    train = Mixture((str(tmp_path / "out"),), labels=(str(tmp_path / "out_label_document"),))
    source = build_sources(
        mixtures={"train": train}, seq_length=6, seed=1, vocab_size=257, pack_impl="unpacked"
    ).samples("train")
    ids, labels = source[0]
    assert ids.tolist() == [*b"abcd", END, 0, 0]
    assert labels.tolist() == [-100, -100, *b"cd", END, -100, -100]


def templated(folder: Path, template: str) -> TokenizerSettings:
    backend = Backend(models.WordLevel({token: i for i, token in enumerate(["<|endoftext|>", "<s>", *"ACGT"])}))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.add_special_tokens(["<|endoftext|>", "<s>"])
    special = [("<|endoftext|>", 0), ("<s>", 1)]
    backend.post_processor = processors.TemplateProcessing(template, special_tokens=special)
    backend.save(str(folder / "letters.json"))
    return TokenizerSettings("HFTokenizer", str(folder / "letters.json"))


@pytest.mark.parametrize(("template", "start"), [("<s> $A", [1]), ("<s> $A <|endoftext|>", [1]), ("$A", [])])
def test_a_document_ends_once_and_what_begins_it_is_not_learned(tmp_path: Path, template: str, start: list) -> None:
    make = EncoderSettings(templated(tmp_path, template))
    totals = preprocess(job(tmp_path, [{"q": "AC", "a": "GT"}], PromptAndCompletion("q", "a")), make)
    text, labels = (IndexedDataset(str(tmp_path / f"out_{kind}_document")) for kind in ("text", "label"))
    assert text.get(0).tolist() == [*start, 2, 3, 4, 5, 0]
    assert labels.get(0).tolist() == [-100] * (len(start) + 2) + [4, 5, 0]
    assert totals.contain_eod == 0
    (tmp_path / "plain.jsonl").write_text('{"text": "ACGT"}\n{"text": "A<|endoftext|>C"}\n')
    for append in (False, True):
        prefix = str(tmp_path / f"plain{append}")
        totals = preprocess(Job((str(tmp_path / "plain.jsonl"),), prefix, form=Texts(append_eod=append)), make)
        data = IndexedDataset(f"{prefix}_text_document")
        ended = [0] * (append or template.endswith("<|endoftext|>"))
        assert data.get(0).tolist() == [*start, 2, 3, 4, 5, *ended]
        assert data.get(1).tolist() == [*start, 2, 0, 3, *ended]
        assert totals.contain_eod == 1


def test_a_chat_template_writes_the_special_tokens_itself(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ bos_token + m['content'] + eos_token }}{% endfor %}"
    form = Chat("m", template, {"bos_token": "<s>", "eos_token": "<|endoftext|>"})
    talk = [{"role": role, "content": text} for role, text in (("user", "AC"), ("assistant", "GT"))]
    totals = preprocess(job(tmp_path, [{"m": talk}], form), EncoderSettings(templated(tmp_path, "<s> $A")))
    text, labels = (IndexedDataset(str(tmp_path / f"out_{kind}_document")) for kind in ("text", "label"))
    assert text.get(0).tolist() == [1, 2, 3, 0, 1, 4, 5, 0]
    assert labels.get(0)[-3:].tolist() == [4, 5, 0]
    assert totals.contain_eod == 1  # that of the first turn


def test_a_text_with_an_unknown_letter_ends_the_run_with_file_line_and_letter(tmp_path: Path) -> None:
    make = EncoderSettings(templated(tmp_path, "$A"))
    (tmp_path / "plain.jsonl").write_text('{"text": "ACGT"}\n{"text": "ACNT"}\n')
    whole = Job((str(tmp_path / "plain.jsonl"),), str(tmp_path / "out"))
    with pytest.raises(RunError, match=r'plain.jsonl, from line 1 on: .* neither a token for "N" \(U\+004E\)'):
        preprocess(whole, make)
    assert choose(make.tokenizer, "auto").refused is None


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_no_space_is_made_up_where_the_answer_begins(tmp_path: Path, scheme: str) -> None:
    backend = Backend(models.BPE({token: i for i, token in enumerate(["<|endoftext|>", "\u2581", *"Frage:j\nQ"])}, []))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    backend.add_special_tokens(["<|endoftext|>"])
    backend.save(str(tmp_path / "space.json"))
    settings = TokenizerSettings("HFTokenizer", str(tmp_path / "space.json"))
    records = [{"q": "Frage:", "a": "ja"}, {"q": "Q\n", "a": "ja"}, {"q": "Q", "a": " ja"}]
    preprocess(job(tmp_path, records, PromptAndCompletion("q", "a")), EncoderSettings(settings))
    text, labels = (IndexedDataset(str(tmp_path / f"out_{kind}_document")) for kind in ("text", "label"))
    tokenizer = settings()
    assert [tokenizer.decode(text.get(i).tolist()[:-1]) for i in range(3)] == ["Frage:ja", "Q\nja", "Q ja"]
    learned = [sum(label >= 0 for label in labels.get(i).tolist()) for i in range(3)]
    assert learned == [3, 3, 4]
