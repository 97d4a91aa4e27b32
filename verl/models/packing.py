"""A micro-batch without padding, in which a prompt that several rows have is computed once.

The tokens of a micro-batch form one line, cut into segments. A segment attends to itself (causally) and to its
ancestors: a response to its prompt, and a prompt to the trunk, the beginning that all prompts of the micro-batch share
(the system turn). So a group of n rationales costs one prompt and n responses, and the system turn is computed once per
micro-batch. Hidden states and gradients are those of separate rows.

Shape letters: N rows, K packed tokens, S scored tokens, M pooled positions, E rows whose vector is averaged
with that of their prompt alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from verl.embedding.settings import NO_MIX, Mix

# Below this many common tokens a trunk saves less than its own attention call costs.
_MIN_TRUNK = 8


@dataclass(frozen=True)
class Row:
    """Token ids of one row."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]
    pool_start: int
    """First pooled position in prompt + response, or -1, the last one; all from there to the end are pooled."""
    scored: bool
    """Whether to compute log-probs of the response, or of the tokens from `score_start` on."""
    mix: Mix = NO_MIX
    """How prompt and response become one vector; of a row without a response there is nothing to mix."""
    score_start: int | None = None
    """First scored position in prompt + response, 1 or more; None = the response's first."""

    @property
    def first_scored(self) -> int:
        """Position in prompt + response of the first token that is scored."""
        return len(self.prompt) if self.score_start is None else self.score_start


@dataclass(frozen=True)
class Segment:
    start: int
    end: int
    ancestors: tuple[tuple[int, int], ...]
    """[start, end) of each segment that comes before this one in its rows, in order."""
    mask: torch.Tensor | None
    """[end - start, ancestor tokens + end - start] bool; None when there are no ancestors (plain causal)."""


@dataclass
class PackedBatch:
    """One micro-batch. Build it with `pack`."""

    input_ids: torch.Tensor
    """[1,K] int64."""
    position_ids: torch.Tensor
    """[1,K] int64, each token's position in its own row."""
    segments: list[Segment]
    pool_token: torch.Tensor
    """[M] int64, position in the line of each pooled token."""
    pool_row: torch.Tensor
    """[M] int64, its row; N + e for the vector of the prompt alone of the row averaged[e]."""
    pool_weight: torch.Tensor | None
    """[M] float32, its weight in the mean; None = all of a row have the same."""
    averaged: torch.Tensor
    """[E] int64, rows whose vector is averaged with that of their prompt alone."""
    average_weight: torch.Tensor
    """[E] float32, the weight of the latter."""
    score_token: torch.Tensor
    """[S] int64, position in the line whose hidden state predicts a scored token."""
    score_target: torch.Tensor
    """[S] int64, that token's id."""
    score_row: torch.Tensor
    """[S] int64, its row."""
    score_column: torch.Tensor
    """[S] int64, its number among the row's scored tokens."""
    num_rows: int

    @property
    def longest_row(self) -> int:
        """Tokens of the longest row."""
        return max(s.end - s.start + sum(b - a for a, b in s.ancestors) for s in self.segments)

    def to(self, device: torch.device) -> "PackedBatch":
        if device.type == "cpu":
            return self
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        segments = [
            Segment(s.start, s.end, s.ancestors, None if s.mask is None else s.mask.to(device)) for s in self.segments
        ]
        return PackedBatch(**{**vars(self), **moved, "segments": segments})


@dataclass
class _Builder:
    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)

    def add(self, ids: Sequence[int], parent: "_Node | None") -> "_Node":
        """Append a segment; without ids nothing is added, and the result equals the parent."""
        ranges, depth = (parent.ranges, parent.depth) if parent else ((), 0)
        if not ids:
            return _Node(ranges, depth)
        start, end = len(self.ids), len(self.ids) + len(ids)
        self.ids.extend(ids)
        self.positions.extend(range(depth, depth + len(ids)))
        self.segments.append(Segment(start, end, ranges, _prefix_mask(end - start, depth) if ranges else None))
        return _Node((*ranges, (start, end)), depth + len(ids))


@dataclass(frozen=True)
class _Node:
    ranges: tuple[tuple[int, int], ...]
    depth: int

    def packed_positions(self, start: int) -> list[int]:
        """Position in the line of every token of this row, from row position `start` to the end."""
        return [p for first, last in self.ranges for p in range(first, last)][start:]


class _Pools:
    """The pooled positions of N rows, and of the prompts alone of those that are averaged."""

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows
        self._tokens: list[int] = []
        self._rows: list[int] = []
        self._weights: list[float] = []
        self._is_weighted = False
        self._averaged: dict[int, float] = {}

    def add(self, number: int, row: Row, positions: list[int]) -> None:
        """Add a row whose tokens have these positions in the line."""
        share, weight = row.mix if row.response else NO_MIX
        pooled, text = positions[row.pool_start :], positions[: len(row.prompt)][row.pool_start :]
        if share is None:
            self._pool(number, pooled)
        else:
            self._is_weighted = True
            self._pool(number, text, share)
            self._pool(number, pooled[len(text) :], 1 - share)
        if weight:
            self._pool(self._num_rows + len(self._averaged), text)
            self._averaged[number] = weight

    def tensors(self) -> dict[str, Any]:
        return {
            "pool_token": torch.tensor(self._tokens, dtype=torch.int64),
            "pool_row": torch.tensor(self._rows, dtype=torch.int64),
            "pool_weight": torch.tensor(self._weights) if self._is_weighted else None,
            "averaged": torch.tensor(list(self._averaged), dtype=torch.int64),
            "average_weight": torch.tensor(list(self._averaged.values())),
        }

    def _pool(self, number: int, positions: list[int], share: float = 1.0) -> None:
        """Add positions that have this share of a vector together."""
        self._tokens += positions
        self._rows += [number] * len(positions)
        self._weights += [share / max(1, len(positions))] * len(positions)


def pack(rows: Sequence[Row], share_prompts: bool) -> PackedBatch:
    """Put `rows` into one line.

    Args:
        share_prompts: compute equal prompts, and the beginning common to all, once. Kernels that support only
            separate rows (varlen_attn) need False: then every row is one segment.
    """
    builder = _Builder()
    if share_prompts:
        trunk_ids = common_beginning([row.prompt for row in rows])
        trunk = builder.add(trunk_ids, None)
        prompts: dict[tuple[int, ...], _Node] = {}
        leaves = []
        for row in rows:
            if row.prompt not in prompts:
                prompts[row.prompt] = builder.add(row.prompt[len(trunk_ids) :], trunk)
            leaves.append(builder.add(row.response, prompts[row.prompt]))
    else:
        leaves = [builder.add(row.prompt + row.response, None) for row in rows]
    pools = _Pools(len(rows))
    score: list[tuple[int, int, int, int]] = []
    for i, (row, leaf) in enumerate(zip(rows, leaves, strict=True)):
        positions = leaf.packed_positions(0)
        pools.add(i, row, positions)
        if row.scored:
            targets = (row.prompt + row.response)[row.first_scored :]
            predicting = positions[row.first_scored - 1 :][: len(targets)]
            score += [(p, t, i, c) for c, (p, t) in enumerate(zip(predicting, targets, strict=True))]
    columns = torch.tensor(score, dtype=torch.int64).reshape(-1, 4).unbind(1)
    return PackedBatch(
        input_ids=torch.tensor([builder.ids], dtype=torch.int64),
        position_ids=torch.tensor([builder.positions], dtype=torch.int64),
        segments=builder.segments,
        **pools.tensors(),
        score_token=columns[0],
        score_target=columns[1],
        score_row=columns[2],
        score_column=columns[3],
        num_rows=len(rows),
    )


def _prefix_mask(length: int, depth: int) -> torch.Tensor:
    """[length, depth + length] bool: everything before the segment, and itself causally."""
    return torch.ones(length, depth + length, dtype=torch.bool).tril(diagonal=depth)


def common_beginning(prompts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The longest beginning common to all prompts when there are several different ones."""
    first, last = min(prompts), max(prompts)
    if first == last:
        return ()
    length = 0
    while length < min(len(first), len(last)) and first[length] == last[length]:
        length += 1
    return first[:length] if length >= _MIN_TRUNK else ()
