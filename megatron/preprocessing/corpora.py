"""The named corpora of `tools/prepare_data.py`. No torch.

To add one, write a `Corpus` and a line in the registry's table.
"""

import io
import os
import random
import shutil
import sysconfig
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from megatron.errors import RunError, UserError
from megatron.files import replaced_when_complete
from megatron.preprocessing.tables import hugging_face_rows
from megatron.text_files import read_text

WITHOUT_NETWORK = "without a network, stdlib works: it is made from the Python installation"


@dataclass(frozen=True)
class Corpus:
    """A named corpus.

    documents: yields its texts; the folder is for downloads. vocab_size: of the BPE that is trained on it.
    """

    description: str
    documents: Callable[[Path], Iterator[str]]
    vocab_size: int


def standard_library_files(folder: Path | None = None) -> Iterator[str]:
    """The modules of Python's standard library on this machine, one document each, shuffled with a fixed seed.

    They are shuffled because a split by document holds out the last ones. Left out are installed packages, tests, which
    some systems lack, and folders that hold tables.
    """
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
    paths: list[Path] = []
    for parent, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in left_out]
        paths += [Path(parent, name) for name in files if name.endswith(".py")]
    paths.sort()
    random.Random(0).shuffle(paths)
    for path in paths:
        text = path.read_text("utf-8", "replace")
        if text.strip():
            yield text


def shakespeare(folder: Path) -> Iterator[str]:
    """A megabyte of Shakespeare's plays, as one document."""
    url = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
    yield read_text(fetched(url, folder / "input.txt"), "the text of tinyshakespeare")


def wikipedia_100m(folder: Path) -> Iterator[str]:
    """The first 100 MB of a dump of the English Wikipedia, complete, one document per page."""
    path = fetched("https://mattmahoney.net/dc/enwik8.zip", folder / "enwik8.zip")
    try:
        with zipfile.ZipFile(path) as archive, archive.open("enwik8") as file:
            page: list[str] = []
            for line in io.TextIOWrapper(file, "utf-8", "replace", newline=""):
                if line.strip() == "<page>" and page:
                    yield "".join(page)
                    page = []
                page.append(line)
            yield "".join(page)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        raise RunError(f"{path} is damaged or is not the archive of enwik8; delete it to fetch it again") from error


def from_hugging_face(name: str, description: str | None = None, vocab_size: int = 32000) -> Corpus:
    """The texts in the column "text" of a dataset of Hugging Face, NAME[:CONFIG[:SPLIT]], streamed."""

    def documents(folder: Path) -> Iterator[str]:
        rows = hugging_face_rows(f"hf:{name}")
        try:
            for row in rows:
                if not isinstance(row.get("text"), str):
                    raise UserError(f'{name} has no text in a column "text" (columns: {", ".join(row)})')
                yield row["text"]
        except RunError as error:
            raise RunError(f"{error}; it needs huggingface.co, or a copy in HF_HOME; {WITHOUT_NETWORK}") from error

    return Corpus(description or f"the dataset {name} of Hugging Face", documents, vocab_size)


def fetched(url: str, path: Path) -> Path:
    """Download `url` to `path` unless that exists. Raises RunError that names the alternatives."""
    if path.exists():
        return path
    try:
        with urllib.request.urlopen(url, timeout=60) as source, replaced_when_complete(path, "wb") as target:
            shutil.copyfileobj(source, target)
    except (OSError, HTTPException) as error:
        raise RunError(f"{url} could not be fetched ({error}); put a copy at {path}; {WITHOUT_NETWORK}") from error
    return path


stdlib = Corpus("the Python standard library of this machine", standard_library_files, vocab_size=8192)
tinyshakespeare = Corpus("a megabyte of Shakespeare", shakespeare, vocab_size=4096)
enwik8 = Corpus("100 MB of the English Wikipedia", wikipedia_100m, vocab_size=32000)
openwebtext = from_hugging_face("Skylion007/openwebtext", "OpenWebText, pages that Reddit linked to (40 GB)")
fineweb_edu = from_hugging_face("HuggingFaceFW/fineweb-edu:sample-10BT", "FineWeb-Edu, a sample of 10 billion tokens")
