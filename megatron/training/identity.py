"""Whether the run that resumes is the run that was saved: same tokenizer, data, seed and optimizer. Floor 6.

The model is compared in `megatron/inputs.py`. What may differ freely is not asked about: layout, precision, batch
size, schedule, where files are kept.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron import registry
from megatron.checkpoint.store import checkpoint_config
from megatron.config.data_keys import DataKeys
from megatron.config.groups import Config
from megatron.errors import UserError
from megatron.tokenizer.base import Tokenizer

IDENTITY = "identity.json"
# keys of data that change nothing about which tokens are trained on, and in which order
_FREE = {"num_workers", *(f"{part}_{what}" for part in ("valid", "test") for what in ("data_paths", "data_weights"))}
_FREE |= {"valid_label_data_paths", "test_label_data_paths"}


def identity_of(tokenizer: Tokenizer) -> dict[str, str]:
    """What a checkpoint says of its run besides the configuration."""
    return {"tokenizer": tokenizer.fingerprint}


def check_same_run(config: Config, tokenizer: Tokenizer, checkpoint: Path) -> None:
    """Compare the configuration with that of the run that wrote `checkpoint`.

    Raises UserError with every difference that `allow_changes` does not name; another optimizer is allowed where its
    state is not loaded, since the tensors of one may well have the names of another's.
    """
    written = checkpoint_config(checkpoint)
    differences = {
        "seed": _differing(config.training.model_dump(mode="json"), written, {"seed"}),
        "data": _differing(
            config.data.model_dump(mode="json") | {"seq_length": config.model.seq_length},
            written,
            (set(DataKeys.model_fields) - _FREE) | {"seq_length"},
        ),
        "tokenizer": _tokenizer_differs(tokenizer, checkpoint),
        "optimizer": _optimizer_differs(config.optimizer.optimizer.type, written),
    }
    allowed = {*config.checkpoint.allow_changes, *(["optimizer"] if config.checkpoint.no_load_optim else [])}
    refused = {kind: lines for kind, lines in differences.items() if lines and kind not in allowed}
    if refused:
        raise UserError(
            f"{checkpoint} was written by a run with another {' and another '.join(refused)}:",
            *(f"  {line}" for lines in refused.values() for line in lines),
            f"to go on from it all the same: {_way_out(refused)}; to take only its weights: finetune",
        )


def _way_out(refused: Iterable[str]) -> str:
    """The keys that allow what was refused."""
    named = [kind for kind in refused if kind != "optimizer"]
    ways = [f"allow_changes=[{', '.join(named)}]"] if named else []
    return " ".join([*ways, *(["no_load_optim=true"] if "optimizer" in refused else [])])


def _differing(here: dict[str, Any], there: dict[str, Any], keys: set[str]) -> list[str]:
    return [
        f"{key} is {here[key]} here, and was {there[key]} there"
        for key in sorted(keys)
        if key in there and here[key] != there[key]
    ]


def _tokenizer_differs(tokenizer: Tokenizer, checkpoint: Path) -> list[str]:
    path = checkpoint / IDENTITY
    written = json.loads(path.read_text()).get("tokenizer") if path.is_file() else None
    if written in (None, tokenizer.fingerprint):
        return []
    return [f"the tokenizer here is {tokenizer.describe()}, which makes other tokens than the one there"]


def _optimizer_differs(here: str, written: dict[str, Any]) -> list[str]:
    there = written.get("optimizer", {}).get("type", here)
    known = registry.TABLE["optimizer"]
    if here == there or known[here] == known.get(there):  # Adam is AdamW
        return []
    return [f"optimizer.type is {here} here, and was {there} there"]
