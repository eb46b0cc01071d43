"""The text of tokens as they come: never taken back, joined the whole, and over at the first stop string."""

import json
from copy import copy
from random import Random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron.generation.stopping import WINDOW, TextStream
from megatron.tokenizer.base import Tokenizer
from megatron.tokenizer.build import build_tokenizer
from tests.many_tokenizers import llama, many_tokenizers

BYTE_FALLBACK = "llama with byte tokens"
WORDS = ["The", " quick", "東京", "🦊", "ß", " Ελλάδα", "\n", "  ", " dog", "again", ".", "\ufffd", "é"]


@pytest.fixture(scope="module")
def tokenizers_(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("streams")
    content = json.loads(llama().to_str())
    model, rare = content["model"], {*"東京🦊"}
    texts = [token for token in model["vocab"] if not rare & {*token}]
    tokens = [*texts, *(f"<0x{byte:02X}>" for byte in range(256))]
    model["vocab"] = {token: i for i, token in enumerate(tokens)}
    model["merges"] = [merge for merge in model["merges"] if not rare & {*"".join(merge)}]
    model["byte_fallback"] = True
    path = folder / "fallback.json"
    path.write_text(json.dumps(content))
    return many_tokenizers(folder) | {BYTE_FALLBACK: build_tokenizer("HFTokenizer", str(path))}


def until_stop(text: str, stops: list[str]) -> str:
    """What a reader who looks at one character after the other has read when a stop string is complete."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))]
    return text


def check(tokenizer: Tokenizer, prompt: list[int], ids: list[int], stops: list[str]) -> None:
    stream, text, count = TextStream(tokenizer, prompt, stops), "", 0
    for token in ids:
        text += stream.push(token)
        assert count <= stream.count
        count = stream.count
        if stream.stopped:
            break
    text += stream.finish()
    whole = tokenizer.decode_continuation(prompt, ids)
    assert text == until_stop(whole, stops)
    assert stream.stopped == any(stop in whole for stop in stops)
    if stream.stopped:  # the fewest tokens that have the text
        own = [tokenizer.decode_continuation(prompt, ids[:size]) for size in range(stream.count + 1)]
        assert count <= stream.count <= len(ids)
        assert own[-1].startswith(text)
        assert not text or not own[-2].rstrip("\ufffd").startswith(text)
    else:
        assert stream.count == len(ids)


some_text = st.lists(st.sampled_from(WORDS), max_size=30).map("".join)
some_stops = st.lists(
    st.sampled_from(["\n", "the", " dog", "dog", ". ", "京🦊", "é", "gain.", "aga", "ain"]), max_size=3
)


@settings(deadline=None, max_examples=40)
@given(some_text, some_text, some_stops)
@example("The quick", " brown fox", [])
@example("", "The quick", ["quick"])
def test_pieces_of_any_text_joined_are_its_continuation_up_to_the_first_stop_string(tokenizers_, prompt, text, stops):
    for tokenizer in tokenizers_.values():
        [before] = tokenizer.encode_openings([prompt])
        check(tokenizer, before, tokenizer.encode_parts([prompt, text])[1], stops)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(0, 40), st.integers(0, 90), some_stops)
def test_pieces_of_any_tokens_joined_are_their_continuation_even_where_they_are_no_text(
    tokenizers_, seed, before, length, stops
):
    for name, tokenizer in tokenizers_.items():
        if name != BYTE_FALLBACK:
            random = Random(seed)
            ids = [random.randrange(tokenizer.vocab_size) for _ in range(before + length)]
            check(tokenizer, ids[:before], ids[before:], stops)


def pieces(tokenizer: Tokenizer, prompt: str, ids: list[int], *stops: str) -> list[str]:
    stream = TextStream(tokenizer, tokenizer.encode(prompt), stops)
    return [*map(stream.push, ids), stream.finish()]


def test_the_bytes_of_a_character_are_held_back_until_it_is_complete_or_the_text_ends(tokenizers_):
    bytes_ = tokenizers_["bytes"]
    assert pieces(bytes_, "x", [*"aß東".encode(), 0xF0, 0x9F]) == ["a", "", "ß", "", "", "東", "", "", "\ufffd"]
    assert pieces(bytes_, "x", [0xC3, 65, 0xFF, 66]) == ["", "\ufffdA", "", "\ufffdB", ""]


def test_a_character_that_the_prompt_begins_is_shown_when_it_is_complete(tokenizers_):
    character = "東".encode()
    for begun in (1, 2):
        stream = TextStream(tokenizers_["bytes"], [65, *character[:begun]])
        assert [*map(stream.push, character[begun:]), stream.push(66)] == [*[""] * (2 - begun), "東", "B"]


def test_what_may_be_the_beginning_of_a_stop_string_is_held_back(tokenizers_):
    bytes_ = tokenizers_["bytes"]
    assert pieces(bytes_, "x", [*b"aENaENE"], "END", "EXIT") == ["a", "", "", "ENa", "", "", "EN", "E"]
    stream = TextStream(bytes_, [], ["END", "ND"])
    assert "".join(map(stream.push, b"aEND")) == "a"  # both are complete at once: the longer
    assert stream.stopped and stream.count == 1 and stream.finish() == ""


def test_byte_tokens_are_shown_before_their_row_ends_and_never_taken_back(tokenizers_):
    tokenizer = tokenizers_[BYTE_FALLBACK]
    character = tokenizer.encode_bare(["東"])[0][-3:]
    assert pieces(tokenizer, "The", character) == ["", "", "東", ""]
    broken = "".join(pieces(tokenizer, "The", [*character, character[-1], *tokenizer.encode_bare(["dog"])[0]]))
    assert broken.startswith("東\ufffd") and broken.endswith("dog")


def watched(tokenizer: Tokenizer) -> tuple[Tokenizer, list[int]]:
    """A tokenizer that notes how many ids it decodes at once."""
    noted, decode = [], tokenizer.decode
    tokenizer = copy(tokenizer)
    tokenizer.decode = lambda ids: noted.append(len(ids)) or decode(ids)
    return tokenizer, noted


def test_a_space_after_many_tokens_without_text_is_shown_as_in_the_middle_of_a_text(tokenizers_):
    tokenizer, noted = watched(tokenizers_["sentencepiece"])
    prompt, word = tokenizer.encode_parts(["The", " dog"])
    assert tokenizer.decode([tokenizer.end_of_document]) == ""
    stream = TextStream(tokenizer, prompt)
    assert "".join(map(stream.push, [tokenizer.end_of_document] * 40 + word)) == " dog"
    assert max(noted) <= 3 * WINDOW + 1


def test_the_cost_of_a_token_does_not_depend_on_the_length_of_prompt_and_text(tokenizers_):
    for tokenizer, noted in map(watched, tokenizers_.values()):
        [prompt] = tokenizer.encode_openings(["The quick brown fox jumps over the lazy dog, ß 東京 again. " * 9])
        stream = TextStream(tokenizer, prompt, ["never"])
        del noted[:]
        for token in prompt[1:]:
            stream.push(token)
        assert max(noted) <= 3 * WINDOW + 1
