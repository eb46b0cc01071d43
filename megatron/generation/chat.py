"""Chats: the prompt that a chat template writes for messages, and where the model's answer ends."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron.config.schema.run_keys import TokenizerKeys
from megatron.errors import UserError
from megatron.preprocessing.record_formats import BadRecordError, Chat, chat_template
from megatron.text import well_formed
from megatron.tokenizer.base import Tokenizer

Message = Mapping[str, Any]  # role and content, as in OpenAI's API
ANSWER = "AN-ANSWER"  # stands for the model's answer where a template is asked what it writes after one


@dataclass(frozen=True)
class ChatFormat:
    """A chat template with the tokenizer that its text is for."""

    template: Chat
    tokenizer: Tokenizer

    def prompt(self, messages: Sequence[Message], answer_begun: bool = False) -> str:
        """The messages as text that the model's answer follows. Raises UserError with the template's reason.

        answer_begun: the last message is the beginning of the answer, so that the text ends with it.
        """
        if answer_begun:
            *before, last = messages
            messages = [*before, {**last, "content": f"{last['content']}{ANSWER} "}]
        try:
            written = well_formed(self.template.render(messages, ask=not answer_begun))
        except BadRecordError as error:
            raise UserError(str(error)) from error
        if not answer_begun:
            return written
        begun, _, after = written.rpartition(ANSWER)
        return begun if after.startswith(" ") else begun.rstrip()  # as the template does with the end of a message

    def encode(self, prompt: str) -> list[int]:
        """Ids of what `prompt` returned. A template writes special tokens itself, so the tokenizer adds none."""
        return self.tokenizer.encode_bare([prompt])[0]

    @cached_property
    def end_of_answer(self) -> tuple[tuple[str, ...], frozenset[int]]:
        """Stop strings and stop tokens: what the template writes after an answer, a token where the vocabulary has one.

        Empty where it writes white space or the end of the document. Raises UserError for a template that cannot write
        an answer.
        """
        question = {"role": "user", "content": "A question"}
        try:
            written = self.template.render([question, {"role": "assistant", "content": ANSWER}])
        except BadRecordError as error:
            raise UserError(str(error)) from error
        after = written.rpartition(ANSWER)[2].strip()
        tokens = [token for token in self.tokenizer.added_tokens if token and after.startswith(token)]
        ids = self.tokenizer.encode_bare([max(tokens, key=len)])[0] if tokens else []
        if len(ids) == 1:
            return (), frozenset(ids) - {self.tokenizer.end_of_document}
        return (after.splitlines()[0].rstrip(),) if after else (), frozenset()


def open_chat(keys: TokenizerKeys, tokenizer: Tokenizer) -> ChatFormat:
    """The chat format that the keys name; templates that write a date get today's.

    Raises UserError where there is no template, or it is broken.
    """
    file = Path(keys.chat_template) if keys.chat_template else None
    return ChatFormat(chat_template("messages", file, keys.vocab_file, date.today(), option="chat_template"), tokenizer)
