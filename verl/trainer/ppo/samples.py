"""The rows of a step as a person reads them: samples/step_N.jsonl."""

from typing import Any

from verl.protocol import DataProto, is_trained
from verl.workers.reward_manager.base import RewardOutput


def step_samples(rows: DataProto, batch: DataProto, reward: RewardOutput, num_samples: int) -> list[dict[str, Any]]:
    """Every row of the first `num_samples` samples, trained rows with their reward, its parts and advantage.

    Args:
        rows: all N rows of the step.
        batch: its trained rows [B], with advantages where their policy is trained, in the order of the reward.
    """
    chosen = set(list(dict.fromkeys(rows.non_tensor_batch["uid"]))[:num_samples])
    trained, trained_rows = is_trained(rows), iter(range(len(batch)))
    lines = []
    for i in range(len(rows)):
        columns = {name: rows.non_tensor_batch[name][i] for name in ("uid", "role", "text", "rationale")}
        place = next(trained_rows) if trained[i] else None
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
            if "advantages" in batch.batch.keys():
                # One per row, but for estimators that give every token its own: then the first token's.
                line["advantage"] = float(batch.batch["advantages"][place, 0])
        lines.append(line)
    return lines
