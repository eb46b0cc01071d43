"""The vocab-parallel loss against torch's cross entropy, forward and backward, on 1, 2 and 4 ranks."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.testing import assert_close

from megatron.parallel import cross_entropy
from tests.ranks.run import make_grid, run_ranks

TP = pytest.mark.parametrize("tp", [1, 2, 4])


def loss_body(vocab_size: int, padded_size: int, dtype: torch.dtype, chunk: int) -> None:
    cross_entropy._CHUNK_ELEMENTS = chunk
    grid = make_grid(tensor=dist.get_world_size())
    whole = (torch.randn(3, 7, vocab_size) * 5).to(grid.device, dtype)
    padded = F.pad(whole, (0, padded_size - vocab_size), value=float("-inf"))
    width = padded_size // grid.size("tensor")
    start = grid.rank("tensor") * width
    mine = padded[..., start : start + width].clone().requires_grad_()
    theirs = whole.float().requires_grad_()
    labels = torch.randint(0, vocab_size, (3, 7)).to(grid.device)
    labels[0, :2] = torch.tensor([0, vocab_size - 1], device=grid.device)
    weights = torch.rand(3, 7).to(grid.device)

    losses = cross_entropy.vocab_parallel_nll(mine, labels, grid.group("tensor"), start)
    expected = F.cross_entropy(theirs.flatten(0, 1), labels.flatten(), reduction="none").view(3, 7)
    assert losses.dtype == torch.float32
    assert_close(losses, expected)
    (losses * weights).sum().backward()
    (expected * weights).sum().backward()
    gradient = F.pad(theirs.grad, (0, padded_size - vocab_size))[..., start : start + width]
    assert mine.grad.dtype == dtype
    assert_close(mine.grad, gradient.to(dtype))


@TP
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(61, 64), (64, 64), (5, 128)])
def test_the_loss_equals_cross_entropy_of_the_whole_logits(tp, dtype, sizes):
    run_ranks(tp, loss_body, *sizes, dtype, 2**24)


@pytest.mark.parametrize("chunk", [1, 64, 130])
def test_the_loss_does_not_depend_on_how_tokens_are_chunked(chunk):
    run_ranks(2, loss_body, 61, 64, torch.float32, chunk)


def huge_logits_body() -> None:
    grid = make_grid(tensor=dist.get_world_size())
    value = 1e4 if grid.rank("tensor") else -1e4
    logits = torch.full((1, 1, 4), value, device=grid.device, requires_grad=True)
    label = torch.tensor([[7]], device=grid.device)  # on the last rank
    loss = cross_entropy.vocab_parallel_nll(logits, label, grid.group("tensor"), 4 * grid.rank("tensor"))
    loss.sum().backward()
    assert_close(loss, torch.full_like(loss, 4.0).log())
    assert logits.grad.isfinite().all()


def test_huge_logits_do_not_overflow():
    run_ranks(2, huge_logits_body)
