"""Work that was interrupted, shared out, or found to be wrong, ends as if nothing had happened."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from megatron.arrays import Ids, flat
from megatron.data.indexed import IndexedDataset
from megatron.errors import RunError, UserError
from megatron.preprocessing.chunks import read_chunks
from megatron.preprocessing.fast_encoding.checked import CheckedEncoder, EncoderSettings
from megatron.preprocessing.fast_encoding.comparison import Comparison
from megatron.preprocessing.fast_encoding.probes import EVERYTHING, Ranges, union
from megatron.preprocessing.job import Job, Texts, Totals
from megatron.preprocessing.journal import Checkpoint, Journal
from megatron.preprocessing.merge import merge, merge_shuffled, open_parts
from megatron.preprocessing.pipeline import preprocess
from megatron.preprocessing.sources import Shard, Span, plan_spans
from megatron.tokenizer.build import TokenizerSettings
from tests.tokenizer_files import TEXT, bpe_file

BYTES = EncoderSettings(TokenizerSettings("CharLevelTokenizer"))


def corpus(folder: Path, files: int = 3, lines: int = 400) -> tuple[str, ...]:
    """Files of lines of many lengths, some of which occur twice."""
    paths = []
    for number in range(files):
        path = folder / f"{number}.jsonl"
        texts = [f"{number}-{line} " + "word " * (line % 50) for line in range(lines)] + ["twice"]
        path.write_text("".join(json.dumps({"text": text, "title": text[:9]}) + "\n" for text in texts))
        paths.append(str(path))
    return tuple(paths)


def files_of(job: Job) -> list[bytes]:
    return [Path(path).read_bytes() for path in job.outputs]


def left_over(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.endswith((".partial", ".journal"))]


class Killed(Exception):
    """Stands for whatever ends a run."""


def stop_after(chunks: int) -> Callable[[Totals], None]:
    count = 0

    def note(totals: Totals) -> None:
        nonlocal count
        count += 1
        if count > chunks:
            raise Killed

    return note


@pytest.mark.parametrize("deduplicate", [False, True])
@pytest.mark.parametrize("chunks", [pytest.param(1, marks=pytest.mark.long), 7, 20])
def test_a_run_that_was_interrupted_again_and_again_gives_the_same_files(
    tmp_path: Path, chunks: int, deduplicate: bool
) -> None:
    job = Job(corpus(tmp_path), str(tmp_path / "a" / "out"), keys=("text", "title"))
    job = replace(job, form=Texts(append_eod=True, deduplicate=deduplicate), chunk_bytes=4000, checkpoint_seconds=0)
    whole = replace(job, output_prefix=str(tmp_path / "b" / "out"))
    expected = preprocess(whole, BYTES)
    for _ in range(100):
        try:
            totals = preprocess(job, BYTES, stop_after(chunks), resume=True)
            break
        except Killed:
            assert "out.journal" in left_over(tmp_path / "a")
    assert files_of(job) == files_of(whole)
    assert (totals.documents, totals.tokens, totals.duplicates) == (
        expected.documents, expected.tokens, expected.duplicates,
    )  # fmt: skip
    assert left_over(tmp_path / "a") == []
    manifests = [json.loads((tmp_path / name / "out_manifest.json").read_text())["inputs"] for name in "ab"]
    assert manifests[0] == manifests[1] and len(manifests[0][0]["sha256"]) == 64


def test_completed_work_is_not_done_again(tmp_path: Path) -> None:
    job = Job(corpus(tmp_path), str(tmp_path / "out"))
    first = preprocess(job, BYTES)
    said: list[str] = []
    assert preprocess(job, BYTES, stop_after(0), resume=True, announce=said.append) == first
    assert said == ["this work is complete already"]


@pytest.mark.parametrize("name", [1, 2, 3, 4, 5])
def test_an_interruption_before_any_of_the_final_names_is_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: int
) -> None:
    """Names 1 to 4 are those of two pairs, 5 that of the manifest."""
    job = Job(corpus(tmp_path), str(tmp_path / "out"), keys=("text", "title"))
    whole = replace(job, output_prefix=str(tmp_path / "whole"))
    preprocess(whole, BYTES)
    given, give = 0, Path.replace

    def fail(path: Path, target: str | Path) -> Path:
        nonlocal given
        given += 1
        if given == name:
            raise Killed
        return give(path, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "replace", fail)
        patch.setattr(Path, "unlink", lambda path, missing_ok: None)  # a process that is killed cleans nothing up
        preprocess(job, BYTES)
    preprocess(job, BYTES, stop_after(0), resume=True)  # nothing is read again
    assert files_of(job) == files_of(whole) and left_over(tmp_path) == []


def test_work_whose_files_are_gone_is_done_again(tmp_path: Path) -> None:
    job = Job(corpus(tmp_path), str(tmp_path / "out"))
    preprocess(job, BYTES)
    before = files_of(job)
    Path(f"{job.prefix('text')}.bin").unlink()
    preprocess(job, BYTES, resume=True)
    assert files_of(job) == before


def test_standard_input_is_not_continued(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--resume reads the inputs again, which is impossible for standard input"):
        preprocess(Job(("-",), str(tmp_path / "out")), BYTES, resume=True)


def test_a_bad_line_is_named_by_its_number_after_an_interruption_as_well(tmp_path: Path) -> None:
    job = Job(corpus(tmp_path, files=1), str(tmp_path / "out"), chunk_bytes=4000, checkpoint_seconds=0)
    Path(job.inputs[0]).write_text(Path(job.inputs[0]).read_text() + "bad\n")
    with pytest.raises(Killed):
        preprocess(job, BYTES, stop_after(5))
    with pytest.raises(RunError, match=r"0.jsonl, line 402: not JSON"):
        preprocess(job, BYTES, resume=True)


def test_other_work_is_not_continued(tmp_path: Path) -> None:
    job = Job(corpus(tmp_path), str(tmp_path / "out"), chunk_bytes=4000, checkpoint_seconds=0)
    with pytest.raises(Killed):
        preprocess(job, BYTES, stop_after(5))
    with pytest.raises(UserError, match=r"other settings.*--resume"):
        preprocess(replace(job, form=Texts(append_eod=True)), BYTES, resume=True)
    Path(job.inputs[0]).write_text('{"text": "new"}\n')
    with pytest.raises(UserError, match="other inputs"):
        preprocess(job, BYTES, resume=True)


def test_a_line_of_the_journal_that_was_cut_short_is_none(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path / "j"), {"a": 1})
    journal.append(Checkpoint(1, 2, 3))
    journal.append(Checkpoint(4, 5, 6))
    path = tmp_path / "j"
    path.write_bytes(path.read_bytes()[:-5])
    again = Journal(str(path), {"a": 1})
    again.load()
    assert again.checkpoints == [Checkpoint(1, 2, 3)]


def test_rolling_back_forgets_from_the_first_sight_of_a_code_point_on(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path / "j"), {})
    for number, seen in enumerate([[200], [300, 301], [400], []]):
        journal.append(Checkpoint(number, first_seen=seen))
    journal.roll_back([(401, 500)])
    assert len(journal.checkpoints) == 4
    journal.roll_back([(301, 302), (450, 460)])
    assert [checkpoint.span for checkpoint in journal.checkpoints] == [0]
    journal.roll_back(EVERYTHING)
    assert journal.checkpoints == [] and not (tmp_path / "j").exists()


@pytest.mark.parametrize("count", [1, 2, 5, 16])
def test_shares_joined_are_byte_for_byte_one_run(tmp_path: Path, count: int) -> None:
    paths = (*corpus(tmp_path, lines=60), str(tmp_path / "z.txt"))
    Path(paths[-1]).write_text("a text file")
    whole = Job(paths, str(tmp_path / "whole"), form=Texts(append_eod=True))
    preprocess(whole, BYTES)
    for index in range(count):
        preprocess(replace(whole, output_prefix=str(tmp_path / f"part{index}"), shard=Shard(index, count)), BYTES)
    parts = open_parts([str(tmp_path / f"part{index}_text_document") for index in range(count)])
    merge(parts, str(tmp_path / "merged_text_document"))
    assert files_of(replace(whole, output_prefix=str(tmp_path / "merged"))) == files_of(whole)


def test_every_line_belongs_to_one_share_wherever_the_cuts_fall(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    data = b"".join(b'{"text": "%s"}\n' % (b"x" * length) for length in (0, 1, 50, 3, 200, 0, 7)) + b'{"text": "end"}'
    path.write_bytes(data)
    for count in [*range(1, 12), *range(12, len(data), 53), len(data) + 2]:
        spans = [span for index in range(count) for span in plan_spans([str(path)], Shard(index, count))]
        assert b"".join(chunk.data for span in spans for chunk in read_chunks(span, chunk_bytes=30)) == data
    assert plan_spans([str(path)]) == [Span(str(path))]


def test_shuffling_moves_every_document_and_loses_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.preprocessing.merge.SHUFFLED_TOKENS", 3000)
    for name in "ab":
        (tmp_path / name).mkdir()
        preprocess(Job(corpus(tmp_path / name), str(tmp_path / name)), BYTES)
    parts = open_parts([str(tmp_path / f"{name}_text_document") for name in "ab"])
    orders = []
    for seed in (1, 1, 2):
        merge_shuffled(parts, str(tmp_path / "mixed"), seed)
        mixed = IndexedDataset(str(tmp_path / "mixed"))
        orders.append([bytes(mixed.get(number).astype("u1")) for number in range(len(mixed))])
    in_order = [bytes(part.get(number).astype("u1")) for part in parts for number in range(len(part))]
    assert orders[0] == orders[1] != orders[2] and sorted(orders[0]) == sorted(in_order)
    assert sum(one == other for one, other in zip(orders[0], in_order, strict=True)) < len(in_order) / 20


@dataclass(frozen=True)
class Lying:
    """Settings of an encoder whose backend has wrong ids for texts with one character, which nobody knows of."""

    tokenizer: TokenizerSettings
    wrong: str
    in_threads: bool
    differing: Ranges = ()

    def __call__(self) -> CheckedEncoder:
        reference = self.tokenizer()

        def fast(texts: Sequence[str]) -> tuple[Ids, Ids]:
            documents = zip(texts, reference.encode_batch(texts), strict=True)
            return flat([[1] * len(ids) if self.wrong in text else ids for text, ids in documents])

        # Which texts threads sample is left to chance; 65 of 1500, a fifth of them wrong, miss them all once in 10^6
        return CheckedEncoder(reference, fast, Comparison("gigatoken", None, self.differing, True), sample_every=23)

    def widened(self, found: Ranges) -> "Lying":
        return replace(self, differing=union(self.differing, found) if found != EVERYTHING else EVERYTHING)

    def describe(self) -> str:
        return "lying"


@pytest.mark.parametrize(
    ("wrong", "workers", "in_threads"),
    [
        ("ß", 1, False),
        ("ß", 2, False),
        ("ß", 2, True),
        ("z", 1, False),
        ("z", 5, True),
        pytest.param("ß", 5, True, marks=pytest.mark.long),
        pytest.param("z", 2, False, marks=pytest.mark.long),
        pytest.param("z", 2, True, marks=pytest.mark.long),
    ],
)
def test_what_a_wrong_backend_wrote_before_the_alarm_is_done_again(
    tmp_path: Path, wrong: str, workers: int, in_threads: bool
) -> None:
    tokenizer = TokenizerSettings("HFTokenizer", bpe_file(tmp_path))
    path = tmp_path / "x.jsonl"
    texts = [f"{TEXT[number % 2]} {number}" + (f" stra{wrong}e" if number % 5 == 3 else " ö") for number in range(1500)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    job = Job((str(path),), str(tmp_path / "out"), chunk_bytes=3000, checkpoint_seconds=0, workers=workers)
    said: list[str] = []
    totals = preprocess(job, Lying(tokenizer, wrong, in_threads), announce=said.append)
    right = replace(job, output_prefix=str(tmp_path / "right"))
    preprocess(right, EncoderSettings(tokenizer))
    assert len(said) == 1
    assert files_of(job) == files_of(right)
    assert totals.documents == 1500
    assert totals.by_reference == (300 if wrong == "ß" else 1500)


def test_duplicates_and_lengths_that_are_not_wanted_are_left_out_and_counted(tmp_path: Path) -> None:
    form = Texts(deduplicate=True, min_chars=5, max_chars=100)
    job = Job(corpus(tmp_path), str(tmp_path / "out"), form=form, workers=2)
    totals = preprocess(job, BYTES)
    texts = [json.loads(line)["text"] for path in job.inputs for line in Path(path).read_bytes().splitlines()]
    wanted = list(dict.fromkeys(text for text in texts if 5 <= len(text) <= 100))
    dataset = IndexedDataset(job.prefix("text"))
    assert [bytes(dataset.get(number).astype("u1")).decode() for number in range(len(dataset))] == wanted
    assert (totals.documents, totals.duplicates) == (len(wanted), 2)
    assert totals.filtered == sum(not 5 <= len(text) <= 100 for text in texts)


@pytest.mark.parametrize("content", [b"{\n", b"\xff\xfe\n", b"[]\n", b'{"inputs": 1}\n{"unknown": 2}\n'])
def test_a_damaged_journal_is_refused_with_the_way_out(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "j").write_bytes(content)
    with pytest.raises(UserError, match=r"j is damaged or of another version.*leave out --resume"):
        Journal(str(tmp_path / "j"), {"a": 1}).load()


@pytest.mark.parametrize("spelling", ["same", "link", "hard link"])
def test_parts_are_not_overwritten_by_their_union(tmp_path: Path, spelling: str) -> None:
    preprocess(Job(corpus(tmp_path, files=1, lines=3), str(tmp_path / "a")), BYTES)
    part = tmp_path / "a_text_document"
    before = Path(f"{part}.bin").read_bytes()
    for ending in (".bin", ".idx"):
        if spelling == "link":
            Path(tmp_path, f"link{ending}").symlink_to(f"{part}{ending}")
        if spelling == "hard link":
            Path(tmp_path, f"hard link{ending}").hardlink_to(f"{part}{ending}")
    with pytest.raises(UserError, match=r"output .bin .* is the .bin of part 1 .* itself"):
        merge(open_parts([str(part)]), str(part if spelling == "same" else tmp_path / spelling))
    assert Path(f"{part}.bin").read_bytes() == before
