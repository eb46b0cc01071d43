"""Check that a resumed run is the run that was saved: same tokenizer, data, seed and optimizer.

`megatron/resources.py` compares the model. Layout, precision, batch size, schedule, validation data and paths may
differ freely; `schedule_change.py` reports what that changes.
"""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron import registry
from megatron.checkpoint.folder import read_document
from megatron.checkpoint.store import checkpoint_config
from megatron.config.schema.config import Config
from megatron.config.schema.data_keys import DataKeys
from megatron.errors import UserError
from megatron.tokenizer.base import Tokenizer
from megatron.training.data_fingerprint import DATASET_KEYS, compare_fingerprints, fingerprints_of

log = logging.getLogger(__name__)

IDENTITY = "identity.json"
# data keys that affect neither the tokens that are trained on nor their order
_FREE = {"num_workers", *(f"{part}_{what}" for part in ("valid", "test") for what in ("data_paths", "data_weights"))}
_FREE |= {"valid_label_data_paths", "test_label_data_paths"}


def identity_of(tokenizer: Tokenizer, data: DataKeys) -> dict[str, Any]:
    """What identifies a run and is not in its configuration: contents of identity.json."""
    return {"tokenizer": tokenizer.fingerprint, "data": fingerprints_of(data)}


def check_same_run(config: Config, tokenizer: Tokenizer, checkpoint: Path) -> None:
    """Compare the configuration with that of the run that wrote `checkpoint`.

    Raises UserError with every difference that `allow_changes` does not name, and warns of those that it does. Another
    optimizer is allowed if its state is not loaded, since two optimizers may use the same names for their tensors.
    """
    written, identity = checkpoint_config(checkpoint), _identity(checkpoint)
    try:
        differences = {
            "seed": _differing(config.training.model_dump(mode="json"), written, {"seed"}),
            "data": _data_differ(config, written, identity),
            "tokenizer": _tokenizer_differs(tokenizer, identity),
            "optimizer": _optimizer_differs(config.optimizer.optimizer.type, written),
        }
    except (KeyError, TypeError, AttributeError) as error:  # of JSON that has been edited
        raise UserError(
            f"config.json and {IDENTITY} of {checkpoint} do not describe a run ({type(error).__name__}: {error}); "
            "to take only its weights: finetune"
        ) from error
    allowed = {*config.checkpoint.allow_changes, *(["optimizer"] if config.checkpoint.no_load_optim else [])}
    refused = {kind: lines for kind, lines in differences.items() if lines and kind not in allowed}
    for line in (line for kind in allowed for line in differences.get(kind, [])):
        log.warning("allowed: %s", line)
    if refused:
        raise UserError(
            f"{checkpoint} was written by a run with another {' and another '.join(refused)}:",
            *(f"  {line}" for lines in refused.values() for line in lines),
            f"to resume from it all the same: {_way_out(refused)}; to take only its weights: finetune",
        )


def _way_out(refused: Iterable[str]) -> str:
    """The overrides that allow what was refused."""
    named = [kind for kind in refused if kind != "optimizer"]
    ways = [f"allow_changes=[{', '.join(named)}]"] if named else []
    return " ".join([*ways, *(["no_load_optim=true"] if "optimizer" in refused else [])])


def _differing(here: dict[str, Any], there: dict[str, Any], keys: set[str]) -> list[str]:
    return [
        f"{key} is {here[key]} here, and was {there[key]} there"
        for key in sorted(keys)
        if key in there and here[key] != there[key]
    ]


def _identity(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / IDENTITY
    return read_document(path) if path.is_file() else {}


def _data_differ(config: Config, written: dict[str, Any], identity: dict[str, Any]) -> list[str]:
    """Compare datasets by their fingerprints, or by path where the checkpoint has none."""
    keys = (set(DataKeys.model_fields) - _FREE) | {"seq_length"}
    found: list[str] = []
    if "data" in identity:
        keys -= set(DATASET_KEYS)
        found, moved = compare_fingerprints(fingerprints_of(config.data), identity["data"])
        for line in moved:
            log.info("%s", line)
    here = config.data.model_dump(mode="json") | {"seq_length": config.model.seq_length}
    return _differing(here, written, keys) + found


def _tokenizer_differs(tokenizer: Tokenizer, identity: dict[str, Any]) -> list[str]:
    if identity.get("tokenizer") in (None, tokenizer.fingerprint):
        return []
    return [f"the tokenizer here is {tokenizer.describe()}, which makes other tokens than the one there"]


def _optimizer_differs(here: str, written: dict[str, Any]) -> list[str]:
    there = written.get("optimizer", {}).get("type", here)
    known = registry.TABLE["optimizer"]
    if here == there or known[here] == known.get(there):  # Adam is AdamW
        return []
    return [f"optimizer.type is {here} here, and was {there} there"]
