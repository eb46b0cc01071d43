"""Very long words in windows: the ids of the whole word, whatever stands around it."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, pre_tokenizers

from megatron.arrays import Ids
from megatron.preprocessing.fast_encoding.backends import BACKENDS, Encode, token_bytes
from megatron.preprocessing.fast_encoding.checked import EncoderSettings
from megatron.preprocessing.fast_encoding.comparison import Comparison, bare_encoder
from megatron.preprocessing.fast_encoding.long_words import EXAMPLES, RUNS, LongWords, safe_runs
from megatron.preprocessing.fast_encoding.probes import EVERYTHING
from megatron.tokenizer.base import Tokenizer as Reference
from megatron.tokenizer.build import TokenizerSettings
from tests.tokenizer_files import TEXT, bpe_file, tiktoken_file

WORDS = [
    "abracadabra",
    "banana",
    "ACGT",
    "ACGTTGCA",
    "中文中文字",
    "かなかな",
    "    ",
    "\n\n\n",
    "====",
    "0101",
    "🦊🦊",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with long tokens of many kinds."""
    from megatron.tokenizer.train import train_byte_level_bpe

    folder = tmp_path_factory.mktemp("tokenizers")
    texts = [word * count for word in WORDS for count in range(1, 30)]
    train_byte_level_bpe([*TEXT, *texts], 700, str(folder / "tokenizer.json"))
    return folder


def opened(folder: Path) -> Reference:
    return TokenizerSettings("HFTokenizer", bpe_file(folder))()


class Counted:
    """An encoder that notes the length of the longest text it was given."""

    def __init__(self, encode: Encode) -> None:
        self._encode, self.longest = encode, 0

    def __call__(self, texts: Sequence[str]) -> tuple[Ids, Ids]:
        self.longest = max(self.longest, *map(len, texts))
        return self._encode(texts)


@lru_cache(maxsize=1)
def both_sides(folder: Path) -> tuple[Ids, tuple[Encode, Encode]]:
    reference = opened(folder)
    return token_bytes(reference), (bare_encoder(reference), BACKENDS["gigatoken"].build(reference))


RUN = given(data=st.data(), name=st.sampled_from(sorted(RUNS)))


@settings(deadline=None, max_examples=15)
@RUN
def test_windows_give_the_ids_of_the_whole(folder: Path, data: st.DataObject, name: str) -> None:
    windows_give_the_ids_of_the_whole(folder, data, name)


@pytest.mark.long
@settings(deadline=None, max_examples=100)
@RUN
def test_windows_give_the_ids_of_many_more_words(folder: Path, data: st.DataObject, name: str) -> None:
    windows_give_the_ids_of_the_whole(folder, data, name)


def windows_give_the_ids_of_the_whole(folder: Path, data: st.DataObject, name: str) -> None:
    letters = data.draw(st.text(EXAMPLES[name], min_size=1, max_size=1 if name == "one character" else 6))
    run = "".join(data.draw(st.lists(st.sampled_from(letters), min_size=400, max_size=900)))
    text = data.draw(st.text("aA 1.\n中'", max_size=6)) + run + data.draw(st.text("aA 1.\n中's", max_size=6))
    sizes_of_tokens, sides = both_sides(folder)
    for encode in sides:
        expected, _ = encode([text])
        for window, overlap in ((100, 40), (70, 60), (200, 5)):
            found, sizes = LongWords(sizes_of_tokens, RUNS, window=window, overlap=overlap).encode([text], encode)
            assert found.tolist() == expected.tolist() and sizes.tolist() == [len(expected)]


@pytest.mark.parametrize("word", ["x", "abcdefgh", "ACGT", "中文字", " ", "🦊", "01", "\r\n"])
def test_no_library_is_given_more_than_a_window(folder: Path, word: str) -> None:
    reference = opened(folder)
    encode = Counted(bare_encoder(reference))
    long_words = LongWords(token_bytes(reference), RUNS, window=1000, overlap=200)
    text = "a. " + word * (20_000 // len(word)) + " end"
    found, sizes = long_words.encode([text, "short"], encode)
    assert encode.longest < 1200
    whole, whole_sizes = bare_encoder(reference)([text, "short"])
    assert found.tolist() == whole.tolist() and sizes.tolist() == whole_sizes.tolist()


def test_a_text_without_a_place_where_windows_meet_is_encoded_whole(folder: Path) -> None:
    reference = opened(folder)
    encode = Counted(bare_encoder(reference))
    text = "1a!" * 500
    found, _ = LongWords(token_bytes(reference), RUNS, window=100, overlap=40).encode([text], encode)
    assert encode.longest == 1500 and found.tolist() == reference.encode_bare([text])[0]


def test_added_tokens_within_a_run_are_found(folder: Path) -> None:
    backend = Tokenizer.from_file(bpe_file(folder))
    backend.add_tokens([AddedToken("aaaaaaab", normalized=False), AddedToken("<m>", lstrip=True, normalized=False)])
    backend.save(str(folder / "added.json"))
    reference = TokenizerSettings("HFTokenizer", str(folder / "added.json"))()
    encode = bare_encoder(reference)
    for text in ("a" * 333 + "b" + "a" * 1000, " " * 1000 + "<m>" + " " * 500):
        found, _ = LongWords(token_bytes(reference), RUNS, reference.added_tokens, window=100, overlap=40).encode(
            [text], encode
        )
        assert found.tolist() == encode([text])[0].tolist()


def test_runs_that_a_pattern_parts_are_found_out(folder: Path) -> None:
    def parted(pattern: str) -> set[str]:
        backend = Tokenizer.from_file(bpe_file(folder))
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        backend.save(str(folder / "pattern.json"))
        reference = TokenizerSettings("HFTokenizer", str(folder / "pattern.json"))()
        return set(RUNS) - set(safe_runs(token_bytes(reference), bare_encoder(reference), ()))

    assert parted(r"\p{L}+|\p{N}+|\s+|[^\s\p{L}\p{N}]+") == set()
    assert parted(r"\p{L}+|\p{N}{1,3}|\s+|[^\s\p{L}\p{N}]+") == {"digits"}
    assert {"letters", "upper case", "lower case"} <= parted(r"\p{L}{1,5}|\p{N}+|\s+|[^\s\p{L}\p{N}]+")


@pytest.mark.parametrize("kind", ["HFTokenizer", "TiktokenTokenizer"])
def test_the_lengths_of_tokens_add_up_to_those_of_the_text(folder: Path, kind: str) -> None:
    settings = TokenizerSettings(kind, bpe_file(folder) if kind == "HFTokenizer" else tiktoken_file(folder))
    reference = settings()
    for text in TEXT[:3]:
        assert token_bytes(reference)[reference.encode(text)].sum() == len(text.encode())


def test_both_sides_of_an_encoder_take_long_words_in_windows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.preprocessing.fast_encoding.checked.LONG_CHARACTERS", 1000)
    monkeypatch.setattr("megatron.preprocessing.fast_encoding.checked.SAMPLED_CHARACTERS", 1000)
    monkeypatch.setattr(LongWords.__init__, "__defaults__", ((), "u4", 500, 100))
    make, text = TokenizerSettings("HFTokenizer", bpe_file(folder)), "中" * 5000 + "b" * 5000
    for differing in ((), EVERYTHING):
        encoder = EncoderSettings(make, Comparison("gigatoken", None, differing, True, tuple(RUNS)))()
        fast, slow = Counted(encoder._fast), Counted(bare_encoder(encoder._reference))  # type: ignore[arg-type]
        encoder._fast = fast
        monkeypatch.setattr(
            "megatron.preprocessing.fast_encoding.checked.bare_encoder", lambda reference, slow=slow: slow
        )
        assert encoder.encode([text]).ids.tolist() == make().encode(text)
        assert 0 < (slow if differing else fast).longest <= 1000
