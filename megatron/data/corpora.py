"""Corpora that `tools/prepare_data.py` knows by name. Floor 2; no torch.

A new one is a function that yields documents and a line in the registry's table.
"""

import os
import random
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Corpus:
    """A named text. documents: a function that yields them. vocab_size: of the byte-level BPE that is trained on it."""

    description: str
    documents: Callable[[], Iterator[str]]
    vocab_size: int


def standard_library_files() -> Iterator[str]:
    """The modules of Python's standard library on this machine, each a document, in a random order that never changes.

    Shuffled, because a split by document takes the last ones. Left out: installed packages; tests, which some systems
    do not have; and folders of tables rather than text.
    """
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
    paths: list[Path] = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in left_out]
        paths += [Path(folder, name) for name in files if name.endswith(".py")]
    paths.sort()
    random.Random(0).shuffle(paths)
    for path in paths:
        text = path.read_text("utf-8", "replace")
        if text.strip():
            yield text


stdlib = Corpus("the Python standard library of this machine", standard_library_files, vocab_size=8192)
