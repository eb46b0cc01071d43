"""Text that an answer must be: a grammar decides which tokens may come next. By llguidance, an extra."""

import json
import re
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from megatron.errors import UserError
from megatron.generation.requests import Constraint
from megatron.tokenizer.base import Tokenizer

COMPILED = 64  # constraints that are kept compiled
# Any number of blanks would be JSON as well, and models without much training write nothing else then.
BLANKS = {"whitespace_pattern": r"[ \n\r\t]{1,32}"}
# Tokens that spell a text in another way than the tokenizer are left to the model.
HEADER = '%llguidance {"no_forcing": true}\nstart: '


class Matcher:
    """How far the answer to one request has come in its grammar."""

    def __init__(self, state: Any, vocab_size: int) -> None:
        """state: an LLMatcher, not shared."""
        self._state, self._vocab_size = state, vocab_size

    def mask(self) -> Tensor:
        """The tokens that may come next: bool [v], on the host.

        The end of the document is one where the text may end, and the only one where the vocabulary has no token to go
        on with.
        """
        packed = torch.frombuffer(bytearray(self._state.compute_bitmask()), dtype=torch.uint8)
        return (packed[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).bool().flatten()[: self._vocab_size]

    def advance(self, token: int) -> None:
        """The answer has grown by a token of the mask."""
        self._state.consume_token(token)

    @property
    def finished(self) -> bool:
        """Whether nothing but the end of the document may follow, or it has come."""
        return bool(self._state.is_stopped())

    def copy(self) -> "Matcher":
        """Another one that has come as far."""
        return Matcher(self._state.deep_copy(), self._vocab_size)


class Constraints:
    """Compiles constraints for a tokenizer, each only once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._compiled = lru_cache(COMPILED)(self._compile)

    def matcher(self, constraint: Constraint) -> Matcher:
        """For a new answer. Raises UserError for a wrong constraint, or without llguidance."""
        return self._compiled(constraint).copy()

    def _compile(self, constraint: Constraint) -> Matcher:
        library, vocabulary = self._vocabulary
        name = {"json_schema": "JSON schema", "json": "JSON", "regex": "regular expression"}[constraint.kind]
        state = library.LLMatcher(vocabulary, HEADER + _grammar(constraint), log_level=0)
        if state.is_error():
            raise UserError(f"the {name} ({constraint.text}) cannot be used: {_reason(state.get_error())}")
        matcher = Matcher(state, self._tokenizer.vocab_size)
        matcher.mask()
        if state.is_error():
            raise UserError(
                f"no text of the {name} ({constraint.text}) can begin with a token of {self._tokenizer.describe()}"
            )
        return matcher

    @cached_property
    def _vocabulary(self) -> tuple[Any, Any]:
        """The library, and the tokens in its form; made at the first constraint, as it takes up to a second."""
        try:
            import llguidance
        except ImportError as error:
            raise UserError(
                'a constraint on answers needs llguidance: pip install "llguidance>=1.9", or -e ".[constrain]"'
            ) from error
        wrapped = llguidance.TokenizerWrapper(_Vocabulary(self._tokenizer))
        return llguidance, llguidance.LLTokenizer(wrapped, n_vocab=self._tokenizer.vocab_size)


class _Vocabulary:
    """What llguidance asks of a tokenizer."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eos_token_id = tokenizer.end_of_document
        self.tokens = tokenizer.token_bytes()
        self.special_token_ids = [tokenizer.end_of_document]

    def __call__(self, text: bytes) -> list[int]:
        """Its own ids of a text. Used only where tokens are forced."""
        return []


def _grammar(constraint: Constraint) -> str:
    """In llguidance's dialect of Lark. Raises UserError for a text that is no JSON object."""
    from llguidance import regex_to_lark

    if constraint.kind == "regex":
        return f"/{regex_to_lark(constraint.text, '')}/"
    try:
        schema = json.loads(constraint.text) if constraint.kind == "json_schema" else {"type": "object"}
    except ValueError as error:
        raise UserError(f"the JSON schema ({constraint.text}) is not JSON: {error}") from error
    if not isinstance(schema, dict):
        raise UserError(f"the JSON schema ({constraint.text}) is not an object")
    return "%json " + json.dumps({"x-guidance": BLANKS} | schema)


def _reason(message: str) -> str:
    """Llguidance's reason, without the place in our grammar around the text."""
    detail = re.search(r"^error: (.+)$", message, re.MULTILINE)
    return detail[1] if detail else re.sub(r"^at \d+\(\d+\): ", "", message.splitlines()[0])
