"""When a checkpoint is due."""

import pytest

from megatron.training.saving import SaveSteps


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
