"""A run of elements, cut into boxes of the whole tensor."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from megatron.checkpoint.slices import Slices, boxes, tiles
from megatron.engine.optimizer_state import Run

shapes = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@st.composite
def runs(draw):
    shape = draw(shapes)
    total = math.prod(shape)
    start = draw(st.integers(0, total - 1))
    return shape, start, draw(st.integers(1, total - start))


@given(runs())
def test_boxes_cover_a_run_exactly_once_and_in_order(run):
    shape, start, numel = run
    numbers = torch.arange(math.prod(shape)).view(shape)
    covered = []
    for offsets, sizes, position in boxes(start, numel, shape):
        assert position == len(covered)
        box = tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))
        covered += numbers[box].flatten().tolist()
    assert covered == list(range(start, start + numel))


@given(runs())
def test_a_run_needs_at_most_two_boxes_per_dimension_less_one(run):
    shape, start, numel = run
    assert len(list(boxes(start, numel, shape))) <= 2 * len(shape) - 1


@given(runs(), st.integers(1, 5))
def test_slices_are_views_of_the_run_and_leave_out_padding(run, true_rows):
    shape, start, numel = run
    true_rows = min(true_rows, shape[0])
    flat = torch.zeros(numel)
    slices = Slices([true_rows, *shape[1:]])
    piece = Run(torch.nn.Parameter(torch.zeros(shape)), tuple(shape), start, numel, {})
    slices.add(piece, flat, origin=[0] * len(shape))
    for part in slices.parts.values():
        part.fill_(1.0)
    true_elements = true_rows * math.prod(shape[1:])
    inside = max(0, min(start + numel, true_elements) - start)
    assert flat.sum() == inside and bool((flat[:inside] == 1).all())


@given(shapes, st.lists(st.integers(1, 30), max_size=4), st.data())
def test_pieces_are_whole_if_each_element_is_in_one_of_them_and_in_no_other_case(shape, cuts, data):
    """Runs as ranks hold them, then one of them left out, doubled, or moved onto its neighbours."""
    total = math.prod(shape)
    ends = sorted({cut % total for cut in cuts} - {0} | {total})
    pieces = [
        ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        for start, end in zip([0, *ends], ends, strict=False)
        for offsets, sizes, _ in boxes(start, end - start, shape)
    ]
    pieces = data.draw(st.permutations(pieces))
    assert tiles(shape, pieces)
    assert not tiles(shape, pieces[1:])
    assert not tiles(shape, [*pieces, pieces[0]])
    equal = [piece for piece in pieces[1:] if piece.sizes == pieces[0].sizes]
    if equal:  # as large together as the whole
        assert not tiles(shape, [equal[0] if piece is pieces[0] else piece for piece in pieces])
