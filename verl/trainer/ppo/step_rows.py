"""The rows of a step on their way through it: copies, advantages, mini-batches. Pure functions of batches.

Shapes: N rows of a step, B trained rows among them, R response tokens.
"""

import numpy as np
import torch
from torch import Tensor

from verl.algorithm.advantage import get_adv_estimator_fn
from verl.algorithm.groups import groups_of
from verl.algorithm.loss import KlController, kl_penalty, truncated_importance_weights
from verl.config import AlgorithmConfig, RolloutConfig
from verl.protocol import DataProto, is_trained, object_array, response_mask


def expand(prompts: DataProto, rollout: RolloutConfig) -> DataProto:
    """Prompt rows to the N rows of a step: n copies of each trained prompt, one of each anchor, with temperatures."""
    trained = is_trained(prompts)
    temperature = np.where(trained, rollout.temperature, rollout.anchor_temperature)
    prompts = prompts.with_tensors(temperature=torch.tensor(temperature, dtype=torch.float32))
    return prompts.repeat(np.where(trained, rollout.n, 1).tolist())


def without_rationales(prompts: DataProto, score_texts: bool) -> DataProto:
    """Prompt rows as rows of a step whose rationales are empty, so that their embeddings are those of the texts.

    Args:
        score_texts: log-probs of the rows will be those of their texts and of what ends the prompt after them.
    """
    count = len(prompts)
    if score_texts:  # no token comes before the first one to predict it
        prompts = prompts.with_tensors(score_start=prompts.batch["text_start"].clamp(min=1))
    rows = prompts.with_tensors(
        responses=torch.zeros(count, 0, dtype=torch.int64),
        response_length=torch.zeros(count, dtype=torch.int64),
        truncated=torch.zeros(count, dtype=torch.bool),
    )
    rationales = {"rationale": object_array([""] * count)}
    return DataProto(rows.batch, {**rows.non_tensor_batch, **rationales}, rows.meta_info)


def add_advantages(
    trained: DataProto, rewards: Tensor, algorithm: AlgorithmConfig, kl_controller: KlController
) -> tuple[DataProto, dict[str, float]]:
    """Rewards [B] of the trained rows to advantages [B,R], with the KL to the reference subtracted where configured.

    Args:
        kl_controller: an adaptive one is moved by this step's KL.

    Returns:
        The rows with `advantages` [B,R] float32, and metrics of the KL in the reward.
    """
    mask, metrics = response_mask(trained), {}
    token_rewards = torch.zeros(mask.shape)
    token_rewards[torch.arange(len(trained)), trained.batch["response_length"] - 1] = rewards.float()
    if algorithm.has_kl_in_reward:
        kl = kl_penalty(trained.batch["old_log_probs"], trained.batch["ref_log_prob"], algorithm.kl_penalty) * mask
        token_rewards = token_rewards - kl_controller.coef * kl
        # As in verl, the mean of a row's tokens first: the controller's target means this.
        metrics = {"kl": float((kl.sum(1) / mask.sum(1)).mean()), "kl_coef": kl_controller.coef}
        kl_controller.update(metrics["kl"], len(trained))
    estimate = get_adv_estimator_fn(algorithm.adv_estimator)
    advantages = estimate(
        token_rewards, mask, groups_of(trained), norm_by_std=algorithm.norm_adv_by_std_in_grpo, gamma=algorithm.gamma
    )
    return trained.with_tensors(advantages=advantages), metrics


def add_embedding_grad(
    trained: DataProto, rows: DataProto, grad: Tensor | None, train_anchors: bool, num_mini_batches: int
) -> DataProto:
    """The rows of the update: the trained ones, with `embedding_grad` where there is one, and with anchors if it trains
    them.

    The policy loss is averaged per mini-batch, so the embedding gradient is multiplied by the number of mini-batches to
    match.

    Args:
        trained: the trained rows [B], with advantages where their policy is trained.
        rows: all rows [N] of the step.
        grad: [N,H] by their embeddings; None = no such loss.
        train_anchors: anchors are rows of the update too; they have neither log-probs nor advantages.
    """
    if grad is None:
        return trained
    grad, mask = grad * num_mini_batches, torch.from_numpy(is_trained(rows))
    if not train_anchors:
        return trained.with_tensors(embedding_grad=grad[mask])
    rows = rows.with_tensors(embedding_grad=grad)
    if "advantages" not in trained.batch.keys():
        return rows
    advantages = torch.zeros(len(rows), trained.batch["advantages"].shape[1])
    advantages[mask] = trained.batch["advantages"]
    return rows.with_tensors(advantages=advantages)


def assign_mini_batches(rows: DataProto, num_mini_batches: int, shuffle_seed: int | None) -> DataProto:
    """The rows with `mini_batch` int64, so that whole groups are trained together.

    Args:
        num_mini_batches: divides the number of groups.
        shuffle_seed: draws which groups are together; None = the order of the rows.
    """
    group = groups_of(rows)
    order = torch.arange(int(group.max()) + 1)
    if shuffle_seed is not None:
        order = torch.randperm(len(order), generator=torch.Generator().manual_seed(shuffle_seed))
    return rows.with_tensors(mini_batch=order[group] // (len(order) // num_mini_batches))


def weigh_by_importance(rows: DataProto, cap: float | None) -> DataProto:
    """The rows with their advantages, if any, multiplied by min(p_trainer / p_engine, cap); None = as they are.

    Every term of the clipped loss is proportional to its advantage, so this weighs the loss; see
    `truncated_importance_weights` for the source.
    """
    if cap is None or "advantages" not in rows.batch.keys():
        return rows
    old, engine = rows.batch["old_log_probs"], rows.batch["rollout_log_probs"]
    weights = truncated_importance_weights(old, engine, cap)
    return rows.with_tensors(advantages=rows.batch["advantages"] * weights)
