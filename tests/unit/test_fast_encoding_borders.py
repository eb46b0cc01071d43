"""Long texts cut where no token reaches across: the ids of the whole, for tokenizers that write spaces into tokens."""

from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, trainers

from megatron.preprocessing.fast_encoding.borders import Borders, borders_are_safe
from megatron.preprocessing.fast_encoding.checked import CheckedEncoder
from megatron.preprocessing.fast_encoding.comparison import compare
from megatron.tokenizer.base import Tokenizer
from megatron.tokenizer.build import TokenizerSettings
from tests.tokenizer_files import TEXT, sentencepiece_file

KINDS = ["unigram", "bpe", "metaspace"]
WORDS = ["the", "fox", " ", "  ", "\n", "東京", "中", "文字", "é", "e\u0301", "<unk>", "1234", "!", "\u2581", "🦊"]


def metaspace_file(folder: Path, scheme: str = "always") -> str:
    """A BPE whose words begin with U+2581 in place of a space."""
    model = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    special = ["<unk>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    model.train_from_iterator([*TEXT, "中文字 東京都"], trainer)
    model.save(str(folder / "metaspace.json"))
    return str(folder / "metaspace.json")


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TokenizerSettings]:
    found = {"metaspace": TokenizerSettings("HFTokenizer", metaspace_file(tmp_path_factory.mktemp("metaspace")))}
    for kind in ("unigram", "bpe"):
        folder = tmp_path_factory.mktemp(kind)
        found[kind] = TokenizerSettings("SPMTokenizer", sentencepiece_file(folder, model_type=kind))
    return found


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=30)
@given(data=st.data(), size=st.integers(1, 9))
def test_a_text_in_pieces_has_the_ids_of_the_whole(
    opened: dict[str, TokenizerSettings], kind: str, data: st.DataObject, size: int
) -> None:
    tokenizer = opened[kind]()
    text = "".join(data.draw(st.lists(st.sampled_from(WORDS), max_size=25)))
    assert Borders(tokenizer).encode(text, size).tolist() == tokenizer.encode_bare([text])[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unit", ["quick brown fox ", "東京 Ελλάδα ", "dlrow0q"])
def test_a_long_text_is_encoded_in_short_pieces(
    opened: dict[str, TokenizerSettings], kind: str, unit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, longest = opened[kind](), 0
    text = unit * (350_000 // len(unit))
    whole = tokenizer.encode_bare([text, "short"])
    comparison = compare(tokenizer, "hf")
    assert comparison.borders and not comparison.cuts
    encode = type(tokenizer).encode_bare

    def noted(self: Tokenizer, texts: list[str]) -> list[list[int]]:
        nonlocal longest
        longest = max(longest, *map(len, texts))
        return encode(self, texts)

    monkeypatch.setattr(type(tokenizer), "encode_bare", noted)
    encoded = CheckedEncoder(tokenizer, None, comparison).encode([text, "short"])
    assert encoded.ids.tolist() == [*whole[0], *whole[1]] and encoded.sizes.tolist() == [len(ids) for ids in whole]
    assert longest < 300_000


def test_an_added_token_of_several_words_is_not_cut(tmp_path: Path) -> None:
    model = tokenizers.Tokenizer.from_file(metaspace_file(tmp_path))
    model.add_tokens(["lazy dog"])
    model.save(str(tmp_path / "metaspace.json"))
    tokenizer = TokenizerSettings("HFTokenizer", str(tmp_path / "metaspace.json"))()
    text = "the lazy dog again and the lazy dog " * 9
    found = Borders(tokenizer).encode(text, 1).tolist()
    assert found == tokenizer.encode_bare([text])[0]
    assert found.count(tokenizer.vocab_size - 1) == 18


def test_a_tokenizer_that_puts_no_space_before_a_text_is_left_alone(tmp_path: Path) -> None:
    tokenizer = TokenizerSettings("HFTokenizer", metaspace_file(tmp_path, scheme="never"))()
    assert not borders_are_safe(tokenizer)


def test_a_tokenizer_whose_tokens_hold_several_words_is_not_cut_at_spaces(tmp_path: Path) -> None:
    file = sentencepiece_file(tmp_path, model_type="bpe", split_by_whitespace=False)
    tokenizer = TokenizerSettings("SPMTokenizer", file)()
    assert any("\u2581" in token[1:].lstrip("\u2581") for token in tokenizer.token_texts())
    assert borders_are_safe(tokenizer)
    assert "".join(piece for piece, _ in Borders(tokenizer).pieces("the quick brown " * 99, 20)).count(" ") == 3 * 99
