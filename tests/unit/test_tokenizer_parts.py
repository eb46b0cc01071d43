"""Parts of a text and continuations: joined, they are the text, whatever tokenizer encodes them."""

import json
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors

from megatron.config.schema.generation_keys import AnswerKeys
from megatron.config.schema.run_keys import TokenizerKeys
from megatron.errors import UserError
from megatron.generation.prompts import Prompt
from megatron.generation.samples import SampleMaker
from megatron.generation.stopping import TextStream
from megatron.preprocessing.fast_encoding.checked import EncoderSettings
from megatron.tokenizer.base import END_OF_DOCUMENT, Tokenizer, UnknownTextError
from megatron.tokenizer.build import TokenizerSettings, build_tokenizer
from tests.many_tokenizers import llama, many_tokenizers

EXACT = ("metaspace first", "unigram", "llama", "byte-level", "tiktoken", "bytes", "sentencepiece as it is")


@pytest.fixture(scope="module")
def tokenizers_(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    return many_tokenizers(tmp_path_factory.mktemp("parts"))


@settings(deadline=None, max_examples=60)
@given(parts=st.lists(st.text(alphabet=[*"abg The,.\n東ß🦊"], max_size=8), min_size=1, max_size=4))
@example(parts=["Frage:", "ja"])
@example(parts=["Q\n", "ja", " the lazy", " dog", "s"])
@example(parts=["play", "ing  ", "  again"])
@example(parts=["", "a", "gain"])
def test_the_ids_of_parts_decode_joined_to_what_the_whole_text_decodes_to(
    tokenizers_: dict[str, Tokenizer], parts: list[str]
) -> None:
    text = "".join(parts)
    for name, tokenizer in tokenizers_.items():
        found = tokenizer.encode_parts(parts)
        decoded = tokenizer.decode([*chain(*found)])
        assert len(found) == len(parts), name
        assert decoded in (text, tokenizer.decode(tokenizer.encode_bare([text])[0])), name
        if name in EXACT and not text.startswith(" "):
            assert decoded == text, name


def test_a_part_keeps_the_ids_that_it_has_as_a_prompt(tokenizers_: dict[str, Tokenizer]) -> None:
    crossed = set()
    for name, tokenizer in tokenizers_.items():
        for parts in (["Frage: g", "et again"], ["The quick brow", "n fox"]):
            if name not in ("bert", "words", "sentencepiece with suffixes"):
                [asked], [whole] = tokenizer.encode_bare(parts[:1]), tokenizer.encode_bare(["".join(parts)])
                assert tokenizer.encode_parts(parts)[0] == asked, name
                crossed |= {name} if whole[: len(asked)] != asked else set()
    assert crossed >= {"metaspace first", "llama"}, "a token of the whole text crosses the border"


def test_parts_of_a_byte_level_tokenizer_are_encoded_each_as_a_text(tokenizers_: dict[str, Tokenizer]) -> None:
    parts = ["ag", "ain", "  ", "\n", "x"]
    for name in ("byte-level", "tiktoken", "bytes"):
        assert tokenizers_[name].parts_stand_alone
        assert tokenizers_[name].encode_parts(parts) == tokenizers_[name].encode_bare(parts)


def test_a_token_across_a_border_belongs_to_the_part_that_it_ends_in(tokenizers_: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers_["words"]
    whole = tokenizer.encode("brown fox")
    assert tokenizer.encode_parts(["bro", "wn fox"]) == [[], whole]
    assert tokenizer.encode_parts(["brown ", "fox"]) == [whole[:1], whole[1:]]


def test_the_encoder_of_a_chunk_gives_the_ids_of_the_tokenizer(tmp_path: Path) -> None:
    llama().save(str(tmp_path / "tokenizer.json"))
    make = TokenizerSettings("HFTokenizer", str(tmp_path / "tokenizer.json"))
    encoded = EncoderSettings(make)().encode_parts([["Frage:", "ja"], ["a", "b", "c"]])
    expected = [*make().encode_parts(["Frage:", "ja"]), *make().encode_parts(["a", "b", "c"])]
    assert encoded.ids.tolist() == [*chain(*expected)] and encoded.sizes.tolist() == [*map(len, expected)]


@settings(deadline=None, max_examples=40)
@given(text=st.text(alphabet=[*"abg The,.\n"], min_size=1, max_size=20), share=st.floats(0, 1))
def test_a_prompt_and_its_continuation_are_the_whole_text(
    tokenizers_: dict[str, Tokenizer], text: str, share: float
) -> None:
    for name in ("metaspace always", *EXACT):
        tokenizer = tokenizers_[name]
        [ids] = tokenizer.encode_openings([text])
        begun = len(tokenizer.affixes[0])
        cut = begun + int(share * (len(ids) - begun))
        before, after = ids[:cut], ids[cut:]
        whole = tokenizer.decode(ids[begun:])
        prompt = tokenizer.decode(before[begun:])
        if "\ufffd" not in prompt:  # in the middle of a character
            assert prompt + tokenizer.decode_continuation(before, after) == whole, name


def test_a_continuation_keeps_its_first_space_and_an_unconditional_text_gets_none(
    tokenizers_: dict[str, Tokenizer],
) -> None:
    for name in ("metaspace always", "llama", "sentencepiece", "unigram"):
        tokenizer = tokenizers_[name]
        prompt, whole = tokenizer.encode_openings(["lazy", "lazy dog"])
        assert whole[: len(prompt)] == prompt, name
        assert tokenizer.decode_continuation(prompt, whole[len(prompt) :]) == " dog", name
        before = tokenizer.affixes[0]
        assert tokenizer.decode_continuation(before, prompt[len(before) :]) == "lazy", name


def test_a_stop_string_that_begins_with_a_space_is_found_in_the_first_token(
    tokenizers_: dict[str, Tokenizer],
) -> None:
    tokenizer = tokenizers_["llama"]
    prompt, whole = tokenizer.encode_openings(["lazy", "lazy dog"])
    for ends, stopped in (((" dog",), True), (("lazy",), False)):  # the latter is in the prompt only
        stream = TextStream(tokenizer, prompt, ends)
        shown = [stream.push(token) for token in whole[len(prompt) :]]
        assert stream.stopped == stopped and "".join([*shown, stream.finish()]) == ("" if stopped else " dog")


def opened(texts: list[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Ids of prompts."""
    maker = SampleMaker(tokenizer, context=99, seed=0, keys=TokenizerKeys())
    prompts = [Prompt(f"prompt {number}", AnswerKeys(), text) for number, text in enumerate(texts, 1)]
    return [list(sample.request.ids) for sample in maker.samples(prompts)]


def spelled(folder: Path, post_processor: object, alphabet: str = "ACGT", **model: object) -> Tokenizer:
    """A tokenizer of single letters, END_OF_DOCUMENT (0) and <s> (1)."""
    tokens = [END_OF_DOCUMENT, "<s>", *alphabet]
    content = json.loads(Backend(models.WordLevel({token: i for i, token in enumerate(tokens)})).to_str())
    content["model"] |= model
    backend = Backend.from_str(json.dumps(content))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(tokens[:2])
    backend.post_processor = post_processor
    backend.save(str(folder / "spelled.json"))
    return build_tokenizer("HFTokenizer", str(folder / "spelled.json"))


SPECIAL = [(END_OF_DOCUMENT, 0), ("<s>", 1)]


@pytest.mark.parametrize(
    ("post_processor", "affixes"),
    [
        (processors.TemplateProcessing("<s> $A", special_tokens=SPECIAL), ((1,), ())),
        (processors.TemplateProcessing(f"<s> <s> $A {END_OF_DOCUMENT}", special_tokens=SPECIAL), ((1, 1), (0,))),
        (processors.BertProcessing((END_OF_DOCUMENT, 0), ("<s>", 1)), ((1,), (0,))),
        (processors.RobertaProcessing((END_OF_DOCUMENT, 0), ("<s>", 1)), ((1,), (0,))),
        (processors.ByteLevel(), ((), ())),
        (
            processors.Sequence(
                [processors.ByteLevel(), processors.TemplateProcessing("<s> $A", special_tokens=SPECIAL)]
            ),
            ((1,), ()),
        ),
    ],
)
@pytest.mark.parametrize("alphabet", ["ACGT", "中文", "1"])
def test_affixes_are_those_of_the_post_processor_whatever_letters_there_are(
    tmp_path: Path, post_processor: object, affixes: object, alphabet: str
) -> None:
    tokenizer = spelled(tmp_path, post_processor, alphabet)
    assert tokenizer.affixes == affixes
    before, after = tokenizer.affixes
    assert tokenizer.encode(alphabet) == [*before, *range(2, 2 + len(alphabet)), *after]
    assert opened([alphabet], tokenizer) == [[*before, *range(2, 2 + len(alphabet))]]


def test_a_template_that_repeats_the_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="puts each text 2 times into its output"):
        spelled(tmp_path, processors.TemplateProcessing("$A <s> $A", special_tokens=SPECIAL))


def test_a_letter_without_a_token_is_named_with_its_place(tmp_path: Path) -> None:
    tokenizer = spelled(tmp_path, processors.ByteLevel())
    with pytest.raises(UnknownTextError) as raised:
        tokenizer.encode_batch(["ACGT", "ACNGT"])
    assert 'neither a token for "N" (U+004E) nor an unknown token; the text has it at character 3: "ACNGT"' in str(
        raised.value
    )
    with pytest.raises(UserError) as several:
        opened(["A", "X", "ACY"], tokenizer)
    assert [problem.partition(": ")[0] for problem in several.value.problems] == ["prompt 2", "prompt 3"]


def test_a_unigram_model_without_an_unknown_token_names_the_letter(tmp_path: Path) -> None:
    backend = Backend(models.Unigram([(END_OF_DOCUMENT, 0.0), ("A", -1.0), ("C", -1.0), ("AC", -1.5)]))
    backend.save(str(tmp_path / "unigram.json"))
    tokenizer = build_tokenizer("HFTokenizer", str(tmp_path / "unigram.json"))
    assert tokenizer.encode("ACC") == [3, 2]
    with pytest.raises(UnknownTextError, match=r'"G" \(U\+0047\).* at character 4: "ACCG"'):
        tokenizer.encode("ACCG")
