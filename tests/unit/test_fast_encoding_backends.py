"""Fast backends: where they differ from the tokenizer's own library, and that they are never believed."""

import json
import random
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from megatron.arrays import Ids, flat
from megatron.errors import UserError
from megatron.preprocessing.fast_encoding.backends import BACKENDS, Encode, probe_reference
from megatron.preprocessing.fast_encoding.checked import CheckedEncoder, EncoderSettings
from megatron.preprocessing.fast_encoding.comparison import Comparison, choose, compare
from megatron.preprocessing.fast_encoding.long_words import safe_runs
from megatron.preprocessing.fast_encoding.probes import (
    CODE_POINTS,
    EVERYTHING,
    WIDE_SNIPPETS,
    Ranges,
    ascii_texts,
    blame,
    cuts_are_safe,
    different_texts,
    differing_code_points,
    mixed_texts,
    probe_tokens,
    ranges_of,
    table_of,
    union,
)
from megatron.preprocessing.fast_encoding.text_pieces import pieces, split_offsets
from megatron.tokenizer.build import TokenizerSettings
from megatron.tokenizer.tiktoken_bpe import CL100K_PATTERN
from tests.tokenizer_files import TEXT, bpe_file, gpt2_files, sentencepiece_file, tiktoken_file

NEW_LETTERS = "\u088f\ua7ce\U00010940"  # of Unicode 17
NASTY = [
    "a<|endoftext|>b", " <|endoftext|> ", NEW_LETTERS, f"word{NEW_LETTERS[0]}word 12{NEW_LETTERS[1]}3",
    " " * 3000 + "x", "\r\n\r\n \r\n", "中文。你好，世界！", "🦊👨‍👩‍👧‍👦", "\0nul\0", "tab\t \n ", "x" * 5000,
    "don't DON'T ſ'ſ", "e\u0301\u00e9", "\U000e0041\U000f0000\U0010ffff", " ", "\n",
]  # fmt: skip


SOME = [*range(0x80, 0x250), *range(0x370, 0x480), *range(0x2000, 0x2070), *range(0x3000, 0x3100)]
SOME += [*map(ord, NEW_LETTERS), *map(ord, "".join([*TEXT[:3], *WIDE_SNIPPETS]))]


def try_some(one: Encode, other: Encode) -> Ranges:
    """All of Unicode takes a while; the code points that are not tried count as different."""
    rest = sorted(set(range(128, CODE_POINTS)) - set(SOME))
    return union(differing_code_points(one, other, SOME), ranges_of(rest))


@pytest.fixture(scope="module", autouse=True)
def quick_comparisons(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEPY_CACHE", str(tmp_path_factory.mktemp("cache")))
        module = "megatron.preprocessing.fast_encoding.comparison"
        patch.setattr(f"{module}.differing_code_points", try_some)
        patch.setattr(f"{module}.ascii_texts", lambda: islice(ascii_texts(), 15900, 16900))  # of both sorts
        patch.setattr(f"{module}.mixed_texts", lambda: mixed_texts(500))
        patch.setattr(f"{module}.cuts_are_safe", lambda encode: cuts_are_safe(encode, 500))
        patch.setattr(f"{module}.safe_runs", partial(safe_runs, count=5))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


def variant(folder: Path, name: str, **parts: object) -> TokenizerSettings:
    """The small tokenizer with other parts."""
    backend = Tokenizer.from_file(bpe_file(folder))
    for part, value in parts.items():
        setattr(backend, part, value)
    backend.save(str(folder / f"{name}.json"))
    return TokenizerSettings("HFTokenizer", str(folder / f"{name}.json"))


def by_pattern(pattern: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


LLAMA_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@lru_cache(maxsize=2)
def encoder_of(make: EncoderSettings) -> CheckedEncoder:
    return make()


@lru_cache
def settings_named(name: str, folder: Path) -> TokenizerSettings:
    if name == "gpt2":
        return TokenizerSettings("GPT2BPETokenizer", *gpt2_files(folder))
    if name == "tiktoken":
        return TokenizerSettings("TiktokenTokenizer", tiktoken_file(folder))
    if name == "llama":
        before = TemplateProcessing("<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
        return variant(folder, name, pre_tokenizer=by_pattern(LLAMA_PATTERN), post_processor=before)
    if name == "nfc":
        return variant(folder, name, normalizer=normalizers.NFC())
    return TokenizerSettings("HFTokenizer", bpe_file(folder))


QUICK = {"plain": ("hf", "gigatoken"), "gpt2": ("tiktoken",), "llama": ("gigatoken", "tiktoken")}
QUICK |= {"nfc": ("gigatoken",), "tiktoken": ("gigatoken",)}


def every_pair() -> Iterator[object]:
    """Of a tokenizer and a backend; each of either kind is in a quick one."""
    for name, quick in QUICK.items():
        for backend in ("hf", "gigatoken", "tiktoken"):
            yield pytest.param(name, backend, marks=() if backend in quick else pytest.mark.long)


@pytest.mark.parametrize(("name", "backend"), every_pair())
def test_ids_are_those_of_the_tokenizers_own_library(name: str, backend: str, folder: Path) -> None:
    make = settings_named(name, folder)
    if (name, backend) == ("tiktoken", "tiktoken"):
        pytest.skip("is its own library")
    comparison = choose(make, backend)
    encoder, reference = EncoderSettings(make, comparison)(), make()
    texts = [*NASTY, *TEXT[:3], *mixed_texts(100)]
    encoded = encoder.encode(texts)
    expected = reference.encode_batch(texts)
    assert encoded.sizes.tolist() == [len(ids) for ids in expected]
    assert encoded.ids.tolist() == [token for ids in expected for token in ids]
    assert not encoded.alarm
    if backend != "hf":
        assert 4 <= encoded.by_reference < len(texts) / 2  # what spells the end of a document, and rare code points


ANY_TEXT = given(text=st.text(alphabet=st.characters(codec="utf-8")))


@settings(deadline=None, max_examples=30)
@ANY_TEXT
def test_any_text_has_the_ids_of_the_reference(folder: Path, text: str) -> None:
    ids_are_those_of_the_reference(folder, text)


@pytest.mark.long
@settings(deadline=None, max_examples=300)
@ANY_TEXT
def test_many_more_texts_have_the_ids_of_the_reference(folder: Path, text: str) -> None:
    ids_are_those_of_the_reference(folder, text)


def ids_are_those_of_the_reference(folder: Path, text: str) -> None:
    make = settings_named("llama", folder)
    for backend in BACKENDS:
        encoder = encoder_of(EncoderSettings(make, choose(make, backend), sample_every=10**9))
        assert encoder.encode([text]).ids.tolist() == make().encode(text)


def test_the_code_points_that_differ_are_found_where_they_are_known_to(folder: Path) -> None:
    reference = settings_named("plain", folder)()
    tokens = probe_tokens()
    one, other = probe_reference(reference, tokens), BACKENDS["gigatoken"].build(reference, tokens)
    letters = [*range(0x10940, 0x1095A), *range(0x4E00, 0x4E80), *range(0x80, 0x250), 0x1F98A]
    found = table_of(differing_code_points(one, other, letters))
    assert found[0x10940:0x1095A].all()  # Sidetic came with Unicode 17
    assert not found[0x4E00:0x4E80].any() and not found[0x80:0x250].any()
    assert found[0x10FFFF] and not found[:128].any()  # what is not tried goes to the reference


def test_one_wrong_class_is_found(folder: Path) -> None:
    reference = settings_named("plain", folder)()
    one = probe_reference(reference, probe_tokens())

    def other(texts: Sequence[str]) -> tuple[Ids, Ids]:
        return one([text.replace("é", "!") for text in texts])

    found = differing_code_points(one, other, range(0xC0, 0x100))
    assert [point for point in range(0xC0, 0x100) if table_of(found)[point]] == [0xE9]


@pytest.mark.parametrize("wrong", [normalizers.Lowercase(), normalizers.Replace("a", "b"), normalizers.Prepend("_")])
def test_a_tokenizer_that_changes_plain_text_first_is_left_to_its_own_library(folder: Path, wrong: object) -> None:
    make = variant(folder, "changed", normalizer=wrong)
    assert choose(make, "auto").backend == "hf"
    with pytest.raises(UserError, match="gigatoken cannot be used for this tokenizer"):
        choose(make, "gigatoken")
    assert EncoderSettings(make, choose(make))().encode(["Aa"]).ids.tolist() == make().encode("Aa")


def test_a_pattern_that_one_backend_does_not_know_is_done_by_the_other(folder: Path) -> None:
    make = variant(folder, "own-pattern", pre_tokenizer=by_pattern(r"\p{L}+|\p{N}+|\s+|[^\s\p{L}\p{N}]+"))
    assert choose(make, "auto").backend == "tiktoken"
    assert "no fast pretokenizer" in str(compare(make(), "gigatoken").refused)


def test_words_that_do_not_end_where_texts_are_cut_are_left_to_the_reference(folder: Path) -> None:
    make = variant(folder, "phrases", pre_tokenizer=by_pattern(r"\w+ \w+|\s+|[^\s\w]+|\w+"))
    comparison = choose(make, "auto")
    assert (comparison.backend, comparison.cuts) == ("hf", False)


@pytest.mark.parametrize("kind", ["SPMTokenizer", "CharLevelTokenizer"])
def test_other_kinds_do_their_own_work(kind: str, folder: Path) -> None:
    make = TokenizerSettings(kind, sentencepiece_file(folder) if kind == "SPMTokenizer" else None)
    assert choose(make, "auto") == Comparison("hf", borders=kind == "SPMTokenizer")
    encoded = EncoderSettings(make)().encode(TEXT[:3])
    assert encoded.ids.tolist() == [token for ids in make().encode_batch(TEXT[:3]) for token in ids]


def test_a_comparison_is_made_once_and_kept_in_the_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEEPY_CACHE", str(tmp_path))
    monkeypatch.setattr(
        "megatron.preprocessing.fast_encoding.comparison.differing_code_points", lambda *_: ((0xE9, 0xEA),)
    )
    make = settings_named("plain", folder)
    first = choose(make, "gigatoken")
    monkeypatch.setattr("megatron.preprocessing.fast_encoding.comparison._compare", None)  # not asked again
    assert choose(make, "gigatoken") == first and first.differing == ((0xE9, 0xEA),)
    wider = EncoderSettings(make, first).widened(((0x100, 0x102),))
    assert wider.comparison.differing == ((0xE9, 0xEA), (0x100, 0x102))
    assert choose(make, "gigatoken") == wider.comparison


def test_a_cache_that_cannot_be_written_is_done_without(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPY_CACHE", "/proc/nowhere")
    monkeypatch.setattr(
        "megatron.preprocessing.fast_encoding.comparison.differing_code_points", lambda *_: ((0xE9, 0xEA),)
    )
    assert choose(settings_named("plain", folder), "gigatoken").backend == "gigatoken"


def lying_encoder(folder: Path, differs_on: str, sample_every: int = 1) -> CheckedEncoder:
    """An encoder whose backend has a wrong id wherever `differs_on` stands, and nobody knows."""
    reference = settings_named("plain", folder)()

    def fast(texts: Sequence[str]) -> tuple[Ids, Ids]:
        return flat(
            [
                [1] * len(ids) if differs_on in text else ids
                for text, ids in zip(texts, map(reference.encode, texts), strict=True)
            ]
        )

    return CheckedEncoder(reference, fast, Comparison("gigatoken", cuts=True), sample_every)


def test_the_alarm_names_the_code_point_to_blame(folder: Path) -> None:
    encoder = lying_encoder(folder, "ß")
    assert encoder.encode(["plain", "äöü"]).alarm == ()
    assert encoder.encode(["plain", "ä straße"]).alarm == ((0xDF, 0xE0),)


def test_an_alarm_over_plain_ascii_blames_everything(folder: Path) -> None:
    encoder = lying_encoder(folder, "wrong")
    assert encoder.encode(["this is wrong"]).alarm == EVERYTHING
    nothing_fast = CheckedEncoder(encoder._reference, encoder._fast, Comparison("gigatoken", None, EVERYTHING, True))
    assert nothing_fast.encode(["this is wrong"]).by_reference == 1


def test_a_sample_is_taken_at_the_given_rate_across_calls(folder: Path) -> None:
    encoder = lying_encoder(folder, "ß", sample_every=10)
    alarms = [bool(encoder.encode(["straße"]).alarm) for _ in range(40)]
    assert [number for number, alarm in enumerate(alarms) if alarm] == [0, 10, 20, 30]


def test_first_seen_names_each_code_point_that_went_to_the_backend_once(folder: Path) -> None:
    make = settings_named("plain", folder)
    encoder = EncoderSettings(make, choose(make, "gigatoken"))()
    assert encoder.encode(["größe", f"ä{NEW_LETTERS}", "plain"]).first_seen == [ord("ß"), ord("ö")]
    assert encoder.encode(["größer ä"]).first_seen == [ord("ä")]


@settings(deadline=None, max_examples=40)
@given(points=st.sets(st.integers(0, 0x10FFFF)), more=st.sets(st.integers(0, 0x10FFFF)))
def test_ranges_hold_exactly_their_code_points(points: set[int], more: set[int]) -> None:
    ranges = union(ranges_of(points), ranges_of(more))
    assert {point for start, stop in ranges for point in range(start, stop)} == points | more
    assert set(np.flatnonzero(table_of(ranges)).tolist()) == points | more


def test_blame_finds_the_smallest_part_that_differs() -> None:
    text = "a" * 5000 + "äöü" + "b" * 3000
    assert blame(text, lambda part: "öü" in part) == ((0xF6, 0xF7), (0xFC, 0xFD))
    assert blame(text, lambda part: "ab" in part or "aä" in part) == ((0xE4, 0xE5),)


def test_a_long_text_is_cut_into_pieces_with_the_same_ids(folder: Path) -> None:
    chance = random.Random(0)
    text = "".join(chance.choices([*TEXT, *NASTY, "snake_case(x)[1]; don't "], k=2000))
    parts = list(pieces(text, ["<|endoftext|>"], 1000))
    assert "".join(parts) == text and len(parts) > len(text) / 3000
    assert sum(part.count("<|endoftext|>") for part in parts) == text.count("<|endoftext|>")
    for name in ("plain", "llama", "tiktoken"):
        tokenizer = settings_named(name, folder)()
        whole, apart = tokenizer.encode_bare([text])[0], tokenizer.encode_bare(parts)
        assert whole == [token for ids in apart for token in ids]


def test_a_text_is_never_cut_within_a_suffix_or_an_added_token() -> None:
    assert split_offsets("don't we'll x") == [5, 11]
    assert list(pieces("ab <|endoftext|> cd ef", ["<|endoftext|>"], 4)) == ["ab <|endoftext|> cd", " ef"]


def test_cutting_is_tried_on_the_tokenizer_itself(folder: Path) -> None:
    good = settings_named("plain", folder)()
    across = variant(folder, "across", pre_tokenizer=by_pattern(r"\w+ \w+|\s+|[^\s\w]+|\w+"))()
    assert cuts_are_safe(probe_reference(good, probe_tokens()), 1000)
    assert not cuts_are_safe(probe_reference(across, probe_tokens()), 1000)


def test_different_texts_are_told_from_equal_ones() -> None:
    def lengths(texts: Sequence[str]) -> tuple[Ids, Ids]:
        return flat([[len(text)] for text in texts])

    def wrong(texts: Sequence[str]) -> tuple[Ids, Ids]:
        return flat([[0] if text == "no" else [len(text)] for text in texts])

    assert list(different_texts(lengths, wrong, ["a", "no", "bb"] * 2000)) == ["no"] * 2000


def test_the_pattern_of_a_tiktoken_file_decides_whether_gigatoken_can_read_it(folder: Path) -> None:
    make = TokenizerSettings("TiktokenTokenizer", tiktoken_file(folder))
    assert getattr(make(), "pattern") == CL100K_PATTERN  # noqa: B009
    assert json.dumps(compare(make(), "gigatoken").refused) == "null"
