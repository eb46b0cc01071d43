"""Decoding with a key-value cache gives the logits of reading the whole text at once.

fp32. The two ways share every sum but attention's, which torch's kernels cut differently: gaps seen are below 2e-6 of
the largest logit, and a token at a wrong position (every new token at position 0, say) is off by a tenth of it.
"""

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from megatron.config.plan import ModelPlan
from megatron.engine.modules import Sequential
from megatron.model import attention_kernels
from megatron.model.cache import KVCache, Positions, bytes_of_slot
from megatron.model.layer import Masking, pack, unpack
from tests.models import VARIETY, build, new_cache, random_tokens, read_in_steps, read_rows, small
from tests.ranks.run import one_rank

TOLERANCE = 1e-5
LENGTH = 16
MODELS = {
    **VARIETY,
    "learned, grouped queries": small(position_embedding="learned", num_kv_heads=1),
    "narrow window": small(position_embedding="learned", attention_kinds=("local",) * 3, sliding_window=1),
    "flash": small(attention_kinds=("flash",) * 3, num_kv_heads=2),
}
WINDOWS = [name for name, model in MODELS.items() if "local" in model.attention_kinds]


@pytest.fixture(scope="module")
def grid():
    with one_rank() as grid, torch.inference_mode():
        yield grid


def assert_near(actual: Tensor, expected: Tensor) -> None:
    assert actual.isfinite().all()
    assert (actual - expected).abs().max() <= TOLERANCE * expected.abs().max()


def true_logits(module: Sequential, tokens: Tensor, model: ModelPlan) -> Tensor:
    return module(tokens)[..., : model.vocab_size]


@pytest.mark.parametrize("steps", [[1] * LENGTH, [9] + [1] * 7, [5, 4, 1, 6], [LENGTH]], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_decoding_equals_reading_everything_at_once(grid, name, steps):
    model = MODELS[name]
    module, tokens = build(model, grid).eval(), random_tokens(model, batch=2, length=LENGTH)
    decoded = read_in_steps(module, tokens, new_cache(model, 2, LENGTH), steps)[..., : model.vocab_size]
    assert_near(decoded, true_logits(module, tokens, model))


@pytest.mark.parametrize("step", [1, 2, 4])
@pytest.mark.parametrize("name", WINDOWS)
def test_a_layer_with_a_window_keeps_only_what_its_queries_see(grid, name, step):
    """However small its ring is, the logits are those of the whole text."""
    model = MODELS[name]
    module, tokens = build(model, grid).eval(), random_tokens(model, batch=2, length=LENGTH)
    cache = new_cache(model, 2, LENGTH, longest_step=step)
    decoded = read_in_steps(module, tokens, cache, [step] * (LENGTH // step))[..., : model.vocab_size]
    assert_near(decoded, true_logits(module, tokens, model))
    layer, expected = model.attention_kinds.index("local"), model.sliding_window - 1 + step
    assert cache._keys[layer].shape[2] == expected + 1  # and a column for what padding would write


@pytest.mark.parametrize("worth", [attention_kernels.WORTH_A_ROW, -1], ids=["together", "row by row"])
@pytest.mark.parametrize("name", MODELS)
def test_texts_of_different_lengths_share_steps(grid, name, worth, monkeypatch):
    """Slots are neither neighbours nor in order; rows are read in pieces of different sizes."""
    monkeypatch.setattr(attention_kernels, "WORTH_A_ROW", worth)
    model, lengths = MODELS[name], [12, 9, 6]
    module, cache = build(model, grid).eval(), new_cache(model, 5, 12, longest_step=7)
    texts = [random_tokens(model, 1, length, seed=length)[0] for length in lengths]
    slots, done, found = [3, 0, 4], [0, 0, 0], [[], [], []]
    for sizes in ([7, 3, 1], [2, 4, 1], [1, 1, 1], [2, 1, 3]):
        rows = [text[start : start + size] for text, start, size in zip(texts, done, sizes, strict=True)]
        for place, result in enumerate(read_rows(module, rows, slots, done, cache)):
            found[place].append(result)
            done[place] += sizes[place]
    assert done == lengths
    for text, parts in zip(texts, found, strict=True):
        assert_near(torch.cat(parts)[..., : model.vocab_size], true_logits(module, text[None], model)[0])


def test_the_beginnings_of_texts_of_different_lengths_are_read_without_a_mask():
    cache = new_cache(MODELS["gpt2"], 2, 12)
    for starts, masked in (([0, 0], False), ([0, 3], True), ([3, 3], True)):
        cache.begin_step([0, 1], starts, [5, 3])
        assert (cache.visibility(0) is not None) == masked, starts


@pytest.mark.parametrize("worth", [attention_kernels.WORTH_A_ROW, -1], ids=["together", "row by row"])
def test_documents_of_a_text_do_not_see_each_other(grid, worth, monkeypatch):
    monkeypatch.setattr(attention_kernels, "WORTH_A_ROW", worth)
    model = small(reset_attention_mask=True)
    module, tokens = build(model, grid).eval(), random_tokens(model, batch=2, length=12)
    first = torch.zeros(2, 12, dtype=torch.int32)
    first[0, 5:], first[1, 3:] = 5, 3
    whole, _ = unpack(module(pack(tokens, Masking(first)), layers=slice(-1)))
    cache, done = new_cache(model, 2, 12), [0, 0]
    for sizes in ([7, 4], [1, 1], [1, 1]):
        pieces = [slice(start, start + size) for start, size in zip(done, sizes, strict=True)]
        inputs, starts = (
            pad_sequence([tensor[row, piece] for row, piece in enumerate(pieces)], batch_first=True)
            for tensor in (tokens, first)
        )
        cache.begin_step([0, 1], done, sizes, document_start=starts)
        found, _ = unpack(module(inputs, cache, slice(-1)))
        for row, (piece, size) in enumerate(zip(pieces, sizes, strict=True)):
            assert_near(found[row, :size], whole[row, piece])
        done = [start + size for start, size in zip(done, sizes, strict=True)]


@pytest.mark.parametrize("name", MODELS)
def test_a_slot_that_held_another_text_and_rows_without_tokens_change_nothing(grid, name):
    model = MODELS[name]
    module, cache = build(model, grid).eval(), new_cache(model, 3, 12, longest_step=4)
    read_in_steps(module, random_tokens(model, 3, 12, seed=1), cache, [4, 4, 4])
    text, slots = random_tokens(model, 1, 8)[0], [0, 1, 2]
    none = text[:0]
    parts = [read_rows(module, [none, text[i : i + 2], none], slots, [0, i, 0], cache)[1] for i in (0, 2, 4, 6)]
    assert_near(torch.cat(parts)[..., : model.vocab_size], true_logits(module, text[None], model)[0])


@pytest.mark.parametrize("name", MODELS)
def test_a_copied_beginning_continues_as_if_it_had_been_read(grid, name):
    model, shared = MODELS[name], 6
    module, cache = build(model, grid).eval(), new_cache(model, 3, LENGTH, longest_step=4)
    first = random_tokens(model, 1, 8)[0]
    for start in (0, 4):
        read_rows(module, [first[start : start + 4]], [2], [start], cache)
    assert cache.can_copy(2, shared)
    other = torch.cat((first[:shared], random_tokens(model, 1, 6, seed=9)[0]))
    cache.copy([2], [0], shared)
    parts = [read_rows(module, [other[i : i + 2]], [0], [i], cache)[0] for i in (6, 8, 10)]
    assert_near(torch.cat(parts)[..., : model.vocab_size], true_logits(module, other[None], model)[0, shared:])


def test_a_ring_that_has_lost_what_a_beginning_needs_is_not_copied():
    model = MODELS["narrow window"]
    cache = new_cache(model, 2, 64, longest_step=2)
    for end, kept in ((2, True), (6, True), (40, False)):
        cache.begin_step([0], [end - 2], [2])
        assert cache.can_copy(0, min(end, 5)) == kept
    cache.begin_step([0], [0], [0])  # a row without tokens is no other text
    assert not cache.can_copy(0, 5)
    cache.copy([0], [1], 38)
    cache.begin_step([0], [0], [2])  # another text
    assert cache.can_copy(0, 2)
    cache.begin_step([1], [38], [1])  # an end that is behind what the copied text had read
    assert cache.can_copy(1, 38) and not cache.can_copy(1, 37)


def test_slots_may_change_places():
    model = small()
    cache = new_cache(model, 3, 4)
    for slot in range(3):
        cache._keys[0][slot] = slot
    cache.copy([1, 2, 2], [0, 1, 2], 4)
    assert cache._keys[0][:, :, :4].mean((1, 2, 3)).tolist() == [1, 2, 2]


def test_tokens_that_do_not_fit_are_refused():
    cache = new_cache(small(), 1, 5, longest_step=4)
    cache.begin_step([0], [1], [4])
    with pytest.raises(ValueError, match="2 tokens up to position 6 do not fit: a step has at most 4, a slot 5"):
        cache.begin_step([0], [4], [2])
    with pytest.raises(ValueError, match="5 tokens up to position 5 do not fit"):
        cache.begin_step([0], [0], [5])


@pytest.mark.parametrize("name", ["gpt2", "neox"])
def test_more_tokens_than_positions_are_refused(grid, name):
    model = MODELS[name]
    module, tokens = build(model, grid).eval(), random_tokens(model, batch=1, length=LENGTH + 1)
    with pytest.raises(ValueError, match=r"17 tokens are more than max_position_embeddings \(16\)"):
        module(tokens)


def test_the_type_of_the_cache_may_be_bf16(grid):
    model = MODELS["llama"]
    module, tokens = build(model, grid).eval().to(torch.bfloat16), random_tokens(model, batch=2, length=8)
    cache = KVCache(model, 2, 8, model.num_kv_heads, torch.bfloat16, torch.device("cpu"))
    decoded = read_in_steps(module, tokens, cache, [4, 1, 1, 2])[..., : model.vocab_size]
    whole = true_logits(module, tokens, model)
    assert decoded.dtype == torch.bfloat16
    # bf16 keeps 8 bits: each of a dozen roundings on the way moves a logit by up to 1/256 of its parts
    assert (decoded - whole).abs().max() <= 0.05 * whole.abs().max()


def test_a_slot_takes_the_bytes_that_it_is_said_to_take():
    model = MODELS["gemma 2"]
    cache = new_cache(model, 3, 12, longest_step=2)
    held = sum(tensor.nbytes for tensor in (*cache._keys.values(), *cache._values.values()))
    size = bytes_of_slot(model, 12, model.num_kv_heads, torch.float32, 2, range(model.num_layers))
    assert held == 3 * size
    assert size < bytes_of_slot(model, 12, model.num_kv_heads, torch.float32, 12, range(model.num_layers))


def test_visibility_follows_order_and_window():
    keys = torch.tensor([[-1, 0, 1, 2]])
    positions = Positions(queries=torch.tensor([[0, 1, 2]]), keys=keys)
    assert positions.visible()[0, 0].int().tolist() == [[0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]]
    assert positions.visible(window=2)[0, 0].int().tolist() == [[0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]


@pytest.mark.parametrize("name", ["neox", *WINDOWS])
def test_fixed_steps_of_a_form_use_the_same_memory_with_their_own_values(grid, name):
    """What a CUDA graph needs. The rows grow from different positions, and a slot between them is empty."""
    model = MODELS[name]
    module, tokens = build(model, grid).eval(), random_tokens(model, batch=2, length=LENGTH)
    cache, found, addresses = new_cache(model, 3, LENGTH, longest_step=6), [], set()
    read_rows(module, [tokens[0, :5], tokens[1, :3]], [0, 2], [0, 0], cache)
    for step in range(6):
        starts, sizes = [5 + step, 0, 3 + step], [1, 0, 1]
        cache.begin_step([0, 1, 2], starts, sizes, fixed=True)
        before = cache.positions
        cache.visibility(0).visible()
        cache.begin_again()
        assert cache.positions is not before, "or layers would take what they kept of another pass"
        assert cache.visibility(0).masks == {}
        step_tokens = torch.stack([tokens[0, 5 + step], torch.tensor(0), tokens[1, 3 + step]]).unsqueeze(1)
        found.append(module(step_tokens, cache)[[0, 2], 0])
        addresses.add((cache.form, cache.positions.data_ptr()))
    assert len(addresses) == 1
    wanted = true_logits(module, tokens, model)
    for step, logits in enumerate(found):
        assert_near(logits[..., : model.vocab_size], wanted[[0, 1], [5 + step, 3 + step]])
