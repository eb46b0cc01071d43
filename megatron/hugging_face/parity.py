"""Compare one of our models with a folder of Hugging Face: the same tokens, in fp32, on both sides.

Both sides hold one module at a time, whatever the size of the model: our layers are built, run and dropped one after
another, and transformers' model has no memory but for the module that runs. So the largest tensor decides how much
memory is needed, not the model.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from megatron.checkpoint.converted import StoredWeight
from megatron.config.plan import ModelPlan
from megatron.convert.family import Family
from megatron.errors import RunError
from megatron.hugging_face.published import without_padding
from megatron.hugging_face.stored import StoredTensors, read_json
from megatron.model.gpt import gpt_layers
from megatron.model.layer import unpack
from megatron.parallel.grid import LoneGrid
from megatron.parallel.parameter import PlacedParameter

BOUND = 1e-4  # relative to the largest element; sums in another order differ by about 1e-6 in fp32
LENGTH = 64  # tokens; more would repeat the same weights
SEED = 1234

Hidden = list[Tensor]  # the input of the first block, and the output of each; fp32 [1, s, h]


@dataclass(frozen=True)
class Parity:
    """The largest gap of the logits, relative to the largest logit, and where the two sides begin to differ."""

    gap: float
    tokens: int
    first_difference: str | None  # None: nowhere by more than the bound

    def require(self, what: str) -> str:
        """A line that says what was compared. Raises RunError if the two sides differ."""
        if self.first_difference is None:
            return f"checked: logits of {self.tokens} tokens are equal on both sides (relative gap {self.gap:.1e})"
        raise RunError(
            f"{what} is not equal to the model that it was made from: logits differ by {self.gap:.1e} of the largest "
            f"(at most {BOUND:g}), first in {self.first_difference}; nothing was left behind"
        )


@torch.inference_mode()
def compare(
    model: ModelPlan,
    ours: Mapping[str, StoredWeight],
    folder: Path,
    family: Family,
    rounding: torch.dtype | None = None,
) -> Parity:
    """Compute the same tokens with our weights and with the folder's.

    ours: parameters by global name, without padding of the vocabulary. rounding: the type of the folder's weights, to
    which ours are rounded first; None: they have been stored in it.
    """
    model = without_padding(model)
    length = min(LENGTH, model.max_position_embeddings)
    tokens = torch.randint(model.vocab_size, (1, length), generator=torch.Generator().manual_seed(SEED))
    our_hidden, our_logits = _ours(model, ours, tokens, rounding)
    their_hidden, their_logits = _theirs(family, model, folder, tokens)
    gap = _gap(our_logits, their_logits)
    if gap <= BOUND:
        return Parity(gap, length, None)
    names = ["the embedding", *(f"block {layer}" for layer in range(model.num_layers))]
    different = (name for name, a, b in zip(names, our_hidden, their_hidden, strict=True) if not _gap(a, b) <= BOUND)
    return Parity(gap, length, next(different, "the final norm or the head"))


def _ours(
    model: ModelPlan, weights: Mapping[str, StoredWeight], tokens: Tensor, rounding: torch.dtype | None
) -> tuple[Hidden, Tensor]:
    hidden: Hidden = []
    passed: Any = tokens
    for layer in gpt_layers(model, LoneGrid(), seed=None):
        module = layer.build().eval()
        for parameter in module.parameters():
            parameter.data = torch.empty(0)  # before the next is read
        for parameter in module.parameters():
            weight = weights[cast(PlacedParameter, parameter).global_name].read()
            if rounding is not None:
                weight = weight.to(rounding)
            parameter.data = weight.float()
            del weight
        passed = layer.tied_forward(module, passed) if layer.tied_forward else module(passed)
        if len(hidden) <= model.num_layers:
            hidden.append(unpack(passed)[0])
    return hidden, passed


def _theirs(family: Family, model: ModelPlan, folder: Path, tokens: Tensor) -> tuple[Hidden, Tensor]:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING[family.model_type].from_dict(read_json(folder / "config.json"))
    config.use_cache = False
    with _parameters_without_memory():
        theirs = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    stored = StoredTensors(folder)
    names = family.parameters(model).find(stored.tensors)
    _read_when_needed(theirs, lambda name: stored.read(names[name]), set(names))
    hidden: Hidden = []
    blocks = [theirs.get_submodule(f"{family.layers}.{layer}") for layer in range(model.num_layers)]
    blocks[0].register_forward_pre_hook(
        lambda _, args, kwargs: hidden.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    for block in blocks:
        block.register_forward_hook(
            lambda _, args, output: hidden.append(output if isinstance(output, Tensor) else output[0])
        )
    logits: Tensor = theirs(tokens).logits
    return hidden, logits


@contextmanager
def _parameters_without_memory() -> Iterator[None]:
    """Parameters that modules register here are on the device "meta"; buffers, such as rotary frequencies, are real."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
        register(module, name, parameter)

    cast(Any, nn.Module).register_parameter = on_meta
    try:
        yield
    finally:
        cast(Any, nn.Module).register_parameter = register


def _read_when_needed(model: nn.Module, read: Callable[[str], Tensor], known: set[str]) -> None:
    """Give every module its parameters, in fp32, while it runs, and take them away afterwards."""
    names: dict[int, str] = {}  # of parameters without memory; a tied one has several, of which the files hold one
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in known or id(parameter) not in names:
            names[id(parameter)] = name
    for module in model.modules():
        absent = {name: names[id(value)] for name, value in module._parameters.items() if value is not None}
        if absent:
            _hook(module, dict(module._parameters), absent, read)


def _hook(
    module: nn.Module,
    empty: Mapping[str, nn.Parameter | None],
    sources: Mapping[str, str],
    read: Callable[[str], Tensor],
) -> None:
    def fill(*_: object) -> None:
        for name, source in sources.items():
            module._parameters[name] = nn.Parameter(read(source).float(), requires_grad=False)

    def clear(*_: object) -> None:
        module._parameters.update(empty)

    module.register_forward_pre_hook(fill)
    module.register_forward_hook(clear)


def _gap(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative to the largest element; infinite where something is not finite."""
    gap = float((ours.float() - theirs.float()).abs().max() / theirs.abs().max().clamp_min(1e-30))
    return gap if torch.isfinite(torch.tensor(gap)) else float("inf")
