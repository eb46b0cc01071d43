"""The harness's interface of a language model: text in, likelihoods and continuations out.

Tokenization and truncation follow the harness's own `hf` model, so that the same weights get the same scores. The
engine computes the requests.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron.errors import UserError
from megatron.generation.chat import ChatFormat
from megatron.generation.engine import Engine
from megatron.generation.requests import Answer, Request, Sampling, Update
from megatron.progress import Progress
from megatron.text import well_formed
from megatron.tokenizer.base import Tokenizer, digest

Likelihood = tuple[float, bool]  # log-likelihood in nats, and whether greedy decoding gives the same tokens
Tokenized = tuple[Any, list[int], list[int]]  # the strings, the ids of the context, the ids of the continuation
MAXIMUM_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first that is given
UNDERSTOOD = {*MAXIMUM_TOKENS, "until", "do_sample", "temperature", "top_k", "top_p"}
HARMLESS = {"num_beams": 1}


class HarnessModel(TemplateLM):
    """A trained model for the harness, on the first rank."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        context: int,
        seed: int,
        open_engine: Callable[[], Engine],
        chat: ChatFormat | None = None,
    ) -> None:
        """context: tokens that the model sees at once.

        open_engine: starts the process group and loads the weights; called for the first request, when the tasks have
        been checked. chat: what questions are written with, if they are to be chats.
        """
        super().__init__()
        self._tokenizer, self._context, self._seed = tokenizer, context, seed
        self._open_engine, self._chat = open_engine, chat
        self.was_needed = False
        self._task_of: dict[Any, str] = {}  # by context and continuation, for messages
        self._prefix = tokenizer.affixes[0][0] if tokenizer.affixes[0] else tokenizer.end_of_document
        self._prefix_text = tokenizer.decode([self._prefix])

    @cached_property
    def engine(self) -> Engine:
        """What computes, on all ranks."""
        self.was_needed = True
        return self._open_engine()

    @property
    def is_open(self) -> bool:
        """Whether the process group is up and the weights are loaded; `was_needed`: whether that was tried."""
        return "engine" in self.__dict__

    @property
    def eot_token_id(self) -> int:
        """The end-of-document token."""
        return self._tokenizer.end_of_document

    @property
    def prefix_token_id(self) -> int:
        """The token before the first one of a text: the tokenizer's beginning of text, else the end of a document."""
        return self._prefix

    @property
    def max_length(self) -> int:
        """The most tokens the model sees at once."""
        return self._context

    @property
    def max_gen_toks(self) -> int:
        """The longest continuation of a task that sets none: the harness's number."""
        return 256

    @property
    def tokenizer_name(self) -> str:
        """For the harness's cache of requests, which depend on the chat template."""
        return digest(self._tokenizer.fingerprint, self._chat.template.template if self._chat else "")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The chat as text, up to where the model's answer begins, or within the last message if it is one to continue.

        Without the messages of the role "system" where the template rejects them. Raises UserError for others.
        """
        assert self._chat is not None
        try:
            return self._chat.prompt(chat_history, answer_begun=not add_generation_prompt)
        except UserError:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history):
                raise
            return self._chat.prompt(others, answer_begun=not add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids, with the tokenizer's prefix unless the text spells it or `add_special_tokens` is false; no suffix."""
        begins = bool(self._prefix_text) and string.startswith(self._prefix_text)
        if add_special_tokens is False or (add_special_tokens is None and begins):
            return self._tokenizer.encode_bare([well_formed(string)])[0]
        return self._tokenizer.encode_openings([string])[0]

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Likelihood]:
        """The likelihood of each continuation after its context, which is truncated on the left if it is too long."""
        self._task_of = {request.args: getattr(request, "task_name", "") for request in requests}
        found: list[Likelihood] = super().loglikelihood(requests, disable_tqdm or not sys.stderr.isatty())
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text, in windows of `max_length` tokens; an empty text has 0."""
        windows: list[Tokenized] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            pairs = get_rolling_token_windows(ids, self._prefix, max_seq_len=self._context, context_len=1)
            windows += [(None, *make_disjoint_window(pair)) for pair in pairs]
            owners += [owner] * (len(windows) - len(owners))
        totals = [0.0] * len(requests)
        for owner, (likelihood, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += likelihood
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """A continuation of each context, up to the first stop string of its task."""
        asked = [self._continuation(number, request) for number, request in enumerate(requests)]
        return [answer.text for answer in self._answers(asked, "generate_until", lambda request: -len(request.ids))]

    def _loglikelihood_tokens(self, requests: Sequence[Tokenized], **_: Any) -> list[Likelihood]:
        answers = self._answers([self._scored(request) for request in requests], "loglikelihood", _by_context)
        return [
            (sum(token.log_probability or 0.0 for token in answer.scored), all(token.greedy for token in answer.scored))
            for answer in answers
        ]

    def _answers(self, requests: Sequence[Request], what: str, key: Callable[[Request], Any]) -> list[Answer]:
        """The answers in order, computed in the order of `key`."""
        if not requests:
            return []
        order = sorted(range(len(requests)), key=lambda number: key(requests[number]))
        engine = self.engine
        with Progress(what, len(requests), "requests") as progress:

            def show(update: Update) -> None:
                progress.add(update.reason is not None)

            answers = engine.run([requests[number] for number in order], show)
        return [answer for _, answer in sorted(zip(order, answers, strict=True), key=lambda pair: pair[0])]

    def _scored(self, request: Tokenized) -> Request:
        """Context and continuation, truncated on the left to the model's context and the token that follows it."""
        strings, context, continuation = request
        task = f"eval_tasks: {self._task_of[strings]}" if strings in self._task_of else "eval_tasks"
        if not continuation:
            raise UserError(f"{task}: an answer without tokens cannot be scored: {str(strings)[-80:]}")
        if len(continuation) > self._context:
            raise UserError(
                f"{task}: an answer of {len(continuation)} tokens cannot be scored; the model's context is "
                f"{self._context} (max_position_embeddings): {str(strings)[-80:]}"
            )
        ids = tuple([*(context or [self._prefix]), *continuation][-self._context - 1 :])
        return Request(ids, maximum_tokens=0, score_from=len(ids) - len(continuation))

    def _continuation(self, number: int, request: Any) -> Request:
        """What a request of `generate_until` asks. Raises UserError for settings that are not supported."""
        text, options = request.args
        unknown = [key for key in options if key not in UNDERSTOOD and options[key] != HARMLESS.get(key)]
        tokens = next((int(options[key]) for key in MAXIMUM_TOKENS if key in options), self.max_gen_toks)
        if unknown:
            raise UserError(
                f"eval_tasks: {request.task_name} asks for {', '.join(unknown)} in its generation_kwargs, which is not "
                "supported"
            )
        if tokens >= self._context:
            raise UserError(
                f"eval_tasks: {request.task_name} wants up to {tokens} tokens (max_gen_toks), which leaves no room for "
                f"a prompt in the model's context of {self._context} (max_position_embeddings)"
            )
        until = options.get("until") or []
        ends = [until] if isinstance(until, str) else list(until)
        ends.append(self._tokenizer.decode([self.eot_token_id]))
        ids = self.tok_encode(text)[tokens - self._context :] or [self._prefix]
        return Request(
            tuple(ids),
            tokens,
            sampling(options),
            f"{self._seed}/{number}",
            stop_strings=tuple(dict.fromkeys(filter(None, ends))),
        )


def sampling(options: Mapping[str, Any]) -> Sampling:
    """Greedy by default; a temperature above 0 means sampling unless do_sample is false."""
    temperature = float(options.get("temperature") or 0.0)
    if not options.get("do_sample", temperature > 0):
        return Sampling()
    top_k, top_p = int(options.get("top_k") or 0), float(options.get("top_p") or 0.0)
    return Sampling(temperature=temperature, top_k=top_k, top_p=top_p)


def _by_context(request: Request) -> Any:
    """Long contexts first, and equal ones together, which are then read once."""
    context = request.ids[: request.score_from]
    return -len(context), context, -len(request.ids)
