"""What happens to one chunk of text in a worker: parse, clean, tokenize. No torch."""

from threading import local

import numpy as np

from megatron.arrays import Ids, surrounded
from megatron.preprocessing.chunks import Chunk
from megatron.preprocessing.deduplication import text_hash
from megatron.preprocessing.documents import parse_chunk
from megatron.preprocessing.instructions import encode_records
from megatron.preprocessing.job import LISTED_BAD_LINES, EncodedChunk, Encoder, Job, MakesEncoder, Texts, Totals
from megatron.text import utf8_length


def encode_chunk(chunk: Chunk, job: Job, make_encoder: MakesEncoder) -> EncodedChunk:
    """Parse and tokenize one chunk."""
    encoder = encoder_of(make_encoder)
    if not isinstance(job.form, Texts):
        return encode_records(chunk, job, job.form, encoder)
    parsed = parse_chunk(chunk, job.keys)
    chunk.release()  # the one who handed it over holds it still
    result = EncodedChunk(Totals(repaired=parsed.repaired, bad_lines=len(parsed.bad_lines)))
    result.totals.bad_line_list = parsed.bad_lines[:LISTED_BAD_LINES]
    for key, texts in parsed.texts.items():
        ids = _encode_texts(key, _chosen(texts, job.form, result.totals), job.form, encoder, result)
        result.ids[key] = ids.astype(job.dtype(key, encoder.vocab_size), copy=False)
    return result


_made = local()


def encoder_of(make_encoder: MakesEncoder) -> Encoder:
    """One encoder for all chunks of a thread: it remembers what it has seen, and each chunk has to say that."""
    if getattr(_made, "by", None) != make_encoder:
        _made.encoder, _made.by = make_encoder(), make_encoder
    encoder: Encoder = _made.encoder
    return encoder


def _chosen(texts: list[str], form: Texts, totals: Totals) -> list[str]:
    """The texts that are neither empty nor of a length that is not wanted, mended."""
    if form.ftfy:
        import ftfy  # only those who ask for it wait for it

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


def _encode_texts(key: str, texts: list[str], form: Texts, encoder: Encoder, result: EncodedChunk) -> Ids:
    """The ids of all texts; what else there is to say of them goes to `result`."""
    encoded, totals = encoder.encode(texts), result.totals
    ids, sizes = encoded.ids, encoded.sizes
    if not sizes.all():  # a tokenizer that strips spaces has no ids for them
        texts = [text for text, size in zip(texts, sizes, strict=True) if size]
        totals.empty += len(sizes) - len(texts)
        sizes = sizes[sizes > 0]
    places = np.flatnonzero(ids == encoder.end_of_document)
    totals.contain_eod += len(np.unique(np.searchsorted(np.cumsum(sizes), places, "right")))
    if form.append_eod:
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
