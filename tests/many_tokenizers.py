"""Tokenizers of many kinds, each of which decodes in its own way."""

import json
from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from megatron.tokenizer.base import END_OF_DOCUMENT, Tokenizer
from megatron.tokenizer.build import build_tokenizer
from tests.tokenizer_files import TEXT, bpe_file, sentencepiece_file, tiktoken_file

TRAINERS = {
    models.BPE: trainers.BpeTrainer,
    models.Unigram: trainers.UnigramTrainer,
    models.WordPiece: trainers.WordPieceTrainer,
    models.WordLevel: trainers.WordLevelTrainer,
}
ALPHABET = sorted({*"".join(TEXT), *map(chr, range(32, 127)), "\n", "\u2581"})


def trained(model: object, **parts: object) -> Backend:
    backend = Backend(model)
    for name, part in parts.items():
        setattr(backend, name, part)
    # BPE and Unigram with a token for each character, so that nothing is unknown.
    extra = {"unk_token": "<unk>"} if isinstance(model, models.Unigram) else {}
    kind = next(kind for kind in TRAINERS if isinstance(model, kind))
    special = [END_OF_DOCUMENT, "<unk>"]
    letters = {} if isinstance(model, models.WordLevel) else {"initial_alphabet": ALPHABET}
    backend.train_from_iterator(TEXT, TRAINERS[kind](special_tokens=special, show_progress=False, **extra, **letters))
    return backend


def metaspace(scheme: str, model: type = models.BPE) -> Callable[[], Backend]:
    part = {
        "pre_tokenizer": pre_tokenizers.Metaspace(prepend_scheme=scheme),
        "decoder": decoders.Metaspace(prepend_scheme=scheme),
    }
    return lambda: trained(model(), **part)


def llama() -> Backend:
    content = json.loads(metaspace("always")().to_str())
    backend = Backend.from_str(json.dumps(content | {"pre_tokenizer": None}))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(
        f"{END_OF_DOCUMENT} $A", special_tokens=[(END_OF_DOCUMENT, 0)]
    )
    return backend


def prefix_space() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=[END_OF_DOCUMENT], initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(TEXT, trainer)
    return backend  # without a decoder, which is found


def bert() -> Backend:
    backend = trained(
        models.WordPiece(unk_token="<unk>"),
        normalizer=normalizers.BertNormalizer(),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
    )
    backend.decoder = decoders.WordPiece()
    return backend


def words() -> Backend:
    return trained(models.WordLevel(unk_token="<unk>"), pre_tokenizer=pre_tokenizers.Whitespace())


FILES: dict[str, Callable[[], Backend]] = {
    "metaspace always": metaspace("always"),
    "metaspace first": metaspace("first"),
    "metaspace never": metaspace("never"),
    "unigram": metaspace("always", models.Unigram),
    "llama": llama,
    "prefix space": prefix_space,
    "bert": bert,
    "words": words,
}


def many_tokenizers(folder: Path) -> dict[str, Tokenizer]:
    """All of them by name; their files are written to `folder`."""
    found = {}
    for name, make in FILES.items():
        make().save(str(folder / f"{name}.json"))
        found[name] = build_tokenizer("HFTokenizer", str(folder / f"{name}.json"))
    for name, keys in {
        "sentencepiece": {},
        "sentencepiece as it is": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
        "sentencepiece without a dummy prefix": {"add_dummy_prefix": False},
        "sentencepiece with suffixes": {"treat_whitespace_as_suffix": True},
    }.items():
        (folder / name).mkdir()
        found[name] = build_tokenizer("SPMTokenizer", sentencepiece_file(folder / name, **keys))
    found["byte-level"] = build_tokenizer("HFTokenizer", bpe_file(folder))
    found["tiktoken"] = build_tokenizer("TiktokenTokenizer", tiktoken_file(folder))
    found["bytes"] = build_tokenizer("CharLevelTokenizer")
    return found
