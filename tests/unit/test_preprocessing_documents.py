"""Reading documents out of files of every ending, whole and broken."""

import gzip
import json
import random
from pathlib import Path

import pytest
import zstandard

from megatron.errors import RunError, UserError
from megatron.preprocessing.chunks import read_chunks
from megatron.preprocessing.documents import parse_chunk, read_texts
from megatron.preprocessing.sources import Span, find_inputs

TEXTS = ["first", "zweites: größer", "第三\nwith two lines", ""]
JSONL = "".join(json.dumps({"text": text, "other": text.upper()}) + "\n" for text in TEXTS).encode()


def packed(name: str, data: bytes) -> bytes:
    if name.endswith(".gz"):
        return gzip.compress(data)
    return zstandard.compress(data) if name.endswith(".zst") else data


def put(folder: Path, name: str, data: bytes) -> str:
    (folder / name).write_bytes(packed(name, data))
    return str(folder / name)


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.jsonl.gz", "x.jsonl.zst"])
def test_each_line_is_a_document(tmp_path: Path, name: str) -> None:
    path = put(tmp_path, name, JSONL)
    assert list(read_texts([path], "text")) == TEXTS
    assert list(read_texts([path], "other")) == [text.upper() for text in TEXTS]


@pytest.mark.parametrize("name", ["x.txt", "x.txt.gz", "x.txt.zst"])
def test_a_text_file_is_one_document_kept_as_it_is(tmp_path: Path, name: str) -> None:
    text = "line\r\nline\n\n{not json\n"
    assert list(read_texts([put(tmp_path, name, text.encode())], "text")) == [text]


def test_all_frames_of_a_file_are_read(tmp_path: Path) -> None:
    skippable = b"\x50\x2a\x4d\x18" + b"\x03\0\0\0" + b"abc"  # pzstd writes such frames
    frames = [packed(".zst", JSONL), skippable, packed(".zst", b""), packed(".zst", JSONL)]
    (tmp_path / "x.jsonl.zst").write_bytes(b"".join(frames))
    (tmp_path / "x.jsonl.gz").write_bytes(packed(".gz", JSONL) + packed(".gz", JSONL))
    for ending in ("zst", "gz"):
        assert list(read_texts([str(tmp_path / f"x.jsonl.{ending}")], "text")) == TEXTS * 2


def test_a_large_compressed_file_comes_out_whole(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"document {n} " + "x" * (n % 3000)}) for n in range(3000)]
    data = "\n".join(lines).encode()  # no newline at the end
    expected = [json.loads(line)["text"] for line in lines]
    for name in ("x.jsonl", "x.jsonl.gz", "x.jsonl.zst"):
        assert list(read_texts([put(tmp_path, name, data)], "text")) == expected


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.zst"])
@pytest.mark.parametrize("lost", [1, 4, 20])
def test_a_file_that_was_cut_short_is_an_error_and_not_a_shorter_corpus(tmp_path: Path, name: str, lost: int) -> None:
    data = packed(name, JSONL * 1000)
    (tmp_path / name).write_bytes(data[:-lost])
    with pytest.raises(RunError, match=f"{name} is damaged or was cut short"):
        list(read_texts([str(tmp_path / name)], "text"))


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.zst"])
def test_a_file_that_is_not_compressed_at_all_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(JSONL)
    with pytest.raises(RunError, match="damaged"):
        list(read_texts([str(tmp_path / name)], "text"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"plain words", "not JSON: Expecting value at character 1"),
        (b'{"text": "cut', "not JSON"),
        (b'["text"]', r"not a JSON object but list; jq -c '.\[\]' FILE writes the objects of a list one a line"),
        (b"[\r", r"not JSON: .*; jq -c '.\[\]' FILE"),
        (b"{", r"not JSON: .*; an object must be on one line, as jq -c . FILE"),
        (b'{"body": "x"}', r'no text under the key "text" \(keys: body\)'),
        (b'{"text": null}', "no text under the key"),
        (b"[" * 100_000, "not readable: .*recursion"),
        (b'{"n": ' + b"1" * 5000 + b"}", "not readable: Exceeds the limit"),
        (b"\xff\xfe", "not JSON"),
    ],
)
def test_a_bad_line_is_named_with_its_file_and_number(tmp_path: Path, line: bytes, message: str) -> None:
    path = put(tmp_path, "x.jsonl", JSONL * 300 + b"\n" + line + b"\n" + JSONL)
    with pytest.raises(RunError, match=f"x.jsonl, line 1202: {message}"):
        list(read_texts([path], "text"))


def test_bad_lines_do_not_hide_the_good_ones(tmp_path: Path) -> None:
    path = put(tmp_path, "x.jsonl", b'{"text": "a"}\nbad\n\n  \n{"text": "b"}\nworse\n')
    (chunk,) = read_chunks(Span(path))
    parsed = parse_chunk(chunk, ["text"])
    assert parsed.texts == {"text": ["a", "b"]}
    assert [line.split(":")[0] for line in parsed.bad_lines] == [f"{path}, line 2", f"{path}, line 6"]


def test_lone_surrogates_and_invalid_utf8_become_replacement_characters_and_are_counted(tmp_path: Path) -> None:
    lines = [
        b'{"text": "a\\ud800b"}',
        b'{"text": "\\ud83e\\udd8a"}',
        b'{"text": "c\xffd"}',
        '{"text": "\ufffd"}'.encode(),
    ]
    (chunk,) = read_chunks(Span(put(tmp_path, "x.jsonl", b"\n".join(lines) + b"\n")))
    parsed = parse_chunk(chunk, ["text"])
    assert parsed.texts["text"] == ["a\ufffdb", "🦊", "c\ufffdd", "\ufffd"]
    assert parsed.repaired == 2


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    for name, data in (("x.jsonl", b'{"text": "a"}'), ("x.txt", b"a")):
        assert list(read_texts([put(tmp_path, name, b"\xef\xbb\xbf" + data)], "text")) == ["a"]


def test_chunks_are_bounded_and_say_how_far_the_file_was_read(tmp_path: Path) -> None:
    path = put(tmp_path, "x.jsonl", JSONL * 1000)
    chunks = list(read_chunks(Span(path), chunk_bytes=10_000))
    assert all(10_000 - 200 < chunk.size <= 10_200 for chunk in chunks[:-1])
    assert b"".join(chunk.data for chunk in chunks) == JSONL * 1000
    assert [chunk.start for chunk in chunks[1:]] == [chunk.end for chunk in chunks[:-1]]
    assert chunks[-1].end.line == 4000
    assert chunks[-1].bytes_read == len(JSONL) * 1000


@pytest.mark.parametrize("kind", ["texts", "messages"])
def test_of_a_table_with_large_rows_a_few_are_read_at_a_time(tmp_path: Path, kind: str) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = ["".join(random.Random(number).choices("abcdefgh", k=50_000)) for number in range(40)]
    column = texts if kind == "texts" else [[{"role": "user", "content": text}] for text in texts]
    path = str(tmp_path / "x.parquet")
    parquet.write_table(pyarrow.table({"id": list(range(40)), "text": column}), path)
    chunks = list(read_chunks(Span(path), chunk_bytes=200_000))
    assert [value for chunk in chunks for value in chunk.columns["text"]] == column
    assert max(chunk.size for chunk in chunks) < 250_000


def test_inputs_are_files_folders_and_patterns_in_the_order_given(tmp_path: Path) -> None:
    names = ["b.jsonl", "a.jsonl.zst", "notes.md", "c.txt"]
    for name in names:
        put(tmp_path, name, JSONL)
    files = {name: str(tmp_path / name) for name in names}
    assert find_inputs(f"{files['c.txt']}, {files['b.jsonl']}") == [files["c.txt"], files["b.jsonl"]]
    assert find_inputs(str(tmp_path)) == [files["a.jsonl.zst"], files["b.jsonl"], files["c.txt"]]
    assert find_inputs(f"{tmp_path}/*.jsonl*") == [files["a.jsonl.zst"], files["b.jsonl"]]
    comma = put(tmp_path, "with, comma.jsonl", JSONL)
    assert find_inputs(comma) == [comma]
    for nothing in ("", " ", f"{files['b.jsonl']},"):
        with pytest.raises(UserError, match=r'input "": no such file'):
            find_inputs(nothing)
    with pytest.raises(UserError, match=r"absent.jsonl.*no such file"):
        find_inputs(f"{files['b.jsonl']},{tmp_path}/absent.jsonl")
    with pytest.raises(UserError, match=r"notes.md: Deepy reads files ending in .jsonl, .jsonl.gz"):
        find_inputs(files["notes.md"])
