"""Which token follows which logits: exact distributions, and frequencies that match them."""

import pytest
import torch

from megatron.generation.sampling import Sampling, choose, probabilities

LOGITS = torch.log(torch.tensor([[0.5, 0.25, 0.15, 0.1]]))


def test_nothing_set_means_the_likeliest_token():
    logits = torch.tensor([[1.0, 3.0, 2.0], [0.0, -1.0, -torch.inf]])
    assert Sampling().is_greedy
    assert choose(logits, Sampling(), torch.tensor([0.99, 0.99])).tolist() == [1, 0]


@pytest.mark.parametrize("sampling", [Sampling(temperature=1.0), Sampling(top_k=4), Sampling(top_p=1.0)])
def test_one_setting_is_enough_to_sample_and_a_temperature_of_zero_then_counts_as_one(sampling):
    assert not sampling.is_greedy
    torch.testing.assert_close(probabilities(LOGITS, sampling), LOGITS.exp())


def test_temperature_divides_the_logits():
    halved = probabilities(LOGITS, Sampling(temperature=0.5))
    squares = LOGITS.exp() ** 2
    torch.testing.assert_close(halved, squares / squares.sum())


def test_top_k_keeps_the_likeliest_k():
    kept = probabilities(LOGITS, Sampling(top_k=2))
    torch.testing.assert_close(kept, torch.tensor([[2 / 3, 1 / 3, 0.0, 0.0]]))
    torch.testing.assert_close(probabilities(LOGITS, Sampling(top_k=99)), LOGITS.exp())


@pytest.mark.parametrize(("top_p", "count"), [(0.1, 1), (0.5, 1), (0.51, 2), (0.74, 2), (0.8, 3), (0.95, 4)])
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p, count):
    kept = probabilities(LOGITS, Sampling(top_p=top_p))
    expected = LOGITS.exp() * (torch.arange(4) < count)
    torch.testing.assert_close(kept, expected / expected.sum())


def test_top_p_counts_what_top_k_has_left():
    kept = probabilities(LOGITS, Sampling(top_k=2, top_p=0.6))
    torch.testing.assert_close(kept, torch.tensor([[1.0, 0.0, 0.0, 0.0]]))


def test_top_p_works_on_each_text_by_itself_and_in_any_order():
    logits = torch.stack([LOGITS[0], LOGITS[0].flip(0)])
    kept = probabilities(logits, Sampling(top_p=0.7))
    torch.testing.assert_close(kept[0], kept[1].flip(0))
    assert (kept > 0).sum(dim=1).tolist() == [2, 2]


def test_frequencies_follow_the_distribution():
    count = 20_000
    draws = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    chosen = choose(LOGITS.expand(count, -1), Sampling(temperature=1.0), draws)
    frequencies = torch.bincount(chosen, minlength=4) / count
    torch.testing.assert_close(frequencies, LOGITS.exp()[0], atol=0.01, rtol=0)


def test_a_token_without_probability_is_never_chosen_even_by_extreme_draws():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(3, -1)
    draws = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert choose(logits, Sampling(temperature=1.0), draws).tolist() == [1, 3, 3]


def test_what_is_chosen_does_not_depend_on_the_other_texts_of_the_batch():
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(2))
    draws = torch.rand(5, dtype=torch.float64)
    together = choose(logits, Sampling(temperature=0.7, top_k=20, top_p=0.9), draws)
    alone = [choose(logits[i : i + 1], Sampling(0.7, 20, 0.9), draws[i : i + 1]) for i in range(5)]
    assert together.tolist() == torch.cat(alone).tolist()
