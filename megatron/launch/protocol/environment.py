"""Which environment variables reach the ranks, and what deepy.py adds to them.

Values are passed in a file that only its owner may read, never on a command line, where `ps` shows them.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron.errors import UserError
from megatron.files import is_file
from megatron.text_files import read_text

# Variables that decide how ranks compute, connect and report. HOME, CUDA_VISIBLE_DEVICES and the like stay those of
# each machine.
PREFIXES = (
    *("NCCL_", "GLOO_", "UCX_", "FI_", "OMP_", "MKL_", "KMP_", "DS_", "TORCH_", "TORCHINDUCTOR_", "TRITON_"),
    *("PYTORCH_", "CUDA_LAUNCH_BLOCKING", "CUDA_DEVICE_MAX_CONNECTIONS", "CUBLAS_", "WANDB_", "HF_", "TOKENIZERS_"),
    "PYTHON",
)
NAMES = ("PATH", "LD_LIBRARY_PATH", "LD_PRELOAD", "GLIBC_TUNABLES", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
DEEPSPEED_FILE = ".deepspeed_env"
# Of a rank on the CPU, whose tensors come from malloc. Mapping fresh pages is slow: keep freed memory, and use huge
# pages. One arena only, because glibc's further arenas (one per thread) map large blocks anew each time. Not for a rank
# on a GPU: its tensors come from torch's own allocator, while the threads of the backward pass, of pinned memory and of
# NCCL, and the processes that compile kernels, would share one lock and keep the host memory of a loaded checkpoint.
ALLOCATOR = ":".join(
    f"glibc.malloc.{setting}"
    for setting in ("arena_max=1", "hugetlb=1", "mmap_threshold=17179869184", "trim_threshold=17179869184")
)

# torch's allocator on a GPU: one growing segment for each stream instead of many of fixed size, between which memory of
# different sizes is lost. Any of these names is the user's own setting; torch 2.11 to 2.13 read the first two on CUDA.
GPU_ALLOCATOR = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
GPU_ALLOCATOR_NAMES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
# GPUs are counted as nvidia-smi and the checks before the start count them, not with the fastest card first.
GPU_ORDER = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
USUAL_NAMES = ("OMP_NUM_THREADS", "GLIBC_TUNABLES", *GPU_ALLOCATOR_NAMES, *GPU_ORDER)


def forwarded_environment(
    environment: Mapping[str, str], listed: Sequence[str], folders: Sequence[Path]
) -> dict[str, str]:
    """The variables that every node gets.

    listed: further names, from the configuration. folders: searched for a file .deepspeed_env with lines NAME=value;
    the first one found is used, and overrides the environment. Raises UserError for a listed name that is not set, and
    for a file with wrong lines.
    """
    missing = [name for name in listed if name not in environment]
    if missing:
        raise UserError(f"forward_environment names {', '.join(missing)}, not set in this shell; export or drop it")
    upper = {*NAMES, *listed}
    chosen = {
        name: value
        for name, value in environment.items()
        if name.startswith(PREFIXES) or name.upper() in upper or name in listed
    }
    return chosen | _deepspeed_file(folders)


def rank_environment(base: Mapping[str, str], accelerator: str, threads: int) -> dict[str, str]:
    """The environment of DeepSpeed's launcher and of every rank of a node. Variables in `base` are kept.

    accelerator: "cuda" or "cpu". threads: of each rank.
    """
    usual = {"OMP_NUM_THREADS": str(max(1, threads))}
    if accelerator == "cpu":
        usual["GLIBC_TUNABLES"] = ALLOCATOR
    else:
        usual |= GPU_ORDER
        usual |= {} if any(name in base for name in GPU_ALLOCATOR_NAMES) else GPU_ALLOCATOR
    return {**usual, **base, "DS_ACCELERATOR": accelerator}


def environment_line(environment: Mapping[str, str]) -> str:
    """The variables that `rank_environment` sets, as they are in `environment`, for the log."""
    values = [f"{name}={environment[name]}" for name in USUAL_NAMES if name in environment]
    if not values:
        return "environment: OMP_NUM_THREADS, GLIBC_TUNABLES and PYTORCH_ALLOC_CONF are not set"
    return f"environment: {', '.join(values)}"


def _deepspeed_file(folders: Sequence[Path]) -> dict[str, str]:
    path = next((folder / DEEPSPEED_FILE for folder in folders if is_file(folder / DEEPSPEED_FILE)), None)
    if path is None:
        return {}
    found, problems = {}, []
    for number, line in enumerate(read_text(path, "the environment file").split("\n"), 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        match = re.fullmatch(r"(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)=(.*)", text, re.DOTALL)
        if match is None:
            problems.append(f'{path}:{number}: "{text}" must be NAME=value')
        elif (control := re.search(r"[\x00-\x08\x0a-\x1f\x7f]", match[2])) is not None:
            problems.append(f"{path}:{number}: {match[1]} has the control character {control[0]!r}; remove it")
        else:
            found[match[1]] = re.sub(r"""^(["'])(.*)\1$""", r"\2", match[2])
    if problems:
        raise UserError(*problems)
    return found
