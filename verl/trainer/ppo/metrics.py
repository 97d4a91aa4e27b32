"""What a step reports: rewards, groups, lengths, embeddings, throughput."""

from collections import Counter
from collections.abc import Mapping

import numpy as np
from torch import Tensor

from verl.algorithm.groups import first_rows, group_mean_std, group_size, groups_of, within_group_correlation
from verl.algorithm.loss import token_weights
from verl.config import RunConfig
from verl.embedding.metrics import spread_report
from verl.embedding.ngrams import distinct_n, repetition
from verl.protocol import DataProto, is_trained
from verl.workers.reward_manager.base import RewardOutput

# Groups whose rewards spread less than this teach nothing.
_FLAT_GROUP_STD = 1e-3


def prefixed(**parts: Mapping[str, float]) -> dict[str, float]:
    """Metrics of several parts under `part/name`."""
    return {f"{part}/{name}": value for part, values in parts.items() for name, value in values.items()}


def step_metrics(rows: DataProto, trained: DataProto, reward: RewardOutput, config: RunConfig) -> dict[str, float]:
    """Figures of a step's rows, of what was computed of them.

    Args:
        rows: all N rows.
        trained: the trained ones, in the order of the reward.
    """
    metrics = prefixed(reward=reward.metrics)
    if rows.batch["response_length"].any():
        metrics |= {
            **reward_metrics(reward.scores, groups_of(trained)),
            "group/duplicate_share": duplicate_share(
                trained.non_tensor_batch["rationale"], trained.non_tensor_batch["uid"]
            ),
            **text_metrics(trained, reward.scores),
            **length_metrics(rows, rows.meta_info["num_shortened"]),
        }
    if "entropy" in trained.batch.keys():
        metrics["actor/entropy"] = mean_entropy(trained, config)
    if "embeddings" in rows.batch.keys():
        metrics |= prefixed(embedding=spread_report(rows.batch["embeddings"]))
    return metrics


def mean_entropy(trained: DataProto, config: RunConfig) -> float:
    """The entropy of the trained rows' tokens, averaged as actor.loss_agg_mode says, as in verl."""
    lengths = trained.batch["response_length"]
    weights = token_weights(
        lengths, config.actor_rollout_ref.actor.loss_agg_mode, float(lengths.sum()), float(len(lengths)),
        config.data.max_response_length,
    )  # fmt: skip
    return float((trained.batch["entropy"].repeat_interleave(lengths) * weights).sum())


def reward_metrics(rewards: Tensor, group: Tensor) -> dict[str, float]:
    """Rewards [B] of the trained rows, and how they spread within the groups [B] of more than one."""
    metrics = {
        "reward/mean": float(rewards.mean()),
        "reward/max": float(rewards.max()),
        "reward/min": float(rewards.min()),
    }
    _, std = group_mean_std(rewards, group)
    spread = std[first_rows(group)][group_size(group) > 1]
    if len(spread):
        metrics["group/std_median"] = float(spread.median())
        metrics["group/flat_share"] = float((spread < _FLAT_GROUP_STD).float().mean())
    return metrics


def text_metrics(trained: DataProto, rewards: Tensor) -> dict[str, float]:
    """How much the trained rationales repeat themselves and each other, and whether longer ones earn more."""
    ids, lengths, group = trained.batch["responses"], trained.batch["response_length"], groups_of(trained)
    metrics = {
        "group/distinct_1": distinct_n(ids, lengths, group, 1),
        "group/distinct_2": distinct_n(ids, lengths, group, 2),
        "rationale/repetition": repetition(ids, lengths),
    }
    length_correlation = within_group_correlation(lengths, rewards, group)
    return metrics if length_correlation is None else metrics | {"group/length_reward_correlation": length_correlation}


def length_metrics(rows: DataProto, num_shortened: int) -> dict[str, float]:
    """Rationale and prompt lengths in tokens: of the trained rows, and of the anchors of each role."""
    metrics = {
        "data/prompt_tokens_mean": float(rows.batch["prompt_length"].float().mean()),
        "data/prompts_shortened": float(num_shortened),
    }
    names = np.where(is_trained(rows), "trained", rows.non_tensor_batch["role"])
    for name in dict.fromkeys(names.tolist()):
        part = rows[names == name].batch
        length = part["response_length"].float()
        metrics[f"rationale/{name}_tokens_mean"] = float(length.mean())
        metrics[f"rationale/{name}_tokens_min"] = float(length.min())
        metrics[f"rationale/{name}_tokens_max"] = float(length.max())
        metrics[f"rationale/{name}_truncated"] = float(part["truncated"].float().mean())
    return metrics


def duplicate_share(rationales: np.ndarray, uid: np.ndarray) -> float:
    """Share of trained rationales that occur more than once in their group."""
    counts = Counter(zip(uid, rationales, strict=True))
    return sum(count for count in counts.values() if count > 1) / len(uid)


def time_metrics(seconds: dict[str, float], rows: DataProto, bytes_moved: int) -> dict[str, float]:
    """Seconds by phase, tokens per second, and bytes sent between processes."""
    step = sum(seconds.values())
    generated = int(rows.batch["response_length"].sum())
    speed = {"perf/generated_tokens_per_s": generated / max(seconds["gen"], 1e-9)} if "gen" in seconds else {}
    return {
        **{f"time/{phase}_s": value for phase, value in seconds.items()},
        "time/step_s": step,
        "perf/generated_tokens": float(generated),
        **speed,
        "perf/tokens_per_s": (generated + int(rows.batch["prompt_length"].sum())) / step,
        "perf/ray_mb": bytes_moved / 2**20,
    }
