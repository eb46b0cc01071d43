"""Micro-batches: the same samples a step in every layout, from any position, with any number of workers."""

from itertools import islice

import numpy as np
import pytest
import torch

from megatron.data.build import build_sources
from megatron.data.indexed import IndexedWriter
from megatron.data.loader import MicroBatchOrder, micro_batches
from megatron.data.windows import SampleSource


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SampleSource:
    prefix = str(tmp_path_factory.mktemp("data") / "x")
    with IndexedWriter(prefix, np.dtype("u2")) as writer:
        for first in range(0, 5000, 50):
            writer.add_document(range(first, first + 50))
    return build_sources(data_path=prefix, data_impl="mmap", split="1", seq_length=8, seed=3, vocab_size=5000).samples(
        "train"
    )


def take(source: SampleSource, count: int, **settings: object) -> list[torch.Tensor]:
    layout = {"consumed_samples": 0, "global_size": 8, "micro_size": 2, "data_rank": 0, "data_size": 1}
    return list(islice(micro_batches(source, **{**layout, **settings}), count))  # type: ignore[arg-type]


@pytest.mark.parametrize(("micro", "ranks"), [(1, 1), (8, 1), (2, 2), (1, 8), (4, 2)])
def test_every_layout_sees_the_same_samples_in_a_step(micro: int, ranks: int) -> None:
    steps = 8 // micro // ranks
    for step in range(3):
        seen: list[int] = []
        for rank in range(ranks):
            order = MicroBatchOrder(16, 8, micro, rank, ranks)
            seen += [number for batch in islice(order, step * steps, (step + 1) * steps) for number in batch]
        assert sorted(seen) == list(range(16 + 8 * step, 24 + 8 * step))


def test_the_place_of_each_sample_is_the_documented_one() -> None:
    order = list(islice(MicroBatchOrder(100, 12, 2, data_rank=1, data_size=3), 4))
    assert order == [[102, 103], [108, 109], [114, 115], [120, 121]]


def test_batches_are_int64_samples_of_the_source(source: SampleSource) -> None:
    (batch,) = take(source, 1, micro_size=4)
    assert batch.dtype == torch.int64 and batch.shape == (4, 9)
    assert batch.tolist() == [source[n].tolist() for n in range(4)]


def test_a_resumed_run_goes_on_where_the_other_would_have(source: SampleSource) -> None:
    whole = take(source, 12)
    rest = take(source, 8, consumed_samples=8)
    assert torch.equal(torch.stack(whole[4:]), torch.stack(rest))


@pytest.mark.parametrize(("start_method", "num_workers"), [("fork", 2), ("spawn", 1)])
def test_workers_give_the_same_batches(source: SampleSource, start_method: str, num_workers: int) -> None:
    plain, read_ahead = take(source, 10), take(source, 10, num_workers=num_workers, start_method=start_method)
    assert torch.equal(torch.stack(plain), torch.stack(read_ahead))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loading_leaves_the_random_numbers_of_training_alone(source: SampleSource, num_workers: int) -> None:
    before = torch.get_rng_state()
    take(source, 3, num_workers=num_workers)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("micro", "ranks"), [(3, 1), (2, 3), (4, 4)])
def test_a_global_batch_that_does_not_divide_is_refused(source: SampleSource, micro: int, ranks: int) -> None:
    with pytest.raises(ValueError, match="8 samples cannot be divided"):
        take(source, 1, micro_size=micro, data_size=ranks)
