"""A reward of your own: how far the query is nearer to the rationale than to the hard negative.

    bash train.sh reward_model.reward_manager=examples/custom_reward.py:MarginReward \\
        '~reward_model.reward_kwargs' '+reward_model.reward_kwargs={margin: 0.2}'

A reward manager gets every row of the step: trained rows (role `positive`) and their anchors (`query`,
`negative`), with `uid`, `text`, `rationale` and, because it asks for them, `embeddings`. It returns one score
per trained row, in their order; metrics and columns appear in metrics.jsonl and samples/step_N.jsonl.
"""

import torch

from verl.protocol import DataProto, is_trained
from verl.workers.reward_manager.base import RewardOutput


class MarginReward:
    """min(cos(query, positive) - cos(query, negative), margin): nothing is gained beyond the margin."""

    needs_embeddings = True
    exclude_system_prompt = True

    def __init__(self, margin: float = 0.2) -> None:
        self.margin = margin

    def __call__(self, rows: DataProto) -> RewardOutput:
        vector = {
            (uid, role): embedding
            for uid, role, embedding in zip(
                rows.non_tensor_batch["uid"],
                rows.non_tensor_batch["role"],
                rows.batch["embeddings"],
                strict=True,
            )
            if role != "positive"
        }
        main = rows[is_trained(rows)]
        query = torch.stack([vector[uid, "query"] for uid in main.non_tensor_batch["uid"]])
        negative = torch.stack([vector[uid, "negative"] for uid in main.non_tensor_batch["uid"]])
        gap = (query * main.batch["embeddings"]).sum(1) - (query * negative).sum(1)
        met = (gap >= self.margin).float()
        return RewardOutput(gap.clamp(max=self.margin), {"margin_met": float(met.mean())}, {"gap": gap})
