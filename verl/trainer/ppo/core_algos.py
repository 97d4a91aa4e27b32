"""The algorithms: group advantages, the clipped policy loss, KL estimators, loss aggregation.

Tensors and scalars in, tensors out: no config objects, no distributed calls, no rows.
Shapes: N rows, R response tokens, S response tokens of all rows in one line.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

EPSILON = 1e-6

AdvantageFn = Callable[..., Tensor]
_ADVANTAGE_ESTIMATORS: dict[str, AdvantageFn] = {}


def register_adv_est(name: str) -> Callable[[AdvantageFn], AdvantageFn]:
    """Make an estimator available as `algorithm.adv_estimator=name`.

    It is called with `rewards` [N,R], `mask` [N,R] bool, `group` [N] int64 (0..G-1), `norm_by_std` and `gamma`,
    and returns advantages [N,R].

    Raises:
        ValueError: the name is taken.
    """

    def register(fn: AdvantageFn) -> AdvantageFn:
        if name in _ADVANTAGE_ESTIMATORS:
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


def group_index(uid: Iterable[Any]) -> Tensor:
    """[N] int64: groups numbered 0..G-1 by first appearance of their uid."""
    seen: dict[Any, int] = {}
    return torch.tensor([seen.setdefault(u, len(seen)) for u in uid], dtype=torch.int64)


def group_sum(values: Tensor, group: Tensor) -> Tensor:
    """[G]: sum of `values` [N] over each group."""
    return values.new_zeros(int(group.max()) + 1).index_add(0, group, values)


def group_size(group: Tensor) -> Tensor:
    """[G] float32: rows of each group."""
    return torch.bincount(group).float()


def group_mean_std(scores: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation of each row's group, both [N]; a group of one has mean 0 and std 1.

    Computed in float64: in float32 the mean of equal scores can miss them by a rounding, which a division by
    their tiny standard deviation would blow up to a real advantage.
    """
    size = group_size(group).double()
    exact = scores.double()
    mean = group_sum(exact, group) / size
    squares = group_sum((exact - mean[group]) ** 2, group)
    std = (squares / (size - 1).clamp(min=1)).sqrt()
    alone = size == 1
    mean, std = mean.masked_fill(alone, 0.0)[group], std.masked_fill(alone, 1.0)[group]
    return mean.to(scores.dtype), std.to(scores.dtype)


@register_adv_est("grpo")
def grpo(rewards: Tensor, mask: Tensor, group: Tensor, norm_by_std: bool = True, gamma: float = 1.0) -> Tensor:
    """Score minus the group's mean, optionally over its std (arXiv 2402.03300)."""
    scores = _scores(rewards, mask)
    mean, std = group_mean_std(scores, group)
    advantages = scores - mean
    return _spread(advantages / (std + EPSILON) if norm_by_std else advantages, mask)


@register_adv_est("rloo")
def rloo(rewards: Tensor, mask: Tensor, group: Tensor, norm_by_std: bool = True, gamma: float = 1.0) -> Tensor:
    """Score minus the mean of the group's other rows (arXiv 2402.14740); a group of one keeps its score."""
    scores = _scores(rewards, mask)
    size = group_size(group)[group]
    others = (group_sum(scores, group)[group] - scores) / (size - 1).clamp(min=1)
    return _spread(scores - others, mask)


@register_adv_est("grpo_passk")
def grpo_passk(rewards: Tensor, mask: Tensor, group: Tensor, norm_by_std: bool = True, gamma: float = 1.0) -> Tensor:
    """The best row of a group gets best minus second best, all others 0 (arXiv 2503.19595)."""
    scores = _scores(rewards, mask)
    _, std = group_mean_std(scores, group)
    advantages = torch.zeros_like(scores)
    for g in range(int(group.max()) + 1):
        members = (group == g).nonzero().flatten()
        if len(members) < 2:
            raise ValueError("grpo_passk needs groups of two or more rows; set actor_rollout_ref.rollout.n >= 2")
        top = scores[members].topk(2)
        best = members[top.indices[0]]
        gain = top.values[0] - top.values[1]
        advantages[best] = gain / (std[best] + EPSILON) if norm_by_std else gain
    return _spread(advantages, mask)


@register_adv_est("opo")
def opo(rewards: Tensor, mask: Tensor, group: Tensor, norm_by_std: bool = True, gamma: float = 1.0) -> Tensor:
    """Score minus the group's length-weighted mean, the variance-optimal baseline (arXiv 2505.23585)."""
    scores = _scores(rewards, mask)
    length = mask.sum(1).float()
    baseline = group_sum(length * scores, group) / group_sum(length, group)
    alone = group_size(group) == 1
    return _spread(scores - baseline.masked_fill(alone, 0.0)[group], mask)


@register_adv_est("reinforce_plus_plus_baseline")
def reinforce_plus_plus_baseline(
    rewards: Tensor, mask: Tensor, group: Tensor, norm_by_std: bool = True, gamma: float = 1.0
) -> Tensor:
    """Score minus the group's mean, whitened over all response tokens of the batch (arXiv 2501.03262)."""
    scores = _scores(rewards, mask)
    mean, _ = group_mean_std(scores, group)
    return _whiten(_spread(scores - mean, mask), mask)


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


def _scores(rewards: Tensor, mask: Tensor) -> Tensor:
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


@dataclass(frozen=True)
class ClipRange:
    low: float
    high: float
    dual: float
    """Bound c of the dual clip (arXiv 1912.09729), above 1."""


def truncated_importance_weights(trainer: Tensor, engine: Tensor, cap: float) -> Tensor:
    """min(p_trainer / p_engine, cap) of each token: what corrects for sampling from the engine's distribution
    (truncated importance sampling, fengyao.notion.site/off-policy-rl).

    Args:
        trainer, engine: log-probs of the same tokens.
        cap: largest weight.
    """
    return (trainer - engine).exp().clamp(max=cap)


def policy_loss(
    old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, clip: ClipRange
) -> tuple[Tensor, dict[str, Tensor]]:
    """Dual-clip PPO loss of each token, not aggregated.

    Args:
        old_log_prob, log_prob, advantages: [S] float32.

    Returns:
        Losses [S], and per-token indicators [S] float32 to be averaged like the loss: `pg_clipfrac` (the
        clipped term was the larger), `pg_clipfrac_lower` (the dual clip took over), `ppo_kl` (-log ratio).
    """
    log_ratio = (log_prob - old_log_prob).clamp(-20.0, 20.0)
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip.low, 1 + clip.high)
    worst = torch.maximum(plain, clipped)
    bounded = torch.minimum(worst, -advantages * clip.dual)
    losses = torch.where(advantages < 0, bounded, worst)
    return losses, {
        "pg_clipfrac": (clipped > plain).float(),
        "pg_clipfrac_lower": ((worst > -advantages * clip.dual) & (advantages < 0)).float(),
        "ppo_kl": -log_ratio.detach(),
    }


def kl_penalty(log_prob: Tensor, ref_log_prob: Tensor, kind: str) -> Tensor:
    """Per-token estimate of KL(policy, reference) (Schulman, "Approximating KL divergence").

    Args:
        kind: k1 or kl; abs; k2 or mse; k3 or low_var_kl.

    Raises:
        ValueError: unknown kind.
    """
    difference = log_prob - ref_log_prob
    if kind in ("k1", "kl"):
        return difference
    if kind == "abs":
        return difference.abs()
    if kind in ("k2", "mse"):
        return 0.5 * difference.square()
    if kind in ("k3", "low_var_kl"):
        inverse = (-difference).clamp(-20.0, 20.0)
        return (inverse.exp() - inverse - 1).clamp(-10.0, 10.0)
    raise ValueError(f"KL kind {kind!r} is unknown; known: k1 (kl), abs, k2 (mse), k3 (low_var_kl)")


def token_weights(lengths: Tensor, mode: str, total_tokens: float, total_rows: float, max_length: int) -> Tensor:
    """Weight of each response token so that the loss of a mini-batch is the weighted sum over its tokens.

    The denominators count the whole mini-batch, over all micro-batches and ranks, so that cutting it up
    differently changes nothing.

    Args:
        lengths: [N] response lengths of the rows at hand, whose tokens stand in one line.
        mode: token-mean: mean over tokens. seq-mean-token-sum: mean over rows of sums.
            seq-mean-token-mean: mean over rows of means. seq-mean-token-sum-norm: sum over max_length.
        total_tokens, total_rows: of the whole mini-batch.
        max_length: data.max_response_length.

    Returns:
        [S] float32.
    """
    if mode == "token-mean":
        per_row = torch.full_like(lengths, 1.0 / total_tokens, dtype=torch.float32)
    elif mode == "seq-mean-token-sum":
        per_row = torch.full_like(lengths, 1.0 / total_rows, dtype=torch.float32)
    elif mode == "seq-mean-token-mean":
        per_row = 1.0 / (lengths.clamp(min=1).float() * total_rows)
    elif mode == "seq-mean-token-sum-norm":
        per_row = torch.full_like(lengths, 1.0 / max_length, dtype=torch.float32)
    else:
        raise ValueError(f"loss_agg_mode {mode!r} is unknown")
    return per_row.repeat_interleave(lengths)


class KlController:
    """The KL coefficient in the reward: fixed, or moved towards a target (arXiv 1909.08593, section 2.2)."""

    def __init__(self, coef: float, adaptive: bool, target: float, horizon: int) -> None:
        self.coef = coef
        self.adaptive = adaptive
        self.target = target
        self.horizon = horizon

    def update(self, current_kl: float, num_samples: int) -> None:
        if self.adaptive:
            error = max(-0.2, min(0.2, current_kl / self.target - 1))
            self.coef *= 1 + error * num_samples / self.horizon
