"""The trained policy on one rank: scoring rows, and updating the weights from them.

Knows the packed model forward and torch.distributed; neither Ray nor a rollout engine.
Shapes: N rows, R response tokens, S scored response tokens of a micro-batch, H hidden size.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from verl.algorithm.loss import ClipRange, kl_penalty, policy_loss, token_weights
from verl.config import ActorConfig
from verl.embedding.pooling import unit
from verl.models.fsdp import build_optimizer, build_scheduler, clip_gradient
from verl.models.packing import PackedBatch, Row, pack
from verl.models.policy import PolicyModel, PolicyOutput
from verl.protocol import DataProto
from verl.utils.seqlen_balancing import pack_rows

MAX_SKIPPED_STEPS = 3
# What tells one packed line of rows from another.
_SAME_LINE = ("input_ids", "position_ids", "score_token", "score_target", "score_row")


@dataclass(frozen=True)
class MicroBatchLimit:
    """How many rows one forward takes: by tokens, or by rows."""

    max_tokens: int | None
    max_rows: int | None


@dataclass
class MicroBatch:
    rows: list[int]
    """Positions in the rank's rows, in packed order; empty on a rank that only keeps the others company."""
    packed: PackedBatch


def token_rows(rows: DataProto) -> list[Row]:
    """The unpadded token ids of each row; log-probs are wanted for trained rows."""
    batch, roles = rows.batch, rows.non_tensor_batch["role"]
    width = batch["prompts"].shape[1]
    return [
        Row(
            prompt=tuple(prompt[width - length :].tolist()),
            response=tuple(response[:size].tolist()),
            pool_start=start,
            scored=role == "positive",
        )
        for prompt, length, response, size, start, role in zip(
            batch["prompts"],
            batch["prompt_length"].tolist(),
            batch["responses"],
            batch["response_length"].tolist(),
            batch["text_start"].tolist(),
            roles,
            strict=True,
        )
    ]


def micro_batches(rows: DataProto, limit: MicroBatchLimit, policy: PolicyModel) -> Iterator[MicroBatch]:
    """Pack a rank's rows into micro-batches: the same number of them on every rank.

    FSDP gathers weights in every forward, so a rank that runs out of rows goes on with a one-token row
    whose result counts for nothing.
    """
    tokens = token_rows(rows)
    prompts, responses = [row.prompt for row in tokens], [len(row.response) for row in tokens]
    parts = pack_rows(prompts, [len(prompt) for prompt in prompts], responses, limit.max_tokens, limit.max_rows)
    count = torch.tensor(len(parts), device=_collective_device())
    dist.all_reduce(count, dist.ReduceOp.MAX)
    company = Row(prompt=(0,), response=(), pool_start=0, scored=True)
    for i in range(int(count)):
        part = parts[i] if i < len(parts) else []
        packed = pack([tokens[row] for row in part] or [company], policy.shares_prompts)
        yield MicroBatch(part, packed.to(policy.device))


@torch.no_grad()
def score(
    policy: PolicyModel,
    rows: DataProto,
    limit: MicroBatchLimit,
    temperature: float,
    embed: bool,
    entropy: bool,
) -> DataProto:
    """One packed forward over a rank's rows.

    Returns:
        Rows in the same order with `log_probs` [N,R] float32 (0 outside the responses of trained rows), and
        where asked for `embeddings` [N,H] float32 and `entropy` [N] float32 (mean over the response).
    """
    policy.eval()
    columns = _ScoreColumns(rows, policy.lm.config.get_text_config().hidden_size if embed else None, entropy)
    for micro in micro_batches(rows, limit, policy):
        columns.fill(micro, policy(micro.packed, temperature, entropy=entropy, embeddings=embed))
    return columns.finish()


class _ScoreColumns:
    """The columns that `score` returns, filled micro-batch by micro-batch.

    Args:
        hidden_size: None = no embeddings.
    """

    def __init__(self, rows: DataProto, hidden_size: int | None, entropy: bool) -> None:
        num_rows, width = rows.batch["responses"].shape
        self._length = rows.batch["response_length"].clamp(min=1)
        self._log_probs = torch.zeros(num_rows, width)
        self._entropies = torch.zeros(num_rows, width) if entropy else None
        self._embeddings = torch.zeros(num_rows, hidden_size) if hidden_size else None

    def fill(self, micro: MicroBatch, out: PolicyOutput) -> None:
        if not micro.rows:
            return
        position = torch.tensor(micro.rows)
        where = (position[micro.packed.score_row.cpu()], micro.packed.score_column.cpu())
        if out.log_probs is not None:
            self._log_probs[where] = out.log_probs.detach().cpu()
        if self._entropies is not None and out.entropy is not None:
            self._entropies[where] = out.entropy.detach().cpu()
        if self._embeddings is not None and out.embeddings is not None:
            self._embeddings[position] = unit(out.embeddings.detach()).cpu()

    def finish(self) -> DataProto:
        tensors = {"log_probs": self._log_probs}
        if self._entropies is not None:
            tensors["entropy"] = self._entropies.sum(1) / self._length
        if self._embeddings is not None:
            tensors["embeddings"] = self._embeddings
        return DataProto.from_dict(tensors)


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
        self._ahead: tuple[PackedBatch, PolicyOutput] | None = None
        self.config = config
        self.temperature = temperature
        self.max_response_length = max_response_length
        self.limit = MicroBatchLimit(
            config.ppo_max_token_len_per_gpu if config.use_dynamic_bsz else None,
            None if config.use_dynamic_bsz else config.ppo_micro_batch_size_per_gpu,
        )
        low, high = config.clip_ratio_low, config.clip_ratio_high
        self.clip = ClipRange(
            low=config.clip_ratio if low is None else low,
            high=config.clip_ratio if high is None else high,
            dual=config.clip_ratio_c,
        )
        self.optimizer = build_optimizer(policy, config.optim)
        self.scheduler = build_scheduler(self.optimizer, config.optim, total_steps)
        # The same on every rank, also on one that has no rows to compute them from.
        self.metric_names = ["pg_loss", "pg_clipfrac", "pg_clipfrac_lower", "ppo_kl"]
        self.metric_names += ["kl_loss"] if self._has_kl_loss else []
        self.metric_names += ["entropy_loss"] if config.entropy_coeff != 0 else []
        self.skipped_in_a_row = 0

    @property
    def _has_kl_loss(self) -> bool:
        return self.config.use_kl_loss and self.config.kl_loss_coef != 0

    def score(self, rows: DataProto, limit: MicroBatchLimit, embed: bool) -> DataProto:
        """As the function `score`, with entropies, on rows that will be trained next.

        Where the update will be one optimizer step on one micro-batch, its forward is this one: nothing changes in
        between, so the graph of the trained rows is kept for it.
        """
        is_trained = rows.non_tensor_batch["role"] == "positive"
        anchors, trained = (np.flatnonzero(which).tolist() for which in (~is_trained, is_trained))
        micro = self._only_forward(rows[trained]) if trained else None
        if micro is None:
            return score(self.policy, rows, limit, self.temperature, embed=embed, entropy=True)
        hidden_size = self.policy.lm.config.get_text_config().hidden_size if embed else None
        columns = _ScoreColumns(rows, hidden_size, entropy=True)
        self.policy.eval()
        with torch.no_grad():
            for part in micro_batches(rows[anchors], limit, self.policy) if embed and anchors else ():
                out = self.policy(part.packed, log_probs=False, embeddings=True)
                columns.fill(MicroBatch([anchors[i] for i in part.rows], part.packed), out)
        self.policy.train()
        out = self.policy(micro.packed, self.temperature, entropy=True, embeddings=embed)
        columns.fill(MicroBatch([trained[i] for i in micro.rows], micro.packed), out)
        self._ahead = (micro.packed, out)
        return columns.finish()

    def _only_forward(self, trained: DataProto) -> MicroBatch | None:
        """The update's one micro-batch, or None where it has several, or where another forward must be its own.

        That is, anywhere but on a CPU with one process: on a GPU weights move away in between, and ranks may get other
        rows.
        """
        if not self._one_update or self.policy.device.type != "cpu" or dist.get_world_size() > 1:
            return None
        micros = list(micro_batches(trained, self.limit, self.policy))
        return micros[0] if len(micros) == 1 else None

    def _forward(self, packed: PackedBatch) -> PolicyOutput:
        """The policy's forward, or the one that `score` did ahead of it on the same line of tokens."""
        ahead, self._ahead = self._ahead, None
        if ahead and all(torch.equal(getattr(ahead[0], name), getattr(packed, name)) for name in _SAME_LINE):
            return ahead[1]
        return self.policy(packed, self.temperature, entropy=self.config.entropy_coeff != 0)

    def update(self, rows: DataProto, num_mini_batches: int) -> dict[str, float]:
        """Take ppo_epochs optimizer steps per mini-batch; return metrics averaged over them, equal on all ranks.

        Args:
            rows: the rank's trained rows, with `mini_batch` 0..num_mini_batches-1.

        Raises:
            FloatingPointError: the gradient was not finite in three steps in a row.
        """
        self.policy.train()
        mini_batch = rows.batch["mini_batch"].numpy()
        order = [i for _ in range(self.config.ppo_epochs) for i in range(num_mini_batches)]
        steps = [self._step(rows[mini_batch == i]) for i in order]
        metrics = {name: float(np.mean([step[name] for step in steps])) for name in steps[0]}
        metrics["skipped_steps"] = float(sum(step["skipped_steps"] for step in steps))
        metrics["lr"] = float(self.scheduler.get_last_lr()[0])
        return metrics

    def end_step(self) -> None:
        """Advance the learning-rate schedule by one training step."""
        self.scheduler.step()

    def _step(self, rows: DataProto) -> dict[str, float]:
        """One optimizer step on one mini-batch, of which `rows` is this rank's share."""
        totals = torch.tensor([float(rows.batch["response_length"].sum()), float(len(rows))])
        total_tokens, total_rows = _sum_over_ranks(totals).tolist()
        self.optimizer.zero_grad()
        sums = {name: torch.zeros(()) for name in self.metric_names}
        for micro in micro_batches(rows, self.limit, self.policy):
            loss, parts = self._loss(rows[micro.rows], micro.packed, total_tokens, total_rows)
            # FSDP averages gradients over ranks; the loss is a sum over them.
            (loss * dist.get_world_size()).backward()
            for name, value in parts.items():
                sums[name] += value.cpu()
        grad_norm = clip_gradient(self.policy, self.config.grad_clip)
        self._apply(grad_norm)
        reduced = _sum_over_ranks(torch.stack(list(sums.values())))
        metrics = dict(zip(sums, reduced.tolist(), strict=True))
        return {**metrics, "grad_norm": grad_norm, "skipped_steps": float(not math.isfinite(grad_norm))}

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
        self, rows: DataProto, packed: PackedBatch, total_tokens: float, total_rows: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The micro-batch's share of the mini-batch loss, and of its metrics."""
        config, device = self.config, packed.input_ids.device
        out = self._forward(packed)
        assert out.log_probs is not None
        where = (packed.score_row.cpu(), packed.score_column.cpu())
        if not len(rows):
            return out.log_probs.sum(), {}
        old, advantages = (rows.batch[k][where].to(device) for k in ("old_log_probs", "advantages"))
        weights = token_weights(
            rows.batch["response_length"],
            config.loss_agg_mode,
            total_tokens,
            total_rows,
            self.max_response_length,
        ).to(device)
        token_share = 1.0 / total_tokens
        losses, indicators = policy_loss(old, out.log_probs, advantages, self.clip)
        loss = (losses * weights).sum()
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


def _collective_device() -> torch.device:
    return torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")


def _sum_over_ranks(values: Tensor) -> Tensor:
    moved = values.to(_collective_device())
    dist.all_reduce(moved)
    return moved.cpu()
