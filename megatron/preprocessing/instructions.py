"""Instruction data: text of which only the answers are learned, as token files with a label file each.

A record becomes segments of text, each learned or not (`record_formats`). A segment is tokenized as a continuation of
those before it, so that no token crosses the border and no space is made up there (`Tokenizer.encode_parts` says what
happens where this cannot be). `P_text_document` holds the ids, `P_label_document` the label of each: the id itself, or
-100 where nothing is to be learned. `train_data_paths` and `train_label_data_paths` name them. No torch.
"""

from collections.abc import Iterator

import numpy as np

from megatron.arrays import Ids, split
from megatron.data.windows import NOT_A_LABEL
from megatron.errors import UserError
from megatron.preprocessing.chunks import Chunk
from megatron.preprocessing.documents import json_object, lines_of
from megatron.preprocessing.fast_encoding.checked import CheckedEncoder
from megatron.preprocessing.job import LABEL, LISTED_BAD_LINES, TEXT, EncodedChunk, Job, Totals
from megatron.preprocessing.record_formats import BadRecordError, Chat, PromptAndCompletion, Record, Segments
from megatron.text import utf8_length, well_formed


def encode_records(chunk: Chunk, job: Job, form: PromptAndCompletion | Chat, encoder: CheckedEncoder) -> EncodedChunk:
    """Ids and labels of a chunk's records, each ended by one end-of-document token. form: the job's.

    A chat template writes the special tokens itself, so the tokenizer adds none, as in Transformers.
    Records without anything to learn are skipped and counted, bad ones are listed.
    """
    result = EncodedChunk(Totals())
    documents = list(_documents(chunk, form, result.totals))
    chunk.release()  # the caller still holds a reference
    encoded = encoder.encode_parts([[text for text, _ in segments] for segments in documents])
    pieces = iter(split(encoded.ids, encoded.sizes))
    before, after = ((), ()) if isinstance(form, Chat) else encoder.affixes
    if after[-1:] == (encoder.end_of_document,):
        after = after[:-1]
    ends = (*before, *after, encoder.end_of_document).count(encoder.end_of_document)
    texts, labels = [], []
    for segments in documents:
        runs = [(next(pieces), learned) for _, learned in segments]
        ids, learned = _document(runs, before, after, encoder.end_of_document)
        texts.append(ids)
        labels.append(np.where(learned, ids, NOT_A_LABEL))
        result.totals.learned += int(learned.sum())
        result.totals.contain_eod += int((ids == encoder.end_of_document).sum() > ends)
    sizes = np.array([len(ids) for ids in texts], "<i4")
    for pair, arrays in ((TEXT, texts), (LABEL, labels)):
        dtype = job.dtype(pair, encoder.vocab_size)
        result.ids[pair] = np.concatenate([np.empty(0, dtype), *arrays]).astype(dtype)
        result.sizes[pair] = sizes
    result.alarm, result.first_seen = encoded.alarm, encoded.first_seen
    result.totals.documents, result.totals.tokens = len(texts), int(sizes.sum())
    result.totals.by_reference = encoded.by_reference
    return result


def _document(
    runs: list[tuple[Ids, bool]], before: tuple[int, ...], after: tuple[int, ...], end: int
) -> tuple[Ids, Ids]:
    """Ids of a document, int64, and which of them are learned.

    What is added to its end is learned if its last text is; `end` is added unless the document has it there.
    """
    if after or runs[-1][0][-1:].tolist() != [end]:
        after = (*after, end)
    whole = [(np.array(before, np.int64), False), *runs, (np.array(after, np.int64), runs[-1][1])]
    ids = np.concatenate([run.astype(np.int64) for run, _ in whole])
    return ids, np.repeat([learned for _, learned in whole], [len(run) for run, _ in whole])


def _documents(chunk: Chunk, form: PromptAndCompletion | Chat, totals: Totals) -> Iterator[Segments]:
    """The segments of each record in which something is learned."""
    for name, record, is_valid in _records(chunk):
        try:
            if isinstance(record, str):
                raise BadRecordError(record)
            found = [(text, learned) for text, learned in form(record) if text]
        except BadRecordError as error:
            totals.bad_lines += 1
            totals.bad_line_list = [*totals.bad_line_list, f"{name}: {error}"][:LISTED_BAD_LINES]
            continue
        segments = [(well_formed(text), learned) for text, learned in found]
        totals.repaired += segments != found or not is_valid
        if any(learned for _, learned in segments):
            totals.text_bytes += sum(utf8_length(text) for text, _ in segments)
            yield segments
        else:
            totals.without_answer += 1


def _records(chunk: Chunk) -> Iterator[tuple[str, Record | str, bool]]:
    """Each record, or what is wrong with it, with its place, and whether it was valid UTF-8."""
    if chunk.is_text:
        raise UserError(f"{chunk.source} is plain text; instruction data have prompts and answers: JSON lines, parquet")
    if chunk.columns:
        for number, row in enumerate(zip(*chunk.columns.values(), strict=True), start=chunk.start.line + 1):
            yield f"{chunk.source}, row {number}", dict(zip(chunk.columns, row, strict=True)), True
        return
    for number, line in enumerate(lines_of(chunk), start=chunk.start.line + 1):
        if line.strip():
            yield f"{chunk.source}, line {number}", *json_object(line, chunk)
