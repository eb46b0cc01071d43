"""Small tokenizers of every kind, trained for the tests of tokenizers and tools."""

import base64
import io
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer

from megatron.tokenizer.base import END_OF_DOCUMENT
from megatron.tokenizer.build import TokenizerSettings
from megatron.tokenizer.train import train_byte_level_bpe

TEXT = [
    "The quick brown fox jumps over the lazy dog, again and again and again.",
    "def encode(self, text: str) -> list[int]:\n    return self.encode_batch([text])[0]\n",
    "Größe, naïve, 東京, Ελλάδα and 🦊: one text, many bytes. It's what we've got, 1234567 times.",
] * 20


def bpe_file(folder: Path, vocab_size: int = 400) -> str:
    """A tokenizer.json."""
    path = folder / "tokenizer.json"
    if not path.exists():
        train_byte_level_bpe(TEXT, vocab_size, str(path))
    return str(path)


def gpt2_files(folder: Path) -> tuple[str, str]:
    """GPT-2's two files, vocab.json and merges.txt, with the same ids as `bpe_file`."""
    Tokenizer.from_file(bpe_file(folder)).model.save(str(folder))
    vocab = folder / "vocab.json"
    content = vocab.read_text()
    if END_OF_DOCUMENT not in content:  # the model's file leaves special tokens out
        vocab.write_text("{" + f'"{END_OF_DOCUMENT}":0,' + content.lstrip().removeprefix("{"))
    return str(vocab), str(folder / "merges.txt")


def tiktoken_file(folder: Path, name: str = "own.tiktoken") -> str:
    """Ranks of the 256 bytes and a few words."""
    tokens = [bytes([value]) for value in range(256)] + [b"th", b"the", b" t", b"in", b"an", b"ag"]
    lines = [base64.b64encode(token) + f" {rank}".encode() for rank, token in enumerate(tokens)]
    (folder / name).write_bytes(b"\n".join(lines) + b"\n")
    return str(folder / name)


def sentencepiece_file(folder: Path, **settings: object) -> str:
    """A SentencePiece model with byte fall-back."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT),
        model_writer=model,
        vocab_size=400,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
        **settings,
    )
    (folder / "own.model").write_bytes(model.getvalue())
    return str(folder / "own.model")


def settings_of_each_kind(folder: Path) -> dict[str, TokenizerSettings]:
    """Settings that work, for every kind in the registry."""
    vocab, merges = gpt2_files(folder)
    return {
        "HFTokenizer": TokenizerSettings("HFTokenizer", bpe_file(folder)),
        "GPT2BPETokenizer": TokenizerSettings("GPT2BPETokenizer", vocab, merges),
        "HFGPT2Tokenizer": TokenizerSettings("HFGPT2Tokenizer", str(folder)),
        "CharLevelTokenizer": TokenizerSettings("CharLevelTokenizer"),
        "TiktokenTokenizer": TokenizerSettings("TiktokenTokenizer", tiktoken_file(folder)),
        "SPMTokenizer": TokenizerSettings("SPMTokenizer", sentencepiece_file(folder)),
    }
