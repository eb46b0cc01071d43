"""What happens to one chunk of text in a worker: parse, clean, tokenize. Floor 2; no torch."""

from threading import local

import numpy as np

from megatron.arrays import surrounded
from megatron.data.documents import parse_chunk
from megatron.data.duplicates import text_hash
from megatron.data.instructions import encode_records
from megatron.data.job import LISTED_BAD_LINES, EncodedChunk, Encoder, Job, MakesEncoder, Totals
from megatron.data.reading import Chunk
from megatron.text import utf8_length


def encode_chunk(chunk: Chunk, job: Job, make_encoder: MakesEncoder) -> EncodedChunk:
    """Parse and tokenize one chunk."""
    encoder = encoder_of(make_encoder)
    if job.form is not None:
        return encode_records(chunk, job.form, encoder)
    parsed = parse_chunk(chunk, job.keys)
    chunk.release()  # the one who handed it over holds it still
    result = EncodedChunk(Totals(repaired=parsed.repaired, bad_lines=len(parsed.bad_lines)))
    result.totals.bad_line_list = parsed.bad_lines[:LISTED_BAD_LINES]
    for key, texts in parsed.texts.items():
        _encode_texts(key, _chosen(texts, job, result.totals), job, encoder, result)
    return result


_made = local()


def encoder_of(make_encoder: MakesEncoder) -> Encoder:
    """One encoder for all chunks of a thread: it remembers what it has seen, and each chunk has to say that."""
    if getattr(_made, "by", None) != make_encoder:
        _made.encoder, _made.by = make_encoder(), make_encoder
    encoder: Encoder = _made.encoder
    return encoder


def _chosen(texts: list[str], job: Job, totals: Totals) -> list[str]:
    """The texts that are neither empty nor of a length that is not wanted, mended."""
    if job.ftfy:
        import ftfy  # only those who ask for it wait for it

        texts = [ftfy.fix_text(text) for text in texts]
    present = [text for text in texts if text]
    chosen = [
        text for text in present if job.min_chars <= len(text) and (job.max_chars is None or len(text) <= job.max_chars)
    ]
    totals.empty += len(texts) - len(present)
    totals.filtered += len(present) - len(chosen)
    return chosen


def _encode_texts(key: str, texts: list[str], job: Job, encoder: Encoder, result: EncodedChunk) -> None:
    encoded, totals = encoder.encode(texts), result.totals
    ids, sizes = encoded.ids, encoded.sizes
    if not sizes.all():  # a tokenizer that strips spaces has no ids for them
        texts = [text for text, size in zip(texts, sizes, strict=True) if size]
        totals.empty += len(sizes) - len(texts)
        sizes = sizes[sizes > 0]
    places = np.flatnonzero(ids == encoder.end_of_document)
    totals.contain_eod += len(np.unique(np.searchsorted(np.cumsum(sizes), places, "right")))
    if job.append_eod:
        ids, sizes = surrounded(ids, sizes, (), (encoder.end_of_document,)), sizes + 1
    totals.documents += len(sizes)
    totals.tokens += len(ids)
    totals.text_bytes += sum(map(utf8_length, texts))
    totals.by_reference += encoded.by_reference
    result.ids[key] = ids.astype(job.dtype(key, encoder.vocab_size), copy=False)
    result.sizes[key] = sizes.astype("<i4")
    result.hashes[key] = [text_hash(text) for text in texts] if job.deduplicate else []
    result.alarm += encoded.alarm
    result.first_seen += encoded.first_seen
