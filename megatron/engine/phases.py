"""The phases of a step, opened to whoever wants to time them.

Nothing is wrapped, and nothing costs anything, in a run that does not ask for it.
"""

from collections.abc import Callable
from typing import Any

Call = Callable[..., Any]
Timed = Callable[[str, Call], Call]  # (name of a phase, function) -> the same function, timed

# DeepSpeed's instructions to a stage. The sum of gradients over replicas is part of backward, as without a pipeline.
_OF_INSTRUCTION = {
    "ForwardPass": "forward",
    "BackwardPass": "backward",
    "ReduceGrads": "backward",
    "ReduceTiedGrads": "backward",
    "OptimizerStep": "optimizer",
    "SendActivation": "pipeline_exchange",
    "RecvActivation": "pipeline_exchange",
    "SendGrad": "pipeline_exchange",
    "RecvGrad": "pipeline_exchange",
}


def time_phases(engine: Any, pipelined: bool, timed: Timed) -> None:
    """Let the functions of `engine`, DeepSpeed's, pass through `timed`: forward, backward, optimizer.

    With a pipeline the loss is in its forward pass, and there is pipeline_exchange: sending, and waiting for others.
    """
    if pipelined:
        engine._INSTRUCTION_MAP = {
            kind: timed(_OF_INSTRUCTION[kind.__name__], function) if kind.__name__ in _OF_INSTRUCTION else function
            for kind, function in engine._INSTRUCTION_MAP.items()
        }
        return
    engine.forward = timed("forward", engine.forward)
    engine.backward = timed("backward", engine.backward)
    engine.step = timed("optimizer", engine.step)
