"""Text files to token files: read, tokenize in workers, write in order, resume after an interruption.

The encoder is passed as settings, from which each worker makes its own. No torch.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from megatron.data.indexed import give_names
from megatron.data.manifest import read_manifest, write_manifest
from megatron.errors import RunError, UserError
from megatron.preprocessing.encoding import encoder_of
from megatron.preprocessing.fast_encoding.checked import EncoderSettings
from megatron.preprocessing.job import Job, Texts, Totals
from megatron.preprocessing.journal import Checkpoint, Journal
from megatron.preprocessing.output import Output
from megatron.preprocessing.sources import STANDARD_INPUT, Span, input_size, is_on_disk, plan_spans
from megatron.preprocessing.workers import Reader, encoded_chunks


class AlarmError(Exception):
    """The fast backend gave other ids than the reference; `found` are the code points that cause it."""

    def __init__(self, found: tuple[tuple[int, int], ...]) -> None:
        super().__init__(f"a fast backend's ids differ for {found}")
        self.found = found


def preprocess(
    job: Job,
    make_encoder: EncoderSettings,
    progress: Callable[[Totals], None] = lambda totals: None,
    resume: bool = False,
    announce: Callable[[str], None] = lambda line: None,
) -> Totals:
    """Tokenize `job.inputs`, in their order; the files are the same for any workers, backend and interruptions.

    progress: called after each chunk. announce: called with lines for the user. resume: continue an interrupted run of
    the same job, or return its totals if it was completed.
    Raises RunError for a bad line, a damaged file, a full disk or a lost worker. The work up to the last checkpoint is
    then kept for `resume`; before the first checkpoint nothing is kept.
    Raises UserError for an input that is not text, and where `resume` is impossible: with standard input, or after an
    interrupted run of other work.
    """
    if resume and STANDARD_INPUT in job.inputs:
        raise UserError("--resume reads the inputs again, which is impossible for standard input; give it files")
    spans = plan_spans(job.inputs, job.shard)
    work = _work(job, encoder_of(make_encoder).fingerprint)
    journal = Journal(f"{job.output_prefix}.journal", work)
    if resume:
        journal.load()
        done = read_manifest(job.output_prefix)
        is_done = done is not None and done.get("work") == work and all(Path(name).exists() for name in job.outputs)
        if journal.last is None and done and is_done:
            announce("this work is complete already")
            return Totals(**done["counts"])
    else:
        journal.clear()
    while True:
        try:
            if journal.last is None or not journal.last.complete:
                _run(job, spans, make_encoder, journal, progress)
            return _finish(job, spans, make_encoder, journal)
        except AlarmError as alarm:
            count = sum(stop - start for start, stop in alarm.found)
            journal.roll_back(alarm.found)
            make_encoder = make_encoder.widened(alarm.found)
            announce(f"{alarm}: these {count:,} go to the tokenizer's own library; documents with them are done again")


def _work(job: Job, fingerprint: str) -> dict[str, Any]:
    """Everything that the output depends on, in JSON's types."""
    inputs = [[path, Path(path).stat().st_mtime_ns if is_on_disk(path) else 0, input_size(path)] for path in job.inputs]
    return {"inputs": inputs, "tokenizer": fingerprint, "settings": job.settings()}


def _run(
    job: Job, spans: Sequence[Span], make_encoder: EncoderSettings, journal: Journal, progress: Callable[[Totals], None]
) -> None:
    """Process the inputs from the last checkpoint to the end, and write the final checkpoint."""
    begin = journal.last or Checkpoint()
    totals = Totals(**begin.totals)
    started = saved = time.monotonic()
    before, first_seen = totals.seconds, list[int]()
    reader = Reader(job, spans, begin)
    with ExitStack() as stack:
        output = stack.enter_context(Output(job, encoder_of(make_encoder).vocab_size, begin if journal.last else None))
        chunks = stack.enter_context(closing(encoded_chunks(job, reader, make_encoder)))
        position = Checkpoint(begin.span, begin.offset, begin.line)
        for position, chunk in chunks:
            if chunk.alarm:
                raise AlarmError(chunk.alarm)
            if chunk.totals.bad_lines and not job.skip_bad_lines:
                raise RunError(f"{chunk.totals.bad_line_list[0]} (--skip-bad-lines leaves such lines out)")
            output.add(chunk)
            totals.add(chunk.totals)
            first_seen += chunk.first_seen
            del chunk  # before the next one is read: it can be large
            totals.input_bytes, totals.seconds = reader.done_bytes(position), before + time.monotonic() - started
            progress(totals)
            if time.monotonic() - saved >= job.checkpoint_seconds:
                journal.append(output.checkpoint(position, totals, reader.digests, first_seen))
                saved, first_seen = time.monotonic(), []
        if not totals.documents and job.shard is None:
            what, left_out = "text" if isinstance(job.form, Texts) else "answer", "; ".join(totals.notes())
            raise RunError(
                f"no document in {', '.join(job.inputs)} has any {what} under {', '.join(job.keys)}"
                + (f" ({left_out})" if left_out else "")
            )
        position.complete = True
        journal.append(output.checkpoint(position, totals, reader.digests, first_seen))


def _finish(job: Job, spans: Sequence[Span], make_encoder: EncoderSettings, journal: Journal) -> Totals:
    """Give the files their final names and write the manifest. Can be repeated after an interruption."""
    last = journal.last
    assert last is not None
    encoder = encoder_of(make_encoder)
    for pair in job.pairs:
        give_names(job.prefix(pair), job.dtype(pair, encoder.vocab_size), last.outputs[pair])
        Path(f"{job.prefix(pair)}.hashes.partial").unlink(missing_ok=True)
    inputs = [
        {"path": span.path, "bytes": input_size(span.path), "from": span.start, "to": span.stop, "sha256": digest}
        for span, digest in zip(spans, last.digests, strict=True)
    ]
    work = _work(job, encoder.fingerprint)
    write_manifest(
        job.output_prefix, job.outputs, work=work, inputs=inputs, encoder=make_encoder.describe(), counts=last.totals
    )
    journal.clear()
    return Totals(**last.totals)
