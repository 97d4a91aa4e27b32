"""Keys and values of the rows that an engine decodes.

Shapes: B rows, T tokens of the trunk, the beginning that all prompts of a call have in common.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

# Columns that are set to zero at a time.
_CLEARED = 64


class Cached(NamedTuple):
    """Keys or values of one layer."""

    trunk: Tensor
    """[heads, T, head size]."""
    rows: Tensor
    """[B, heads, columns, head size], of the tokens after the trunk."""


class DecodingCache:
    """Keys and values in buffers of their final size, the trunk's once for all rows.

    A column is a position: a row's tokens stand at the beginning of its buffer, and rows have lengths of their own. So
    a prompt may take the place of a row that has ended.

    Args:
        max_rows: most rows at once.
        trunk: T, 0 or more.
        longest: most tokens of a row, prompt and response.
    """

    def __init__(self, max_rows: int, trunk: int, longest: int, device: torch.device) -> None:
        self.lengths = torch.zeros(0, dtype=torch.int64, device=device)
        """[B] int64: tokens of each row, the trunk's included."""
        self._trunk = trunk
        self._size = (max_rows, longest - trunk)
        self._keys: dict[int, Cached] = {}  # by layer, with max_rows rows and all columns
        self._values: dict[int, Cached] = {}
        self._cleared = 0
        self._source = torch.empty(0)
        self._bias: dict[int | None, Tensor] = {}

    def expect(self, lines: Sequence[Tensor]) -> None:
        """Add a row for each prompt of the next forward.

        Args:
            lines: for each of the prompts, where its tokens stand in the packed line: [tokens] int64.
        """
        device = self.lengths.device
        added = torch.tensor([len(line) for line in lines], device=device)
        self._trunk_source = lines[0][: self._trunk].to(device)
        # Columns behind a row's own tokens get any token's numbers; nothing attends to them.
        self._source = pad_sequence([line[self._trunk :] for line in lines], batch_first=True).to(device)
        self.lengths = torch.cat([self.lengths, added])
        self._clear()

    def record(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Write a layer's keys and values [1, heads, tokens, head size] of the packed prompts that were expected."""
        end = len(self.lengths)
        first, width = end - len(self._source), self._source.shape[1]
        for caches, packed in ((self._keys, key[0]), (self._values, value[0])):
            if layer not in caches:
                heads, _, size = packed.shape
                rows = packed.new_empty(self._size[0], heads, self._size[1], size)
                rows[:, :, : self._cleared] = 0
                caches[layer] = Cached(packed[:, self._trunk_source], rows)
            caches[layer].rows[first:end, :, :width] = packed[:, self._source].transpose(0, 1)

    def advance(self) -> None:
        """Make room for the next token of every row."""
        self.lengths = self.lengths + 1
        self._places = torch.arange(len(self.lengths), device=self.lengths.device)
        self._clear()

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Cached, Cached]:
        """Write the newest token's keys and values [B, heads, 1, head size]; return those of all tokens."""
        column = self.lengths - self._trunk - 1
        found = []
        for caches, new in ((self._keys, key), (self._values, value)):
            trunk, rows = caches[layer]
            rows[self._places, :, column] = new[:, :, 0]
            found.append(Cached(trunk, rows[: len(new), :, : self._width]))
        return found[0], found[1]

    def bias(self, window: int | None) -> Tensor:
        """[B, 1, 1, T + columns] float32: 0 where a row's newest token attends to, -inf elsewhere.

        Args:
            window: it attends to this many tokens, itself included; None = to all of its row.
        """
        if window not in self._bias:
            column, length = torch.arange(self._trunk + self._width, device=self.lengths.device), self.lengths[:, None]
            hidden = (column >= length) if window is None else (column >= length) | (column < length - window)
            bias = torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, -torch.inf)
            self._bias[window] = bias[:, None, None]
        return self._bias[window]

    def keep(self, going: Tensor) -> Tensor:
        """Keep the rows where `going` [B] bool is True; return [B'] int64, the former index of every row kept.

        The last rows are copied over the dropped ones, so dropping a row costs the copy of one row.
        """
        count = int(going.sum())
        place = torch.arange(len(going), device=going.device)
        free, moved = place[:count][~going[:count]], place[count:][going[count:]]
        if len(free):
            for caches in (self._keys, self._values):
                for _, rows in caches.values():
                    rows[free, :, : self._width] = rows[moved, :, : self._width]
        order = place[:count].clone()
        order[free] = moved
        self.lengths = self.lengths[order]
        return order

    def _clear(self) -> None:
        """Follow new lengths. A column that is read from now on must hold numbers: nan times a weight of 0 is nan."""
        self._bias = {}
        self._width = int(self.lengths.max()) - self._trunk
        if self._width <= self._cleared:
            return
        first, self._cleared = self._cleared, min(self._size[1], self._width + _CLEARED)
        for caches in (self._keys, self._values):
            for _, rows in caches.values():
                rows[:, :, first : self._cleared] = 0
