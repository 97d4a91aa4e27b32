"""The trained policy on one rank: updating the weights from rewarded rows.

Knows the packed model forward and torch.distributed; neither Ray nor a rollout engine.
Shapes: N rows, R response tokens, S response tokens of a micro-batch in one line, H hidden size.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from verl.algorithm.gradient_balance import GradientBalance
from verl.algorithm.loss import ClipRange, kl_penalty, policy_loss, token_weights
from verl.config import ActorConfig
from verl.embedding.pooling import unit
from verl.models.fsdp import build_optimizer, build_scheduler, clip_gradient, combine_gradient, take_gradient
from verl.models.packing import PackedBatch
from verl.models.policy import PolicyModel, PolicyOutput
from verl.protocol import DataProto, is_trained
from verl.workers.kept_forward import KeptForward, only_micro_batch, score_and_keep
from verl.workers.micro_batches import MicroBatchLimit, micro_batches, sum_over_ranks
from verl.workers.scoring import score

MAX_SKIPPED_STEPS = 3


@dataclass(frozen=True)
class _Totals:
    """Of a mini-batch, over all ranks."""

    tokens: float
    """Response tokens of the trained rows."""
    rows: float
    """Trained rows."""
    embedding_grad: float
    """Norm of the gradient by the embeddings; 0 = there is no such gradient."""


class Actor:
    """The policy with its optimizer.

    Args:
        policy: sharded already.
        temperature: the rollout's, by which log-probs divide the logits.
        max_response_length: for loss_agg_mode=seq-mean-token-sum-norm.
        total_steps: training steps of the run, for the learning-rate schedule.
        one_update: a training step is one optimizer step.
    """

    def __init__(
        self,
        policy: PolicyModel,
        config: ActorConfig,
        temperature: float,
        max_response_length: int,
        total_steps: int,
        one_update: bool = False,
    ) -> None:
        self.policy = policy
        self._one_update = one_update
        self._kept = KeptForward()
        self.config = config
        self.temperature = temperature
        self.max_response_length = max_response_length
        self.limit = MicroBatchLimit(*config.update_limit)
        low, high = config.clip_ratio_low, config.clip_ratio_high
        self.clip = ClipRange(
            low=config.clip_ratio if low is None else low,
            high=config.clip_ratio if high is None else high,
            dual=config.clip_ratio_c,
        )
        self.optimizer = build_optimizer(policy, config.optim)
        self.scheduler = build_scheduler(self.optimizer, config.optim, total_steps)
        # Of the policy loss; the same on every rank, also on one that has no rows to compute them from.
        self.metric_names = ["pg_loss", "pg_clipfrac", "pg_clipfrac_lower", "ppo_kl"]
        self.metric_names += ["kl_loss"] if self._has_kl_loss else []
        self.metric_names += ["entropy_loss"] if config.entropy_coeff != 0 else []
        self.skipped_in_a_row = 0
        self.balance = GradientBalance(config.embedding_grad_share, config.embedding_grad_every)

    @property
    def _has_kl_loss(self) -> bool:
        return self.config.use_kl_loss and self.config.kl_loss_coef != 0

    def score(
        self, rows: DataProto, limit: MicroBatchLimit, embed: bool, log_probs: bool = True, train_anchors: bool = False
    ) -> DataProto:
        """As `scoring.score`, on rows that will be trained next; its forward is kept where it can be.

        Args:
            log_probs: the update will follow the policy gradient; entropies are computed too.
            train_anchors: the update will have the anchors too.
        """
        only = only_micro_batch(self.policy, rows, self.limit, train_anchors) if self._one_update else None
        if only is None:
            return score(self.policy, rows, limit, self.temperature, embed, entropy=log_probs, log_probs=log_probs)
        return score_and_keep(self.policy, rows, only, limit, self.temperature, embed, log_probs, self._kept)

    def update(self, rows: DataProto, num_mini_batches: int) -> dict[str, float]:
        """Train on the rows of one training step, and advance the learning-rate schedule.

        Takes ppo_epochs optimizer steps per mini-batch; returns metrics averaged over them, equal on all ranks.

        Args:
            rows: the rank's trained rows, with `mini_batch` 0..num_mini_batches-1; and anchors that are trained by
                `embedding_grad`, a column that not every step has. It alone is followed where no trained row has a
                rationale, and with embedding_grad_share=1.

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
        trains_policy = self.config.trains_policy and total.tokens > 0
        if trains_policy and not total.embedding_grad:
            sums = self._backward(rows, total)
        elif trains_policy and self.balance.is_due:
            sums, norms = self._backward_apart(rows, total)
        else:
            sums = self._backward(rows, total, trains_policy, self.balance.scale(total.embedding_grad))
        grad_norm = clip_gradient(self.policy, self.config.grad_clip)
        self._apply(grad_norm)
        reduced = sum_over_ranks(torch.tensor([float(value) for value in sums.values()]))
        metrics = dict(zip(sums, reduced.tolist(), strict=True))
        return {**metrics, **norms, "grad_norm": grad_norm, "skipped_steps": float(not math.isfinite(grad_norm))}

    def _backward(
        self, rows: DataProto, total: _Totals, policy: bool = True, embedding: float = 0.0
    ) -> dict[str, Tensor]:
        """Add the gradient of the mini-batch's loss; return this rank's share of the metrics.

        Args:
            policy: whether the policy loss is part of it.
            embedding: what the loss on the embeddings is multiplied by.
        """
        sums = {name: torch.zeros(()) for name in self.metric_names if policy}
        for micro in micro_batches(rows, self.limit, self.policy):
            loss, parts = self._loss(rows[micro.rows], micro.packed, total, policy, embedding)
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
        self._backward(rows, total, policy=False, embedding=1.0)
        embedding_norm = clip_gradient(self.policy, math.inf)
        scale = self.balance.measure(policy_norm, embedding_norm, total.embedding_grad)
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
        self, rows: DataProto, packed: PackedBatch, total: _Totals, policy: bool, embedding: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The micro-batch's share of the mini-batch loss, and of its metrics."""
        out = self._kept.take(packed) or self.policy(
            packed, self.temperature, log_probs=policy, entropy=policy and self.config.entropy_coeff != 0,
            embeddings=embedding != 0,
        )  # fmt: skip
        if not len(rows):
            computed = out.log_probs if policy else out.embeddings
            assert computed is not None
            return 0 * computed.sum(), {}
        nothing: dict[str, Tensor] = {}
        loss, parts = self._policy_loss(rows, packed, out, total) if policy else (torch.zeros(()), nothing)
        if embedding:
            assert out.embeddings is not None
            # Its gradient at the weights of the scoring is that of the loss whose gradient by the vectors this is.
            grad = rows.batch["embedding_grad"].to(out.embeddings.device)
            loss = loss + embedding * (unit(out.embeddings) * grad).sum()
        return loss, parts

    def _policy_loss(
        self, rows: DataProto, packed: PackedBatch, out: PolicyOutput, total: _Totals
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The part of the loss that trained rows have by their tokens; anchors have none."""
        config, device = self.config, packed.input_ids.device
        assert out.log_probs is not None
        where = (packed.score_row.cpu(), packed.score_column.cpu())
        old, advantages = (rows.batch[k][where].to(device) for k in ("old_log_probs", "advantages"))
        weights = token_weights(
            _trained_lengths(rows), config.loss_agg_mode, total.tokens, total.rows, self.max_response_length
        ).to(device)
        losses, indicators = policy_loss(old, out.log_probs, advantages, self.clip)
        loss = (losses * weights).sum()
        token_share = 1.0 / total.tokens
        parts = {"pg_loss": loss.detach(), **{k: v.sum() * token_share for k, v in indicators.items()}}
        if self._has_kl_loss:
            kl = kl_penalty(out.log_probs, rows.batch["ref_log_prob"][where].to(device), config.kl_loss_type)
            loss = loss + config.kl_loss_coef * (kl * weights).sum()
            parts["kl_loss"] = (kl.detach() * weights).sum()
        if config.entropy_coeff != 0:
            assert out.entropy is not None
            loss = loss - config.entropy_coeff * (out.entropy * weights).sum()
            parts["entropy_loss"] = (out.entropy.detach() * weights).sum()
        return loss, parts


def _totals(rows: DataProto) -> _Totals:
    square = rows.batch["embedding_grad"].square().sum() if "embedding_grad" in rows.batch.keys() else 0.0
    own = torch.tensor([float(_trained_lengths(rows).sum()), float(is_trained(rows).sum()), float(square)])
    tokens, count, square = sum_over_ranks(own).tolist()
    return _Totals(tokens, count, math.sqrt(square))


def _trained_lengths(rows: DataProto) -> Tensor:
    """[N] int64: response tokens with a log-prob, which anchors' do not have."""
    return rows.batch["response_length"] * torch.from_numpy(is_trained(rows))
