"""Record what a run is started with, in its log folder (megatron/record/start.py has the format)."""

import logging
import os
import platform
import socket
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import megatron
from megatron.checkpoint.state import TrainState
from megatron.config.parameter_counts import parameter_count
from megatron.launch.nvml import find_gpus
from megatron.launch.protocol.environment import NAMES, PREFIXES
from megatron.record.secrets import environment_without_secrets
from megatron.record.start import Surroundings, write_start
from megatron.training.hooks.base import Run
from megatron.training.identity import identity_of

log = logging.getLogger(__name__)

CODE = Path(megatron.__file__).resolve().parent.parent
# of the variables that reach the ranks, those that decide how they compute
RECORDED = (*PREFIXES, *(name for name in NAMES if name not in ("PATH", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")))


def look_around(log_folder: str | None) -> Surroundings | None:
    """Begin to look up code and machine, on rank 0 of a run with a log folder."""
    is_first = os.environ.get("RANK", "0") == "0"
    return Surroundings.looked_up(CODE) if is_first and log_folder is not None else None


def record_start(
    run: Run, state: TrainState, checkpoint: Path | None, beginning: str, surroundings: Surroundings | None
) -> None:
    """Write the record on rank 0. Collective. A failure is a warning: a run does not end because of its record.

    checkpoint: that was loaded. beginning: the same for people. surroundings: of rank 0.
    """
    if run.config.log_folder is None:
        return
    hosts: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname(), group=run.engine.grid.host_group)
    if surroundings is None:
        return
    try:
        facts = _facts(run, state, checkpoint, beginning, list(dict.fromkeys(hosts)))
        write_start(Path(run.config.log_folder), run.config, surroundings, facts)
    except Exception as error:
        log.warning("the start is not recorded in %s: %s: %s", run.config.log_folder, type(error).__name__, error)


def _facts(run: Run, state: TrainState, checkpoint: Path | None, beginning: str, hosts: list[str]) -> dict[str, Any]:
    plan, tokenizer, device = run.plan, run.tokenizer, run.engine.grid.device
    layout, batch, identity = plan.layout, plan.batch, identity_of(run.tokenizer, run.config.data)
    on_gpu = device.type == "cuda"
    return {
        "step": state.step,
        "consumed_samples": state.consumed_samples,
        "consumed_tokens": state.consumed_tokens,
        "checkpoint": None if checkpoint is None else str(checkpoint.resolve()),
        "beginning": beginning,
        "python": sys.executable,
        "versions": _versions(on_gpu),
        "environment": environment_without_secrets(os.environ, RECORDED),
        "hosts": hosts,
        "layout": {
            "world_size": layout.world_size,
            "pipe": layout.pipe,
            "data": layout.data,
            "context": layout.context,
            "model": layout.tensor,
            "sequence_parallel": layout.sequence_parallel,
            "zero_stage": plan.engine.zero_stage,
        },
        "batch": asdict(batch) | {"tokens_per_step": batch.tokens_per_step},
        "precision": plan.engine.precision,
        "parameters": parameter_count(plan.model),
        "tokenizer": {"description": tokenizer.describe(), "fingerprint": tokenizer.fingerprint},
        "data": identity["data"],
        "hardware": {"threads": torch.get_num_threads(), "devices": _devices() if on_gpu else []},
    }


def _versions(on_gpu: bool) -> dict[str, str | None]:
    found = find_gpus() if on_gpu else None
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if on_gpu and torch.distributed.is_nccl_available() else None
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "nccl": nccl,
        "driver": (found.driver or None) if found else None,
    }


def _devices() -> list[dict[str, Any]]:
    """The cards that this process sees."""
    cards = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return [{"name": card.name, "memory_bytes": card.total_memory} for card in cards]
