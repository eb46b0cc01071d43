"""Rules between keys of what a run does about spikes and corrupted weights."""

from collections.abc import Iterator

from megatron.config.rules.rule import Rule, rule
from megatron.config.schema.config import Config

RECOVERY_RULES: list[Rule] = []
# Steps after a step until all ranks go back because of it: its loss is read one step later, and voted on in the next.
STEPS_TO_AGREE = 2


@rule(RECOVERY_RULES, "on_loss_spike", "save", "checkpoint_factor", "extra_save_iters")
def _there_is_something_to_go_back_to(config: Config) -> Iterator[str]:
    keys = config.checkpoint
    if config.recovery.on_loss_spike != "rewind":
        return
    if keys.save is None:
        yield "on_loss_spike (rewind) goes back to a checkpoint, but save is not set; set save and checkpoint_factor"
    elif keys.checkpoint_factor is None and not keys.extra_save_iters:
        yield (
            "on_loss_spike (rewind) goes back to a checkpoint, but without checkpoint_factor the only one is that of "
            "the end; set checkpoint_factor"
        )


@rule(
    RECOVERY_RULES,
    "on_loss_spike",
    "loss_spike_patience",
    "keep_last_n_checkpoints",
    "checkpoint_factor",
    "checkpoint_scale",
)
def _checkpoints_outlive_a_spike(config: Config) -> Iterator[str]:
    """The checkpoints written during a spike must not push out the last one from before it."""
    keys, patience = config.checkpoint, config.recovery.loss_spike_patience
    kept, factor = keys.keep_last_n_checkpoints, keys.checkpoint_factor
    if config.recovery.on_loss_spike != "rewind" or kept is None or factor is None:
        return
    steps = patience + STEPS_TO_AGREE
    needed = 1 + (2 if keys.checkpoint_scale == "log" else -(-steps // factor))
    if kept < needed:
        yield (
            f"on_loss_spike (rewind) with loss_spike_patience ({patience}) and checkpoint_factor ({factor}) needs "
            f"keep_last_n_checkpoints of at least {needed}, not {kept}, or the checkpoint from before a spike is "
            "deleted during it; raise it"
        )


@rule(RECOVERY_RULES, "check_replicas_interval", "zero_optimization")
def _replicas_hold_weights(config: Config) -> Iterator[str]:
    interval, stage = config.recovery.check_replicas_interval, config.engine.zero_optimization.stage
    if interval is not None and stage == 3:
        yield (
            f"check_replicas_interval ({interval}) compares weights that several ranks hold, and with "
            "zero_optimization.stage 3 each element is held once; leave it out, or use stage 0 to 2"
        )
