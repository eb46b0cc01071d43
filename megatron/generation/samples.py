"""Samples: the texts that a run generates, each with its number and the request that asks for it."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from megatron.checkpoint.folder import MANIFEST, file_hash
from megatron.config.schema.generation_keys import AnswerKeys
from megatron.config.schema.run_keys import TokenizerKeys
from megatron.errors import UserError
from megatron.generation.chat import ChatFormat, Message, open_chat
from megatron.generation.constraints import Constraints
from megatron.generation.prompts import Prompt, several_problems
from megatron.generation.requests import Beams, Constraint, Request, Sampling
from megatron.inference import FoundModel
from megatron.text_files import read_text
from megatron.tokenizer.base import Tokenizer


@dataclass(frozen=True)
class Sample:
    """A text to generate. prompt: the number of its prompt, from 0. number: among the texts of that prompt.

    context: the prompt as text, of a chat what the template wrote.
    """

    prompt: int
    number: int
    context: str
    request: Request

    def identity(self, model: str) -> str:
        """Equal for equal requests to equal models (`model_identity`)."""
        asked = asdict(self.request)
        asked["stop_tokens"] = sorted(self.request.stop_tokens)
        return hashlib.sha256(json.dumps([model, asked], sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class SampleMaker:
    """Makes requests of prompts. context: of the model, in tokens. keys: with the chat template, for chats only."""

    tokenizer: Tokenizer
    context: int
    seed: int
    keys: TokenizerKeys

    @cached_property
    def chat(self) -> ChatFormat:
        """The format of chats. Raises UserError where there is none."""
        return open_chat(self.keys, self.tokenizer)

    @cached_property
    def _constraints(self) -> Constraints:
        return Constraints(self.tokenizer)

    def samples(self, prompts: Sequence[Prompt]) -> list[Sample]:
        """The texts of all prompts, in order. Raises UserError, naming each prompt that cannot be continued."""
        if any(prompt.messages for prompt in prompts):
            _ = self.chat  # without a template there is one message, not one for each prompt
        samples: list[Sample] = []
        problems: list[str] = []
        for number, prompt in enumerate(prompts):
            try:
                samples += self.samples_of(prompt, number)
            except UserError as error:
                problems += [f"{prompt.place}: {problem}" for problem in error.problems]
        if problems:
            raise several_problems(problems)
        return samples

    def samples_of(self, prompt: Prompt, number: int) -> Iterator[Sample]:
        """The texts of one prompt. Without any text, the end of a document is the prompt: a new one begins after it.

        Raises UserError for a prompt that is longer than the context or that the vocabulary has no tokens for, and for
        settings with ids that it lacks or a constraint that cannot be used.
        """
        context, ids = self._encoded(prompt)
        if len(ids) > self.context:
            raise UserError(
                f"{len(ids)} tokens, but the model's context is {self.context} (max_position_embeddings): "
                f'"{context[:40]}..."'
            )
        if problems := list(self._unknown_ids(prompt.settings)):
            raise UserError(*problems)
        strings, tokens = self.chat.end_of_answer if prompt.messages else ((), frozenset())
        for sample in range(prompt.settings.num_samples):
            seed = f"{self.seed}/{number}" if prompt.seed is None else str(prompt.seed)
            asked = request(tuple(ids), prompt.settings, f"{seed}/{sample}", strings, tokens)
            if asked.constraint is not None:
                self._constraints.matcher(asked.constraint)
            yield Sample(number, sample, context, asked)

    def _encoded(self, prompt: Prompt) -> tuple[str, list[int]]:
        if prompt.messages:
            text = self.chat.prompt(prompt.messages)
            ids = self.chat.encode(text)
        else:
            text = prompt.text
            ids = self.tokenizer.encode_openings([text])[0]
        return text, ids or [self.tokenizer.end_of_document]

    def length(self, messages: Sequence[Message]) -> int:
        """The tokens of a chat as a prompt. Raises UserError for messages that the template rejects."""
        return len(self.chat.encode(self.chat.prompt(messages)))

    def _unknown_ids(self, settings: AnswerKeys) -> Iterator[str]:
        named = {"stop_token_ids": settings.stop_token_ids, "logit_bias": settings.logit_bias or ()}
        for name, ids in named.items():
            if wrong := [id for id in ids if id >= self.tokenizer.vocab_size]:
                yield f"{name} ({wrong[0]}) must be an id below {self.tokenizer.vocab_size}, the size of the vocabulary"


def request(
    ids: tuple[int, ...],
    settings: AnswerKeys,
    seed: str,
    stop_strings: tuple[str, ...] = (),
    stop_tokens: frozenset[int] = frozenset(),
) -> Request:
    """What the settings ask for; the stop strings and tokens are added to theirs. Raises UserError."""
    beams = Beams(settings.num_beams, settings.length_penalty, settings.early_stopping)
    return Request(
        ids=ids,
        maximum_tokens=settings.maximum_tokens,
        sampling=Sampling(
            repetition_penalty=settings.repetition_penalty,
            presence_penalty=settings.presence_penalty,
            frequency_penalty=settings.frequency_penalty,
            logit_bias=tuple(sorted((settings.logit_bias or {}).items())),
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            min_p=settings.min_p,
        ),
        seed=seed,
        minimum_tokens=settings.minimum_tokens,
        stop_strings=(*settings.stop, *stop_strings),
        stop_tokens=stop_tokens.union(settings.stop_token_ids),
        ignore_end=settings.ignore_end_of_document,
        alternatives=settings.logprobs,
        constraint=_constraint(settings),
        beams=beams if beams.count > 1 else None,
        keep_logits=settings.return_logits,
    )


def _constraint(settings: AnswerKeys) -> Constraint | None:
    if settings.regex is not None:
        return Constraint("regex", settings.regex)
    if settings.json_schema is None:
        return None
    if settings.json_schema.lstrip().startswith("{"):
        return Constraint("json_schema", settings.json_schema)
    return Constraint("json_schema", read_text(Path(settings.json_schema), "json_schema"))


def model_identity(found: FoundModel) -> str:
    """Equal for the same weights in the same types: the hash of a checkpoint's manifest, or a folder's files."""
    if found.published is None:
        weights = file_hash(found.checkpoint / MANIFEST)
    else:
        files = sorted(path for path in found.checkpoint.rglob("*") if path.is_file())
        facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        weights = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    return f"{weights} {found.plan.engine.precision} {found.quantization}"
