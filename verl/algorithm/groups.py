"""Groups: the trained rows of one sample, whose rewards GRPO compares with each other.

Shapes: N rows, G groups.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from verl.protocol import DataProto


def group_index(uid: Iterable[Any]) -> Tensor:
    """[N] int64: groups numbered 0..G-1 by first appearance of their uid."""
    seen: dict[Any, int] = {}
    return torch.tensor([seen.setdefault(u, len(seen)) for u in uid], dtype=torch.int64)


def first_rows(group: Tensor) -> Tensor:
    """[G] int64: the first row of each group."""
    return torch.from_numpy(np.unique(group.numpy(), return_index=True)[1])


def group_sum(values: Tensor, group: Tensor) -> Tensor:
    """[G,...]: sum of `values` [N,...] over each group."""
    return values.new_zeros(int(group.max()) + 1, *values.shape[1:]).index_add(0, group, values)


def group_size(group: Tensor) -> Tensor:
    """[G] float32: rows of each group."""
    return torch.bincount(group).float()


def group_mean_std(rewards: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation of each row's group, both [N]; a group of one has mean 0 and std 1.

    Computed in float64: in float32 the mean of equal rewards can miss them by a rounding, which a division by
    their tiny standard deviation would blow up to a real advantage.
    """
    size = group_size(group).double()
    exact = rewards.double()
    mean = group_sum(exact, group) / size
    squares = group_sum((exact - mean[group]) ** 2, group)
    std = (squares / (size - 1).clamp(min=1)).sqrt()
    alone = size == 1
    mean, std = mean.masked_fill(alone, 0.0)[group], std.masked_fill(alone, 1.0)[group]
    return mean.to(rewards.dtype), std.to(rewards.dtype)


def within_group(values: Tensor, group: Tensor) -> Tensor:
    """[N] float64: `values` minus the mean of their group, which is all of them that an advantage sees."""
    exact = values.double()
    return exact - (group_sum(exact, group) / group_size(group).double())[group]


def within_group_correlation(first: Tensor, second: Tensor, group: Tensor) -> float | None:
    """Pearson's correlation of two series [N] within the groups; None where one is constant in every group."""
    a, b = within_group(first, group), within_group(second, group)
    spread = float(a.square().sum() * b.square().sum())
    # Rewards that differ by rounding alone are equal.
    return float((a * b).sum()) / spread**0.5 if spread > 1e-24 else None


def groups_of(rows: DataProto) -> Tensor:
    """[N] int64: the group of each row, by the uid of its sample."""
    return group_index(rows.non_tensor_batch["uid"])
