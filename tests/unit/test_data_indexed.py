"""The .bin/.idx files, against a reader and a writer of their own, made from the table of the format."""

import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron.data.indexed import IndexedDataset, IndexedWriter, best_dtype
from megatron.errors import RunError, UserError

CODES = {"u1": 1, "i1": 2, "i2": 3, "i4": 4, "i8": 5, "u2": 8}
LETTERS = {"u1": "B", "i1": "b", "i2": "h", "i4": "i", "i8": "q", "u2": "H"}


def independent_files(documents: list[list[int]], dtype: str) -> tuple[bytes, bytes]:
    """.bin and .idx as GPT-NeoX writes them."""
    size = struct.calcsize("<" + LETTERS[dtype])
    tokens = b"".join(struct.pack(f"<{len(ids)}{LETTERS[dtype]}", *ids) for ids in documents)
    sizes = [len(ids) for ids in documents]
    pointers = [sum(sizes[:n]) * size for n in range(len(sizes))]
    index = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", CODES[dtype])
    index += struct.pack("<Q", len(documents)) + struct.pack("<Q", len(documents) + 1)
    index += struct.pack(f"<{len(sizes)}i", *sizes) + struct.pack(f"<{len(sizes)}q", *pointers)
    return tokens, index + struct.pack(f"<{len(sizes) + 1}q", *range(len(sizes) + 1))


def independent_read(tokens: bytes, index: bytes) -> list[list[int]]:
    dtype = {code: letters for letters, code in CODES.items()}[index[17]]
    size = struct.calcsize("<" + LETTERS[dtype])
    (count,) = struct.unpack_from("<Q", index, 18)
    sizes = struct.unpack_from(f"<{count}i", index, 34)
    pointers = struct.unpack_from(f"<{count}q", index, 34 + 4 * count)
    parts = (tokens[at : at + n * size] for at, n in zip(pointers, sizes, strict=True))
    return [list(struct.unpack(f"<{len(part) // size}{LETTERS[dtype]}", part)) for part in parts]


def write(prefix: Path, documents: list[list[int]], dtype: str = "u2") -> None:
    with IndexedWriter(str(prefix), np.dtype(dtype)) as writer:
        for ids in documents:
            writer.add_document(ids)


def put(prefix: Path, tokens: bytes, index: bytes) -> None:
    Path(f"{prefix}.bin").write_bytes(tokens)
    Path(f"{prefix}.idx").write_bytes(index)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(documents=st.lists(st.lists(st.integers(0, 100), max_size=9), max_size=9), dtype=st.sampled_from([*CODES]))
def test_files_are_byte_for_byte_those_of_the_format(tmp_path: Path, documents: list[list[int]], dtype: str) -> None:
    write(tmp_path / "ours", documents, dtype)
    ours = tuple(Path(tmp_path, f"ours.{ending}").read_bytes() for ending in ("bin", "idx"))
    theirs = independent_files(documents, dtype)
    assert ours == theirs
    assert independent_read(*ours) == documents
    put(tmp_path / "theirs", *theirs)
    dataset = IndexedDataset(str(tmp_path / "theirs"))
    assert [dataset.get(n).tolist() for n in range(len(dataset))] == documents
    assert dataset.num_tokens == sum(map(len, documents)) == dataset.token_start(len(dataset))
    assert dataset.document_index.tolist() == list(range(len(documents) + 1))


def test_ids_use_two_bytes_below_65500_and_four_from_there_on() -> None:
    assert [best_dtype(size).str for size in (257, 65499, 65500, 250000)] == ["<u2", "<u2", "<i4", "<i4"]


def test_documents_are_read_in_part_and_as_one_stream(tmp_path: Path) -> None:
    write(tmp_path / "x", [[1, 2, 3], [], [4, 5, 6, 7]])
    dataset = IndexedDataset(str(tmp_path / "x"))
    assert dataset.get(2, 1, 2).tolist() == [5, 6]
    assert dataset.get(0, 1).tolist() == [2, 3]
    assert dataset.get(0, 1, 99).tolist() == [2, 3]
    assert dataset.tokens(2, 3).tolist() == [3, 4, 5]
    assert [dataset.token_start(n) for n in range(4)] == [0, 3, 3, 7]


def test_a_file_of_several_sequences_in_a_document_is_read(tmp_path: Path) -> None:
    tokens, index = independent_files([[1, 2], [3], [4, 5]], "u2")
    index = index[:26] + struct.pack("<Q", 3) + index[34 : 34 + 12 * 3] + struct.pack("<3q", 0, 2, 3)
    put(tmp_path / "x", tokens, index)
    dataset = IndexedDataset(str(tmp_path / "x"))
    assert len(dataset) == 3 and dataset.document_index.tolist() == [0, 2, 3]


def test_ids_that_do_not_fit_are_refused_and_nothing_is_left_behind(tmp_path: Path) -> None:
    for ids in ([70000], np.array([70000]), [-1]):
        with pytest.raises(ValueError, match="uint16"):
            write(tmp_path / "x", [[1], ids])  # type: ignore[list-item]
    assert list(tmp_path.iterdir()) == []


def test_an_index_is_written_in_pieces_with_places_beyond_four_gigabytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer goes on after 8 GB in five documents (a sparse file), three of them to a piece of the index."""
    monkeypatch.setattr("megatron.data.indexed.PIECE", 3)
    sizes = np.array([10**9, 5, 10**9, 10**9, 10**9 - 5], "<i4")
    (tmp_path / "x.sizes.partial").write_bytes(sizes.tobytes())
    with (tmp_path / "x.bin.partial").open("wb") as file:
        file.truncate(8 * 10**9)
    with IndexedWriter(str(tmp_path / "x"), np.dtype("u2"), resume_at=(8 * 10**9, 5)) as writer:
        for ids in ([7, 8], [9]):
            writer.add_document(ids)
        writer.keep = False
    dataset = IndexedDataset(str(tmp_path / "x"))
    starts = [0, 10**9, 10**9 + 5, 2 * 10**9 + 5, 3 * 10**9 + 5, 4 * 10**9, 4 * 10**9 + 2, 4 * 10**9 + 3]
    assert [dataset.token_start(number) for number in range(8)] == starts
    assert [dataset.get(number).tolist() for number in (5, 6)] == [[7, 8], [9]]
    assert dataset.document_index.tolist() == list(range(8))


def test_an_error_while_writing_keeps_the_files_that_were_there(tmp_path: Path) -> None:
    write(tmp_path / "x", [[1, 2]])
    with pytest.raises(KeyError), IndexedWriter(str(tmp_path / "x"), np.dtype("u2")) as writer:
        writer.add_document([3])
        raise KeyError
    assert IndexedDataset(str(tmp_path / "x")).get(0).tolist() == [1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx"]


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "x.bin.partial").symlink_to("/dev/full")
    with pytest.raises(RunError, match=r"no space left on the disk.*x.bin"):
        write(tmp_path / "x", [[1] * 100_000])
    assert list(tmp_path.iterdir()) == []


def test_a_pickled_dataset_opens_the_files_and_carries_no_tokens(tmp_path: Path) -> None:
    write(tmp_path / "x", [list(range(5000))])
    packed = pickle.dumps(IndexedDataset(str(tmp_path / "x")))
    assert len(packed) < 500
    assert pickle.loads(packed).get(0, 4990).tolist() == list(range(4990, 5000))


def test_a_path_without_its_ending_words_is_found(tmp_path: Path) -> None:
    write(tmp_path / "mine_text_document", [[1, 2]])
    full = str(tmp_path / "mine_text_document")
    for path in (full, str(tmp_path / "mine"), full + ".bin", full + ".idx"):
        assert IndexedDataset(path).prefix == full


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("mien_text_document", 'Did you mean ".*mine_text_document"'),
        ("zzzzzzzz", "holds half, mine_text_document"),
        ("nowhere/mine", "nowhere does not exist"),
        ("mine,other", "one prefix, not a list"),
        ("half", "half.bin is missing next to .*half.idx"),
    ],
)
def test_missing_files_are_named_with_the_nearest(tmp_path: Path, path: str, message: str) -> None:
    write(tmp_path / "mine_text_document", [[1, 2]])
    (tmp_path / "half.idx").write_bytes(b"")
    with pytest.raises(UserError, match=message):
        IndexedDataset(str(tmp_path / path))


@pytest.mark.parametrize("change", [-2, -1, 2, 1000])
def test_a_bin_of_another_length_than_its_index_is_refused(tmp_path: Path, change: int) -> None:
    tokens, index = independent_files([[1, 2, 3], [4]], "u2")
    put(tmp_path / "x", tokens[:change] if change < 0 else tokens + bytes(change), index)
    with pytest.raises(UserError, match=rf"x.bin has {8 + change:,} bytes.*describes 8"):
        IndexedDataset(str(tmp_path / "x"))


@pytest.mark.parametrize(
    ("place", "wrong"),
    [
        (34, "sequence 0 does not end where the next one begins"),  # sizes
        (34 + 4 * 20, r"sequence \d+ does not end where the next one begins"),
        (34 + 4 * 40, "sequence 0 begins at byte 2 and should at 0"),  # places
        (34 + 4 * 40 + 8 * 17, r"sequence \d+ does not end where the next one begins"),
    ],
)
def test_an_index_with_a_number_that_changed_is_refused(tmp_path: Path, place: int, wrong: str) -> None:
    tokens, index = independent_files([[1, 2, 3]] * 40, "u2")
    put(tmp_path / "x", tokens, index[:place] + bytes([index[place] + 2]) + index[place + 1 :])
    with pytest.raises(UserError, match=f"x.idx is damaged: {wrong}; "):
        IndexedDataset(str(tmp_path / "x"))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (b"", "does not begin with MMIDIDX"),
        (b"PK" + bytes(100), "does not begin with MMIDIDX"),
        (b"TNTIDX\0\0" + bytes(100), "cached.*--dataset-impl mmap"),
        (independent_files([[1]], "u2")[1][:-1], "cut short"),
        (independent_files([[1]], "u2")[1] + b"\0\0", "damaged"),
        (
            independent_files([[1]], "u2")[1] + b"\1",
            r"multimodal dataset of Megatron-core: 1 of 1 sequences are not text",
        ),
        (b"ARROW1\0\0" + bytes(100), "it is an Arrow file"),
        (independent_files([[1]], "u2")[1][:20], "does not begin"),
        (b"MMIDIDX\0\0" + struct.pack("<QBQQ", 2, 8, 0, 0), "version 2"),
        (b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 7, 0, 0), "dtype code 7"),
    ],
)
def test_an_index_that_is_none_is_refused(tmp_path: Path, index: bytes, message: str) -> None:
    put(tmp_path / "x", b"\1\0", index)
    with pytest.raises(UserError, match=message):
        IndexedDataset(str(tmp_path / "x"))


def test_an_index_with_modes_of_megatron_core_is_read_where_all_are_text(tmp_path: Path) -> None:
    tokens, index = independent_files([[1, 2], [3]], "u2")
    put(tmp_path / "x", tokens, index + b"\0\0")
    dataset = IndexedDataset(str(tmp_path / "x"))
    assert [dataset.get(number).tolist() for number in range(2)] == [[1, 2], [3]]
    assert dataset.document_index.tolist() == [0, 1, 2]


@pytest.mark.parametrize("path", ["x" * 5000, "zero\0byte"])
def test_a_prefix_that_cannot_be_a_path_is_a_missing_pair(path: str) -> None:
    with pytest.raises(UserError, match="there are no data at"):
        IndexedDataset(path)


def test_a_dataset_of_hugging_face_is_named(tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(UserError, match=f"dataset of Hugging Face; preprocess it with --input hf:{tmp_path}"):
        IndexedDataset(str(tmp_path))
