"""Reading documents out of files of every ending, whole and broken."""

import gzip
import hashlib
import io
import json
import random
import zipfile
from pathlib import Path

import pytest
import zstandard

from megatron.data.manifest import write_manifest
from megatron.errors import RunError, UserError
from megatron.preprocessing.chunks import read_chunks
from megatron.preprocessing.corpora import wikipedia_100m
from megatron.preprocessing.documents import parse_chunk, read_texts
from megatron.preprocessing.sources import Shard, Span, find_inputs, plan_spans
from megatron.preprocessing.text_streams import NOT_UTF_8, check_inputs

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
    with pytest.raises(UserError, match=f"{name} is not a {name[8:]} file, as its name says"):
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


BOM = b"\xef\xbb\xbf"
WIDE = ["utf-16", "utf-32", "utf-16-be-marked"]


def wide(text: str, encoding: str) -> bytes:
    return b"\xfe\xff" + text.encode("utf-16-be") if encoding == "utf-16-be-marked" else text.encode(encoding)


@pytest.mark.parametrize("encoding", WIDE)
@pytest.mark.parametrize("name", ["x.txt", "x.txt.gz", "x.txt.zst"])
def test_a_text_file_in_utf_16_or_32_is_decoded_by_its_mark(tmp_path: Path, name: str, encoding: str) -> None:
    text = "grüße, 世界 🦊\n" * 3000
    assert list(read_texts([put(tmp_path, name, wide(text, encoding))], "text")) == [text]


@pytest.mark.parametrize("encoding", WIDE)
@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.jsonl.zst"])
def test_lines_of_json_in_utf_16_or_32_are_decoded_from_any_position(tmp_path: Path, name: str, encoding: str) -> None:
    lines = "".join(json.dumps({"text": f"größer 🦊 {n}"}, ensure_ascii=False) + "\n" for n in range(500))
    path = put(tmp_path, name, wide(lines, encoding))
    assert list(read_texts([path], "text")) == [f"größer 🦊 {n}" for n in range(500)]
    digest = hashlib.sha256()
    chunks = list(read_chunks(Span(path), chunk_bytes=3000))
    rest = list(read_chunks(Span(path), position=chunks[3].start, chunk_bytes=3000, digest=digest))
    assert b"".join(chunk.data for chunk in rest) == b"".join(chunk.data for chunk in chunks[3:])
    assert digest.hexdigest() == hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_a_file_in_utf_16_belongs_to_one_shard(tmp_path: Path) -> None:
    path = put(tmp_path, "x.jsonl", wide('{"text": "a"}\n' * 100, "utf-16"))
    spans = [plan_spans([path], Shard(index, 4)) for index in range(4)]
    assert spans == [[Span(path)], [], [], []]


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.txt"])
def test_byte_order_marks_where_files_were_joined_are_no_text(tmp_path: Path, name: str) -> None:
    if name == "x.txt":
        path = put(tmp_path, name, BOM + b"a\n" + BOM + BOM + b"b\n")
        assert list(read_texts([path], "text")) == ["a\nb\n"]
        return
    path = put(tmp_path, name, BOM + b'{"text": "a"}\n' + BOM + b'{"text": "b\xc3\xa4"}\n' + BOM + b"\n" + BOM)
    assert list(read_texts([path], "text")) == ["a", "bä"]


def test_an_invalid_surrogate_of_utf_16_is_replaced_and_counted(tmp_path: Path) -> None:
    (chunk,) = read_chunks(Span(put(tmp_path, "x.txt", b"\xff\xfea\0\x00\xd8b\0c")))
    parsed = parse_chunk(chunk, ["text"])
    assert (parsed.texts["text"], parsed.repaired) == (["a\ufffdb\ufffd"], 1)


@pytest.mark.parametrize("ending", ["txt", "jsonl"])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (gzip.compress(JSONL, mtime=0), r"is gzip data, not UTF-8 text; rename it to .*\.gz, or decompress it first"),
        (zstandard.compress(JSONL), r"is Zstandard data.*rename it to .*\.zst"),
        (b"%PDF-1.4\n...", "is a PDF document"),
        (b"PK\3\4...", "is a ZIP archive"),
        ("some text".encode("utf-16-le"), "is UTF-16-LE text without a byte order mark.*iconv -f UTF-16LE"),
        ("some text".encode("utf-32-be"), "is UTF-32-BE text without a byte order mark"),
        ("Grüße aus Köln".encode("latin-1"), "is not UTF-8 but probably Latin-1.*iconv -f WINDOWS-1252"),
    ],
)
def test_what_is_not_text_is_refused_by_its_name_before_the_work(
    tmp_path: Path, ending: str, data: bytes, message: str
) -> None:
    path = put(tmp_path, f"x.{ending}", data)
    with pytest.raises(UserError, match=f"x.{ending} {message}"):
        check_inputs([put(tmp_path, "good.jsonl", JSONL), path])
    with pytest.raises(UserError, match=f"x.{ending}.gz is"):
        check_inputs([put(tmp_path, f"x.{ending}.gz", data)])
    if "Latin" not in message:
        with pytest.raises(UserError, match=message):
            list(read_chunks(Span(path)))


def test_standard_input_is_decoded_or_refused_as_files_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for data, expected in ((BOM + JSONL, TEXTS), (wide(JSONL.decode(), "utf-16"), TEXTS), (gzip.compress(JSONL), None)):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
        if expected:
            assert list(read_texts(["-"], "text")) == expected
        else:
            with pytest.raises(UserError, match="standard input is gzip data"):
                list(read_texts(["-"], "text"))


def test_latin_1_beyond_the_beginning_is_a_bad_document_or_line(tmp_path: Path) -> None:
    ascii, latin = b"plain\n" * 1000, "größer\n".encode("latin-1") * 100
    (chunk,) = read_chunks(Span(put(tmp_path, "x.txt", ascii + latin)))
    assert parse_chunk(chunk, ["text"]).bad_lines == [f"{tmp_path}/x.txt: {NOT_UTF_8}"]
    line = '{"text": "größer"}\n'.encode("latin-1")
    (chunk,) = read_chunks(Span(put(tmp_path, "x.jsonl", b'{"text": "plain"}\n' * 100 + line * 3)))
    parsed = parse_chunk(chunk, ["text"])
    assert parsed.bad_lines[0] == f"{tmp_path}/x.jsonl, line 101: {NOT_UTF_8}" and len(parsed.bad_lines) == 3
    assert len(parsed.texts["text"]) == 100


@pytest.mark.parametrize("way", ["folder", "pattern"])
def test_hidden_files_folders_and_manifests_are_no_inputs_and_counted(tmp_path: Path, way: str) -> None:
    good = put(tmp_path, "a.jsonl", JSONL)
    for name in (".part.jsonl", "._x.txt", ".a.md"):
        put(tmp_path, name, JSONL)
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / "b.jsonl").mkdir()
    write_manifest(str(tmp_path / "mine"), [])
    said: list[str] = []
    name = str(tmp_path) if way == "folder" else f"{tmp_path}/*.*"
    if way == "pattern":
        (tmp_path / ".a.md").unlink()
    assert find_inputs(name, said.append) == [good]
    assert said == [
        f'input "{name}": 2 hidden files left out',
        f'input "{name}": 1 manifests of preprocessed data left out',
    ]
    assert find_inputs(f"{tmp_path}/.part.jsonl") == [f"{tmp_path}/.part.jsonl"]  # named on purpose


def test_a_list_longer_than_a_path_can_be_is_a_list(tmp_path: Path) -> None:
    paths = [put(tmp_path, f"part-{number:03}.jsonl", JSONL) for number in range(200)]
    assert len(",".join(paths)) > 4096 and find_inputs(",".join(paths)) == paths
    for name in ("x" * 5000, "a\0b", "[" * 300):
        with pytest.raises(UserError, match="no such file"):
            find_inputs(name)


def test_home_and_variables_are_expanded_in_each_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NAME", "b")
    paths = [put(tmp_path, name, JSONL) for name in ("a.jsonl", "b.jsonl", "$x.jsonl")]
    assert find_inputs(f"~/a.jsonl,{tmp_path}/${{NAME}}.jsonl,{paths[2]}") == paths
    with pytest.raises(UserError, match="NOT_SET_HERE is not set"):
        find_inputs("$NOT_SET_HERE/x.jsonl")


def test_invalid_text_in_a_table_is_replaced_and_counted(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    values = pyarrow.array([b"good", b"bad \xff", None], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": values}), tmp_path / "x.parquet")
    (chunk,) = read_chunks(Span(str(tmp_path / "x.parquet")))
    parsed = parse_chunk(chunk, ["text"])
    assert (parsed.texts["text"], parsed.repaired) == (["good", "bad \ufffd"], 1)
    assert "row 3: no text in the column" in parsed.bad_lines[0]


def test_a_table_that_is_none_is_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"x.parquet is not a parquet file, as its name says"):
        check_inputs([put(tmp_path, "x.parquet", JSONL)])


def test_a_failure_without_a_message_is_still_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def fail(*_: object, **__: object) -> None:
        raise TimeoutError

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(RunError, match=r"the dataset hf:a/b could not be read \(TimeoutError\)"):
        list(read_chunks(Span("hf:a/b")))


@pytest.mark.parametrize("content", [b"no archive", None])
def test_an_archive_of_a_corpus_that_is_damaged_is_named(tmp_path: Path, content: bytes | None) -> None:
    if content is None:
        with zipfile.ZipFile(tmp_path / "enwik8.zip", "w") as archive:
            archive.writestr("other", "x")
    else:
        (tmp_path / "enwik8.zip").write_bytes(content)
    with pytest.raises(RunError, match=r"enwik8.zip is damaged or is not the archive of enwik8"):
        list(wikipedia_100m(tmp_path))
