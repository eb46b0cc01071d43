"""When a checkpoint is due, and which one is the best."""

import math
from pathlib import Path

import pytest
import torch

from megatron.checkpoint.folder import BEST, point_to, publish
from megatron.checkpoint.state import TrainState
from megatron.engine.training import StepOutput
from megatron.training.clock import Clock
from megatron.training.hooks.base import FinishedStep
from megatron.training.hooks.saving import SaveSteps, Saving, best_loss_in


@pytest.mark.parametrize(
    ("steps", "due"),
    [
        (SaveSteps(factor=4), [4, 8, 12, 16, 20]),
        (SaveSteps(factor=None), []),
        (SaveSteps(factor=2, logarithmic=True), [1, 2, 4, 8, 16]),
        (SaveSteps(factor=3, logarithmic=True), [1, 3, 9]),
        (SaveSteps(factor=1, logarithmic=True), [1]),
        (SaveSteps(factor=10, extra=frozenset({1, 3})), [1, 3, 10, 20]),
    ],
    ids=str,
)
def test_a_checkpoint_is_due_where_factor_scale_and_extra_steps_say(steps, due):
    assert [step for step in range(1, 21) if step in steps] == due


class Writer:
    """Takes down what it is asked to write."""

    asynchronous = False

    def __init__(self):
        self.saved: list[tuple[int, float | None, bool]] = []

    def save(self, state, validation_loss=None, is_best=False):
        self.saved.append((state.step, validation_loss, is_best))

    def agree(self, value):
        return value

    def finish(self):
        self.saved.append("waited")


def saved(losses: dict[int, float], best_loss: float | None, last: int = 9) -> list:
    """What is written in steps 1 to `last`, every fourth being due, with these losses of validation."""
    writer = Writer()
    hook = Saving(writer, SaveSteps(factor=4), Clock(torch.device("cpu")), best_loss=best_loss)
    for number in range(1, last + 1):
        metrics = {"validation/lm_loss": losses[number]} if number in losses else {}
        output = StepOutput(torch.tensor(1.0), torch.tensor(1.0))
        hook.after_step(FinishedStep(TrainState(number), output, 1e-3, number == last, metrics))
    hook.close()
    assert writer.saved.pop() == "waited"
    return [entry for entry in writer.saved if entry != "waited"]


def test_a_checkpoint_is_written_where_it_is_due_and_at_the_end_of_the_run():
    assert saved({2: 3.0}, None) == [(4, None, False), (8, None, False), (9, None, False)]
    assert saved({}, None, last=8) == [(4, None, False), (8, None, False)]


def test_the_best_is_written_whenever_validation_finds_a_lower_loss_than_ever():
    losses = {2: 3.0, 3: 3.0, 4: 2.0, 5: 2.5, 6: math.nan, 7: 1.0}
    due = [(2, 3.0, True), (4, 2.0, True), (7, 1.0, True), (8, None, False), (9, None, False)]
    assert saved(losses, math.inf) == due
    assert saved(losses, 1.5) == [(4, 2.0, False), *due[2:]], "1.5 is from an earlier part of the run"


def test_the_best_loss_of_an_earlier_part_of_the_run_is_known_while_its_checkpoint_is_whole(tmp_path: Path):
    assert best_loss_in(tmp_path) == math.inf
    for step, loss in ((5, 1.25), (10, 2.5), (15, None)):
        (tmp_path / "unfinished").mkdir()
        final = tmp_path / f"global_step{step}"
        publish(tmp_path / "unfinished", final, {"progress.json": {"validation_loss": loss}}, {})
    assert best_loss_in(tmp_path) == math.inf, "none was called the best"
    point_to(tmp_path / "global_step5", BEST)
    assert best_loss_in(tmp_path) == 1.25
    (tmp_path / "global_step5" / "progress.json").unlink()
    assert best_loss_in(tmp_path) == math.inf
