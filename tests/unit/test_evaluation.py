"""Perplexity: each token once, the right sums, the right units."""

import json
import math
from dataclasses import dataclass
from datetime import datetime

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, processors

from megatron.config.load import config_from_flat
from megatron.convert.families import gpt_neox
from megatron.convert.model_keys import model_keys
from megatron.errors import UserError
from megatron.evaluation.held_out import open_held_out
from megatron.evaluation.perplexity import WindowSettings, negative_log_likelihood, score, table, window_batches
from megatron.evaluation.run import evaluate, results_file
from megatron.evaluation.text_size import TextSize, measure_text, unigram_entropy
from megatron.progress import Progress
from megatron.tokenizer.build import build_tokenizer
from tests.harness_tasks import Weights, vocabulary
from tests.models import random_tensor, spread
from tests.ranks.run import one_rank
from tests.tokenizer_files import TEXT, bpe_file, sentencepiece_file
from tests.trained import one_rank_model

MODEL = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "seq_length": 8}


@dataclass(frozen=True)
class Stream:
    """Tokens in memory."""

    ids: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    def tokens(self, start: int, length: int):
        return np.array(self.ids[start : start + length], dtype=np.int64)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 31, 32, 33])
@pytest.mark.parametrize("batch", [1, 3])
def test_each_token_is_a_label_once_behind_the_token_before_it(count, batch):
    stream = Stream(tuple(range(100, 100 + count)))
    pairs = []
    for ids, weights in window_batches(stream, WindowSettings(8, 8, batch), first_token=7):
        assert ids.shape[1] == 9 and weights.shape == ids[:, 1:].shape
        for row, row_weights in zip(ids.tolist(), weights.tolist(), strict=True):
            pairs += [(row[i], row[i + 1]) for i, weight in enumerate(row_weights) if weight]
    assert pairs == list(zip([7, *stream.ids], stream.ids, strict=False))


def test_the_likelihood_is_that_of_the_same_windows_scored_one_token_at_a_time():
    text = tuple(b"The quick brown fox jumps over the lazy dog.")
    sequence = 8
    with one_rank_model() as model:
        expected = 0.0
        for place, token in enumerate(text):
            start = place - place % sequence
            seen = [text[start - 1] if start else model.tokenizer.end_of_document, *text[start:place]]
            expected -= float(model.logits(torch.tensor([seen]))[0, -1].log_softmax(-1)[token])
        windows = [WindowSettings(sequence, sequence, batch) for batch in (1, 4)]
        totals = [negative_log_likelihood(model, Stream(text), each) for each in windows]
    assert totals == pytest.approx([expected, expected], rel=1e-5)


@pytest.mark.parametrize("stride", [8, 3])
def test_each_token_counts_once_as_scored(monkeypatch, stride):
    counts: list[float] = []
    monkeypatch.setattr(Progress, "add", lambda self, amount=1: counts.append(amount))
    text = tuple(b"The quick brown fox jumps over the lazy dog.")
    with one_rank_model() as model:
        negative_log_likelihood(model, Stream(text), WindowSettings(8, stride, 2))
    assert len(counts) > 2 and sum(counts) == len(text)


def test_words_and_bytes_are_of_the_documents_without_the_tokens_that_end_them():
    tokenizer = build_tokenizer("CharLevelTokenizer")
    end = tokenizer.end_of_document
    ids = (*b"one two", end, *"drei Füße".encode(), end, *b"x")
    size = measure_text(Stream(ids), tokenizer)
    assert (size.tokens, size.words, size.bytes) == (len(ids), 5, 7 + 11 + 1)


def test_long_documents_are_measured_in_pieces(monkeypatch):
    monkeypatch.setattr("megatron.evaluation.text_size.PIECE", 5)
    tokenizer = build_tokenizer("CharLevelTokenizer")
    ids = (*b"abcdefghijklmnopqrstuvw", *b"xyz" * 10, tokenizer.end_of_document, 65, 66)
    assert measure_text(Stream(ids), tokenizer).bytes == len(ids) - 1


def test_the_entropy_of_equal_shares_is_the_logarithm_of_their_number():
    assert unigram_entropy(np.array([3, 0, 3, 3, 3])) == pytest.approx(math.log(4))
    assert unigram_entropy(np.array([9, 0])) == 0
    assert unigram_entropy(np.array([1, 3])) == pytest.approx(0.25 * math.log(4) + 0.75 * math.log(4 / 3))


def test_perplexities_are_per_token_word_and_byte_of_the_same_total():
    results = score(nats=120.0, size=TextSize(tokens=60, words=20, bytes=100, entropy=3.0))
    assert results["loss"] == 2.0
    assert results["token_perplexity"] == pytest.approx(math.exp(2))
    assert results["word_perplexity"] == pytest.approx(math.exp(6))
    assert results["byte_perplexity"] == pytest.approx(math.exp(1.2))
    assert results["bits_per_byte"] == pytest.approx(1.2 / math.log(2))
    assert results["unigram_entropy_bits"] == pytest.approx(3 / math.log(2))
    assert "1.0000" in table("valid", results).splitlines()[-1]


def test_the_results_file_has_prefix_and_time_in_its_name_and_lies_with_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    now = datetime(2026, 3, 4, 5, 6, 7)

    def path(**keys: str) -> str:
        return str(results_file(config_from_flat(MODEL | keys), now))

    assert path() == "eval_results_03-04-2026-05-06-07.json"
    assert path(eval_results_prefix="mine", save="run") == "run/mine_eval_results_03-04-2026-05-06-07.json"
    assert path(save="run", log_dir="logs") == "logs/eval_results_03-04-2026-05-06-07.json"
    assert path(save="run", eval_results_prefix="out/x") == "out/x_eval_results_03-04-2026-05-06-07.json"


def test_an_evaluation_without_a_checkpoint_names_the_folder(tmp_path):
    with pytest.raises(UserError, match=f"no checkpoint in {tmp_path}"):
        evaluate(config_from_flat(MODEL | {"save": str(tmp_path)}))


def streamed(tokenizer, texts, ended=True):
    end = [tokenizer.end_of_document] * ended
    return Stream(tuple(token for text in texts for token in [*tokenizer.encode(text), *end]))


CODE = ["x = 1", "return self.x", "import os, sys", "  indented\n\ttwice ", "Füße 東京"]
SIZE = (sum(len(text.split()) for text in CODE), sum(len(text.encode()) for text in CODE))


@pytest.mark.parametrize("template", [None, "<s> $A", "<s> $A <|endoftext|>"])
@pytest.mark.parametrize("decoder", [True, False])
@pytest.mark.parametrize("prefix_space", [True, False])
def test_neither_the_tokens_around_a_text_nor_a_missing_decoder_change_its_words_and_bytes(
    tmp_path, template, decoder, prefix_space
):
    backend = Backend.from_file(bpe_file(tmp_path))
    backend.add_special_tokens(["<s>"])
    if template:
        special = [(token, backend.token_to_id(token)) for token in ("<s>", "<|endoftext|>")]
        backend.post_processor = processors.TemplateProcessing(template, special_tokens=special)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(json.loads(backend.to_str()) | ({} if decoder else {"decoder": None})))
    tokenizer = build_tokenizer("HFTokenizer", str(path))
    for ended in (True, False) if template else (True,):
        size = measure_text(streamed(tokenizer, CODE, ended), tokenizer)
        assert (size.words, size.bytes, size.reason) == (*SIZE, "")


def test_words_and_bytes_of_a_sentencepiece_model_that_changes_nothing_are_those_of_the_text(tmp_path):
    keys = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    tokenizer = build_tokenizer("SPMTokenizer", sentencepiece_file(tmp_path, **keys))
    size = measure_text(streamed(tokenizer, CODE), tokenizer)
    assert (size.words, size.bytes, size.reason) == (*SIZE, "")


def test_bytes_are_not_known_where_the_tokenizer_collapses_spaces_and_the_report_says_so(tmp_path):
    tokenizer = build_tokenizer("SPMTokenizer", sentencepiece_file(tmp_path))
    size = measure_text(streamed(tokenizer, CODE), tokenizer)
    assert (size.words, size.bytes) == (SIZE[0], None) and size.reason.startswith("bytes are not known")
    results = score(10.0, size)
    assert results["byte_perplexity"] is None and results["bits_per_byte"] is None and results["word_perplexity"] > 1
    assert json.loads(json.dumps(results, allow_nan=False))["bytes"] is None
    assert table("valid", results).splitlines()[0].endswith("unknown bytes")


def words_only(folder, vocabulary, unknown=None):
    backend = Backend(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=unknown or "no"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<|endoftext|>"])
    backend.save(str(folder / "words.json"))
    return build_tokenizer("HFTokenizer", str(folder / "words.json"))


def test_words_and_bytes_are_not_known_where_spaces_are_lost_or_words_are_unknown(tmp_path):
    lost = words_only(tmp_path, ["<|endoftext|>", "a", "b", ",", ".", "ab"])
    size = measure_text(streamed(lost, ["a, b", "ab.a"]), lost)
    assert (size.words, size.bytes) == (None, None) and "this tokenizer changes text" in size.reason
    unknown = words_only(tmp_path, ["<|endoftext|>", "<unk>", "a"], "<unk>")
    size = measure_text(streamed(unknown, ["a a", "b a c"]), unknown)
    assert (size.words, size.bytes) == (
        None,
        None,
    ) and "2 tokens stand for text that the vocabulary lacks" in size.reason


def test_a_word_that_two_pieces_share_is_counted_once_and_keeps_its_space(tmp_path, monkeypatch):
    keys = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    tokenizer = build_tokenizer("SPMTokenizer", sentencepiece_file(tmp_path, **keys))
    text = "the lazy dog again and again, the quick fox"
    for piece in (3, 4, 5, 7):
        monkeypatch.setattr("megatron.evaluation.text_size.PIECE", piece)
        size = measure_text(streamed(tokenizer, [text, text]), tokenizer)
        assert (size.words, size.bytes) == (18, 2 * len(text))


@pytest.mark.parametrize("stride", [1, 3, 8])
@pytest.mark.parametrize("count", [5, 8, 9, 12, 13, 40])
def test_windows_that_overlap_score_each_token_once_from_as_many_tokens_as_the_stride_leaves(count, stride):
    stream, seen = Stream(tuple(range(100, 100 + count))), []
    for ids, weights in window_batches(stream, WindowSettings(8, stride, 3), first_token=99):
        for row, row_weights in zip(ids.tolist(), weights.tolist(), strict=True):
            seen += [(row[place + 1], place + 1) for place, weight in enumerate(row_weights) if weight]
    assert [token for token, _ in seen] == list(stream.ids)
    assert all(before == (token - 99 if token < 108 else max(before, 9 - stride)) for token, before in seen)


def twin(folder):
    """Weights for our model, and the model of transformers with the same."""
    path = vocabulary(folder)
    config = transformers.GPTNeoXConfig(
        vocab_size=build_tokenizer("HFTokenizer", path).vocab_size, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=72, max_position_embeddings=16,
    )  # fmt: skip
    theirs = transformers.GPTNeoXForCausalLM(config).eval().requires_grad_(False)
    for index, (name, parameter) in enumerate(theirs.named_parameters()):
        parameter.copy_(spread(name, random_tensor(parameter.shape, index)))
    weights = Weights(model_keys(gpt_neox.FAMILY.model(config.to_dict())), path, {})
    state = gpt_neox.FAMILY.parameters(weights.plan().model).from_hugging_face(theirs.state_dict())
    return Weights(weights.keys, path, state), theirs


@pytest.mark.parametrize("stride", [16, 6])
def test_the_likelihood_with_a_stride_is_that_of_the_recipe_of_transformers(tmp_path, stride):
    """Its windows have `max_length` ids, of which the last is a label only: ours have one input less."""
    weights, theirs = twin(tmp_path)
    tokenizer = weights.tokenizer
    text = tokenizer.encode(" ".join(TEXT[:3]) * 2)
    ids, max_length, end, expected = torch.tensor([[tokenizer.end_of_document, *text]]), 17, 0, 0.0
    for begin in range(0, ids.shape[1], stride):
        fresh = min(begin + max_length, ids.shape[1]) - end
        end += fresh
        labels = ids[:, begin:end].clone()
        labels[:, :-fresh] = -100
        scored = int((labels[:, 1:] != -100).sum())
        expected += float(theirs(ids[:, begin:end], labels=labels).loss) * scored
        if end == ids.shape[1]:
            break
    with one_rank() as grid:
        found = negative_log_likelihood(weights.on(grid), Stream(tuple(text)), WindowSettings(16, stride, 3))
    assert found == pytest.approx(expected, rel=1e-5)


def held_out(folder, **keys):
    tokenizer = build_tokenizer("HFTokenizer", bpe_file(folder))
    return tokenizer, open_held_out(config_from_flat(MODEL | keys), tokenizer)


def test_files_of_text_have_the_tokens_of_their_documents_with_ends_and_the_words_and_bytes_they_were_written_with(
    tmp_path,
):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*CODE, ""]))
    (tmp_path / "b.txt").write_text("Größe\n\n two")
    tokenizer, (lines, whole) = held_out(tmp_path, eval_data=[f"{tmp_path}/a.jsonl", f"{tmp_path}/b.txt"])
    assert lines.stream.tokens(0, 1000).tolist() == list(streamed(tokenizer, CODE).ids)
    assert whole.stream.tokens(0, 1000).tolist() == list(streamed(tokenizer, ["Größe\n\n two"]).ids)
    assert (lines.measure().words, lines.measure().bytes) == SIZE
    assert (whole.measure().words, whole.measure().bytes) == (2, 13)
    assert lines.measure().entropy == measure_text(lines.stream, tokenizer).entropy


def test_all_text_that_cannot_be_read_is_named_at_once(tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"content": "b"}\n')
    (tmp_path / "packed.txt").write_bytes(b"\x1f\x8b123")
    names = ("empty.txt", "bad.jsonl", "packed.txt", "gone.txt", "gone")
    with pytest.raises(UserError) as raised:
        held_out(tmp_path, eval_data=[f"{tmp_path}/{name}" for name in names])
    reasons = ("holds no text", 'line 2: no text under the key "text"', "is gzip data", "no data at", "no data at")
    for name, reason, problem in zip(names, reasons, raised.value.problems, strict=True):
        assert problem.startswith("eval_data: ") and f"{tmp_path}/{name}" in problem and reason in problem
