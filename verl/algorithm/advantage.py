"""Advantages: token rewards of grouped rows to one number per response token.

Tensors and scalars in, tensors out: no config objects, no distributed calls, no batches.
Shapes: N rows, R response tokens, G groups.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from verl.algorithm.groups import group_mean_std, group_size, group_sum

EPSILON = 1e-6

AdvantageFn = Callable[..., Tensor]
_ADVANTAGE_ESTIMATORS: dict[str, AdvantageFn] = {}


def register_adv_est(name: str) -> Callable[[AdvantageFn], AdvantageFn]:
    """Make an estimator available as `algorithm.adv_estimator=name`.

    The file of a user's reward manager or reward function may do so: it is loaded before the name is looked up.

    It is called with `rewards` [N,R], `mask` [N,R] bool, `group` [N] int64 (0..G-1), `norm_by_std` and `gamma`,
    and returns advantages [N,R].

    Raises:
        ValueError: another module has taken the name.
    """

    def register(fn: AdvantageFn) -> AdvantageFn:
        taken = _ADVANTAGE_ESTIMATORS.get(name)
        # A second run in one process executes the user's file again.
        if taken is not None and taken.__module__ != fn.__module__:
            raise ValueError(f"an advantage estimator named {name!r} exists already")
        _ADVANTAGE_ESTIMATORS[name] = fn
        return fn

    return register


def get_adv_estimator_fn(name: str) -> AdvantageFn:
    """Raises ValueError with the known names for an unknown one."""
    if name not in _ADVANTAGE_ESTIMATORS:
        raise ValueError(
            f"algorithm.adv_estimator={name} is unknown; known: {', '.join(sorted(_ADVANTAGE_ESTIMATORS))}"
        )
    return _ADVANTAGE_ESTIMATORS[name]


@register_adv_est("grpo")
def grpo(rewards: Tensor, mask: Tensor, group: Tensor, norm_by_std: bool = True, gamma: float = 1.0) -> Tensor:
    """Reward minus the group's mean, optionally over its std (arXiv 2402.03300)."""
    row_rewards = _row_rewards(rewards, mask)
    mean, std = group_mean_std(row_rewards, group)
    advantages = row_rewards - mean
    return _spread(advantages / (std + EPSILON) if norm_by_std else advantages, mask)


@register_adv_est("rloo")
def rloo(rewards: Tensor, mask: Tensor, group: Tensor, norm_by_std: bool = True, gamma: float = 1.0) -> Tensor:
    """Reward minus the mean of the group's other rows (arXiv 2402.14740); a group of one keeps its reward."""
    row_rewards = _row_rewards(rewards, mask)
    size = group_size(group)[group]
    others = (group_sum(row_rewards, group)[group] - row_rewards) / (size - 1).clamp(min=1)
    return _spread(row_rewards - others, mask)


@register_adv_est("grpo_passk")
def grpo_passk(rewards: Tensor, mask: Tensor, group: Tensor, norm_by_std: bool = True, gamma: float = 1.0) -> Tensor:
    """The best row of a group gets best minus second best, all others 0 (arXiv 2503.19595)."""
    row_rewards = _row_rewards(rewards, mask)
    _, std = group_mean_std(row_rewards, group)
    advantages = torch.zeros_like(row_rewards)
    for g in range(int(group.max()) + 1):
        members = (group == g).nonzero().flatten()
        if len(members) < 2:
            raise ValueError("grpo_passk needs groups of two or more rows; set actor_rollout_ref.rollout.n >= 2")
        top = row_rewards[members].topk(2)
        best = members[top.indices[0]]
        gain = top.values[0] - top.values[1]
        advantages[best] = gain / (std[best] + EPSILON) if norm_by_std else gain
    return _spread(advantages, mask)


@register_adv_est("opo")
def opo(rewards: Tensor, mask: Tensor, group: Tensor, norm_by_std: bool = True, gamma: float = 1.0) -> Tensor:
    """Reward minus the group's length-weighted mean, the variance-optimal baseline (arXiv 2505.23585)."""
    row_rewards = _row_rewards(rewards, mask)
    length = mask.sum(1).float()
    baseline = group_sum(length * row_rewards, group) / group_sum(length, group)
    alone = group_size(group) == 1
    return _spread(row_rewards - baseline.masked_fill(alone, 0.0)[group], mask)


@register_adv_est("reinforce_plus_plus_baseline")
def reinforce_plus_plus_baseline(
    rewards: Tensor, mask: Tensor, group: Tensor, norm_by_std: bool = True, gamma: float = 1.0
) -> Tensor:
    """Reward minus the group's mean, whitened over all response tokens of the batch (arXiv 2501.03262)."""
    row_rewards = _row_rewards(rewards, mask)
    mean, _ = group_mean_std(row_rewards, group)
    return _whiten(_spread(row_rewards - mean, mask), mask)


@register_adv_est("reinforce_plus_plus")
def reinforce_plus_plus(
    rewards: Tensor, mask: Tensor, group: Tensor, norm_by_std: bool = True, gamma: float = 1.0
) -> Tensor:
    """Discounted sum of the rewards still to come, whitened over all response tokens (arXiv 2501.03262)."""
    returns = torch.zeros_like(rewards)
    running = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        running = (rewards[:, t] + gamma * running) * mask[:, t]
        returns[:, t] = running
    return _whiten(returns, mask)


def _row_rewards(rewards: Tensor, mask: Tensor) -> Tensor:
    """[N]: sum of each row's token rewards."""
    return (rewards * mask).sum(1)


def _spread(advantages: Tensor, mask: Tensor) -> Tensor:
    """[N] -> [N,R]: a row's advantage on each of its response tokens."""
    return advantages.unsqueeze(1) * mask


def _whiten(values: Tensor, mask: Tensor) -> Tensor:
    """Zero mean and unit (unbiased) variance over the masked entries; 0 elsewhere. In float64, as group_mean_std."""
    count = mask.sum()
    exact = values.double()
    mean = (exact * mask).sum() / count
    variance = ((exact - mean) ** 2 * mask).sum() / (count - 1).clamp(min=1)
    return ((exact - mean) * torch.rsqrt(variance + 1e-8) * mask).to(values.dtype)
