"""Which number format the keys precision, fp16 and bf16 ask for together."""

from megatron.config.plan import Precision
from megatron.config.schema.training_keys import PrecisionKeys

NAMES: dict[str, Precision] = {"fp32": "fp32", "fp16": "fp16", "bfloat16": "bf16"}


def wanted(keys: PrecisionKeys) -> dict[str, Precision]:
    """What each key that was written asks for, by its text: {"precision (fp16)": "fp16"}."""
    wishes: dict[str, Precision] = {}
    if keys.precision is not None:
        wishes[f"precision ({keys.precision})"] = NAMES[keys.precision]
    if keys.fp16.enabled:
        wishes["fp16.enabled (true)"] = "fp16"
    if keys.bf16.enabled:
        wishes["bf16.enabled (true)"] = "bf16"
    return wishes


def refused(keys: PrecisionKeys) -> dict[str, Precision]:
    """What keys set to false exclude: {"fp16.enabled (false)": "fp16"}."""
    excluded: dict[str, Precision] = {}
    if keys.fp16.enabled is False:
        excluded["fp16.enabled (false)"] = "fp16"
    if keys.bf16.enabled is False:
        excluded["bf16.enabled (false)"] = "bf16"
    return excluded


def resolve_precision(keys: PrecisionKeys) -> Precision:
    """The format that was asked for; fp32 if none was. The rules have made sure that the keys agree."""
    return next(iter(wanted(keys).values()), "fp32")
