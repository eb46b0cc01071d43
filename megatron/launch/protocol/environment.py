"""Which environment variables reach the ranks, and what deepy.py adds to them.

Values travel in a file that only its owner may read, never on a command line, where `ps` shows them.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron.errors import UserError

# What decides how ranks compute, meet and report; the machines' own (HOME, CUDA_VISIBLE_DEVICES, ...) stay as they are.
PREFIXES = (
    *("NCCL_", "GLOO_", "UCX_", "FI_", "OMP_", "MKL_", "KMP_", "DS_", "TORCH_", "TORCHINDUCTOR_", "TRITON_"),
    *("PYTORCH_", "CUDA_LAUNCH_BLOCKING", "CUDA_DEVICE_MAX_CONNECTIONS", "CUBLAS_", "WANDB_", "HF_", "TOKENIZERS_"),
    "PYTHON",
)
NAMES = ("PATH", "LD_LIBRARY_PATH", "LD_PRELOAD", "GLIBC_TUNABLES", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
DEEPSPEED_FILE = ".deepspeed_env"
# Freshly mapped pages are dear: keep freed memory, and use huge pages. In one arena, since the others of glibc, which
# every further thread would get, map what is large anew each time.
ALLOCATOR = ":".join(
    f"glibc.malloc.{setting}"
    for setting in ("arena_max=1", "hugetlb=1", "mmap_threshold=17179869184", "trim_threshold=17179869184")
)


def forwarded_environment(
    environment: Mapping[str, str], listed: Sequence[str], folders: Sequence[Path]
) -> dict[str, str]:
    """The variables that every node gets.

    listed: names that the configuration adds. folders: where a file .deepspeed_env with lines NAME=value may be; the
    first that has one counts, and outranks the environment. Raises UserError for a listed name that is not set.
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


def for_ranks(base: Mapping[str, str], accelerator: str, threads: int) -> dict[str, str]:
    """The environment of DeepSpeed's launcher and of every rank of a node. What the user has set stays.

    accelerator: "cuda" or "cpu". threads: of each rank.
    """
    usual = {"OMP_NUM_THREADS": str(max(1, threads)), "GLIBC_TUNABLES": ALLOCATOR}
    return {**usual, **base, "DS_ACCELERATOR": accelerator}


def _deepspeed_file(folders: Sequence[Path]) -> dict[str, str]:
    path = next((folder / DEEPSPEED_FILE for folder in folders if (folder / DEEPSPEED_FILE).is_file()), None)
    if path is None:
        return {}
    found = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        match = re.fullmatch(r"(?:export\s+)?([A-Za-z_]\w*)=(.*)", text)
        if match is None:
            raise UserError(f'{path}:{number}: "{text}" must be NAME=value')
        found[match[1]] = match[2].strip("\"'")
    return found
