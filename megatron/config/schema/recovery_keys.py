"""Keys of what a run does about loss spikes, bad updates, slow ranks and corrupted weights."""

from typing import Annotated, Literal

from pydantic import Field

from megatron.config.schema.key_group import Group, NotNegativeInt, PositiveFloat, PositiveInt, WholeNumber

WindowSize = Annotated[WholeNumber, Field(ge=16)]


class RecoveryKeys(Group):
    """Loss spikes, bad updates, slow ranks and corrupted weights (docs/outliving.md)."""

    on_loss_spike: Literal["ignore", "warn", "rewind"] = "warn"
    """What to do when the loss jumps up. warn: record the event spike, with the samples of the step and their text;
    rewind: also go back to the newest checkpoint from before the spike, leave out the samples from there to the end of
    the spike, and go on."""

    loss_spike_window: WindowSize = 100
    """Losses, of the last steps outside of spikes, whose median and deviation a loss is compared with. Nothing is a
    spike until half of them are there."""

    loss_spike_threshold: PositiveFloat = 6.0
    """A spike begins with a loss that is more than this many deviations above the median, and ends when two in a row
    are less than half of that above it. A deviation is 1.4826 times the median of the distances from the median, which
    is the standard deviation of normally distributed losses and hardly moved by outliers; at least a thousandth of the
    median."""

    loss_spike_patience: PositiveInt = 8
    """Steps after which a spike that has not ended counts as over: rewind goes back then, warn takes the losses as the
    new level. Above 8, a run whose gradients are not finite ends before it can go back."""

    max_rewinds: NotNegativeInt = 3
    """How often a run may go back, over all its restarts; later spikes are only reported."""

    skip_update: PositiveFloat | None = None
    """Skip an update whose gradient norm is more than this many deviations above the median of the last norms; a
    deviation is as in loss_spike_threshold, but at least a hundredth of the median. At most 5 in a row are skipped;
    then the norms count as the new level. Unset: only updates from gradients that are not finite are skipped."""

    skip_update_window: WindowSize = 100
    """Gradient norms that skip_update compares with, kept on the device and in checkpoints. Nothing is skipped until
    half of them are there."""

    watch_stragglers: bool = True
    """Compare the times of all ranks every log_interval steps (at least 10), and report a rank that is slow for three
    intervals in a row, with its node and the phase in which it is slow."""

    check_replicas_interval: PositiveInt | None = None
    """Steps between comparisons of the weights that several ranks hold, by checksum; they are also compared before each
    checkpoint that is due by its step. A difference ends the run before anything is saved. The host waits for the
    device in these steps. Unset: never compared."""
