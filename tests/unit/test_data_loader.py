"""Micro-batches: the same samples a step in every layout, from any position, with any number of workers."""

import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data.blend import Blend
from megatron.data.build import build_sources
from megatron.data.indexed import HEADER, MAGIC, IndexedWriter
from megatron.data.loader import MicroBatchOrder, micro_batches
from megatron.data.windows import SampleSource, Windows


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


@settings(deadline=None)
@given(
    sizes=st.lists(st.sampled_from([4, 8, 12, 16]), min_size=1, max_size=4),
    steps=st.lists(st.integers(0, 4), min_size=4, max_size=4),
    ranks=st.sampled_from([1, 2, 4]),
)
def test_a_run_that_changes_its_batch_size_sees_every_sample_once_in_order(
    sizes: list[int], steps: list[int], ranks: int
) -> None:
    """Runs that resume one another: each with its own global batch, and micro-batches of 1 or 2."""
    consumed, seen = 0, []
    for size, count in zip(sizes, steps, strict=False):
        for _ in range(count):
            step = []
            for rank in range(ranks):
                order = MicroBatchOrder(consumed, size, size // ranks if size < 8 else 1, rank, ranks)
                batches = islice(order, size // ranks // order.micro_size)
                step += [number for batch in batches for number in batch]
            seen += sorted(step)
            consumed += size
    assert seen == list(range(consumed))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_resumed_blend_goes_on_at_the_next_unseen_sample(source: SampleSource, ranks: int) -> None:
    blend = Blend((source, source), (2, 1))
    wanted = [blend[n].tolist() for n in range(16)]
    shares = [
        take(blend, 8 // ranks, global_size=8, micro_size=1, data_rank=rank, data_size=ranks) for rank in range(ranks)
    ]
    first = [batch[0].tolist() for step in zip(*shares, strict=True) for batch in step]
    [second] = take(blend, 1, consumed_samples=8, global_size=8, micro_size=8)
    assert first + second.tolist() == wanted


def test_offsets_beyond_four_billion_tokens_are_read_right(tmp_path: Path) -> None:
    """10^11 tokens in a sparse file: each place that is looked at is written first."""
    prefix, count, size = tmp_path / "big", 50, 2 * 10**9
    sizes = np.full(count, size, dtype="<i4")
    pointers = np.arange(count, dtype="<i8") * size * 2
    header = HEADER.pack(MAGIC, 1, 8, count, count + 1)
    index = header + sizes.tobytes() + pointers.tobytes() + np.arange(count + 1, dtype="<i8").tobytes()
    Path(f"{prefix}.idx").write_bytes(index)
    with Path(f"{prefix}.bin").open("wb") as file:
        file.truncate(count * size * 2)
    began = time.process_time()
    source = build_sources(data_path=str(prefix), split="48, 1, 1", seq_length=2048, seed=1, vocab_size=60_000).train
    assert isinstance(source, Windows) and time.process_time() - began < 1
    starts = [source.start_of(n) for n in range(64)]
    assert max(starts) > 2**34 and source.samples_per_epoch == (96 * 10**9 - 1) // 2048
    with Path(f"{prefix}.bin").open("r+b") as file:
        for number, start in enumerate(starts):
            file.seek(2 * start)
            file.write(np.full(2049, number + 1, dtype="<u2").tobytes())
    assert [sorted(set(source[n].tolist())) for n in range(64)] == [[n + 1] for n in range(64)]
