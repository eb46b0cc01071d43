"""Which losses are spikes, when a run goes back from one, and what it records."""

import math
import random

import pytest
import torch

from megatron.checkpoint.state import TrainState
from megatron.config.schema.recovery_keys import RecoveryKeys
from megatron.engine.training import StepOutput
from megatron.events import EventLog, read_events
from megatron.training.hooks.base import FinishedStep
from megatron.training.hooks.divergence import PATIENCE, Divergence
from megatron.training.hooks.spikes import LossSpikes
from megatron.training.spike_detector import SpikeDetector
from megatron.training.stopping import Spike

NOISE = random.Random(3)
USUAL = [2.0 + 0.1 * NOISE.gauss(0, 1) for _ in range(40)]


def test_a_loss_is_compared_with_median_and_deviation_which_outliers_do_not_move():
    detector = SpikeDetector(window=9, threshold=4.0)
    for loss in [1.0, 1.1, 0.9, 50.0]:
        assert detector.jump(99.0) is None, "half of the window is not there yet"
        detector.add(1, loss)
    detector.add(1, 1.2)
    # the median of 0.9, 1.0, 1.1, 1.2, 50 is 1.1, and that of their distances from it 0.1
    found = detector.jump(1.8)
    assert found is not None
    assert (found.median, found.deviation) == pytest.approx((1.1, 0.14826))
    assert found.distance == pytest.approx(0.7 / 0.14826)
    assert detector.jump(1.65) is None and detector.jump(1.65, goes_on=True) is not None
    assert detector.jump(1.35, goes_on=True) is None
    assert detector.jump(-9.0) is None, "a low loss is none"
    assert detector.jump(math.nan) is not None and detector.jump(math.inf) is not None


def test_losses_that_hardly_change_have_no_spikes_by_rounding():
    detector = SpikeDetector(window=8, threshold=6.0)
    for _ in range(8):
        detector.add(1, 2.0)
    assert detector.jump(2.0 + 1e-3) is None and detector.jump(2.1) is not None
    for _ in range(8):
        detector.add(1, 0.0)
    assert detector.jump(0.0) is None and detector.jump(0.1) is not None


def test_noise_has_no_spikes():
    detector = SpikeDetector(window=100, threshold=6.0)
    for _ in range(5000):
        loss = NOISE.gauss(3.0, 0.05)
        assert detector.jump(loss) is None
        detector.add(1, loss)


def judged(hook: LossSpikes, losses: list[float], skipped: int = 0, step: int = 0) -> list[Spike | None]:
    """What the hook asks for after each step that follows `step`."""
    asked = []
    state = TrainState(step, skipped_samples=((0, 0),) * skipped)
    for number, loss in enumerate(losses, 1):
        state = state.after_step(4, 32)
        output = StepOutput(torch.tensor(loss), torch.tensor(1.0))
        hook.after_step(FinishedStep(state, output, 1e-3, is_last=number == len(losses)))
        asked.append(hook.asked)
    return asked


def keys(**chosen) -> RecoveryKeys:
    return RecoveryKeys(loss_spike_window=20, on_loss_spike="rewind", **chosen)


def test_a_spike_is_over_when_the_loss_has_settled_and_only_then_the_run_goes_back(tmp_path):
    hook = LossSpikes(keys(), EventLog(tmp_path), lambda state: f"samples of step {state.step}")
    # one usual loss within a spike does not end it; the step after 46 is under way when the loss of 46 is judged
    losses = [*USUAL, 9.0, 8.0, 2.0, 7.0, 2.0, 2.0, 2.0, 9.0]
    assert judged(hook, losses) == [None] * 46 + [Spike(41, 44)] * 2
    (event,) = read_events(tmp_path)
    assert (event.kind, event.step, event.details["loss"]) == ("spike", 41, 9.0)
    for words in ("9 is ", " deviations above ", "last 20 losses", "threshold is 6", "samples of step 41"):
        assert words in event.text
    hook.rewound(TrainState(40))
    losses = [2.0, 9.0, 2.0, 2.0, 2.0, 2.0]
    assert judged(hook, losses, step=40) == [None] * 4 + [Spike(42, 42)] * 2, "the losses before stay known"


def test_after_a_rewind_losses_are_compared_with_those_before_the_checkpoint():
    """While a run learns much, those of the steps that are done again are far below."""
    falling = [4.0 - 0.02 * step + 0.01 * NOISE.gauss(0, 1) for step in range(100)]
    hook = LossSpikes(keys())
    assert judged(hook, [*falling, 9.0, 2.0, 2.0, 2.0])[-1] == Spike(101, 101)
    hook.rewound(TrainState(40))
    assert judged(hook, falling[40:], step=40) == [None] * 60
    assert judged(hook, [9.0, 2.0, 2.0, 2.0], step=100)[-1] == Spike(101, 101)


def test_a_run_that_goes_back_to_where_it_was_resumed_stays_watched():
    hook = LossSpikes(keys())
    assert judged(hook, [*USUAL, 9.0, 2.0, 2.0, 2.0])[-1] == Spike(41, 41)
    hook.rewound(TrainState(3))
    assert judged(hook, [9.0, 2.0, 2.0, 2.0], step=3)[-1] == Spike(4, 4)


@pytest.mark.parametrize(("norm", "limit"), [(math.inf, None), (9.0, 8.0), (9.0, math.inf), (9.0, None)])
def test_a_run_stays_where_the_updates_of_the_whole_spike_were_skipped(norm, limit):
    hook, state = LossSpikes(keys()), TrainState()
    norms = [1.0] * 40 + [norm] * 2 + [1.0] * 4
    for loss, norm_of_step in zip([*USUAL, 9.0, 9.0, 2.0, 2.0, 2.0, 2.0], norms, strict=True):
        state = state.after_step(4, 32)
        limits = None if limit is None else torch.tensor(limit)
        output = StepOutput(torch.tensor(loss), torch.tensor(norm_of_step), norm_limit=limits)
        hook.after_step(FinishedStep(state, output, 1e-3, is_last=False))
    was_skipped = norm > (limit or 1e9)
    assert hook.asked == (None if was_skipped else Spike(41, 42))


def test_a_spike_that_does_not_end_is_over_after_some_steps():
    hook = LossSpikes(keys(loss_spike_patience=5))
    assert judged(hook, [*USUAL, *[math.nan] * 9]) == [None] * 45 + [Spike(41, 45)] * 4


def test_with_infinite_losses_a_run_goes_back_before_it_counts_as_diverged():
    """The vote on going back is held in the step after `asked`, and acted on before the one after that."""
    spikes, divergence = LossSpikes(keys()), Divergence(PATIENCE)
    judged(spikes, USUAL)
    state, voted = TrainState(len(USUAL)), False
    for _ in range(20):
        voted = spikes.asked is not None
        state = state.after_step(4, 32)
        step = FinishedStep(state, StepOutput(torch.tensor(math.nan), torch.tensor(math.nan)), 1e-3, is_last=False)
        spikes.after_step(step)
        divergence.after_step(step)
        if voted:
            break
    assert voted
    spikes.rewound(state)
    divergence.rewound(state)
    for _ in range(PATIENCE - 1):
        divergence.after_step(step)


def test_the_number_of_rewinds_is_limited_and_told(tmp_path):
    hook = LossSpikes(keys(max_rewinds=2), EventLog(tmp_path))
    assert judged(hook, [*USUAL, 9.0, 2.0, 2.0, 2.0], skipped=2) == [None] * 44
    (event,) = read_events(tmp_path)
    assert "does not go back, as it has done so 2 times (max_rewinds)" in event.text


def test_warn_never_asks_and_takes_a_lasting_spike_for_the_new_level(tmp_path):
    hook = LossSpikes(RecoveryKeys(loss_spike_window=20), EventLog(tmp_path))
    assert judged(hook, [*USUAL, *[loss + 5 for loss in USUAL], 20.0, 7.0]) == [None] * 82
    assert [event.step for event in read_events(tmp_path)] == [41, 81]


def test_texts_are_kept_of_the_first_spikes_only():
    kept = []
    hook = LossSpikes(RecoveryKeys(loss_spike_window=20), None, lambda state: str(kept.append(state.step)))
    judged(hook, USUAL + 30 * [9.0, 2.0, 2.0, 2.0])
    assert len(kept) == 20


def test_a_state_tells_consumed_samples_from_those_it_was_trained_on():
    state = TrainState(10, 80, 640).leaving_out(120).after_step(8, 64)
    assert state == TrainState(11, 128, 704, ((80, 120),))
    assert state.trained_samples == 88
    stored = {"step": 11, "consumed_samples": 128, "consumed_tokens": 704, "skipped_samples": [[80, 120]]}
    assert TrainState.of(stored) == state
    del stored["skipped_samples"]  # of a checkpoint that an earlier version wrote
    assert TrainState.of(stored).skipped_samples == ()
