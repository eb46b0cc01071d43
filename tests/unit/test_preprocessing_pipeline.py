"""Text files to token files."""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron.data.indexed import IndexedDataset
from megatron.errors import RunError
from megatron.preprocessing.chunks import Chunk, read_chunks
from megatron.preprocessing.fast_encoding.checked import EncoderSettings
from megatron.preprocessing.job import Job, Texts, Totals
from megatron.preprocessing.pipeline import preprocess
from megatron.tokenizer.build import TokenizerSettings
from tests.tokenizer_files import TEXT, bpe_file

BYTES = EncoderSettings(TokenizerSettings("CharLevelTokenizer"))
END = 256


def jsonl(path: Path, entries: Iterable[Any]) -> str:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return str(path)


def documents(prefix: str) -> list[bytes]:
    dataset = IndexedDataset(prefix)
    return [bytes(token for token in dataset.get(n) if token != END) for n in range(len(dataset))]


def test_each_key_gets_its_own_text(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", [{"question": f"q{n}", "answer": f"a{n}"} for n in range(3)])
    job = Job((path,), str(tmp_path / "out"), keys=("question", "answer"))
    preprocess(job, BYTES)
    assert documents(job.prefix("question")) == [b"q0", b"q1", b"q2"]
    assert documents(job.prefix("answer")) == [b"a0", b"a1", b"a2"]


def test_files_follow_one_another_and_a_text_file_is_a_document(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("a plain\ntext")
    paths = (str(tmp_path / "b.txt"), jsonl(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two"}]))
    job = Job(paths, str(tmp_path / "deep" / "out"))
    preprocess(job, BYTES)
    assert documents(job.prefix("text")) == [b"a plain\ntext", b"one", b"two"]


def test_the_end_of_a_document_is_written_only_when_asked_for(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", [{"text": "ab"}, {"text": "c"}])
    for append, expected in ((False, [97, 98, 99]), (True, [97, 98, END, 99, END])):
        job = Job((path,), str(tmp_path / "out"), form=Texts(append_eod=append))
        assert preprocess(job, BYTES).tokens == len(expected)
        assert IndexedDataset(job.prefix("text")).tokens(0, 99).tolist() == expected


def test_empty_documents_are_left_out_and_counted(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", [{"text": text} for text in ("", "a", "", "b", " ")])
    job = Job((path,), str(tmp_path / "out"), form=Texts(append_eod=True))
    totals = preprocess(job, BYTES)
    assert (totals.documents, totals.empty) == (3, 2)
    assert documents(job.prefix("text")) == [b"a", b"b", b" "]


@dataclass(frozen=True)
class InThreads(EncoderSettings):
    """The tokenizer's own library, with threads for workers."""

    in_threads = True


@pytest.mark.parametrize("settings", [EncoderSettings, InThreads])
def test_files_are_the_same_for_any_number_of_workers(tmp_path: Path, settings: type[EncoderSettings]) -> None:
    tokenizer = settings(TokenizerSettings("HFTokenizer", bpe_file(tmp_path)))
    path = jsonl(tmp_path / "x.jsonl", [{"text": f"{n} {TEXT[n % 3] * (n % 5)}"} for n in range(3000)])
    results = []
    for workers in (1, 2, 3):
        prefix, form = str(tmp_path / f"out{workers}"), Texts(append_eod=True)
        job = Job((path, path), prefix, form=form, workers=workers, chunk_bytes=20_000)
        totals = preprocess(job, tokenizer)
        totals.seconds = 0
        results.append((totals, *(Path(f"{job.prefix('text')}.{end}").read_bytes() for end in ("bin", "idx"))))
    assert results[0] == results[1] == results[2]
    assert results[0][0].documents == 6000


def test_a_bad_line_ends_the_work_and_leaves_no_output(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", [{"text": "a"}] * 2000 + [{"txt": "b"}] + [{"text": "c"}] * 2000)
    for workers in (1, 2):
        with pytest.raises(RunError, match=r"x.jsonl, line 2001: .*--skip-bad-lines"):
            preprocess(Job((path,), str(tmp_path / "out"), workers=workers), BYTES)
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.jsonl"]


def test_bad_lines_are_counted_when_they_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a"}\n' + "bad\n" * 30 + '{"text": "b"}\n')
    totals = preprocess(Job((str(path),), str(tmp_path / "out"), skip_bad_lines=True), BYTES)
    assert (totals.documents, totals.bad_lines, len(totals.bad_line_list)) == (2, 30, 10)
    assert totals.bad_line_list[0].startswith(f"{path}, line 2: not JSON")


def test_ftfy_mends_text_only_when_asked_for(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", [{"text": "It\u00e2\u20ac\u2122s broken"}])
    for ftfy, expected in ((False, "It\u00e2\u20ac\u2122s broken"), (True, "It's broken")):
        job = Job((path,), str(tmp_path / "out"), form=Texts(ftfy=ftfy))
        preprocess(job, BYTES)
        assert documents(job.prefix("text")) == [expected.encode()]


def test_documents_that_spell_the_end_of_document_token_are_counted(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", [{"text": "a<|endoftext|>b"}, {"text": "c"}, {"text": "d\ud800"}])
    tokenizer = EncoderSettings(TokenizerSettings("HFTokenizer", bpe_file(tmp_path)))
    totals = preprocess(Job((path,), str(tmp_path / "out"), form=Texts(append_eod=True)), tokenizer)
    assert (totals.contain_eod, totals.repaired) == (1, 1)


def test_input_without_any_text_is_an_error(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", [{"text": ""}])
    with pytest.raises(RunError, match=r"no document in .*x.jsonl has any text under text"):
        preprocess(Job((path,), str(tmp_path / "out")), BYTES)


def test_progress_goes_up_to_the_size_of_the_input(tmp_path: Path) -> None:
    paths = tuple(jsonl(tmp_path / f"{name}.jsonl", [{"text": "a"}] * 1000) for name in "ab")
    seen: list[tuple[int, int]] = []

    def note(totals: Totals) -> None:
        seen.append((totals.documents, totals.input_bytes))

    preprocess(Job(paths, str(tmp_path / "out"), chunk_bytes=10_000), BYTES, note)
    assert seen == sorted(seen) and len(seen) >= 4
    assert seen[-1] == (2000, sum(Path(path).stat().st_size for path in paths))


def test_reading_stays_a_few_chunks_ahead_of_the_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = jsonl(tmp_path / "x.jsonl", [{"text": "a"}] * 512 * 40)
    read = done = most = 0

    def counted(*arguments: Any) -> Iterator[Chunk]:
        nonlocal read
        for chunk in read_chunks(*arguments):
            read += 1
            yield chunk

    def note(totals: Totals) -> None:
        nonlocal done, most
        done, most = done + 1, max(most, read - done)

    monkeypatch.setattr("megatron.preprocessing.workers.read_chunks", counted)
    preprocess(Job((path,), str(tmp_path / "out"), workers=2, chunk_bytes=5_000), BYTES, note)
    assert done == read >= 40
    assert 2 <= most <= 7


def test_nothing_is_read_beside_a_large_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["a" * 900] * 30 + ["b" * 9_000] + ["c" * 900] * 30
    path = jsonl(tmp_path / "x.jsonl", [{"text": text} for text in texts])
    ahead: dict[bool, list[int]] = {False: [], True: []}  # chunks in work, by whether the large one is among them
    read = done = large = 0

    def counted(*arguments: Any) -> Iterator[Chunk]:
        nonlocal read, large
        for chunk in read_chunks(*arguments):
            ahead[done < large].append(read - done)
            read += 1
            large = read if b"b" in chunk.data else large
            yield chunk

    def note(totals: Totals) -> None:
        nonlocal done
        done += 1

    monkeypatch.setattr("megatron.preprocessing.workers.read_chunks", counted)
    preprocess(Job((path,), str(tmp_path / "out"), workers=8, chunk_bytes=1_000), InThreads(BYTES.tokenizer), note)
    assert ahead[True] == [] and max(ahead[False]) > 8


@dataclass(frozen=True)
class Dying:
    """A tokenizer whose worker is killed, as for want of memory."""

    parent: int
    in_threads: bool = False

    def __call__(self) -> Any:
        if os.getpid() != self.parent:
            os.kill(os.getpid(), 9)
        return BYTES()


def test_a_worker_that_dies_is_an_error_and_no_hang(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", [{"text": "a"}] * 10)
    with pytest.raises(RunError, match="a worker process died"):
        preprocess(Job((path,), str(tmp_path / "out"), workers=2), Dying(os.getpid()))
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.jsonl"]
