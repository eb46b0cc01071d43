"""Process one chunk of text in a worker: parse, clean, tokenize. No torch."""

from threading import local

import numpy as np

from megatron.arrays import Ids, surrounded
from megatron.errors import RunError
from megatron.preprocessing.chunks import Chunk
from megatron.preprocessing.deduplication import text_hash
from megatron.preprocessing.documents import parse_chunk
from megatron.preprocessing.fast_encoding.checked import CheckedEncoder, EncoderSettings
from megatron.preprocessing.instructions import encode_records
from megatron.preprocessing.job import LISTED_BAD_LINES, EncodedChunk, Job, Texts, Totals
from megatron.text import utf8_length
from megatron.tokenizer.base import UnknownTextError


def encode_chunk(chunk: Chunk, job: Job, make_encoder: EncoderSettings) -> EncodedChunk:
    """Parse and tokenize one chunk. Raises RunError for a text that the vocabulary has no tokens for."""
    try:
        return _encode_chunk(chunk, job, encoder_of(make_encoder))
    except UnknownTextError as error:
        raise RunError(f"{chunk.source}, from line {chunk.start.line + 1} on: {error}") from error


def _encode_chunk(chunk: Chunk, job: Job, encoder: CheckedEncoder) -> EncodedChunk:
    if not isinstance(job.form, Texts):
        return encode_records(chunk, job, job.form, encoder)
    parsed = parse_chunk(chunk, job.keys)
    chunk.release()  # the caller still holds a reference
    result = EncodedChunk(Totals(repaired=parsed.repaired, bad_lines=len(parsed.bad_lines)))
    result.totals.bad_line_list = parsed.bad_lines[:LISTED_BAD_LINES]
    for key, texts in parsed.texts.items():
        ids = _encode_texts(key, _chosen(texts, job.form, result.totals), job.form, encoder, result)
        result.ids[key] = ids.astype(job.dtype(key, encoder.vocab_size), copy=False)
    return result


_made = local()


def encoder_of(make_encoder: EncoderSettings) -> CheckedEncoder:
    """One encoder for all chunks of a thread: it reports each code point only once."""
    if getattr(_made, "by", None) != make_encoder:
        _made.encoder, _made.by = make_encoder(), make_encoder
    encoder: CheckedEncoder = _made.encoder
    return encoder


def _chosen(texts: list[str], form: Texts, totals: Totals) -> list[str]:
    """The texts that are not empty and within the length limits, repaired by ftfy if the form asks for it."""
    if form.ftfy:
        import ftfy  # slow to import

        texts = [ftfy.fix_text(text) for text in texts]
    present = [text for text in texts if text]
    chosen = [
        text
        for text in present
        if form.min_chars <= len(text) and (form.max_chars is None or len(text) <= form.max_chars)
    ]
    totals.empty += len(texts) - len(present)
    totals.filtered += len(present) - len(chosen)
    return chosen


def _encode_texts(key: str, texts: list[str], form: Texts, encoder: CheckedEncoder, result: EncodedChunk) -> Ids:
    """The ids of all texts; sizes, counts and hashes go to `result`."""
    encoded, totals = encoder.encode(texts), result.totals
    ids, sizes = encoded.ids, encoded.sizes
    if not sizes.all():  # a tokenizer that strips white space has no ids for a text of it alone
        texts = [text for text, size in zip(texts, sizes, strict=True) if size]
        totals.empty += len(sizes) - len(texts)
        sizes = sizes[sizes > 0]
    found = np.flatnonzero(ids == encoder.end_of_document)
    ends = np.bincount(np.searchsorted(np.cumsum(sizes), found, "right"), minlength=len(sizes))
    totals.contain_eod += int((ends > sum(encoder.affixes, ()).count(encoder.end_of_document)).sum())
    if form.append_eod and encoder.affixes[1][-1:] != (encoder.end_of_document,):
        ids, sizes = surrounded(ids, sizes, (), (encoder.end_of_document,)), sizes + 1
    totals.documents += len(sizes)
    totals.tokens += len(ids)
    totals.text_bytes += sum(map(utf8_length, texts))
    totals.by_reference += encoded.by_reference
    result.sizes[key] = sizes.astype("<i4")
    result.hashes[key] = [text_hash(text) for text in texts] if form.deduplicate else []
    result.alarm += encoded.alarm
    result.first_seen += encoded.first_seen
    return ids
