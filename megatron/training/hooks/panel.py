"""Hook: the state of the run at the bottom of a terminal."""

from collections.abc import Callable, Mapping

import psutil
import torch

from megatron.checkpoint.state import TrainState
from megatron.terminal import Footer, footer
from megatron.training.hooks.base import NOTHING, FinishedStep, Hook, Run
from megatron.training.hooks.metrics_log import peak_name
from megatron.training.panel import Panel
from megatron.units import short_number


class PanelHook(Hook):
    """Tells the panel of each finished step."""

    def __init__(self, view: Panel, drawn: Footer) -> None:
        """Show `view` in the footer `drawn`."""
        self._view, self._footer = view, drawn
        drawn.show(view.lines)

    def after_step(self, step: FinishedStep) -> Mapping[str, float]:
        """Count the step, and take over what is recorded of it."""
        self._view.finished(step.state.step, step.metrics)
        return NOTHING

    def rewound(self, state: TrainState) -> None:
        """Go back to the step of `state`."""
        self._view.rewound(state.step)

    def close(self) -> None:
        """Leave the last panel on the screen."""
        self._footer.remove(self._view.lines, keep=True)


def memory_of(device: torch.device) -> Callable[[], str]:
    """A function that tells the memory in use: of this rank's device, or of this process on a CPU. It does not wait."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory

        def of_device() -> str:
            stats = torch.cuda.memory_stats(device)
            names = ("allocated_bytes.all.current", "allocated_bytes.all.peak", "reserved_bytes.all.current")
            used, peak, held = (short_number(float(stats[name]), "B") for name in names)
            return f"{used}  peak {peak}  held by torch {held} of {short_number(float(total), 'B')}"

        return of_device
    process, machine = psutil.Process(), float(psutil.virtual_memory().total)
    return lambda: f"{short_number(float(process.memory_info().rss), 'B')} of {short_number(machine, 'B')}, this rank"


def panel(run: Run) -> PanelHook | None:
    """Registry entry: where this process may draw on a terminal."""
    drawn = footer()
    if drawn is None:
        return None
    plan, device = run.plan, run.engine.grid.device
    view = Panel(
        run.first_step,
        run.last_step,
        run.liveness,
        memory_of(device),
        compiles=plan.engine.compile,
        on_gpu=device.type == "cuda",
        peak_name=peak_name(run),
    )
    run.events.listen(view.note)
    return PanelHook(view, drawn)
