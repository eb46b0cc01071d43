"""A library libnvidia-ml.so.1 for machines without a driver: compiled from C, and loaded as the driver's is.

It answers from environment variables, so that the calls of nvidia-ml-py, their structures and their errors are real.
"""

import os
import shutil
import subprocess
from pathlib import Path

COMPILER = shutil.which("gcc") or shutil.which("cc")
SOURCE = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { NOT_SUPPORTED = 3, NOT_FOUND = 6, TOO_SMALL = 7 };
typedef struct { char uuid[96], name[96]; unsigned long long total, used; unsigned process; } Card;
typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } Memory2;
typedef struct { unsigned process; unsigned long long used; unsigned gpu, compute; } Process;
static Card cards[16];
static unsigned count;

static int number(const char *name) { return getenv(name) ? atoi(getenv(name)) : 0; }

int nvmlInitWithFlags(unsigned flags) {
    char text[4096] = "", *rest = text, *one;
    if (number("FAKE_NVML_INIT")) return number("FAKE_NVML_INIT");
    if (getenv("FAKE_NVML_GPUS")) strncpy(text, getenv("FAKE_NVML_GPUS"), sizeof text - 1);
    for (count = 0; (one = strsep(&rest, ";")) && *one; count++) {
        Card *card = &cards[count];
        sscanf(one, "%95[^|]|%95[^|]|%llu|%llu|%u", card->uuid, card->name, &card->total, &card->used, &card->process);
        if (getenv("FAKE_NVML_FREED") && !access(getenv("FAKE_NVML_FREED"), F_OK)) card->used = 0;
    }
    return 0;
}
int nvmlShutdown(void) { return 0; }
int nvmlSystemGetDriverVersion(char *text, unsigned size) {
    snprintf(text, size, "%s", getenv("FAKE_NVML_DRIVER"));
    return 0;
}
int nvmlDeviceGetCount_v2(unsigned *out) { *out = count; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, Card **out) {
    if (index >= count) return NOT_FOUND;
    *out = &cards[index];
    return 0;
}
int nvmlDeviceGetUUID(Card *card, char *text, unsigned size) { snprintf(text, size, "%s", card->uuid); return 0; }
int nvmlDeviceGetName(Card *card, char *text, unsigned size) { snprintf(text, size, "%s", card->name); return 0; }
int nvmlDeviceGetMemoryInfo(Card *card, Memory *out) {
    if (!card->total) return NOT_SUPPORTED;
    *out = (Memory){card->total << 20, (card->total - card->used) << 20, card->used << 20};
    return 0;
}
#ifndef OLD_DRIVER
int nvmlSystemGetCudaDriverVersion_v2(int *out) { *out = number("FAKE_NVML_CUDA"); return 0; }
int nvmlDeviceGetMemoryInfo_v2(Card *card, Memory2 *out) {
    if (out->version != (sizeof *out | 2 << 24) || !card->total) return NOT_SUPPORTED;
    *out = (Memory2){out->version, card->total << 20, 1, (card->total - card->used) << 20, card->used << 20};
    return 0;
}
int nvmlDeviceGetComputeRunningProcesses_v3(Card *card, unsigned *size, Process *out) {
    unsigned room = *size;
    *size = card->process ? 1 : 0;
    if (room < *size) return TOO_SMALL;
    if (card->process) out[0] = (Process){card->process, card->used << 20, ~0u, ~0u};
    return 0;
}
#endif
"""


def build(folder: Path, old: bool = False) -> Path:
    """Compile the library into `folder`, for LD_LIBRARY_PATH. old: without the functions of newer drivers."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "nvml.c").write_text(SOURCE)
    options = ["-D_GNU_SOURCE", "-shared", "-fPIC", *(["-DOLD_DRIVER"] if old else [])]
    library = folder / "libnvidia-ml.so.1"
    subprocess.run([str(COMPILER), *options, "-o", str(library), str(folder / "nvml.c")], check=True, timeout=60)
    return folder


def fake_torch(folder: Path, version: str = "2.13.0+cu130", cuda: str | None = "13.0", nccl: bool = True) -> Path:
    """The files of a torch as `launch/torch_build.py` reads them, for PYTHONPATH."""
    (folder / "torch" / "lib").mkdir(parents=True)
    (folder / "torch" / "__init__.py").touch()
    (folder / "torch" / "version.py").write_text(f"__version__ = '{version}'\ncuda: str | None = {cuda!r}\n")
    (folder / "torch" / "lib" / "libtorch_python.so").write_bytes(b"_ZN4c10d16ProcessGroupNCCLE" if nccl else b"none")
    return folder


def cards(*descriptions: tuple[str, int, int, int]) -> dict[str, str]:
    """The variable that describes the cards: (name, total MiB, used MiB, process) each; UUIDs are GPU-0, GPU-1, ..."""
    described = (f"GPU-{index}|{'|'.join(map(str, one))}" for index, one in enumerate(descriptions))
    return {"FAKE_NVML_GPUS": ";".join(described)}


def environment(library: Path | None, torch: Path, **variables: str) -> dict[str, str]:
    """The environment of a process that sees this library, this torch and nothing of the machine's own GPUs."""
    hidden = ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "LD_LIBRARY_PATH")
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    root = str(Path(__file__).resolve().parents[1])
    paths = {"PYTHONPATH": os.pathsep.join([str(torch), root])}
    usual = {"FAKE_NVML_DRIVER": "580.65.06", "FAKE_NVML_CUDA": "13000"}
    return kept | paths | usual | ({"LD_LIBRARY_PATH": str(library)} if library else {}) | variables
