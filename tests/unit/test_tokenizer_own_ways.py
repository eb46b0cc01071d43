"""What is particular to one kind of tokenizer."""

import gzip
import json
from pathlib import Path

import pytest
import tiktoken_ext.openai_public as openai_encodings
from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing

from megatron.errors import UserError
from megatron.tokenizer.base import END_OF_DOCUMENT, Tokenizer
from megatron.tokenizer.build import build_tokenizer
from megatron.tokenizer.tiktoken_bpe import FAMILIES
from megatron.tokenizer.train import train_byte_level_bpe
from tests.tokenizer_files import TEXT, bpe_file, gpt2_files, sentencepiece_file, tiktoken_file


def test_a_spelled_out_special_token_becomes_that_token(tmp_path: Path) -> None:
    vocab, merges = gpt2_files(tmp_path)
    for tokenizer in (
        build_tokenizer("HFTokenizer", bpe_file(tmp_path)),
        build_tokenizer("GPT2BPETokenizer", vocab, merges),
        build_tokenizer("TiktokenTokenizer", tiktoken_file(tmp_path)),
    ):
        text = f"one{END_OF_DOCUMENT}two"
        assert tokenizer.encode(text).count(tokenizer.end_of_document) == 1
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_truncation_that_a_tokenizer_file_asks_for_is_ignored(tmp_path: Path) -> None:
    backend = Backend.from_file(bpe_file(tmp_path))
    backend.enable_truncation(4)
    backend.enable_padding(length=4)
    backend.save(str(tmp_path / "cutting.json"))
    cutting = build_tokenizer("HFTokenizer", str(tmp_path / "cutting.json"))
    assert cutting.encode(TEXT[0]) == build_tokenizer("HFTokenizer", bpe_file(tmp_path)).encode(TEXT[0])
    assert len(cutting.encode("a")) == 1


def test_what_the_file_itself_adds_to_each_text_is_added(tmp_path: Path) -> None:
    backend = Backend.from_file(bpe_file(tmp_path))
    backend.post_processor = TemplateProcessing("<|endoftext|> $A", special_tokens=[(END_OF_DOCUMENT, 0)])
    backend.save(str(tmp_path / "beginning.json"))
    plain = build_tokenizer("HFTokenizer", bpe_file(tmp_path)).encode("text")
    assert build_tokenizer("HFTokenizer", str(tmp_path / "beginning.json")).encode("text") == [0, *plain]


def gpt2_model(folder: Path) -> Tokenizer:
    """OPT's way: GPT-2's two files, a token that was added later, and a text that begins with a token."""
    vocab, merges = gpt2_files(folder)
    (folder / "tokenizer.json").unlink()
    settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": END_OF_DOCUMENT, "bos_token": END_OF_DOCUMENT}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"add_bos_token": True}))
    return build_tokenizer("GPT2BPETokenizer", vocab, merges)


def sentencepiece_model(folder: Path) -> Tokenizer:
    """Llama 2's way: a SentencePiece model."""
    Path(sentencepiece_file(folder, model_type="bpe")).rename(folder / "tokenizer.model")
    settings = {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"add_bos_token": True}))
    return build_tokenizer("SPMTokenizer", str(folder / "tokenizer.model"))


@pytest.mark.parametrize(("make", "beginning"), [(gpt2_model, 0), (sentencepiece_model, 1)])
def test_a_folder_without_a_tokenizer_json_has_the_ids_of_transformers(tmp_path: Path, make, beginning: int) -> None:
    from transformers import AutoTokenizer

    plain = make(tmp_path)
    added = plain.vocab_size
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<image>": added}))
    ours, theirs = build_tokenizer("HFTokenizer", str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.encode(TEXT[0]) == [beginning, *plain.encode(TEXT[0])]
    for text in (*TEXT[:3], f"an<image>, {TEXT[2]}", "<image>", ""):
        assert ours.encode(text) == theirs(text)["input_ids"]
        assert ours.encode(text).count(added) == text.count("<image>")
    assert ours.decode([ours.end_of_document]) == theirs.eos_token


def test_files_that_transformers_makes_no_tokenizer_of_are_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_text("prose")
    with pytest.raises(UserError, match=r"has no tokenizer\.json, and transformers makes none of its other files"):
        build_tokenizer("HFTokenizer", str(tmp_path))


def test_the_vocabulary_of_a_file_with_gaps_reaches_to_its_highest_id(tmp_path: Path) -> None:
    content = json.loads(Path(bpe_file(tmp_path)).read_text())
    content["model"]["vocab"]["far away"] = 999
    (tmp_path / "gaps.json").write_text(json.dumps(content))
    tokenizer = build_tokenizer("HFTokenizer", str(tmp_path / "gaps.json"))
    assert tokenizer.vocab_size == 1000
    assert tokenizer.decode(range(990, 1000)).endswith("far away")


def test_the_error_for_an_absent_token_suggests_the_special_tokens_there_are(tmp_path: Path) -> None:
    backend = Backend.from_file(bpe_file(tmp_path))
    backend.add_special_tokens(["<|end_of_text|>"])
    content = backend.to_str().replace(END_OF_DOCUMENT, "</s>")
    (tmp_path / "other.json").write_text(content)
    with pytest.raises(UserError, match=r'perhaps to "<\|end_of_text\|>"'):
        build_tokenizer("HFTokenizer", str(tmp_path / "other.json"))
    named = build_tokenizer("HFTokenizer", str(tmp_path / "other.json"), None, "</s>")
    assert named.end_of_document == 0


def test_gpt2_ids_are_those_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    vocab, merges = gpt2_files(tmp_path)
    theirs = transformers.GPT2TokenizerFast(vocab=vocab, merges=merges)
    ours = build_tokenizer("GPT2BPETokenizer", vocab, merges)
    texts = [*TEXT[:3], "  indented\n\n\tand\ttabs  ", "don't we'll I'M 12 345", " \u00a0x\u2003y "]
    assert ours.encode_batch(texts) == [theirs.encode(text, add_special_tokens=False) for text in texts]
    assert ours.vocab_size == 400


def test_gpt2_without_its_merges_is_an_error_that_names_the_key(tmp_path: Path) -> None:
    vocab, _ = gpt2_files(tmp_path)
    with pytest.raises(UserError, match="needs merge_file"):
        build_tokenizer("GPT2BPETokenizer", vocab)


def test_gpt2_never_adds_an_end_of_document_token_to_the_vocabulary(tmp_path: Path) -> None:
    vocab, merges = gpt2_files(tmp_path)
    Path(vocab).write_text(Path(vocab).read_text().replace(END_OF_DOCUMENT, "<|other|>"))
    with pytest.raises(UserError, match=r'no token "<\|endoftext\|>".*<\|other\|>'):
        build_tokenizer("GPT2BPETokenizer", vocab, merges)


def test_characters_are_bytes_and_the_end_of_a_document_is_no_byte() -> None:
    tokenizer = build_tokenizer("CharLevelTokenizer")
    assert tokenizer.encode("a\0é") == [97, 0, 0xC3, 0xA9]
    assert (tokenizer.vocab_size, tokenizer.end_of_document) == (257, 256)
    assert tokenizer.decode([97, 256, 98]) == "a<|endoftext|>b"
    assert tokenizer.decode([0xC3]) == "\ufffd"


def test_a_tiktoken_file_knows_pattern_and_special_tokens_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_encodings, "load_tiktoken_bpe", lambda *_, **__: {})
    for name, family in FAMILIES:
        theirs = openai_encodings.ENCODING_CONSTRUCTORS[name]()
        assert family.pattern == theirs["pat_str"], name
        assert dict(family.special_tokens) == theirs["special_tokens"], name


def test_holes_in_a_tiktoken_vocabulary_do_not_stop_decoding(tmp_path: Path) -> None:
    tokenizer = build_tokenizer("TiktokenTokenizer", tiktoken_file(tmp_path, "cl100k_base.small.tiktoken"))
    assert tokenizer.vocab_size == 100277 and tokenizer.end_of_document == 100257
    assert tokenizer.decode([104, 100000, 105]) == "h\ufffdi"


def test_a_tiktoken_name_without_a_network_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # nobody answers there
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="without a network, set vocab_file"):
        build_tokenizer("TiktokenTokenizer", "p50k_edit")
    with pytest.raises(UserError, match='Did you mean "cl100k_base"'):
        build_tokenizer("TiktokenTokenizer", "cl100k")


def test_sentencepiece_ends_documents_with_its_own_piece_or_a_chosen_one(tmp_path: Path) -> None:
    path = sentencepiece_file(tmp_path, control_symbols=["<eod>"])
    assert build_tokenizer("SPMTokenizer", path).end_of_document == 2  # </s>
    chosen = build_tokenizer("SPMTokenizer", path, None, "<eod>")
    assert chosen.end_of_document == 3
    with_none = sentencepiece_file(tmp_path, eos_id=-1, control_symbols=["<eod>"])
    with pytest.raises(UserError, match="<eod>"):
        build_tokenizer("SPMTokenizer", with_none)


def test_training_gives_the_same_file_again_and_every_byte_an_id(tmp_path: Path) -> None:
    first, second = tmp_path / "first.json", tmp_path / "deeper" / "second.json"
    assert train_byte_level_bpe(TEXT, 390, str(first)) == train_byte_level_bpe(iter(TEXT), 390, str(second)) == 390
    assert first.read_bytes() == second.read_bytes()
    assert list(tmp_path.glob("*.partial")) == []
    tokenizer = build_tokenizer("HFTokenizer", str(first))
    assert tokenizer.end_of_document == 0
    strange = "".join(map(chr, [0, 1, 127, 128, 0x2FFF, 0x10FFFF]))
    assert tokenizer.decode(tokenizer.encode(strange)) == strange
    assert len(tokenizer.encode(TEXT[0])) < len(TEXT[0]) / 2


def test_a_vocabulary_without_room_for_the_bytes_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least 257"):
        train_byte_level_bpe(TEXT, 256, str(tmp_path / "small.json"))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_tokenizer_files_with_a_byte_order_mark_give_the_ids_of_those_without(tmp_path: Path, encoding: str) -> None:
    def marked(path: str) -> str:
        changed = tmp_path / "marked" / Path(path).name
        changed.parent.mkdir(exist_ok=True)
        changed.write_text(Path(path).read_text("utf-8"), encoding)
        return str(changed)

    vocab, merges = gpt2_files(tmp_path)
    for kind, files in (
        ("HFTokenizer", [bpe_file(tmp_path)]),
        ("GPT2BPETokenizer", [vocab, merges]),
        ("TiktokenTokenizer", [tiktoken_file(tmp_path)]),
    ):
        plain, found = build_tokenizer(kind, *files), build_tokenizer(kind, *map(marked, files))
        assert found.encode_batch(TEXT[:3]) == plain.encode_batch(TEXT[:3])
        assert found.fingerprint == plain.fingerprint


def test_a_compressed_tokenizer_file_is_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json.gz").write_bytes(gzip.compress(Path(bpe_file(tmp_path)).read_bytes()))
    for kind in ("HFTokenizer", "TiktokenTokenizer"):
        with pytest.raises(UserError, match=r"vocab_file \(.*tokenizer.json.gz\) is gzip data"):
            build_tokenizer(kind, str(tmp_path / "tokenizer.json.gz"))


def test_merges_that_are_not_pairs_are_named_by_their_line(tmp_path: Path) -> None:
    vocab, merges = gpt2_files(tmp_path)
    Path(merges).write_text("#version: 0.2\nt h\nth e x\n")
    with pytest.raises(UserError, match="line 3 of the merges is not a pair of tokens"):
        build_tokenizer("GPT2BPETokenizer", vocab, merges)
