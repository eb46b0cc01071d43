"""Answers that follow a grammar, chosen from random logits."""

import json
import re
import sys

import jsonschema
import pytest
import torch

from megatron.errors import UserError
from megatron.generation.constraints import Constraints
from megatron.generation.requests import Constraint, Request, Sampling
from megatron.generation.sampling import Chooser, Row
from megatron.tokenizer.base import Tokenizer
from megatron.tokenizer.build import build_tokenizer
from tests.many_tokenizers import many_tokenizers

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "kind": {"enum": ["a dog", "a fox", None]},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": -9, "maximum": 120}, "maxItems": 3},
        "lazy": {"type": "boolean"},
    },
    "required": ["name", "sizes"],
    "additionalProperties": False,
}
PERSON = Constraint("json_schema", json.dumps(SCHEMA))
DATE = Constraint("regex", r"(quick|lazy|東京)? ?[0-9]{4}-[0-9]{2}(/[a-f]+)?!")
NOT_CONSTRAINED = ("bert", "words")  # their tokens are words with a space before them


@pytest.fixture(scope="module")
def tokenizers_(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    found = many_tokenizers(tmp_path_factory.mktemp("constraints"))
    return {name: tokenizer for name, tokenizer in found.items() if name not in NOT_CONSTRAINED}


def answer(tokenizer: Tokenizer, request: Request, steps: int = 400) -> tuple[list[int], str, bool]:
    """Ids chosen from random logits, their text, and whether the document has ended."""
    row = Row(request, Constraints(tokenizer).matcher(request.constraint))
    chooser = Chooser(tokenizer.vocab_size, tokenizer.end_of_document)
    generator = torch.Generator().manual_seed(int(request.seed or 0))
    ended = False
    while not ended and not row.finished and len(row.generated) < steps:
        logits = torch.randn(1, tokenizer.vocab_size + 3, generator=generator)
        row.append(chooser.choose(logits, [row])[0].id)
        ended = row.ids[-1] == tokenizer.end_of_document
    ids = row.generated[:-1] if ended else row.generated
    return ids, tokenizer.decode_continuation(request.ids, ids), ended or row.finished


def bytes_() -> Tokenizer:
    return build_tokenizer("CharLevelTokenizer")


def request_of(tokenizer: Tokenizer, constraint: Constraint, seed: int, temperature: float = 1.0, **more) -> Request:
    ids = tuple(tokenizer.encode_openings(["The"])[0])
    return Request(ids, 400, Sampling(temperature=temperature), str(seed), constraint=constraint, **more)


def test_the_bytes_of_tokens_joined_are_the_text_that_they_decode_to(tokenizers_):
    for name, tokenizer in tokenizers_.items():
        spelled = tokenizer.token_bytes()
        assert len(spelled) == tokenizer.vocab_size
        assert spelled[tokenizer.end_of_document] == b""
        for text in (" quick brown fox", "ß", " 東京, Ελλάδα", "{1}\n  again"):
            before, ids = tokenizer.encode_parts(["The", text])
            joined = b"".join(spelled[token] for token in ids).decode()
            assert joined == tokenizer.decode_continuation(before, ids), name


def test_an_answer_to_a_schema_is_json_that_the_schema_validates(tokenizers_):
    for name, tokenizer in tokenizers_.items():
        for seed in range(2):
            _, text, ended = answer(tokenizer, request_of(tokenizer, PERSON, seed))
            assert ended, name
            jsonschema.validate(json.loads(text), SCHEMA)


def test_an_answer_to_an_expression_is_matched_by_it_as_a_whole(tokenizers_):
    for name, tokenizer in tokenizers_.items():
        found = set()
        for seed in range(6):
            _, text, ended = answer(tokenizer, request_of(tokenizer, DATE, seed, temperature=seed % 2))
            assert ended and re.fullmatch(DATE.text, text), name
            found.add(text)
        assert len(found) > 3


def test_json_is_any_object(tokenizers_):
    tokenizer = tokenizers_["bytes"]
    row = Row(request_of(tokenizer, Constraint("json"), 0), Constraints(tokenizer).matcher(Constraint("json")))
    for token in b'{"a": [1, {}], "b":null}':
        assert row.mask([])[token]
        row.append(token)
    assert row.finished
    assert row.mask([]).nonzero().flatten().tolist() == [tokenizer.end_of_document]


def test_blanks_in_json_end():
    tokenizer = bytes_()
    matcher = Constraints(tokenizer).matcher(Constraint("json"))
    matcher.advance(ord("{"))
    count = 0
    while matcher.mask()[ord(" ")] and count < 100:
        matcher.advance(ord(" "))
        count += 1
    assert 0 < count < 100


def test_the_document_may_end_exactly_where_the_grammar_may():
    tokenizer = bytes_()
    matcher = Constraints(tokenizer).matcher(Constraint("regex", "ab?c?"))
    allowed = []
    for token in b"abc":
        allowed.append(bool(matcher.mask()[tokenizer.end_of_document]))
        assert not matcher.finished
        matcher.advance(token)
    assert allowed == [False, True, True]
    assert matcher.finished


def test_an_empty_text_can_be_asked_for():
    assert Constraints(bytes_()).matcher(Constraint("regex", "")).mask().nonzero().tolist() == [[256]]


def test_a_copy_goes_on_by_itself():
    matcher = Constraints(bytes_()).matcher(Constraint("regex", "ab"))
    other = matcher.copy()
    other.advance(ord("a"))
    assert matcher.mask()[ord("a")] and other.mask()[ord("b")]


def test_minimum_tokens_hold_back_the_end_until_nothing_else_is_left():
    tokenizer = bytes_()
    constraint = Constraint("regex", "a{1,3}")
    for minimum, expected in ((0, 1), (2, 2), (9, 3)):
        row = Row(
            Request((1,), 9, constraint=constraint, minimum_tokens=minimum), Constraints(tokenizer).matcher(constraint)
        )
        chooser, logits = Chooser(257, 256), torch.zeros(1, 257)
        logits[0, 256] = 9.0
        while not row.finished and row.ids[-1] != 256:
            row.append(chooser.choose(logits, [row])[0].id)
        assert row.generated.count(ord("a")) == expected


def test_where_a_constraint_has_only_the_end_it_comes_in_spite_of_minimum_tokens():
    constraint = Constraint("regex", "")
    request = Request((1,), 9, constraint=constraint, minimum_tokens=3)
    row = Row(request, Constraints(bytes_()).matcher(constraint))
    assert Chooser(257, 256).choose(torch.zeros(1, 257), [row])[0].id == 256


def test_a_text_ends_where_the_vocabulary_has_no_token_for_the_rest(tokenizers_):
    tokenizer = tokenizers_["metaspace never"]
    request = request_of(tokenizer, Constraint("regex", "dog\u4e00"), 0)
    _, text, ended = answer(tokenizer, request)
    assert ended and text == "dog"


def test_constraints_in_a_batch_leave_the_other_rows_alone():
    tokenizer = bytes_()
    constraints = Constraints(tokenizer)
    logits = torch.randn(4, 257, generator=torch.Generator().manual_seed(0))
    rows = [
        Row(Request((1,), 9, constraint=constraint), constraint and constraints.matcher(constraint))
        for constraint in (None, Constraint("regex", "[xyz]"), None, Constraint("regex", "[0-9]"))
    ]
    chosen = [token.id for token in Chooser(257, 256).choose(logits, rows)]
    assert [chosen[0], chosen[2]] == logits[[0, 2]].argmax(dim=1).tolist()
    assert chr(chosen[1]) in "xyz" and chr(chosen[3]) in "0123456789"


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        ("regex", "a(b", "unclosed group"),
        ("regex", "(?=a)b", "look-around"),
        ("json_schema", '{"type": ', "is not JSON"),
        ("json_schema", "[1]", "is not an object"),
        ("json_schema", '{"type": "wrong"}', "Invalid type: wrong"),
        ("json_schema", '{"not": {"type": "string"}}', 'Unimplemented keys: ["not"]'),
        ("json_schema", '{"type": "string", "pattern": "(a"}', "unclosed group"),
    ],
)
def test_a_wrong_constraint_is_refused_with_the_reason(kind, text, reason):
    with pytest.raises(UserError) as caught:
        Constraints(bytes_()).matcher(Constraint(kind, text))
    assert reason in str(caught.value) and text in str(caught.value)
    assert "llguidance" not in str(caught.value) and "\n" not in str(caught.value)


def test_an_expression_that_no_token_begins_is_refused(tokenizers_):
    with pytest.raises(UserError, match="can begin with a token of HFTokenizer"):
        Constraints(tokenizers_["metaspace never"]).matcher(Constraint("regex", "\u4e00+"))


def test_without_the_library_the_command_to_install_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UserError, match=r"pip install .*constrain"):
        Constraints(bytes_()).matcher(Constraint("json"))
