"""The forward pass of a list of layers for generation and evaluation, without DeepSpeed and gradients.

Shapes: b rows, s columns, h hidden, v vocabulary in memory, tp tensor-parallel ranks.
"""

from collections import Counter
from contextlib import nullcontext
from functools import partial
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.config.parameter_shapes import is_adapter
from megatron.config.schema.generation_keys import Quantization
from megatron.engine.modules import Sequential, cast_parameters
from megatron.engine.optimizer_state import ModuleState, draw_initial_values
from megatron.engine.replay import Replay
from megatron.model.attention_kernels import kernels_for_decoding
from megatron.model.cache import KVCache
from megatron.model.embedding_and_head import Embedding
from megatron.model.layer import Layer, Masking, Targets, pack, unpack
from megatron.parallel.grid import ParallelGrid
from megatron.parallel.layers import LinearLayer
from megatron.parallel.packed_weights import check_quantization, has_products, pack_weight, quantize_weight
from megatron.parallel.parameter import PlacedParameter


class InferenceEngine:
    """This rank's stage of the model, or its tensor-parallel shard of it.

    replays: fixed steps of a cache (`KVCache.begin_step`) are CUDA graphs.
    """

    replays = False

    def __init__(
        self, layers: list[Layer], grid: ParallelGrid, dtype: torch.dtype = torch.float32, hidden_size: int = 0
    ) -> None:
        """Build this stage of `layers` with weights of `dtype` on the grid's device; draw them if `layers` have a seed.

        hidden_size: of what stages send to each other; needed in a pipeline.
        """
        self.blocks = blocks_of_stage(len(layers) - 3, grid)
        first = 0 if grid.is_first_stage else self.blocks.start + 1
        last = len(layers) if grid.is_last_stage else self.blocks.stop + 1
        module = Sequential(layers[first:last], prepare=partial(cast_parameters, dtype=dtype))
        self.module = module.to(grid.device).eval().requires_grad_(False)
        self.state = ModuleState(self.module)
        draw_initial_values(self.module, self.state)
        self.grid = grid
        self.dtype = dtype
        self.hidden_size = hidden_size
        self._tied_head = layers[-1].tied is not None and grid.is_last_stage
        self.is_adapted = any(is_adapter(name) for name in self.parameter_names)
        self.base: dict[str, str] | None = None  # which model adapters belong to, as in base.json
        self._sending: tuple[dist.Work, Tensor] | None = None
        self.replays = grid.device.type == "cuda" and grid.size("tensor") == grid.size("pipe") == 1
        self._replay = Replay(self._run)

    @property
    def parameter_names(self) -> set[str]:
        """Global names of the parameters this rank computes with."""
        return {cast(PlacedParameter, parameter).global_name for parameter in self.module.parameters()}

    def pack_weights(self, quantization: Quantization | None = None) -> list[str]:
        """Bring the loaded weights of matrix products into the form that a CPU multiplies fastest; lines for the log.

        The memory of each is freed, except that of an embedding that is the head as well, which has its rows twice.
        On a CPU without products in 16 bits, activations are fp32 from then on. Nothing changes on a GPU.
        quantization: round the weights to this type. Raises UserError where it cannot be.
        """
        device = self.grid.device
        if quantization is not None:
            check_quantization(device)
        if device.type != "cpu":
            return []
        make, forms = pack_weight if quantization is None else quantize_weight, Counter[str]()
        for module in self.module.modules():
            if not isinstance(module, LinearLayer) or (isinstance(module, Embedding) and not self._tied_head):
                continue
            module.packed = make(module.weight.detach())
            forms["as stored" if module.packed is None else module.packed.form] += 1
            if module.packed is not None and not isinstance(module, Embedding):
                del module.weight
        if self.dtype != torch.float32 and not has_products(self.dtype):
            self._widen()
        self.state = ModuleState(self.module)
        return [f"weights of {count} matrix products: {form}" for form, count in forms.items()]

    def _widen(self) -> None:
        """Make activations fp32, and the parameters that are not packed, but for the rows of an embedding."""
        self.dtype = torch.float32
        for module in self.module.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if isinstance(module, Embedding) and name == "weight":
                    module.vectors = torch.float32
                else:
                    parameter.data = parameter.data.float()

    @torch.inference_mode()
    def hidden(self, tokens: Tensor, cache: KVCache | None = None, document_start: Tensor | None = None) -> Tensor:
        """Tokens [b, s] in, this stage's output [b, s, h] out: in the last stage the input of the head.

        Every stage calls it with the same arguments. With a cache, `tokens` are its step, begun by the caller.
        document_start: int32 [b, s], the column in which each token's document begins; None: column 0.
        """
        if document_start is not None:
            document_start = document_start.to(self.grid.device)
        inputs = tokens.to(self.grid.device) if self.grid.is_first_stage else self._received(tokens)
        if cache is not None and cache.form is not None:
            return self._replay(inputs, cache)
        hidden = self._run(inputs, cache, document_start)
        if not self.grid.is_last_stage:
            self._send(hidden)
        return hidden

    def _run(self, inputs: Tensor, cache: KVCache | None, document_start: Tensor | None = None) -> Tensor:
        """This stage's layers without the head, of tokens [b, s] or hidden states [b, s, h]."""
        layers = slice(-1) if self.grid.is_last_stage else slice(None)
        with nullcontext() if cache is None else kernels_for_decoding():
            hidden, _ = unpack(self.module(pack(inputs, Masking(document_start)), cache, layers))
        return hidden

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """The head, in the last stage: any positions of `hidden`, [..., h] -> [..., v/tp]."""
        logits: Tensor = self.module(hidden, layers=slice(-1, None))
        return logits

    @torch.inference_mode()
    def loss(self, hidden: Tensor, targets: Targets) -> Tensor:
        """The head with its loss, in the last stage, summed over `hidden` [b, s, h]: a scalar in fp32."""
        loss: Tensor = self.module(hidden, layers=slice(-1, None), targets=targets)
        return loss

    def _received(self, tokens: Tensor) -> Tensor:
        """The output of the stage before this one, [b, s, h]."""
        hidden = torch.empty(*tokens.shape, self.hidden_size, dtype=self.dtype, device=self.grid.device)
        dist.recv(hidden, group=self.grid.group("pipe"), group_src=self.grid.rank("pipe") - 1)
        return hidden

    def _send(self, hidden: Tensor) -> None:
        """Send to the next stage; the tensor is kept until it has left, which the next call waits for."""
        if self._sending is not None:
            self._sending[0].wait()
        hidden = hidden.contiguous()
        work = dist.isend(hidden, group=self.grid.group("pipe"), group_dst=self.grid.rank("pipe") + 1)
        self._sending = (cast(dist.Work, work), hidden)


def blocks_of_stage(count: int, grid: ParallelGrid) -> range:
    """This stage's share of `count` blocks; sizes differ by at most one."""
    stage, stages = grid.rank("pipe"), grid.size("pipe")
    return range(count * stage // stages, count * (stage + 1) // stages)
