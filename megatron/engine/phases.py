"""The phases of a training step, and how to time them. Without timing, no function is wrapped."""

from collections.abc import Callable
from typing import Any

from megatron.engine.deepspeed_internals import wrap_instructions

Call = Callable[..., Any]
Timed = Callable[[str, Call], Call]  # (name of a phase, function) -> the same function, timed

DATA_WAIT = "data_wait"
FORWARD = "forward"
BACKWARD = "backward"
OPTIMIZER = "optimizer"
PIPELINE_EXCHANGE = "pipeline_exchange"
PHASES = (DATA_WAIT, FORWARD, BACKWARD, OPTIMIZER, PIPELINE_EXCHANGE)  # in the order of a step

# DeepSpeed's pipeline instructions. Averaging gradients over replicas is part of backward, as without a pipeline.
_OF_INSTRUCTION = {
    "ForwardPass": FORWARD,
    "BackwardPass": BACKWARD,
    "ReduceGrads": BACKWARD,
    "ReduceTiedGrads": BACKWARD,
    "OptimizerStep": OPTIMIZER,
    "SendActivation": PIPELINE_EXCHANGE,
    "RecvActivation": PIPELINE_EXCHANGE,
    "SendGrad": PIPELINE_EXCHANGE,
    "RecvGrad": PIPELINE_EXCHANGE,
}


def time_phases(engine: Any, pipelined: bool, timed: Timed) -> None:
    """Wrap the functions of DeepSpeed's `engine` in `timed`: forward, backward, optimizer.

    Forward includes the loss. With a pipeline, pipeline_exchange is sending to and waiting for other stages.
    """
    if pipelined:

        def wrap(instruction: str, function: Call) -> Call:
            phase = _OF_INSTRUCTION.get(instruction)
            return function if phase is None else timed(phase, function)

        wrap_instructions(engine, wrap)
        return
    engine.forward = timed(FORWARD, engine.forward)
    engine.backward = timed(BACKWARD, engine.backward)
    engine.step = timed(OPTIMIZER, engine.step)
