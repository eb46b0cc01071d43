"""What holds for every tokenizer in the registry; a new one is tested as soon as it has an entry in tokenizer_files."""

import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.errors import UserError
from megatron.registry import names
from megatron.tokenizer.base import END_OF_DOCUMENT, Tokenizer
from megatron.tokenizer.build import TokenizerSettings, build_tokenizer
from tests.tokenizer_files import TEXT, bpe_file, settings_of_each_kind


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TokenizerSettings]:
    return settings_of_each_kind(tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture(scope="module")
def tokenizers(kinds: dict[str, TokenizerSettings]) -> dict[str, Tokenizer]:
    return {kind: make() for kind, make in kinds.items()}


@pytest.fixture(params=names("tokenizer"))
def tokenizer(request: pytest.FixtureRequest, tokenizers: dict[str, Tokenizer]) -> Tokenizer:
    return tokenizers[request.param]


def test_text_comes_back_unchanged(tokenizer: Tokenizer) -> None:
    for text in TEXT[:1] + TEXT[2:3]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(deadline=None)
@given(text=st.text(alphabet=st.characters(codec="utf-8")))
def test_any_text_comes_back_from_a_byte_level_tokenizer(tokenizers: dict[str, Tokenizer], text: str) -> None:
    for kind in ("HFTokenizer", "GPT2BPETokenizer", "CharLevelTokenizer", "TiktokenTokenizer"):
        tokenizer = tokenizers[kind]
        assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(deadline=None)
@given(ids=st.lists(st.integers(-(2**63), 2**63) | st.integers(-2, 600)))
def test_decoding_any_ids_never_raises(tokenizers: dict[str, Tokenizer], ids: list[int]) -> None:
    for tokenizer in tokenizers.values():
        assert isinstance(tokenizer.decode(ids), str)


def test_an_id_outside_the_vocabulary_is_shown_as_a_replacement_character(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([tokenizer.vocab_size, -1]) == "\ufffd\ufffd"


def test_every_id_is_inside_the_vocabulary(tokenizer: Tokenizer) -> None:
    ids = [token for document in tokenizer.encode_batch(TEXT) for token in document]
    assert 0 <= min(ids) <= max(ids) < tokenizer.vocab_size
    assert 0 <= tokenizer.end_of_document < tokenizer.vocab_size


def test_a_batch_gives_the_ids_of_its_texts_one_by_one(tokenizer: Tokenizer) -> None:
    texts = ["", *TEXT[:3], "a lone surrogate \ud800 in the middle"]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode("x\ud800y") == tokenizer.encode("x\ufffdy")


def test_plain_text_never_holds_the_end_of_a_document(tokenizer: Tokenizer) -> None:
    text = "".join(map(chr, range(0x250))) + "".join(TEXT)
    assert tokenizer.end_of_document not in tokenizer.encode(text)


def test_the_line_for_the_start_of_a_run_names_kind_size_and_end_of_document(tokenizer: Tokenizer) -> None:
    line = tokenizer.describe()
    assert "\n" not in line and f"{tokenizer.vocab_size:,} ids" in line and f"({tokenizer.end_of_document})" in line


def test_fingerprints_are_stable_and_differ_between_vocabularies(kinds: dict[str, TokenizerSettings]) -> None:
    prints = {kind: make().fingerprint for kind, make in kinds.items()}
    assert prints == {kind: make().fingerprint for kind, make in kinds.items()}
    assert prints["HFGPT2Tokenizer"] == prints["GPT2BPETokenizer"]
    assert len(set(prints.values())) == len(prints) - 1
    assert all(len(value) == 64 for value in prints.values())


def test_copies_of_settings_are_equal_so_that_a_worker_makes_its_tokenizer_once(
    kinds: dict[str, TokenizerSettings],
) -> None:
    for make in kinds.values():
        assert hash(pickle.loads(pickle.dumps(make))) == hash(make)


def test_an_end_of_document_token_that_is_not_in_the_vocabulary_is_an_error(
    kinds: dict[str, TokenizerSettings],
) -> None:
    for make in kinds.values():
        with pytest.raises(UserError, match="end_of_document_token"):
            build_tokenizer(make.kind, make.vocab_file, make.merge_file, "<|nowhere|>")


@pytest.mark.parametrize("kind", [name for name in names("tokenizer") if name != "CharLevelTokenizer"])
def test_a_missing_or_foreign_vocabulary_file_is_a_clear_error(kind: str, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.file"
    foreign.write_text("this is prose, and no vocabulary\n")
    with pytest.raises(UserError, match="needs vocab_file"):
        build_tokenizer(kind)
    with pytest.raises(UserError, match="absent"):
        build_tokenizer(kind, str(tmp_path / "absent"), str(foreign))
    with pytest.raises(UserError, match=r"foreign\.file"):
        build_tokenizer(kind, str(foreign), str(foreign))


def test_an_unknown_kind_names_the_nearest() -> None:
    with pytest.raises(UserError, match='Did you mean "HFTokenizer"'):
        build_tokenizer("HFTokeniser")


def test_the_folder_of_a_model_stands_for_its_tokenizer_with_the_end_that_its_settings_name(tmp_path: Path) -> None:
    definition = json.loads(Path(bpe_file(tmp_path)).read_text())
    text = json.dumps(definition).replace(END_OF_DOCUMENT, "</s>")
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match=r"no token .<.endoftext.>"):
        build_tokenizer("HFTokenizer", str(tmp_path))
    for token in ("</s>", {"content": "</s>"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": token}))
        tokenizer = build_tokenizer("HFTokenizer", str(tmp_path))
        assert tokenizer.decode([tokenizer.end_of_document]) == "</s>"
        assert tokenizer.fingerprint == build_tokenizer("HFTokenizer", str(tmp_path / "tokenizer.json")).fingerprint
