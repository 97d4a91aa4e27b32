"""A micro-batch without padding, in which a prompt that several rows have is computed once.

The tokens of a micro-batch form one line, cut into segments. A segment attends to itself (causally) and to its
ancestors: a response to its prompt, and a prompt to the trunk, the beginning that all prompts of the micro-batch share
(the system turn). So a group of n rationales costs one prompt and n responses, and the system turn is computed once per
micro-batch. Hidden states and gradients are those of separate rows.

Shape letters: N rows, K packed tokens, S scored response tokens, M pooled positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

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
    """Whether to compute log-probs of the response."""


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
    """[M] int64, its row."""
    score_token: torch.Tensor
    """[S] int64, position in the line whose hidden state predicts a scored response token."""
    score_target: torch.Tensor
    """[S] int64, that response token's id."""
    score_row: torch.Tensor
    """[S] int64, its row."""
    score_column: torch.Tensor
    """[S] int64, its position in the response."""
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


def pack(rows: Sequence[Row], share_prompts: bool) -> PackedBatch:
    """Put `rows` into one line.

    Args:
        share_prompts: compute equal prompts, and the beginning common to all, once. Kernels that support only
            separate rows (flash-attention) need False: then every row is one segment.
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
    pool_token, pool_row = [], []
    score: list[tuple[int, int, int, int]] = []
    for i, (row, leaf) in enumerate(zip(rows, leaves, strict=True)):
        positions = leaf.packed_positions(0)
        pooled = positions[row.pool_start :]
        pool_token += pooled
        pool_row += [i] * len(pooled)
        if row.scored:
            predicting = positions[len(row.prompt) - 1 : -1] if row.response else []
            score += [(p, t, i, c) for c, (p, t) in enumerate(zip(predicting, row.response, strict=True))]
    columns = torch.tensor(score, dtype=torch.int64).reshape(-1, 4).unbind(1)
    return PackedBatch(
        input_ids=torch.tensor([builder.ids], dtype=torch.int64),
        position_ids=torch.tensor([builder.positions], dtype=torch.int64),
        segments=builder.segments,
        pool_token=torch.tensor(pool_token, dtype=torch.int64),
        pool_row=torch.tensor(pool_row, dtype=torch.int64),
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
