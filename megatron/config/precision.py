"""Which number format the keys precision, fp16 and bf16 ask for together. Floor 1."""

from megatron.config.plan import Precision
from megatron.config.training_keys import PrecisionKeys

NAMES: dict[str, Precision] = {"fp32": "fp32", "fp16": "fp16", "bfloat16": "bf16"}


def wanted(keys: PrecisionKeys) -> dict[str, Precision]:
    """What each key that was written asks for, by its text: {"precision (fp16)": "fp16"}."""
    wishes: dict[str, Precision] = {}
    if keys.precision is not None:
        wishes[f"precision ({keys.precision})"] = NAMES[keys.precision]
    for name in ("enabled", "fp16"):
        if getattr(keys.fp16, name) and keys.fp16.type != "bfloat16":
            wishes[f"fp16.{name} (true)"] = "fp16"
    if keys.fp16.type == "bfloat16" and keys.fp16.enabled is not False:
        wishes["fp16.type (bfloat16)"] = "bf16"
    for name in ("enabled", "bf16"):
        if getattr(keys.bf16, name):
            wishes[f"bf16.{name} (true)"] = "bf16"
    return wishes


def refused(keys: PrecisionKeys) -> dict[str, Precision]:
    """What keys set to false exclude: {"fp16.enabled (false)": "fp16"}."""
    groups: tuple[tuple[Precision, bool | None, bool | None], ...] = (
        ("fp16", keys.fp16.enabled, keys.fp16.fp16),
        ("bf16", keys.bf16.enabled, keys.bf16.bf16),
    )
    excluded: dict[str, Precision] = {}
    for name, enabled, same in groups:
        excluded |= {f"{name}.enabled (false)": name} if enabled is False else {}
        excluded |= {f"{name}.{name} (false)": name} if same is False else {}
    return excluded


def resolve_precision(keys: PrecisionKeys) -> Precision:
    """The format that was asked for; fp32 if none was. The rules have made sure that the keys agree."""
    return next(iter(wanted(keys).values()), "fp32")
