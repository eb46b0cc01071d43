"""The order of the samples: every token once an epoch, pure, instant."""

import pickle
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data.indexed import IndexedDataset, IndexedWriter
from megatron.data.windows import CorpusStream, Tokens, Windows, derived_key, permuted
from megatron.errors import UserError


@dataclass(frozen=True)
class Numbers:
    """A stream in which each token says its own place."""

    num_tokens: int

    def tokens(self, start: int, length: int) -> Tokens:
        return np.arange(start, min(start + length, self.num_tokens), dtype=np.int64)


@settings(deadline=None)
@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_the_permutation_visits_everything_once(size: int, key: int) -> None:
    assert sorted(permuted(index, size, key) for index in range(size)) == list(range(size))


@pytest.mark.parametrize("size", [2, 3, 5, 12, 100])
def test_the_permutation_is_even_over_keys(size: int) -> None:
    rounds = 400 * size
    for index in (0, size - 1):
        counts = Counter(permuted(index, size, derived_key("test", n)) for n in range(rounds))
        deviation = sum((counts[place] - 400) ** 2 / 400 for place in range(size))  # chi-squared, size - 1 degrees
        assert deviation < size - 1 + 6 * (2 * size) ** 0.5


def test_neighbours_are_parted_by_the_permutation() -> None:
    size = 10_000
    steps = np.diff([permuted(index, size, 7) for index in range(size)])
    assert np.abs(steps).mean() == pytest.approx(size / 3, rel=0.05)  # that of a random order
    assert np.mean(steps == 1) < 0.001


@settings(deadline=None)
@given(data=st.data(), length=st.integers(1, 40), seed=st.integers(0, 9), epoch=st.integers(0, 3))
def test_every_token_of_an_epoch_is_a_label_once_but_for_the_first_and_a_short_tail(
    data: st.DataObject, length: int, seed: int, epoch: int
) -> None:
    total = data.draw(st.integers(length + 1, 400))
    source = Windows(Numbers(total), length, seed)
    count = source.samples_per_epoch
    samples = [source[epoch * count + n] for n in range(count)]
    assert all(sample.shape == (length + 1,) and sample.dtype == np.int64 for sample in samples)
    assert all(((sample[1:] - sample[:-1]) % total == 1 % total).all() for sample in samples)  # unbroken on the ring
    labels = np.concatenate([sample[1:] for sample in samples])
    assert len(set(labels.tolist())) == len(labels) == count * length
    missing = total - len(labels)
    assert 1 <= missing < length + 1


def test_in_order_each_window_begins_with_the_last_token_of_the_one_before() -> None:
    source = Windows(Numbers(100), 10, seed=3, shuffle=False)
    assert [source[n].tolist() for n in range(9)] == [list(range(n * 10, n * 10 + 11)) for n in range(9)]
    assert source.samples_per_epoch == 9
    assert source[9].tolist() == source[0].tolist()


def test_epochs_and_seeds_differ_in_order_and_in_where_windows_begin() -> None:
    source, other = Windows(Numbers(10_000), 9, seed=1), Windows(Numbers(10_000), 9, seed=2)
    count = source.samples_per_epoch
    starts = [
        [windows.start_of(epoch * count + n) for n in range(count)] for windows in (source, other) for epoch in (0, 1)
    ]
    assert len({tuple(order) for order in starts}) == 4
    assert len({start[0] % 9 for start in starts}) > 1
    assert len({tuple(sorted(order)) for order in starts}) > 1


def test_a_sample_depends_on_nothing_but_its_number() -> None:
    source = Windows(Numbers(5000), 16, seed=11)
    later = [source[n].tolist() for n in (700, 3, 700, 311)]
    copy: Windows = pickle.loads(pickle.dumps(Windows(Numbers(5000), 16, seed=11)))
    assert [copy[n].tolist() for n in (700, 3, 700, 311)] == later
    assert later[0] == later[2]


def test_the_order_is_the_same_on_every_machine_and_in_every_version() -> None:
    # Written down once: a change of these numbers would make every resumed run see other data.
    source = Windows(Numbers(1_000_003), 128, seed=1234)
    assert [source.start_of(n) for n in (0, 1, 2, 7812, 10**6)] == [532728, 215288, 675960, 923652, 1294]


def test_a_trillion_tokens_need_no_index() -> None:
    """An index of their samples would not fit into memory."""
    source = Windows(Numbers(10**12 + 7), 2048, seed=0)
    samples = [source[n] for n in range(0, 10**9, 10**6)]
    assert len({int(sample[0]) for sample in samples}) == 1000
    assert np.mean([sample[0] for sample in samples]) == pytest.approx(5e11, rel=0.1)


def test_data_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    with IndexedWriter(str(tmp_path / "x"), np.dtype("i4")) as writer:
        writer.add_document([5, 6, 700, 8])
        writer.add_document([-100, 1])
    dataset = IndexedDataset(str(tmp_path / "x"))
    assert CorpusStream(dataset, 0, 4, 701).tokens(1, 9).tolist() == [6, 700, 8]
    with pytest.raises(UserError, match=r"token id 700, .*0 to 699.*another tokenizer"):
        CorpusStream(dataset, 0, 4, 700).tokens(0, 3)
    with pytest.raises(UserError, match="-100"):
        CorpusStream(dataset, 4, 2, 701).tokens(0, 2)
