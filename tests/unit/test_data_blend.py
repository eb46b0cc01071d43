"""Blends: no prefix strays a sample from the weights, and sample n is found at once."""

import pickle
import time
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data.blend import LONGEST_PERIOD, Blend, earliest_deadlines, whole_shares
from megatron.data.build import Mixture, Sources, build_sources
from megatron.data.indexed import IndexedWriter
from megatron.data.windows import Tokens
from megatron.errors import UserError


@dataclass(frozen=True)
class Numbered:
    """Samples that say which corpus they are of, and their number."""

    corpus: int
    samples_per_epoch: int = 100
    num_tokens: int = 1000

    def __getitem__(self, sample: int) -> Tokens:
        return np.array([self.corpus, sample])


def blend(*shares: int) -> Blend:
    return Blend(tuple(Numbered(corpus) for corpus in range(len(shares))), shares)


@settings(deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=12))
def test_no_prefix_strays_a_sample_from_the_weights(shares: list[int]) -> None:
    order = earliest_deadlines(shares)
    period = sum(shares)
    for corpus, share in enumerate(shares):
        counts = np.cumsum(order == corpus)
        # |count - share n / period| < 1, in whole numbers
        assert (np.abs(counts * period - share * np.arange(1, period + 1)) < period).all()


@pytest.mark.parametrize("longest", [1 << 15, pytest.param(LONGEST_PERIOD, marks=pytest.mark.long)])
@settings(deadline=None, max_examples=10)
@given(weights=st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=300))
def test_nor_with_many_corpora_and_any_weights(longest: int, weights: list[float]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron.data.blend.LONGEST_PERIOD", longest)  # which takes a second to fill
        mixed = Blend(tuple(Numbered(corpus) for corpus in range(len(weights))), shares := whole_shares(weights))
    assert mixed.period <= longest
    asked = np.array(weights) / sum(weights)
    assert np.abs(np.array(mixed.weights) - asked).max() < (len(weights) + 1) / longest
    corpora, counts = np.array([mixed.place(sample) for sample in range(2000)]).T
    for corpus in set(corpora.tolist()):
        places = np.flatnonzero(corpora == corpus)
        assert counts[places].tolist() == list(range(len(places)))
        before = np.abs(np.arange(len(places)) - places * shares[corpus] / mixed.period)
        after = np.abs(np.arange(1, len(places) + 1) - (places + 1) * shares[corpus] / mixed.period)
        assert max(before.max(), after.max()) < 1


def test_each_corpus_gives_its_samples_in_their_order_across_periods() -> None:
    mixed = blend(3, 2, 1)
    seen: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for sample in range(60):
        corpus, number = mixed[sample].tolist()
        seen[corpus].append(number)
    assert {corpus: len(numbers) for corpus, numbers in seen.items()} == {0: 30, 1: 20, 2: 10}
    assert all(numbers == list(range(len(numbers))) for numbers in seen.values())


def test_a_sample_far_away_costs_what_the_first_one_costs() -> None:
    mixed = blend(600, 300, 100)
    began = time.process_time()
    places = [mixed.place(10**12 + n) for n in range(10_000)]
    assert time.process_time() - began < 1
    assert places[0] == (mixed.place(0)[0], 10**9 * mixed.shares[mixed.place(0)[0]])


def test_the_order_is_the_same_on_every_machine_and_in_every_version() -> None:
    # Written down once: a change of these numbers would make every resumed run see other data.
    assert "".join(map(str, earliest_deadlines((5, 3, 2)))) == "0102010102"
    assert "".join(map(str, earliest_deadlines((1, 2, 5)))) == "21222012"


def test_shares_are_exact_for_written_weights_and_small() -> None:
    assert whole_shares([0.6, 0.3, 0.1]) == (6, 3, 1)
    assert whole_shares([1, 2.0, 3]) == (1, 2, 3)
    assert whole_shares([200, 400]) == (1, 2)
    assert whole_shares([0.125]) == (1,)
    tiny = whole_shares([1e-9, 1.0])
    assert tiny[0] == 1 and sum(tiny) <= LONGEST_PERIOD


def test_more_than_255_corpora() -> None:
    mixed = blend(*range(1, 400))
    corpora = [mixed.place(n)[0] for n in range(mixed.period)]
    assert [corpora.count(corpus) for corpus in (0, 255, 256, 398)] == [1, 256, 257, 399]


def test_a_worker_gets_the_same_blend() -> None:
    mixed = blend(5, 7, 11)
    copy: Blend = pickle.loads(pickle.dumps(mixed))
    assert [copy.place(n) for n in range(50)] == [mixed.place(n) for n in range(50)]


def test_an_epoch_of_a_blend_ends_when_every_corpus_has_been_seen() -> None:
    mixed = blend(3, 1)
    last = mixed.samples_per_epoch
    numbers = {corpus: [n for c, n in map(mixed.place, range(last)) if c == corpus] for corpus in (0, 1)}
    assert last == 400 and max(numbers[1]) == 99 and max(numbers[0]) >= 99


def corpus(folder: Path, name: str, *sizes: int, first: int = 0) -> str:
    """Documents of these sizes; document n consists of the id `first` + n."""
    with IndexedWriter(str(folder / name), np.dtype("i4")) as writer:
        for number, size in enumerate(sizes):
            writer.add_document([first + number] * size)
    return str(folder / name)


def build(**mixtures: Mixture) -> Sources:
    return build_sources(mixtures=mixtures, seq_length=4, seed=1, vocab_size=1000)  # type: ignore[arg-type]


def test_parts_name_their_corpora_and_weights(tmp_path: Path) -> None:
    paths = (corpus(tmp_path, "a_text_document", 400), corpus(tmp_path, "b", 50, 50, first=10))
    sources = build(train=Mixture(paths, (3.0, 1.0)), valid=Mixture(paths[1:]))
    assert sources.train is not None and sources.valid is not None and sources.test is None
    from_a = sum(int(sources.train[n][0]) == 0 for n in range(4000))
    assert from_a == 3000
    assert sources.reasons == {"test": "test_data_paths is not set"}
    assert [corpus.name for corpus in sources.corpora["train"]] == ["a", "b"]
    assert "valid" not in sources.corpora  # a single one is no blend
    assert sources.part("train").num_tokens == 500
    assert sources.part("train").tokens(398, 4).tolist() == [0, 0, 10, 10]
    assert sources.part("train").tokens(449, 2).tolist() == [10, 11]
    assert any("75.0000%" in line and "99 samples an epoch" in line for line in sources.description)


@pytest.mark.parametrize(("alpha", "wanted"), [(1.0, (0.1, 0.3, 0.6)), (0.0, (1 / 3,) * 3), (0.5, None)])
def test_corpora_are_weighed_by_their_documents(tmp_path: Path, alpha: float, wanted: tuple[float, ...] | None) -> None:
    counts = (10, 30, 60)
    paths = tuple(corpus(tmp_path, f"c{count}", *[9] * count) for count in counts)
    sources = build(train=Mixture(paths, alpha=alpha))
    wanted = wanted or tuple(count**alpha / sum(n**alpha for n in counts) for count in counts)
    assert [each.weight for each in sources.corpora["train"]] == pytest.approx(wanted, abs=1e-5)


def test_corpora_of_the_same_size_are_shuffled_unlike_each_other(tmp_path: Path) -> None:
    paths = (corpus(tmp_path, "a", *[4] * 100), corpus(tmp_path, "b", *[4] * 100))
    one, other = (each.source for each in build(train=Mixture(paths)).corpora["train"])
    assert [int(one[n][0]) for n in range(50)] != [int(other[n][0]) for n in range(50)]


def test_a_corpus_without_a_sample_is_named(tmp_path: Path) -> None:
    paths = (corpus(tmp_path, "a", 400), corpus(tmp_path, "b", 4))
    with pytest.raises(UserError, match=r"train_data_paths: .*b has no sample: its 4 tokens are too few"):
        build(train=Mixture(paths))


def test_corpora_of_one_name_are_told_apart(tmp_path: Path) -> None:
    paths = (corpus(tmp_path / "x", "a", 400), corpus(tmp_path / "y", "a", 400))
    assert [each.name for each in build(valid=Mixture(paths)).corpora["valid"]] == ["a#1", "a#2"]


def test_the_shares_of_a_third_come_in_turn() -> None:
    assert Fraction(*whole_shares([1 / 3, 2 / 3])) == Fraction(1, 2)
    assert all(a != b for a, b in pairwise(earliest_deadlines((1, 1, 1)).tolist()))
