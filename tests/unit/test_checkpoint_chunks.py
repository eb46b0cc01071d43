"""A fragment of elements, cut into chunks of the whole tensor."""

import math

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from megatron.checkpoint.chunks import LoadPlanner, LocalChunks, SavePlanner, tiles
from megatron.checkpoint.reading import SafeReader
from megatron.checkpoint.writing import Writer
from megatron.parallel.parameter import chunks_of_fragment, global_chunks

shapes = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@st.composite
def fragments(draw):
    shape = draw(shapes)
    total = math.prod(shape)
    start = draw(st.integers(0, total - 1))
    return shape, start, draw(st.integers(1, total - start))


@given(fragments())
def test_chunks_cover_a_fragment_exactly_once_and_in_order(fragment):
    shape, start, numel = fragment
    numbers = torch.arange(math.prod(shape)).view(shape)
    covered = []
    for offsets, sizes, position in chunks_of_fragment(start, numel, shape):
        assert position == len(covered)
        chunk = tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))
        covered += numbers[chunk].flatten().tolist()
    assert covered == list(range(start, start + numel))


@given(fragments())
def test_a_fragment_needs_at_most_two_chunks_per_dimension_less_one(fragment):
    shape, start, numel = fragment
    assert len(list(chunks_of_fragment(start, numel, shape))) <= 2 * len(shape) - 1


@given(fragments(), st.integers(1, 5))
def test_chunks_are_views_of_the_fragment_and_leave_out_padding(fragment, true_rows):
    shape, start, numel = fragment
    true_rows = min(true_rows, shape[0])
    flat = torch.zeros(numel)
    parameter = torch.nn.Parameter(torch.zeros(shape))
    placement = {"global_shape": (true_rows, *shape[1:]), "shard_shape": tuple(shape), "shard_dim": None}
    vars(parameter).update(placement, shard_start=0)
    for _, chunk in global_chunks(parameter, start, flat):
        chunk.fill_(1.0)
    true_elements = true_rows * math.prod(shape[1:])
    inside = max(0, min(start + numel, true_elements) - start)
    assert flat.sum() == inside and bool((flat[:inside] == 1).all())


@given(shapes, st.lists(st.integers(1, 30), max_size=4), st.data())
def test_chunks_tile_if_each_element_is_in_one_of_them_and_in_no_other_case(shape, cuts, data):
    """Fragments as ranks hold them, then one of them left out, doubled, or moved onto its neighbours."""
    total = math.prod(shape)
    ends = sorted({cut % total for cut in cuts} - {0} | {total})
    chunks = [
        ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        for start, end in zip([0, *ends], ends, strict=False)
        for offsets, sizes, _ in chunks_of_fragment(start, end - start, shape)
    ]
    chunks = data.draw(st.permutations(chunks))
    assert tiles(shape, chunks)
    assert not tiles(shape, chunks[1:])
    assert not tiles(shape, [*chunks, chunks[0]])
    equal = [chunk for chunk in chunks[1:] if chunk.sizes == chunks[0].sizes]
    if equal:  # as large together as the whole
        assert not tiles(shape, [equal[0] if chunk is chunks[0] else chunk for chunk in chunks])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_bytes_of_a_checkpoint_are_counted_as_they_are_written_and_read(tmp_path):
    def chunks(value: float) -> dict[str, LocalChunks]:
        local = LocalChunks(torch.Size((4, 256)))
        local.chunks |= {
            torch.Size((0, 0)): torch.full((3, 256), value),
            torch.Size((3, 0)): torch.full((1, 256), value),
        }
        return {"a": local}

    written: list[int] = []
    dcp.save(chunks(2.0), storage_writer=Writer(tmp_path, written.append), planner=SavePlanner(), no_dist=True)
    assert sum(written) == sum(path.stat().st_size for path in tmp_path.iterdir()) > 4096
    loaded: list[int] = []
    target = chunks(0.0)
    dcp.load(target, storage_reader=SafeReader(tmp_path), planner=LoadPlanner(loaded.append), no_dist=True)
    assert sorted(loaded) == [1024, 3072]
    assert all(bool((chunk == 2).all()) for chunk in target["a"].chunks.values())
