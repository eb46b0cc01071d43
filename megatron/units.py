"""Format numbers for people: 39.8k, 162M, 171 TFLOP/s, 1d 4h; perplexity of a loss."""

import math

PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))  # of units
COUNTS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))  # of tokens and parameters, which have no unit
SECONDS = ((86400, "d"), (3600, "h"), (60, "m"), (1, "s"))


def short_number(value: float, unit: str = "") -> str:
    """Three significant digits with a prefix: 2e9 -> "2.00B", (1.71e14, "FLOP/s") -> "171 TFLOP/s", (7, "") -> "7"."""
    if isinstance(value, int) and abs(value) < 1000:
        return f"{value} {unit}".rstrip()
    for factor, letter in PREFIXES if unit else COUNTS:
        if abs(value) >= 0.9995 * factor:
            return f"{_three_digits(value / factor)}{' ' if unit else ''}{letter}{unit}"
    return f"{_three_digits(value)} {unit}".rstrip()


def duration(seconds: float) -> str:
    """The two largest units of a time: 100800 -> "1d 4h", 75 -> "1m 15s", 0.4 -> "0s"."""
    rest = round(seconds)
    parts: list[str] = []
    for size, letter in SECONDS:
        amount, rest = divmod(rest, size)
        if amount or parts:
            parts.append(f"{amount}{letter}")
    return " ".join(part for part in parts[:2] if not part.startswith("0")) or "0s"


def perplexity(nats: float) -> float:
    """The exponential of a mean negative log likelihood; infinite where that is too large for a float."""
    return math.exp(nats) if nats < 700 else math.inf if nats == nats else math.nan


def _three_digits(value: float) -> str:
    digits = f"{value:#.3g}"
    return f"{value:.0f}" if "e" in digits else digits.rstrip(".")
