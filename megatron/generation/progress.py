"""How far the generation of a run's texts is."""

from megatron.progress import Progress


class TextProgress(Progress):
    """Texts and tokens done, tokens per second, and the time that is left."""

    def __init__(self, done: int, total: int) -> None:
        """done: texts of `total` that an earlier run has generated."""
        super().__init__("generating", total, "texts", done)
        self._tokens = 0

    def generated(self, tokens: int, texts: int) -> None:
        """Tokens were generated, and texts were finished."""
        self._tokens += tokens
        self.note = f"{self._tokens / max(self.seconds, 1e-9):,.0f} tokens/s"
        self.add(texts)

    def summary(self) -> str:
        """What was generated, and how fast."""
        return (
            f"{self._done - self._first} texts, {self._tokens} tokens in {self.seconds:.1f} s "
            f"({self._tokens / self.seconds:.1f} tokens/s)"
        )
