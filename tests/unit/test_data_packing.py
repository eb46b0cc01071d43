"""Samples of whole documents, and labels of their own."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data.build import Mixture, Sources, build_sources
from megatron.data.indexed import IndexedDataset, IndexedWriter
from megatron.data.packing import DocumentSamples
from megatron.data.windows import NOT_A_LABEL, SampleSource
from megatron.errors import UserError
from megatron.training.batch import BatchBuilder
from tests.ranks.run import one_rank

LENGTH = 7  # room for 8 tokens


def corpus(path: Path, sizes: list[int], labels: bool = False) -> str:
    """Token k of document n is 100 n + k; in labels every second one, from the first on, is masked."""
    with IndexedWriter(str(path), np.dtype("i4")) as writer:
        for number, size in enumerate(sizes):
            ids = 100 * number + np.arange(size)
            writer.add_document(np.where(np.arange(size) % 2, ids, NOT_A_LABEL) if labels else ids)
    return str(path)


def samples(path: str, several: bool, **settings: object) -> DocumentSamples:
    dataset = IndexedDataset(path)
    return DocumentSamples(dataset, 0, len(dataset), LENGTH, 5, 10**6, several, **settings)  # type: ignore[arg-type]


def build(path: str | None = None, **settings: object) -> Sources:
    return build_sources(data_path=path, seq_length=LENGTH, seed=5, vocab_size=10**6, **settings)  # type: ignore[arg-type]


def documents(source: SampleSource, number: int) -> list[list[int]]:
    """The tokens of a sample that are labels, by document."""
    tokens, labels = source[number]
    assert ((labels == tokens) | (labels == NOT_A_LABEL)).all()
    kept = tokens[labels != NOT_A_LABEL]
    assert labels[len(kept) :].tolist() == [NOT_A_LABEL] * (LENGTH + 1 - len(kept))  # what fills up comes last
    return [part.tolist() for part in np.split(kept, np.flatnonzero(kept % 100 == 0)[1:])]


def test_documents_go_into_a_sample_until_one_does_not_fit(tmp_path: Path) -> None:
    source = samples(corpus(tmp_path / "x", [3, 4, 2, 6, 1, 1, 1, 8, 5]), several=True, shuffle=False)
    assert source.samples_per_epoch == 5
    numbers = [[part[0] // 100 for part in documents(source, n)] for n in range(5)]
    assert numbers == [[0, 1], [2, 3], [4, 5, 6], [7], [8]]


def test_unpacked_documents_are_alone_and_a_single_token_is_left_out(tmp_path: Path) -> None:
    source = samples(corpus(tmp_path / "x", [3, 1, 8]), several=False, shuffle=False)
    assert [documents(source, n) for n in range(2)] == [[[0, 1, 2]], [list(range(200, 208))]]
    assert source.samples_per_epoch == 2 and source.num_left_out == 1


@pytest.mark.parametrize("several", [True, False])
def test_a_long_document_is_cut_or_left_out(tmp_path: Path, several: bool) -> None:
    path = corpus(tmp_path / "x", [3, 20, 8])
    cut = samples(path, several, shuffle=False)
    assert documents(cut, 1) == [list(range(100, 108))] and cut.num_chopped == 1 and cut.num_tokens == 19
    without = samples(path, several, shuffle=False, allow_chopped=False)
    assert documents(without, 1) == [list(range(200, 208))] and without.num_left_out == 1


@settings(deadline=None, max_examples=50)
@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=60), several=st.booleans(), epoch=st.integers(0, 2))
def test_every_document_of_an_epoch_is_read_once_and_whole(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], several: bool, epoch: int
) -> None:
    source = samples(corpus(tmp_path_factory.mktemp("x") / "x", sizes), several)
    count = source.samples_per_epoch
    read = [part for n in range(count) for part in documents(source, epoch * count + n)]
    wanted = [
        list(range(100 * n, 100 * n + min(size, LENGTH + 1))) for n, size in enumerate(sizes) if several or size > 1
    ]
    assert sorted(read) == wanted


def test_epochs_visit_the_samples_in_orders_of_their_own(tmp_path: Path) -> None:
    source = samples(corpus(tmp_path / "x", [8] * 50), several=True)
    orders = [[documents(source, epoch * 50 + n)[0][0] for n in range(50)] for epoch in (0, 1)]
    assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1] != sorted(orders[1])


def test_sizes_that_do_not_add_up_are_an_error(tmp_path: Path) -> None:
    path = Path(corpus(tmp_path / "x", [3] * 1000) + ".idx")
    path.write_bytes(path.read_bytes()[: 34 + 4 * 10] + b"\4" + path.read_bytes()[34 + 4 * 10 + 1 :])
    with pytest.raises(UserError, match=r"x.idx is damaged: its sizes do not add up"):
        build(str(tmp_path / "x"), pack_impl="unpacked")


@pytest.mark.parametrize("pack_impl", ["pack_until_overflow", "unpacked"])
def test_the_parts_of_a_split_hold_their_own_documents_only(tmp_path: Path, pack_impl: str) -> None:
    sources = build(corpus(tmp_path / "x", [3, 5] * 10), split="12, 4, 4", pack_impl=pack_impl)
    found = []
    for part in (sources.train, sources.valid, sources.test):
        assert part is not None
        found.append(sorted(doc[0] // 100 for n in range(part.samples_per_epoch) for doc in documents(part, n)))
    assert found == [list(range(12)), list(range(12, 16)), list(range(16, 20))]
    assert "0 documents cut, 0 left out" in sources.description[1]


def test_a_single_document_that_is_split_cannot_stay_whole(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"pack_impl \(unpacked\) keeps documents whole, but .* is a single one"):
        build(corpus(tmp_path / "x", [90]), pack_impl="unpacked")


def test_a_part_whose_documents_are_all_left_out_says_so(tmp_path: Path) -> None:
    sources = build(corpus(tmp_path / "x", [9] * 9), pack_impl="unpacked", allow_chopped=False)
    assert sources.train is None
    with pytest.raises(UserError, match=r"no train samples: none of its documents fits into seq_length \(7\)"):
        sources.samples("train")


@pytest.mark.parametrize("pack_impl", ["packed", "pack_until_overflow", "unpacked"])
def test_labels_come_from_their_own_files(tmp_path: Path, pack_impl: str) -> None:
    sizes = [4, 4, 8, 6]
    text, labels = corpus(tmp_path / "x", sizes), corpus(tmp_path / "y", sizes, labels=True)
    source = build(mixtures={"train": Mixture((text,), labels=(labels,))}, pack_impl=pack_impl).samples("train")
    for number in range(2 * source.samples_per_epoch):
        ids, targets = source[number]
        used = targets != NOT_A_LABEL
        assert used.any() and (ids[used] % 100 % 2 == 1).all() and (targets[used] == ids[used]).all()
        if pack_impl == "packed":
            assert (used == (ids % 100 % 2 == 1)).all()


def test_labels_that_do_not_match_their_text_are_refused(tmp_path: Path) -> None:
    text, labels = corpus(tmp_path / "x", [4, 5]), corpus(tmp_path / "y", [5, 4], labels=True)
    with pytest.raises(UserError, match=r"the labels .*y \(2 documents, 9 tokens\) do not match .*x"):
        build(mixtures={"train": Mixture((text,), labels=(labels,))})


def test_masked_labels_weigh_nothing_and_the_others_all_the_same(tmp_path: Path) -> None:
    source = samples(corpus(tmp_path / "x", [3, 6]), several=False, shuffle=False)
    with one_rank() as grid:
        [(tokens, (labels, weights))], count = BatchBuilder(grid).build(
            [torch.as_tensor(np.stack([source[0], source[1]]))]
        )
    assert tokens.tolist() == [[0, 1, 2, 0, 0, 0, 0], [100, 101, 102, 103, 104, 105, 0]]  # type: ignore[union-attr]
    assert count == 2 + 5 and labels.min() >= 0
    assert weights.tolist() == [pytest.approx([1 / 7] * 2 + [0.0] * 5), pytest.approx([1 / 7] * 5 + [0.0] * 2)]
    assert labels[weights > 0].tolist() == [1, 2, 101, 102, 103, 104, 105]
