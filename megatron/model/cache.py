"""Key-value cache: keys and values of earlier tokens, so that decoding computes each token once.

Shapes: b rows of a step, s tokens of a row (short rows are padded on the right), k columns of keys, g key/value heads
on this rank, d head size.
The cache has slots, each of which holds one text from position 0 on. A step computes the next tokens of some slots, as
many of each as it likes. A layer with a window keeps no more columns than its queries see: its slots are rings, whose
column p modulo their size holds position p.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from megatron.config.plan import ModelPlan
from megatron.registry import resolve


@dataclass(frozen=True)
class Positions:
    """Positions of queries and keys in their sequences; a query sees the keys that are not after it."""

    queries: Tensor  # [b or 1, s] int64
    keys: Tensor  # [b or 1, k] int64; negative: no key
    first: Tensor | None = None  # [b, s] the first key that each query sees; None: all before it
    in_order: bool = True  # the keys are consecutive, and the queries are the last of them

    def visible(self, window: int | None = None) -> Tensor:
        """Which keys each query sees, bool [b or 1, 1, s, k]; with a window, only the last `window` keys."""
        queries, keys = self.queries[:, None, :, None], self.keys[:, None, None, :]
        seen = (keys <= queries) & (keys >= 0)
        if self.first is not None:
            seen = seen & (keys >= self.first[:, None, :, None])
        return seen if window is None else seen & (keys > queries - window)


@dataclass(frozen=True)
class StepPositions(Positions):
    """Positions of a step of decoding, whose mask is the same for all layers of one kind."""

    masks: dict[int | None, Tensor] = field(default_factory=dict)
    # if each row has one query that sees the columns before a number: these numbers
    ends: tuple[int, ...] | None = None

    def visible(self, window: int | None = None) -> Tensor:
        """See `Positions`."""
        if window not in self.masks:
            self.masks[window] = super().visible(window)
        return self.masks[window]


@dataclass
class _Columns:
    """How layers of one kind use their columns in the current step. size: columns of a slot."""

    size: int
    window: int | None
    # [b, s], where padding is written to column `size`; a slice: the same columns for all rows
    written: Tensor | slice = field(default_factory=lambda: slice(0))
    shown: int = 0  # columns that hold keys
    positions: StepPositions | None = None


class KVCache:
    """Keys and values of this rank's layers, and the rows of the current step."""

    def __init__(
        self,
        model: ModelPlan,
        slots: int,
        capacity: int,
        kv_heads: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        longest_step: int | None = None,
        layers: range | None = None,
    ) -> None:
        """Allocate `slots` texts of up to `capacity` tokens.

        kv_heads: on this rank. longest_step: most tokens of a row in a step; None: capacity. layers: of this rank;
        None: all.
        """
        self.capacity, self.longest_step = capacity, longest_step or capacity
        self._device = device
        self._reset_mask, self._reset_positions = model.reset_attention_mask, model.reset_position_ids
        self._full = _Columns(capacity, None)
        self._kinds = [self._full]
        own = range(model.num_layers) if layers is None else layers
        self._of_layer: dict[int, _Columns] = {}
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        for layer in own:
            columns = self._of_layer[layer] = self._columns(model, layer)
            # a head's keys are neighbours: a query reads them twice as fast as keys that alternate with other heads'
            shape = (slots, kv_heads, columns.size + 1, model.head_size)
            self._keys[layer] = torch.zeros(shape, dtype=dtype, device=device)
            self._values[layer] = torch.zeros(shape, dtype=dtype, device=device)
        # the position after the last one that each slot has held since it was at 0: what of it rings have lost
        self._ends = [0] * slots
        self._from_nothing = False
        self._fixed: dict[Hashable, dict[Hashable, Tensor]] = {}  # the tensors of fixed steps, by the form of the step
        self.form: Hashable = None  # of the current step, if it is fixed
        self._rows: slice | Tensor = slice(0, 0)
        self._indices = torch.empty(0)
        self.positions = torch.empty(0)
        self.lengths: tuple[int, ...] = ()

    def _columns(self, model: ModelPlan, layer: int) -> _Columns:
        """The columns of a layer. A bias of scores needs the keys in order, so no ring."""
        window = model.sliding_window if model.attention_kinds[layer] == "local" else None
        biased = resolve("position_embedding", model.position_embedding).at_scores is not None
        if window is None or biased or window - 1 + self.longest_step >= self.capacity:
            return self._full
        if len(self._kinds) == 1:
            self._kinds.append(_Columns(window - 1 + self.longest_step, window))
        return self._kinds[1]

    def begin_step(
        self,
        slots: Sequence[int],
        starts: Sequence[int],
        sizes: Sequence[int],
        *,
        lengths: Sequence[int] | None = None,
        document_start: Tensor | None = None,
        fixed: bool = False,
    ) -> None:
        """Begin a step of the tokens at positions start to start + size - 1 of each slot.

        A row of size 0 computes nothing that counts. lengths: of the whole texts, by which some rotary scaling chooses
        its frequencies; None: the capacity. document_start: [b, s], the position at which each token's document
        begins, if the model keeps documents apart. fixed: for slots in a row; steps of the same `form` use the same
        tensors, with other values, and therefore the same operations. There are few forms.
        Raises ValueError for tokens that do not fit.
        """
        ends = [start + size for start, size in zip(starts, sizes, strict=True)]
        width = max(sizes)
        if max(ends) > self.capacity or width > self.longest_step:
            raise ValueError(
                f"{width} tokens up to position {max(ends)} do not fit: a step has at most {self.longest_step}, a slot "
                f"{self.capacity}"
            )
        for slot, begin, end in zip(slots, starts, ends, strict=True):
            if end > begin:
                self._ends[slot] = max(self._ends[slot], end) if begin else end
        last = [max(end - 1, 0) for end in ends]
        # padding sees what the last token sees
        ranges = [range(begin, begin + width) for begin in starts]
        places = [[min(place, final) for place in row] for row, final in zip(ranges, last, strict=True)]
        shown = [min(kind.size, _rounded(max(ends)) if fixed else max(ends)) for kind in self._kinds]
        self.form = (slots[0], len(slots), width, *shown) if fixed else None
        seen = self._on_device("places", torch.tensor(places))
        start = None if document_start is None else self._on_device("documents", document_start)
        first = start if self._reset_mask else None
        self.positions = seen
        if document_start is not None and self._reset_positions:
            self.positions = self._on_device("positions", torch.tensor(places) - document_start)
        self.lengths = tuple(lengths or [self.capacity] * len(slots))
        in_a_row = list(slots) == list(range(slots[0], slots[0] + len(slots)))
        indices = self._on_device("slots", torch.tensor(slots))
        self._rows = slice(slots[0], slots[0] + len(slots)) if in_a_row else indices
        self._indices = indices.unsqueeze(1)
        even = len(set(sizes)) == 1 and len(set(ends)) == 1 and not fixed
        # padding is on the right, where no token sees it
        self._from_nothing = not any(starts) and width > 1 and not fixed
        for kind, columns_shown in zip(self._kinds, shown, strict=True):
            kind.shown = columns_shown
            column = starts[0] % kind.size
            if even and in_a_row and column + width <= kind.size:
                kind.written = slice(column, column + width)
            else:
                columns = [
                    [place % kind.size if number < size else kind.size for number, place in enumerate(row)]
                    for row, size in zip(places, sizes, strict=True)
                ]
                kind.written = self._on_device(("written", kind.window), torch.tensor(columns))
            causal = self._from_nothing or (even and width == 1)
            kind.positions = self._positions(kind, seen, last, even, causal, first)

    def begin_again(self) -> None:
        """Forget what layers have computed for all of them in this step, such as masks: they will compute it again."""
        self.positions = self.positions.view(self.positions.shape)  # rotations recognize those of a step by identity
        for kind in self._kinds:
            if kind.positions is not None:
                kind.positions = replace(kind.positions, masks={})

    def _on_device(self, name: Hashable, values: Tensor) -> Tensor:
        """A tensor of the step with these values; in a fixed step that of all steps of the form."""
        if self.form is None:
            return values.to(self._device)
        kept = self._fixed.setdefault(self.form, {})
        if name not in kept:
            kept[name] = values.to(self._device, copy=True)
        return kept[name].copy_(values, non_blocking=True)

    def _positions(
        self, kind: _Columns, queries: Tensor, last: Sequence[int], even: bool, causal: bool, first: Tensor | None
    ) -> StepPositions | None:
        """What queries of a kind of layers see; None: each one all keys up to its own, the cases with fast kernels."""
        wrapped = kind.window is not None and max(last) >= kind.size
        if causal and first is None and not wrapped:
            return None
        keys = torch.arange(kind.shown).unsqueeze(0)
        if kind.window is not None:
            finals = torch.tensor(last).unsqueeze(1)
            keys = finals - (finals - keys) % kind.size
        keys = self._on_device(("keys", kind.window), keys)
        single = queries.shape[1] == 1 and first is None and not wrapped and self.form is None
        ends = tuple(place + 1 for place in last) if single else None
        return StepPositions(queries, keys, first, in_order=even and not wrapped, ends=ends)

    def visibility(self, layer: int) -> Positions | None:
        """Positions of this step's queries and all keys; None: each query sees all keys up to its own."""
        return self._of_layer[layer].positions

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's keys and values [b, s, g, d] of this step; returns those of all tokens, [b, k, g, d]."""
        kind, stored = self._of_layer[layer], (self._keys[layer], self._values[layer])
        for tensor, new in zip(stored, (keys, values), strict=True):
            if isinstance(kind.written, slice):
                tensor[self._rows, :, kind.written] = new.transpose(1, 2)
            else:
                tensor[self._indices, :, kind.written] = new
        if self._from_nothing:
            return keys, values
        shown_keys, shown_values = (tensor[self._rows, :, : kind.shown].transpose(1, 2) for tensor in stored)
        return shown_keys, shown_values

    def can_copy(self, slot: int, tokens: int) -> bool:
        """Whether a slot still has all that the token after its first `tokens` sees."""
        lost = (self._ends[slot] - kind.size for kind in self._kinds)
        return all(
            kind.window is None or last <= max(0, tokens - kind.window + 1)
            for kind, last in zip(self._kinds, lost, strict=True)
        )

    def copy(self, sources: Sequence[int], targets: Sequence[int], tokens: int) -> None:
        """Copy slots as they were after their first `tokens` tokens; a target may be another one's source."""
        ends = [self._ends[source] for source in sources]
        for target, end in zip(targets, ends, strict=True):
            self._ends[target] = end
        for layer, kind in self._of_layer.items():
            columns = slice(min(tokens, kind.size) if kind.window is None else kind.size)
            for stored in (self._keys[layer], self._values[layer]):
                # one by one: a copy by lists of indices takes a hundred times as long on a CPU
                parts = [stored[source, :, columns].clone() for source in sources]
                for target, part in zip(targets, parts, strict=True):
                    stored[target, :, columns] = part


def _rounded(length: int) -> int:
    """A power of two that is not below `length`, and at least 128: columns whose keys are read, and masked."""
    return max(128, 1 << (length - 1).bit_length())


def bytes_of_slot(
    model: ModelPlan, capacity: int, kv_heads: int, dtype: torch.dtype, longest_step: int, layers: range
) -> int:
    """Bytes of one slot of a `KVCache` with these arguments."""
    lone = KVCache(model, 1, capacity, kv_heads, dtype, torch.device("meta"), longest_step=longest_step, layers=layers)
    return sum(tensor.nbytes for tensor in (*lone._keys.values(), *lone._values.values()))
