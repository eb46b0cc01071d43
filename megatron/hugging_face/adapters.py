"""Low-rank adapters, in and out: ours, and those in a folder of PEFT."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron.checkpoint.adapter_base import describe_base, find_base, read_base
from megatron.checkpoint.converted import StoredWeight, checkpoint_weights, write_converted
from megatron.checkpoint.folder import find_checkpoint, read_document
from megatron.config.yaml_file import yaml_text
from megatron.convert.peft import from_peft, to_peft
from megatron.engine.settings import DTYPES
from megatron.errors import UserError
from megatron.files import replaced_when_complete
from megatron.hugging_face.incoming import refuse_existing, unfinished
from megatron.hugging_face.outgoing import TrainedWeights, architecture_for, open_checkpoint
from megatron.hugging_face.published import open_base, published_name, without_padding
from megatron.hugging_face.tokenizer_files import write_json, write_tokenizer

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def export_adapters(
    trained: TrainedWeights,
    output: Path,
    dtype: str = "fp32",
    family: str | None = None,
    tell: Callable[[str], object] = print,
) -> None:
    """Write the adapters and the tokenizer into the folder `output`, with nothing left behind on failure.

    dtype, family: as for `plan_export`. The base is not needed, so nothing is compared.
    Raises UserError for adapters that the architecture cannot have, before anything is written; RunError if the disk
    fails.
    """
    refuse_existing(output)
    model = without_padding(trained.model)
    chosen, _ = architecture_for(replace(model, lora=None), trained.vocab_file, family)
    config, tensors = to_peft({name: stored.read() for name, stored in trained.weights.items()}, model, chosen)
    config["base_model_name_or_path"] = published_name(trained.base)
    with unfinished(output) as folder:
        write_json(folder / SETTINGS, config)
        cast = {name: tensor.to(DTYPES[dtype]).contiguous() for name, tensor in tensors.items()}
        save_file(cast, folder / WEIGHTS, metadata={"format": "pt"})
        write_tokenizer(trained.tokenizer, trained.vocab_file, folder)
    tell(f"{output}: adapters for {chosen.architecture} in the format of PEFT, in {dtype}")
    tell("not compared: tools/merge_lora.py makes a whole model, which an export compares on both sides")


def import_adapters(adapters: Path, base: Path, output: Path, tell: Callable[[str], object] = print) -> None:
    """Write checkpoint 0 with the adapters of a PEFT folder, and model.yml, into the folder `output`.

    base: the folder of our checkpoints of the model that they adapt, of which the latest is named as their base.
    Raises UserError for files that are not adapters of such a model, before anything is written; RunError if the disk
    fails.
    """
    refuse_existing(output)
    checkpoint = find_checkpoint(base)
    if checkpoint is None:
        raise UserError(f"{base} has no checkpoint")
    trained = open_checkpoint(base, None, {})
    if trained.model.lora is not None:
        raise UserError(f"{checkpoint} holds adapters, not a model that others could adapt")
    model = without_padding(trained.model)
    family, _ = architecture_for(model, trained.vocab_file)
    lora, tensors = from_peft(read_document(adapters / SETTINGS), _tensors(adapters), model, family)
    weights = {
        name: StoredWeight(tuple(tensor.shape), partial(Tensor.to, tensor, torch.float32))
        for name, tensor in tensors.items()
    }
    keys = {key: value for key, value in trained.keys.items() if key != "freeze"}
    keys |= {"lora": asdict(lora) | {"targets": list(lora.targets)}, "load": str(output), "finetune": True}
    path = write_converted(output, weights, keys, base=describe_base(checkpoint))
    with replaced_when_complete(output / "model.yml") as file:
        file.write(yaml_text(keys))
    tell(f"{path}: {len(tensors)} tensors of adapters for {checkpoint}, described by {output / 'model.yml'}")


def base_weights(checkpoint: Path, moved: str | None = None) -> Mapping[str, StoredWeight]:
    """The weights, by global name, of the base of the adapters in `checkpoint`: where it was, or in `moved`.

    moved: a folder of our checkpoints, or hf:MODEL. Raises UserError if it is not there or not the same.
    """
    model = published_name(moved or read_base(checkpoint)["path"])
    return checkpoint_weights(find_base(checkpoint, moved)) if model is None else open_base(model, checkpoint).weights()


def _tensors(adapters: Path) -> dict[str, Tensor]:
    try:
        found: dict[str, Tensor] = load_file(adapters / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{adapters / WEIGHTS} cannot be read: {error}") from error
    return found
