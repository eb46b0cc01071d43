"""The text of tokens as they are generated, and its end at the first stop string."""

from bisect import bisect_left
from collections.abc import Sequence

from megatron.text import common_length
from megatron.tokenizer.base import UNKNOWN_ID, Tokenizer

WINDOW = 8  # tokens that the text of the next one depends on: a character has at most 4, but some tokens have no text


class TextStream:
    """The text of a continuation in pieces, none of which is taken back.

    Joined they are `tokenizer.decode_continuation(prompt, ids)` up to the first stop string. What may still change is
    held back: the bytes of an unfinished character, and the beginning of a stop string. Of several stop strings that
    which is complete first counts, of those that end together the longest, wherever the borders of tokens are. The cost
    of a token does not depend on the length of the text, unless that goes on with bytes that are not UTF-8.

    One kind of text differs: byte tokens in a row that are not UTF-8, of which the ByteFallback decoder of `tokenizers`
    turns even the characters before the first wrong byte into U+FFFD. Here they have been shown.

    stopped: whether a stop string has come; no more tokens are pushed then.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop_strings: Sequence[str] = ()) -> None:
        """stop_strings: none is empty."""
        self._tokenizer, self._stop_strings = tokenizer, stop_strings
        self._longest = max(map(len, stop_strings), default=0)
        # The last tokens, and the first ones: a space is dropped where a text begins.
        document = list(tokenizer.document_of(prompt))
        self._window, self._before = self._shortened(document, tokenizer.decode(document))  # with the prompt's text
        self._taken = 0  # characters of the window's text that are the prompt's or have been taken
        self._held = ""  # taken, but perhaps the beginning of a stop string
        self._shown = 0
        self._lengths: list[int] = []  # characters taken when each token had come
        self._is_whole = False
        self.stopped = False

    @property
    def count(self) -> int:
        """How many tokens are sure to belong to the text: as many as it takes to have what is shown; at its end all.

        With a stop string, the tokens that have none of the text before it do not belong to the text.
        """
        if self._is_whole:
            return len(self._lengths)
        return bisect_left(self._lengths, self._shown) + 1 if self._shown else 0

    def push(self, token: int) -> str:
        """The text that can be shown now that `token` has come."""
        self._window.append(token)
        self._held += self._taken_from(text := self._tokenizer.decode(self._window), is_whole=False)
        self._lengths.append(self._shown + len(self._held))
        if len(self._window) > 3 * WINDOW:
            self._window, shorter = self._shortened(self._window, text)
            rest = self._before[self._taken :]
            self._taken += len(shorter) - len(text)
            self._before = shorter[: self._taken] + rest
        return self._show()

    def finish(self) -> str:
        """The rest of the text, as no more tokens come."""
        if self.stopped:
            return ""
        self._held += self._taken_from(self._tokenizer.decode(self._window), is_whole=True)
        if self._lengths:
            self._lengths[-1] = self._shown + len(self._held)
        text = self._show()
        if not self.stopped:
            text, self._held, self._is_whole = text + self._held, "", True
        return text

    def _taken_from(self, text: str, is_whole: bool) -> str:
        """What is new and certain in the window's text."""
        certain = text if is_whole else _certain(text)
        # the prompt may end within a character, which its first tokens complete or leave broken
        taken = max(self._taken, common_length(self._before, certain))
        self._taken = max(taken, len(certain))
        if self._taken > taken:
            self._before = ""
        return certain[taken:]

    def _shortened(self, window: list[int], text: str) -> tuple[list[int], str]:
        """The first and last tokens of a window, with their text; all where the end of the text would change."""
        if len(window) > 2 * WINDOW:
            shorter = [*window[:WINDOW], *window[-WINDOW:]]
            if (decoded := self._tokenizer.decode(shorter)).endswith(text[max(len(_certain(text)) - 1, 0) :]):
                return shorter, decoded
        return window, text

    def _show(self) -> str:
        """Take what can be shown from what is held."""
        found = [(self._held.find(stop) + len(stop), -len(stop)) for stop in self._stop_strings if stop in self._held]
        if found:
            end, length = min(found)
            text, self._held, self.stopped = self._held[: end + length], "", True
        else:
            place = len(self._held) - self._begun()
            text, self._held = self._held[:place], self._held[place:]
        self._shown += len(text)
        return text

    def _begun(self) -> int:
        """The number of last characters that may be the beginning of a stop string."""
        sizes = range(min(len(self._held), self._longest - 1), 0, -1)
        return next((size for size in sizes if any(s.startswith(self._held[-size:]) for s in self._stop_strings)), 0)


def _certain(text: str) -> str:
    """`text` without U+FFFD at its end, as which decoders show the bytes of an unfinished character."""
    return text.rstrip(UNKNOWN_ID)
