"""The number format that the keys precision, fp16 and bf16 select."""

from megatron.config.plan import Precision
from megatron.config.schema.training_keys import PrecisionKeys

NAMES: dict[str, Precision] = {"fp32": "fp32", "fp16": "fp16", "bfloat16": "bf16"}


def chosen_formats(keys: PrecisionKeys) -> dict[str, Precision]:
    """The format that each written key selects: {"precision (fp16)": "fp16"}."""
    chosen: dict[str, Precision] = {}
    if keys.precision is not None:
        chosen[f"precision ({keys.precision})"] = NAMES[keys.precision]
    if keys.fp16.enabled:
        chosen["fp16.enabled (true)"] = "fp16"
    if keys.bf16.enabled:
        chosen["bf16.enabled (true)"] = "bf16"
    return chosen


def excluded_formats(keys: PrecisionKeys) -> dict[str, Precision]:
    """The formats that keys set to false exclude: {"fp16.enabled (false)": "fp16"}."""
    excluded: dict[str, Precision] = {}
    if keys.fp16.enabled is False:
        excluded["fp16.enabled (false)"] = "fp16"
    if keys.bf16.enabled is False:
        excluded["bf16.enabled (false)"] = "bf16"
    return excluded


def resolve_precision(keys: PrecisionKeys) -> Precision:
    """The selected format; default fp32. The rules ensure that the keys agree."""
    return next(iter(chosen_formats(keys).values()), "fp32")
