"""Versions, the cards, and the kernels that would be chosen here for each kind of attention."""

import os
import platform
import sys
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from contenders import plan_of

from bench.gpu_steps.common import DEVICE, ON_CARD, keys_of, record
from megatron import registry
from megatron.errors import UserError
from megatron.estimate.describe import plan_lines
from megatron.launch.accelerators import cores, visible_gpus
from megatron.launch.gpu_checks import check_gpus
from megatron.launch.protocol.environment import environment_line, rank_environment
from megatron.model.attention import describe_attention

PACKAGES = (
    "torch", "deepspeed", "triton", "transformers", "flash-attn", "flash-attn-3",
    "nvidia-ml-py", "numpy", "pydantic",
)  # fmt: skip


def main() -> None:
    """Print three tables."""
    found = {name: _version(name) for name in PACKAGES}
    found |= {"python": sys.version.split()[0], "kernel": platform.release(), "CUDA of torch": str(torch.version.cuda)}
    if ON_CARD:
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        found |= {"driver": _driver(), "cuDNN": str(torch.backends.cudnn.version()), "NCCL": nccl}
    print("| | version |\n|---|---|")
    for name, value in found.items():
        print(f"| {name} | {value} |")
    record(**found)
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        memory, processors = round(card.total_memory / 2**30, 1), card.multi_processor_count
        print(
            f"\nGPU {index}: {card.name}, compute capability {card.major}.{card.minor}, {memory} GiB, {processors} SMs"
        )
        record(gpu=index, name=card.name, capability=f"{card.major}.{card.minor}", gib=memory, processors=processors)
    print("\nWhat is checked before ranks start: " + "; ".join(checked()))
    plan = plan_of(keys_of("neox-350M", quick=False))
    print("\nWhat a run of 350M would log at its start:\n\n```")
    print(environment_line(rank_environment(os.environ, DEVICE.type, cores())))
    print("\n".join(plan_lines(plan)))
    for kind in registry.names("attention_backend"):
        model = replace(plan.model, attention_kinds=(kind,) * plan.model.num_layers, sliding_window=1024)
        print("\n".join(describe_attention(model, DEVICE, torch.bfloat16)))
    apart = replace(plan.model, reset_attention_mask=True)
    print("documents kept apart: " + "\n".join(describe_attention(apart, DEVICE, torch.bfloat16)))
    print("```")


def checked() -> list[str]:
    """What `deepy.py` would say of the GPUs of this machine."""
    try:
        return check_gpus(os.environ, None, visible_gpus(os.environ), most_in_use=0.1) or ["nothing is in the way"]
    except UserError as error:
        return list(error.problems)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def _driver() -> str:
    """The driver's version, as its kernel module states it."""
    try:
        return Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0]
    except OSError:
        return "unknown"


if __name__ == "__main__":
    main()
