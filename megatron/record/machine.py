"""What the code runs on: packages and hardware."""

import os
import platform
import re
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

OURS = "deepy"


def installed_packages() -> dict[str, str]:
    """Name and version of every installed package but ours, by the names of the folders in which pip keeps them.

    `importlib.metadata` would parse a file of each, which takes a hundred times as long.
    """
    found: dict[str, str] = {}
    for place in sys.path:
        with suppress(OSError):
            for name in os.listdir(place or "."):  # noqa: PTH208 (of names alone, and faster)
                if (match := re.fullmatch(r"([^-]+)-([^-]+)\.dist-info", name)) is not None:
                    found.setdefault(match[1].replace("_", "-"), match[2])
    return {name: found[name] for name in sorted(found, key=str.lower) if name.lower() != OURS}


def hardware() -> dict[str, Any]:
    """This machine without its accelerators, which torch knows."""
    return {
        "host": socket.gethostname(),
        "system": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
    }


def _processor() -> str:
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        if (match := re.search(r"^(?:model name|Model)\s*:\s*(.+)$", text, re.MULTILINE)) is not None:
            return match[1].strip()
    return platform.processor() or platform.machine()
