"""The rows of a step as a person reads them: samples/step_N.jsonl."""

from typing import Any

from verl.protocol import DataProto, is_trained
from verl.workers.reward_manager.base import RewardOutput


def step_samples(rows: DataProto, trained: DataProto, reward: RewardOutput, num_samples: int) -> list[dict[str, Any]]:
    """Every row of the first `num_samples` samples, trained rows with their reward, its parts and advantage.

    Args:
        rows: all N rows of the step.
        trained: its trained rows [B], with advantages where their policy is trained, in the order of the reward.
    """
    chosen = set(list(dict.fromkeys(rows.non_tensor_batch["uid"]))[:num_samples])
    places = iter(range(len(trained)))
    lines = []
    for i, is_rewarded in enumerate(is_trained(rows)):
        columns = {name: rows.non_tensor_batch[name][i] for name in ("uid", "role", "text", "rationale")}
        place = next(places) if is_rewarded else None
        if columns["uid"] not in chosen:
            continue
        line = {
            **columns,
            "tokens": int(rows.batch["response_length"][i]),
            "finish_reason": "length" if rows.batch["truncated"][i] else "stop",
        }
        if place is not None:
            line["reward"] = float(reward.scores[place])
            line["reward_parts"] = {name: float(part[place]) for name, part in reward.columns.items()}
            if "advantages" in trained.batch.keys():
                # One per row, but for estimators that give every token its own: then the first token's.
                line["advantage"] = float(trained.batch["advantages"][place, 0])
        lines.append(line)
    return lines
