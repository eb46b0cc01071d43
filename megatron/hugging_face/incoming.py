"""A published model becomes a folder of ours: a checkpoint, its configuration, and the tokenizer's files."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.converted import checkpoint_weights, write_converted
from megatron.config.load import config_from_flat
from megatron.config.resolve import resolve
from megatron.config.yaml_file import yaml_text
from megatron.errors import RunError, UserError, work_begins
from megatron.hugging_face.parity import compare
from megatron.hugging_face.published import PublishedModel
from megatron.hugging_face.tokenizer_files import copy_files, write_json
from megatron.progress import Progress
from megatron.units import short_number

NOT_CHECKED = "NOT CHECKED (--no-check): nothing shows that the two sides compute the same"
FILES = "hugging_face"  # the folder of the tokenizer's files in a folder of ours


def import_model(published: PublishedModel, output: Path, check: bool, tell: Callable[[str], object] = print) -> None:
    """Write the folder `output`: global_step0, model.yml and hugging_face/, with nothing left behind on failure.

    check: compare the logits of both sides before the folder gets its name. tell: gets the lines that say what is done.
    Raises UserError before anything is written; RunError if the disk fails or the two sides differ.
    """
    keys = published.keys(output / FILES)
    config = config_from_flat(keys, str(published.folder / "config.json"))
    model = resolve(config, 1, published.model.vocab_size).model
    if different := _differences(vars(model), vars(published.model)):
        raise UserError(f"{published.folder}: no configuration of ours gives this model:", *different)
    refuse_existing(output)
    require_space(output, 4 * published.tensors.elements)
    with unfinished(output) as folder:
        with Progress(f"writing {output}", len(published.weights()), "tensors") as progress:
            path = write_converted(folder, published.weights(), keys, progress.add)
        copy_files(published.folder, folder / FILES)
        if published.tokenizer is not None and not (folder / FILES / "tokenizer.json").is_file():
            write_json(folder / FILES / "tokenizer.json", published.tokenizer.definition())
        run = {"load": str(output), "finetune": True}
        (folder / "model.yml").write_text(yaml_text(keys | run), encoding="utf-8")
        if check:
            parity = compare(published.model, checkpoint_weights(path), published.folder, published.family)
            line = parity.require(str(output))
        else:
            line = NOT_CHECKED
    count = short_number(sum(torch.Size(weight.shape).numel() for weight in published.weights().values()))
    tell(f"{output}: {published.family.name} with {count} parameters, described by {output / 'model.yml'}")
    if unused := published.family.unused_fields(published.config):
        tell(f"config.json: without effect here: {', '.join(unused)}")
    if published.tokenizer is None:
        tell(f"{published.folder} has no tokenizer that Deepy reads: set tokenizer_type and vocab_file")
    tell(line)


def refuse_existing(output: Path) -> None:
    """Raise UserError for a file or a folder that holds something."""
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists() or output.is_symlink():
        raise UserError(f"{output} exists already; choose another folder, or remove it")


def require_space(output: Path, needed: int) -> None:
    """Raise UserError where the disk has less than `needed` bytes."""
    parent = next(path for path in output.absolute().parents if path.exists())
    if (free := shutil.disk_usage(parent).free) < needed:
        raise UserError(f"{output} needs {needed:,} bytes, and {free:,} are free there; choose another disk")


@contextmanager
def unfinished(output: Path) -> Iterator[Path]:
    """A folder beside `output` to write into, which takes its name when the block ends well, and is removed if not.

    Raises UserError if it cannot be made, RunError if the block fails.
    """
    output = output.absolute()  # "." has no name
    folder = output.with_name(f".{output.name}.unfinished")
    try:
        shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{output} cannot be created: {error.strerror}") from error
    try:
        with work_begins():
            yield folder
        folder.rename(output)
    except OSError as error:
        free = shutil.disk_usage(output.absolute().parent).free
        raise RunError(f"cannot write {output} ({free:,} bytes are free there): {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    training = {"padded_vocab_size", "init_std", "init_method", "output_init_method"}
    return [
        f"  {name} would be {ours[name]!r}, and is {theirs[name]!r}"
        for name in ours
        if name not in training and ours[name] != theirs[name]
    ]
