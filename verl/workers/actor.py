"""The trained policy on one rank: updating the weights from rewarded rows.

Knows the packed model forward and torch.distributed; neither Ray nor a rollout engine.
Shapes: N rows, H hidden size.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from verl.algorithm.gradient_balance import GradientBalance
from verl.algorithm.loss import ClipRange, kl_penalty, policy_loss, token_weights
from verl.config import ActorConfig, MicroBatchLimit
from verl.embedding.pooling import unit
from verl.models.fsdp import build_optimizer, build_scheduler, clip_gradient, combine_gradient, take_gradient
from verl.models.packing import PackedBatch
from verl.models.policy import PolicyModel, PolicyOutput
from verl.protocol import DataProto, is_trained, scored_length
from verl.workers.kept_forward import KeptForward, only_micro_batch
from verl.workers.micro_batches import micro_batches, sum_over_ranks
from verl.workers.scoring import score

MAX_SKIPPED_STEPS = 3
# Advantages below this come from rounding: the rewards of each group are equal.
_FLAT = 1e-6


@dataclass(frozen=True)
class _Totals:
    """Of a mini-batch, over all ranks."""

    tokens: float
    """Scored tokens of the trained rows: of their responses, or of their texts."""
    rows: float
    """Trained rows."""
    vector_norm: float
    """Of the gradient by the embeddings; 0 = there is no such gradient."""
    has_advantages: bool
    """Whether some row's advantage is not 0. If all are 0, the policy gradient is only the KL and entropy terms', and
    must not be measured."""


class Actor:
    """The policy with its optimizer.

    Args:
        policy: sharded already.
        temperature: the rollout's, by which log-probs divide the logits.
        max_response_length: for loss_agg_mode=seq-mean-token-sum-norm.
        total_steps: training steps of the run, for the learning-rate schedule.
        one_mini_batch: a training step has one, so the forward that scores it can be that of its first update.
    """

    def __init__(
        self,
        policy: PolicyModel,
        config: ActorConfig,
        temperature: float,
        max_response_length: int,
        total_steps: int,
        one_mini_batch: bool = False,
    ) -> None:
        self.policy = policy
        self._one_mini_batch = one_mini_batch
        self._kept = KeptForward(policy, temperature, config.has_kl_loss)
        self.config = config
        self.temperature = temperature
        self.max_response_length = max_response_length
        self.limit = config.update_limit
        low, high = config.clip_ratio_low, config.clip_ratio_high
        self.clip = ClipRange(
            low=config.clip_ratio if low is None else low,
            high=config.clip_ratio if high is None else high,
            dual=config.clip_ratio_c,
        )
        self.optimizer = build_optimizer(policy, config.optim)
        self.scheduler = build_scheduler(self.optimizer, config.optim, total_steps)
        self.skipped_in_a_row = 0
        self.balance = GradientBalance(config.embedding_grad_share, config.embedding_grad_every)

    def score(
        self, rows: DataProto, limit: MicroBatchLimit, embed: bool, log_probs: bool = True, train_anchors: bool = False
    ) -> DataProto:
        """As `scoring.score`, on rows that will be trained next; its forward is kept where it can be.

        Args:
            log_probs: the update will follow the policy gradient; entropies are computed too.
            train_anchors: the update will have the anchors too.
        """
        only = only_micro_batch(self.policy, rows, self.limit, train_anchors) if self._one_mini_batch else None
        if only is None:
            return score(self.policy, rows, limit, self.temperature, embed, entropy=log_probs, log_probs=log_probs)
        return self._kept.score(rows, only, limit, embed, log_probs)

    def update(self, rows: DataProto, num_mini_batches: int) -> dict[str, float]:
        """Train on the rows of one training step, and advance the learning-rate schedule.

        Takes ppo_epochs optimizer steps per mini-batch; returns metrics averaged over them, equal on all ranks.

        Args:
            rows: the rank's trained rows, with `mini_batch` 0..num_mini_batches-1; and anchors that are trained by
                `embedding_grad`. Not every step has this column, nor `advantages`: without these no policy gradient is
                followed. Of a KL term `ref_log_prob` is needed.

        Raises:
            FloatingPointError: the gradient was not finite in three steps in a row.
        """
        self.policy.train()
        mini_batch = rows.batch["mini_batch"].numpy()
        order = [i for _ in range(self.config.ppo_epochs) for i in range(num_mini_batches)]
        steps = [self._step(rows[mini_batch == i]) for i in order]
        # Float32 gradients of all weights would take memory from the engine until the next update.
        self.optimizer.zero_grad()
        names = dict.fromkeys(name for step in steps for name in step)
        metrics = {name: float(np.mean([step[name] for step in steps if name in step])) for name in names}
        metrics["skipped_steps"] = float(sum(step["skipped_steps"] for step in steps))
        metrics["lr"] = float(self.scheduler.get_last_lr()[0])
        self.scheduler.step()
        return metrics

    def _step(self, rows: DataProto) -> dict[str, float]:
        """One optimizer step on one mini-batch, of which `rows` is this rank's share."""
        total = _totals(rows)
        self.optimizer.zero_grad()
        norms: dict[str, float] = {}
        trains_policy = self._trains_policy(rows)
        if trains_policy and not total.vector_norm:
            sums = self._backward(rows, total)
        elif trains_policy and total.has_advantages and self.balance.is_due:
            sums, norms = self._backward_apart(rows, total)
        else:
            with_token_loss = trains_policy or self.config.has_kl_loss
            sums = self._backward(rows, total, with_token_loss, self.balance.scale(total.vector_norm))
        grad_norm = clip_gradient(self.policy, self.config.grad_clip)
        self._apply(grad_norm)
        reduced = sum_over_ranks(torch.tensor([float(value) for value in sums.values()]))
        metrics = dict(zip(sums, reduced.tolist(), strict=True))
        return {**metrics, **norms, "grad_norm": grad_norm, "skipped_steps": float(not math.isfinite(grad_norm))}

    def _trains_policy(self, rows: DataProto) -> bool:
        return self.config.trains_policy and "advantages" in rows.batch.keys()

    def _has_entropy(self, rows: DataProto) -> bool:
        return self._trains_policy(rows) and self.config.entropy_coeff != 0

    def _metric_names(self, rows: DataProto) -> list[str]:
        """Of the loss by tokens; the same on every rank, also on one that has no rows to compute them from."""
        names = ["kl_loss"] if self.config.has_kl_loss else []
        if not self._trains_policy(rows):
            return names
        names += ["entropy_loss"] if self._has_entropy(rows) else []
        return ["pg_loss", "pg_clipfrac", "pg_clipfrac_lower", "ppo_kl", *names]

    def _backward(
        self, rows: DataProto, total: _Totals, with_token_loss: bool = True, embedding: float = 0.0
    ) -> dict[str, Tensor]:
        """Add the gradient of the mini-batch's loss; return this rank's share of the metrics.

        Args:
            with_token_loss: whether `_token_loss` is part of it.
            embedding: what the loss on the embeddings is multiplied by.
        """
        sums = {name: torch.zeros(()) for name in self._metric_names(rows) if with_token_loss}
        for micro in micro_batches(rows, self.limit, self.policy):
            loss, parts = self._loss(rows[micro.rows], micro.packed, total, with_token_loss, embedding)
            # FSDP averages gradients over ranks; the loss is a sum over them.
            (loss * dist.get_world_size()).backward()
            for name, value in parts.items():
                sums[name] += value.cpu()
        return sums

    def _backward_apart(self, rows: DataProto, total: _Totals) -> tuple[dict[str, Tensor], dict[str, float]]:
        """As `_backward` with both losses, one after the other, to measure their gradients; returns the norms too."""
        sums = self._backward(rows, total)
        policy_norm = clip_gradient(self.policy, math.inf)
        policy_gradient = take_gradient(self.policy)
        self._backward(rows, total, with_token_loss=False, embedding=1.0)
        embedding_norm = clip_gradient(self.policy, math.inf)
        scale = self.balance.measure(policy_norm, embedding_norm, total.vector_norm)
        combine_gradient(self.policy, scale, policy_gradient)
        both = policy_norm + scale * embedding_norm
        return sums, {
            "policy_grad_norm": policy_norm,
            "embedding_grad_norm": embedding_norm,
            "embedding_grad_share": scale * embedding_norm / both if both else 0.0,
        }

    def _apply(self, grad_norm: float) -> None:
        """Step the optimizer, unless the gradient is not finite; stop after three such steps in a row."""
        if math.isfinite(grad_norm):
            self.skipped_in_a_row = 0
            self.optimizer.step()
            return
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= MAX_SKIPPED_STEPS:
            raise FloatingPointError(
                f"the gradient norm was {grad_norm} in {self.skipped_in_a_row} optimizer steps in a row; lower "
                "actor_rollout_ref.actor.optim.lr, or look at the rewards in samples/ of the last steps"
            )

    def _loss(
        self, rows: DataProto, packed: PackedBatch, total: _Totals, with_token_loss: bool, embedding: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The micro-batch's share of the mini-batch loss, and of its metrics."""
        out = self._kept.take(packed) or self.policy(
            packed, self.temperature, log_probs=with_token_loss, entropy=with_token_loss and self._has_entropy(rows),
            embeddings=embedding != 0,
        )  # fmt: skip
        if not len(rows):
            computed = out.log_probs if with_token_loss else out.embeddings
            assert computed is not None
            return 0 * computed.sum(), {}
        nothing: dict[str, Tensor] = {}
        loss, parts = self._token_loss(rows, packed, out, total) if with_token_loss else (torch.zeros(()), nothing)
        if embedding:
            assert out.embeddings is not None
            # Surrogate: its gradient by the weights equals the embedding loss's, as long as the weights are those of
            # scoring.
            grad = rows.batch["embedding_grad"].to(out.embeddings.device)
            loss = loss + embedding * (unit(out.embeddings) * grad).sum()
        return loss, parts

    def _token_loss(
        self, rows: DataProto, packed: PackedBatch, out: PolicyOutput, total: _Totals
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The part of the loss that trained rows have by their tokens; anchors have none."""
        config, device = self.config, packed.input_ids.device
        assert out.log_probs is not None
        where = (packed.score_row.cpu(), packed.score_column.cpu())
        weights = token_weights(
            _trained_lengths(rows), config.loss_agg_mode, total.tokens, total.rows, self.max_response_length
        ).to(device)
        loss, parts = torch.zeros((), device=device), dict[str, Tensor]()
        if self._trains_policy(rows):
            old, advantages = (rows.batch[k][where].to(device) for k in ("old_log_probs", "advantages"))
            losses, indicators = policy_loss(old, out.log_probs, advantages, self.clip)
            loss = (losses * weights).sum()
            token_share = 1.0 / total.tokens
            parts = {"pg_loss": loss.detach(), **{k: v.sum() * token_share for k, v in indicators.items()}}
        if config.has_kl_loss:
            kl = kl_penalty(out.log_probs, rows.batch["ref_log_prob"][where].to(device), config.kl_loss_type)
            loss = loss + config.kl_loss_coef * (kl * weights).sum()
            parts["kl_loss"] = (kl.detach() * weights).sum()
        if self._has_entropy(rows):
            assert out.entropy is not None
            loss = loss - config.entropy_coeff * (out.entropy * weights).sum()
            parts["entropy_loss"] = (out.entropy.detach() * weights).sum()
        return loss, parts


def _totals(rows: DataProto) -> _Totals:
    square = rows.batch["embedding_grad"].square().sum() if "embedding_grad" in rows.batch.keys() else 0.0
    with_advantage = (rows.batch["advantages"].abs() > _FLAT).sum() if "advantages" in rows.batch.keys() else 0.0
    lengths = _trained_lengths(rows).sum()
    own = torch.tensor([float(value) for value in (lengths, is_trained(rows).sum(), square, with_advantage)])
    tokens, count, square, with_advantage = sum_over_ranks(own).tolist()
    return _Totals(tokens, count, math.sqrt(square), with_advantage > 0)


def _trained_lengths(rows: DataProto) -> Tensor:
    """[N] int64: tokens with a log-prob, which anchors' do not have."""
    return scored_length(rows) * torch.from_numpy(is_trained(rows))
