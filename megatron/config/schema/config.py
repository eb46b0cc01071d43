"""`Config`: the validated, frozen configuration, in groups.

Every key of the flat YAML is a field of one group (or `plugins`). For derived values see `resolve`.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from pydantic.fields import FieldInfo

from megatron.config.origin import Origin
from megatron.config.schema.data_keys import DataKeys
from megatron.config.schema.generation_keys import GenerationKeys
from megatron.config.schema.key_group import Group
from megatron.config.schema.model_keys import ModelKeys, ParallelismKeys
from megatron.config.schema.recovery_keys import RecoveryKeys
from megatron.config.schema.run_keys import (
    AlertKeys,
    CheckpointKeys,
    EvaluationKeys,
    LauncherKeys,
    LoggingKeys,
    ProfilingKeys,
    TokenizerKeys,
)
from megatron.config.schema.serving_keys import ServingKeys
from megatron.config.schema.training_keys import (
    BatchKeys,
    EngineKeys,
    OptimizerKeys,
    PrecisionKeys,
    TrainingKeys,
    TuningKeys,
)


class Config(Group):
    """The configuration of a run: written keys, and defaults for the others."""

    parallelism: ParallelismKeys
    model: ModelKeys
    optimizer: OptimizerKeys
    tuning: TuningKeys
    precision: PrecisionKeys
    engine: EngineKeys
    batch: BatchKeys
    tokenizer: TokenizerKeys
    data: DataKeys
    training: TrainingKeys
    checkpoint: CheckpointKeys
    recovery: RecoveryKeys
    logging: LoggingKeys
    alerts: AlertKeys
    profiling: ProfilingKeys
    generation: GenerationKeys
    serving: ServingKeys
    evaluation: EvaluationKeys
    launcher: LauncherKeys

    plugins: tuple[str, ...] = ()
    """Python modules whose DEEPY_REGISTRY adds names to the registry."""

    origin: Annotated[Origin | None, Field(repr=False)] = None
    """No key: the command and the files that the configuration was read from, for the record of a run."""

    @property
    def log_folder(self) -> str | None:
        """Folder of logs and metrics: log_dir, else logs in save, else None."""
        if self.logging.log_dir is None and self.checkpoint.save is not None:
            return str(Path(self.checkpoint.save) / "logs")
        return self.logging.log_dir

    def to_flat(self, with_defaults: bool = False) -> dict[str, Any]:
        """The flat keys, only written ones or all, as plain lists, dicts and numbers for JSON."""
        flat = {} if "plugins" not in self.model_fields_set else {"plugins": list(self.plugins)}
        for group in group_fields():
            flat |= getattr(self, group).model_dump(mode="json", exclude_unset=not with_defaults)
        return flat


@cache
def group_fields() -> dict[str, type[Group]]:
    """Names and classes of the groups of Config."""
    annotations = {name: field.annotation for name, field in Config.model_fields.items()}
    return {name: kind for name, kind in annotations.items() if isinstance(kind, type) and issubclass(kind, Group)}


@cache
def group_of_key() -> dict[str, str]:
    """The group that holds each flat key."""
    return {key: name for name, kind in group_fields().items() for key in kind.model_fields}


def fields_at(path: Sequence[str | int]) -> dict[str, FieldInfo]:
    """The keys of the nested group at `path`, such as ("optimizer", "params"); flat keys for (); {} for no group."""
    fields = {key: field for kind in group_fields().values() for key, field in kind.model_fields.items()}
    for part in path:
        annotation = fields[str(part)].annotation if str(part) in fields else None
        fields = dict(getattr(annotation, "model_fields", {}))
    return fields
