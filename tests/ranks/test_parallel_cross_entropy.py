"""The loss without logits against torch's cross entropy in fp64, forward and backward, on 1, 2 and 4 ranks.

fp32: rounding of a few products, within assert_close's defaults. In 16 bits the logits are rounded once, to 2^-9 (bf16)
or 2^-11 (fp16) of themselves; those here are below 16, so a softmax is off by 16 * 2^-9 = 3% in bf16 at most.
"""

from itertools import product

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from megatron.parallel import cross_entropy
from megatron.parallel.cross_entropy import UNCHANGED, LogitTransform, VocabularyShard, linear_cross_entropy
from megatron.parallel.grid import ParallelGrid
from tests.ranks.run import make_grid, one_rank, run_ranks

TP = pytest.mark.parametrize("tp", [1, 2, 4])
TOKENS, HIDDEN = (3, 7), 16
Case = tuple[Tensor, Tensor, Tensor, Tensor]  # hidden, weight without padding, labels, loss weights


def case_of(vocab_size: int, grid: ParallelGrid) -> Case:
    """The same on every rank; logits of about 3, some loss weights zero."""
    generator = torch.Generator().manual_seed(vocab_size)
    hidden = torch.randn(*TOKENS, HIDDEN, generator=generator)
    weight = torch.randn(vocab_size, HIDDEN, generator=generator) * 0.75
    labels = torch.randint(0, vocab_size, TOKENS, generator=generator)
    labels[0, :2] = torch.tensor([0, vocab_size - 1])
    loss_weights = torch.rand(TOKENS, generator=generator)
    loss_weights[1, :3] = 0
    return hidden.to(grid.device), weight.to(grid.device), labels.to(grid.device), loss_weights.to(grid.device)


def shard_of(weight: Tensor, padded_size: int, grid: ParallelGrid) -> tuple[Tensor, VocabularyShard, slice]:
    """This rank's rows of the weight with padding, their shard, and which they are."""
    rows = padded_size // grid.size("tensor")
    start = rows * grid.rank("tensor")
    part = slice(start, start + rows)
    mine = F.pad(weight, (0, 0, 0, padded_size - len(weight)))[part]
    return mine, VocabularyShard(grid.group("tensor"), start, min(max(len(weight) - start, 0), rows)), part


def ours(
    case: Case, padded_size: int, grid: ParallelGrid, dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, slice]:
    """Loss, gradient of hidden summed over ranks, gradient of this rank's rows of the weight, and which they are.

    scale: multiplies the loss before the backward pass; the gradients are divided by it.
    """
    mine, shard, part = shard_of(case[1], padded_size, grid)
    hidden, mine = (tensor.detach().clone().to(dtype).requires_grad_() for tensor in (case[0], mine))
    loss = linear_cross_entropy(hidden, mine, *case[2:], shard)
    (loss * scale).backward()
    assert hidden.grad.dtype == mine.grad.dtype == dtype
    of_hidden = hidden.grad.float()
    dist.all_reduce(of_hidden, group=grid.group("tensor"))
    return loss.detach(), of_hidden / scale, mine.grad.float() / scale, part


def torchs(case: Case, padded_size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """The same from whole logits in fp64, of inputs rounded to `dtype`; the padding has no gradient."""
    hidden, weight = (tensor.detach().to(dtype).double().requires_grad_() for tensor in case[:2])
    losses = F.cross_entropy((hidden @ weight.t()).flatten(0, -2), case[2].flatten(), reduction="none")
    loss = (losses * case[3].flatten()).sum()
    loss.backward()
    padded = F.pad(weight.grad, (0, 0, 0, padded_size - len(weight)))
    return loss.detach().float(), hidden.grad.float(), padded.float()


def chunks_of(tokens: int) -> None:
    """Let the loss take so many tokens at a time, in this process."""
    cross_entropy.loss_chunk = lambda *_, **__: tokens


def loss_body(vocab_size: int, padded_size: int, chunks: list[int]) -> None:
    grid = make_grid(tensor=dist.get_world_size())
    case = case_of(vocab_size, grid)
    expected, theirs_hidden, theirs_weight = torchs(case, padded_size)
    for chunk in chunks:
        chunks_of(chunk)
        loss, of_hidden, of_weight, part = ours(case, padded_size, grid)
        assert loss.dtype == torch.float32
        assert_close(loss, expected)
        assert_close(of_hidden, theirs_hidden)
        assert_close(of_weight, theirs_weight[part])
        mine, shard, _ = shard_of(case[1], padded_size, grid)
        assert torch.equal(linear_cross_entropy(case[0], mine, *case[2:], shard), loss), "no gradient"


@TP
@pytest.mark.parametrize("sizes", [(61, 64), (64, 64), (5, 128)], ids=str)
def test_loss_and_gradients_equal_those_of_whole_logits(tp, sizes):
    run_ranks(tp, loss_body, *sizes, [21])


def test_loss_and_gradients_do_not_depend_on_the_chunks():
    run_ranks(2, loss_body, 61, 64, [1, 5, 20])


def narrow_body() -> None:
    grid = make_grid(tensor=dist.get_world_size())
    case = case_of(61, grid)
    # fp16 holds 6e-8 at least: without the scale, the gradients of these weights would be zero
    small = (*case[:3], case[3] * 2.0**-24)
    for chunk in (21, 5):
        chunks_of(chunk)
        for dtype, inputs, scale, relative in (
            (torch.bfloat16, case, 1.0, 2**-5),
            (torch.float16, case, 1.0, 2**-7),
            (torch.float16, small, 2.0**24, 2**-7),
        ):
            loss, *gradients, part = ours(inputs, 64, grid, dtype, scale)
            expected, theirs_hidden, theirs_weight = torchs(inputs, 64, dtype)
            assert_close(loss, expected, rtol=relative, atol=0)
            for found, wanted in zip(gradients, (theirs_hidden, theirs_weight[part]), strict=True):
                assert_close(found, wanted, rtol=0, atol=relative * float(theirs_weight.abs().max()))


@pytest.mark.parametrize("tp", [1, 2])
def test_16_bits_are_as_exact_as_their_logits_and_fp16_is_computed_with_the_loss_scale(tp):
    run_ranks(tp, narrow_body)


TRANSFORMS = {
    "bias": (True, UNCHANGED),
    "multiplier": (False, LogitTransform(multiplier=0.5)),
    "cap": (False, LogitTransform(cap=4.0)),
    "everything": (True, LogitTransform(multiplier=1.7, cap=5.0)),
}


def transformed_body(vocab_size: int, padded_size: int) -> None:
    grid = make_grid(tensor=dist.get_world_size())
    case = case_of(vocab_size, grid)
    whole_bias = torch.randn(vocab_size, generator=torch.Generator().manual_seed(2)).to(grid.device)
    tolerances = {torch.float32: 1e-5, torch.bfloat16: 2**-5, torch.float16: 2**-7}  # as above
    for (has_bias, transform), (dtype, relative), chunk in product(TRANSFORMS.values(), tolerances.items(), (21, 5)):
        chunks_of(chunk)
        mine, shard, part = shard_of(case[1], padded_size, grid)
        bias = F.pad(whole_bias, (0, padded_size - vocab_size))[part]
        inputs = [tensor.detach().clone().to(dtype).requires_grad_() for tensor in (case[0], mine, bias)]
        own_bias = inputs[2] if has_bias else None
        loss = linear_cross_entropy(*inputs[:2], *case[2:], shard, bias=own_bias, transform=transform)
        loss.backward()
        with torch.no_grad():
            same = linear_cross_entropy(*inputs[:2], *case[2:], shard, bias=own_bias, transform=transform)
        assert torch.equal(same, loss)
        dist.all_reduce(of_hidden := inputs[0].grad.float(), group=grid.group("tensor"))

        exact = [t.detach().to(dtype).double().requires_grad_() for t in (*case[:2], whole_bias)]
        logits = (exact[0] @ exact[1].t() + (exact[2] if has_bias else 0)) * transform.multiplier
        if transform.cap is not None:
            logits = transform.cap * torch.tanh(logits / transform.cap)
        losses = F.cross_entropy(logits.flatten(0, -2), case[2].flatten(), reduction="none")
        (expected := (losses * case[3].flatten()).sum()).backward()
        assert_close(loss.detach(), expected.detach().float(), rtol=relative, atol=0)
        pairs = [
            (of_hidden, exact[0].grad),
            (inputs[1].grad, F.pad(exact[1].grad, (0, 0, 0, padded_size - vocab_size))),
        ]
        if has_bias:
            pairs.append((inputs[2].grad, F.pad(exact[2].grad, (0, padded_size - vocab_size))))
        for number, (found, wanted) in enumerate(pairs):
            assert found.isfinite().all()
            wanted = wanted[part] if number else wanted
            assert_close(found.double(), wanted, rtol=0, atol=relative * float(exact[1].grad.abs().max()))


@pytest.mark.parametrize(("tp", "sizes"), [(1, (61, 64)), (2, (61, 64)), (2, (5, 128))], ids=str)
def test_bias_multiplier_and_cap_have_the_gradients_of_whole_logits(tp, sizes):
    run_ranks(tp, transformed_body, *sizes)


def huge_logits_body() -> None:
    grid = make_grid(tensor=dist.get_world_size())
    hidden = torch.ones(1, 1, device=grid.device, requires_grad=True)
    weight = torch.full((4, 1), 1e4 if grid.rank("tensor") else -1e4, device=grid.device, requires_grad=True)
    label, ones = torch.tensor([7], device=grid.device), torch.ones(1, device=grid.device)  # on the last rank
    shard = VocabularyShard(grid.group("tensor"), 4 * grid.rank("tensor"), 4)
    loss = linear_cross_entropy(hidden, weight, label, ones, shard)
    loss.backward()
    assert_close(loss.detach(), torch.tensor(4.0, device=grid.device).log())
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()


def test_huge_logits_do_not_overflow():
    run_ranks(2, huge_logits_body)


class Largest(TorchDispatchMode):
    """The most elements that any operation's result has."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_tensor_has_the_logits_of_more_than_a_chunk(dtype):
    with one_rank() as grid:
        tokens, rows, hidden_size = 8192, 320, 64
        weight = torch.randn(rows, hidden_size, device=grid.device).to(dtype).requires_grad_()
        hidden = torch.randn(tokens, hidden_size, device=grid.device).to(dtype).requires_grad_()
        labels = torch.randint(0, rows, (tokens,), device=grid.device)
        shard = VocabularyShard(grid.group("tensor"), 0, rows)
        with Largest() as largest:
            loss = linear_cross_entropy(hidden, weight, labels, torch.ones(tokens, device=grid.device), shard)
            loss.backward()
        assert tokens * hidden_size <= largest.elements <= max(tokens * hidden_size, 2048 * rows) < tokens * rows


def test_a_second_backward_pass_is_refused_rather_than_scaled_twice():
    with one_rank() as grid:
        case = case_of(61, grid)
        mine, shard, _ = shard_of(case[1], 64, grid)
        loss = linear_cross_entropy(case[0].requires_grad_(), mine, *case[2:], shard)
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
