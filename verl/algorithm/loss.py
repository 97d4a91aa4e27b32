"""The clipped policy loss, its token weights, importance weights, and KL estimators.

Tensors and scalars in, tensors out: no config objects, no distributed calls, no batches.
Shapes: N rows, S response tokens of all rows in one line.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


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
    """The KL coefficient in the reward: fixed, or moved towards a target (arXiv 1909.08593, section 2.2).

    Args:
        coef: the coefficient to begin with.
        adaptive: False = it stays as it is.
        target: KL that an adaptive one is to hold.
        horizon: samples over which an adaptive one moves; the larger, the slower.
    """

    def __init__(self, coef: float, adaptive: bool, target: float, horizon: int) -> None:
        self.coef = coef
        self.adaptive = adaptive
        self.target = target
        self.horizon = horizon

    def update(self, current_kl: float, num_samples: int) -> None:
        """Raise an adaptive coefficient when the KL is above the target, and lower it when it is below.

        Args:
            current_kl: the KL of a step, a mean over its rows.
            num_samples: trained rows of the step.
        """
        if self.adaptive:
            error = max(-0.2, min(0.2, current_kl / self.target - 1))
            self.coef *= 1 + error * num_samples / self.horizon
