"""How a step's samples become tokens, labels and weights."""

import pytest
import torch

from megatron.training.batch import BatchBuilder, training_batches
from tests.ranks.run import one_rank


@pytest.fixture
def grid():
    with one_rank() as grid:
        yield grid


def test_labels_are_the_tokens_moved_by_one(grid):
    [(tokens, (labels, _))], count = BatchBuilder(grid).build([torch.tensor([[5, 6, 7, 8]])])
    assert tokens.tolist() == [[5, 6, 7]]
    assert labels.tolist() == [[6, 7, 8]]
    assert count == 3


def test_the_weights_of_a_step_sum_to_its_micro_batches(grid):
    batches, count = BatchBuilder(grid).build([torch.ones(2, 5, dtype=torch.int64)] * 3)
    weights = torch.stack([weights for _, (_, weights) in batches])
    assert count == 24
    assert weights.sum().item() == pytest.approx(3)
    assert weights.unique().numel() == 1


def test_the_label_after_the_end_of_a_document_does_not_count(grid):
    end = 9
    samples = [torch.tensor([[1, end, 2, 3]]), torch.tensor([[4, 5, 6, end]])]
    batches, count = BatchBuilder(grid, masked_token=end).build(samples)
    masks = [(weights > 0).tolist() for _, (_, weights) in batches]
    assert masks == [[[True, False, True]], [[True, True, True]]]
    assert count == 5
    assert sum(weights.sum().item() for _, (_, weights) in batches) == pytest.approx(2)


def test_the_loss_of_a_step_is_the_mean_over_labels_however_they_are_masked(grid):
    """Micro-batches with unlike numbers of counted labels: the mean of their own means would be another number."""
    end = 0
    samples = [torch.tensor([[1, 2, 3, 4]]), torch.tensor([[end, end, 5, 6]])]
    losses = [torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[10.0, 20.0, 30.0]])]
    batches, _ = BatchBuilder(grid, masked_token=end).build(samples)
    of_micro_batches = [(loss * weights).sum() for loss, (_, (_, weights)) in zip(losses, batches, strict=True)]
    assert torch.stack(of_micro_batches).mean().item() == pytest.approx((1 + 2 + 3 + 30) / 4)


def test_samples_that_only_fill_up_do_not_count(grid):
    samples = [torch.ones(2, 4, dtype=torch.int64)]
    [(_, (_, weights))], count = BatchBuilder(grid).build(samples, [torch.tensor([True, False])])
    assert count == 3
    assert weights.sum(dim=1).tolist() == [1.0, 0.0]


def test_a_step_in_which_nothing_counts_has_weights_of_zero_and_no_nan(grid):
    [(_, (_, weights))], count = BatchBuilder(grid, masked_token=1).build([torch.ones(1, 4, dtype=torch.int64)])
    assert count == 0
    assert weights.tolist() == [[0.0, 0.0, 0.0]]


def test_a_step_takes_as_many_micro_batches_as_are_accumulated(grid):
    stream = (torch.full((1, 3), number) for number in range(4))
    steps = list(training_batches(stream, BatchBuilder(grid), accumulation_steps=2))
    assert [[int(tokens[0, 0]) for tokens, _ in step] for step in steps] == [[0, 1], [2, 3]]
