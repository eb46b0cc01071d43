"""From settings to train, valid and test."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data.build import PARTS, Mixture, Sources, build_sources
from megatron.data.dataset_slices import parse_split, split_ranges
from megatron.data.indexed import IndexedWriter
from megatron.data.mock import BEST_LOSS, MockStream
from megatron.errors import UserError


def corpus(prefix: Path, *sizes: int) -> str:
    """Documents of these sizes; document n consists of the id n."""
    with IndexedWriter(str(prefix), np.dtype("u2")) as writer:
        for number, size in enumerate(sizes):
            writer.add_document([number] * size)
    return str(prefix)


def build(
    path: str | None, split: str, seq_length: int = 4, data_impl: str = "mmap", vocab_size: int = 1000
) -> Sources:
    return build_sources(
        data_path=path, data_impl=data_impl, split=split, seq_length=seq_length, seed=1, vocab_size=vocab_size
    )


def test_parts_are_contiguous_ranges_of_whole_documents(tmp_path: Path) -> None:
    sources = build(corpus(tmp_path / "x", *range(10, 20)), "6, 3, 1")
    parts = [sources.part(part) for part in PARTS]
    assert [sorted(set(part.tokens(0, 10**6).tolist())) for part in parts] == [[0, 1, 2, 3, 4, 5], [6, 7, 8], [9]]
    assert [part.num_tokens for part in parts] == [75, 51, 19]
    assert len(sources.description) == 4 and "10 documents, 145 tokens" in sources.description[0]


def test_only_training_is_shuffled(tmp_path: Path) -> None:
    sources = build(corpus(tmp_path / "x", *[50] * 20), "10, 9, 1")
    assert sources.train and sources.valid
    order = [int(sources.train[n][0]) for n in range(sources.train.samples_per_epoch)]
    assert sorted(order) != order and set(order) == set(range(10))
    assert [int(sources.valid[n][0]) for n in range(5)] == [10] * 5


def test_one_document_is_split_by_token_and_says_so(tmp_path: Path) -> None:
    sources = build(corpus(tmp_path / "x", 1000), "90, 10")
    assert [sources.part(part).num_tokens for part in ("train", "valid")] == [900, 100]  # type: ignore[arg-type]
    assert "split by token because it is one document" in sources.description[0]
    assert "tokens 900 to 999" in sources.description[2]


@settings(deadline=None)
@given(
    count=st.integers(1, 500),
    weights=st.lists(st.integers(0, 1000), min_size=1, max_size=3).filter(any),
)
def test_documents_are_divided_as_gpt_neox_divides_them(count: int, weights: list[int]) -> None:
    split = ", ".join(map(str, weights))
    padded = [float(weight) for weight in [*weights, 0, 0][:3]]
    bounds = [0]
    for weight in padded:  # its get_train_valid_test_split_
        bounds.append(bounds[-1] + round(weight / sum(padded) * float(count)))
    excess = bounds[-1] - count
    bounds = [bounds[0]] + [bound - excess for bound in bounds[1:]]
    ranges = split_ranges(count, parse_split(split))
    assert ranges[-1][1] == count and ranges[0][0] == 0
    if min(np.diff(bounds)) >= 0:  # where it gives sense at all
        assert ranges == list(pairwise(bounds))


def test_a_part_without_a_document_is_absent_with_its_reason(tmp_path: Path) -> None:
    sources = build(corpus(tmp_path / "x", *[30] * 5), "969, 30, 1")
    assert sources.train is not None and sources.valid is None and sources.test is None
    assert any('valid: none, split "969, 30, 1" leaves it 0 of 5 documents' in line for line in sources.description)
    with pytest.raises(UserError, match="no valid samples: split"):
        sources.samples("valid")
    with pytest.raises(UserError, match="no test tokens: split"):
        sources.part("test")
    assert sources.samples("train") is sources.train


def test_a_part_shorter_than_a_sample_has_tokens_but_no_samples(tmp_path: Path) -> None:
    sources = build(corpus(tmp_path / "x", 100, 4, 5), "1, 1, 1")
    assert sources.valid is None and sources.part("valid").num_tokens == 4
    assert sources.test is not None and sources.test.samples_per_epoch == 1
    with pytest.raises(UserError, match=r"4 tokens are too few for seq_length \(4\)"):
        sources.samples("valid")


def test_data_of_another_tokenizer_are_refused_before_the_work_starts(tmp_path: Path) -> None:
    path = corpus(tmp_path / "x", *[30] * 12)
    with pytest.raises(UserError, match="another tokenizer"):
        build(path, "1,1", vocab_size=11)


def test_no_path_is_an_error_that_names_the_way_out() -> None:
    with pytest.raises(UserError, match=r"data_path is not set.*mock"):
        build(None, "1")


def test_split_takes_commas_and_slashes() -> None:
    assert parse_split("969, 30, 1") == parse_split("969/30/1") == (0.969, 0.03, 0.001)
    assert parse_split("1") == (1.0, 0.0, 0.0)
    for wrong in ("", "a,b", "1,2,3,4", "0,0", "-1,2", "nan", "inf", "1;2"):
        with pytest.raises(UserError, match="split"):
            parse_split(wrong)


def test_mock_data_are_pure_and_differ_between_parts_and_seeds() -> None:
    sources = build(None, "1", seq_length=64, data_impl="mock", vocab_size=50)
    assert sources.train and sources.valid
    assert sources.train[10**6].tolist() == build(None, "1", 64, "mock", 50).samples("train")[10**6].tolist()
    firsts = [MockStream(name, 10**6, 50, seed).tokens(0, 64).tolist() for name in "ab" for seed in (1, 2)]
    assert len({tuple(first) for first in firsts}) == 4
    assert max(max(first) for first in firsts) < 50
    assert "best possible loss 0.914" in sources.description[0]


def test_mock_text_can_be_learned_down_to_the_loss_it_names() -> None:
    text = MockStream("train", 2**40, 50304, 1).tokens(2**39 + 5, 200_000)
    pairs, singles = np.zeros((128, 128)), np.bincount(text, minlength=128) / len(text)
    np.add.at(pairs, (text[:-1], text[1:]), 1)
    chances = pairs / pairs.sum(1, keepdims=True)
    bigram = -np.log(chances[text[:-1], text[1:]]).mean()
    assert bigram == pytest.approx(BEST_LOSS, abs=0.02)
    assert -(singles * np.log(singles)).sum() > 4.7


@settings(deadline=None)
@given(start=st.integers(0, 9000), length=st.integers(0, 9000))
def test_mock_text_reads_the_same_from_anywhere(start: int, length: int) -> None:
    stream = MockStream("train", 10_000, 30, 5)
    assert stream.tokens(start, length).tolist() == stream.tokens(0, 10_000)[start : start + length].tolist()


@pytest.mark.parametrize("alpha", [2000.0, -2000.0, float("nan"), float("inf")])
def test_an_exponent_of_weights_out_of_range_is_refused_with_its_key(tmp_path: Path, alpha: float) -> None:
    paths = (corpus(tmp_path / "a", *[9] * 30), corpus(tmp_path / "b", *[9] * 20))
    with pytest.raises(
        UserError, match=r"weighted_sampler_alpha \(.*\) is out of range: the weight of .*a would be 30"
    ):
        build_sources(mixtures={"train": Mixture(paths, alpha=alpha)}, seq_length=4, seed=1, vocab_size=99)
