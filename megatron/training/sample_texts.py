"""Write the samples of steps that a person will want to look at, by number and text."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch.distributed as dist

from megatron.files import replaced_when_complete
from megatron.training.hooks.base import Run

MOST = 1000  # samples in a file


def keep_texts(run: Run, name: str, numbers: Sequence[int]) -> str:
    """Write the training samples `numbers` to the file `name` in the log folder, as JSON lines, on rank 0.

    Returns what is known of them, for a sentence: their numbers and the file. Of more than MOST the first are written.
    A file that cannot be written is only told of: what the samples have led to is what the user has to see.
    """
    words = f"samples {numbers[0]:,} to {numbers[-1]:,}"
    if run.config.log_folder is None:
        return words
    path = Path(run.config.log_folder) / name
    try:
        if dist.get_rank() == 0:
            _write(run, path, numbers[:MOST])
    except OSError as error:
        return f"{words}; their text cannot be written to {path}: {error.strerror}"
    return f"{words}; {'their text' if len(numbers) <= MOST else f'the text of the first {MOST:,}'} is in {path}"


def _write(run: Run, path: Path, numbers: Sequence[int]) -> None:
    source = run.sources.samples("train")
    with replaced_when_complete(path) as file:
        for number in numbers:
            ids = np.atleast_2d(source[number])[0]  # a second row holds labels
            file.write(json.dumps({"sample": number, "text": run.tokenizer.decode(ids.tolist())}) + "\n")
