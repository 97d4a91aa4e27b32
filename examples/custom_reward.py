"""Rewards of your own: how far the query is nearer to the rationale than to the hard negative.

    RECIPE=paper bash train.sh trainer.experiment_name=margin \\
        reward_model.reward_manager=examples/custom_reward.py:MarginReward \\
        '~reward_model.reward_kwargs' '+reward_model.reward_kwargs={margin: 0.2}'

A reward manager gets every row of the step: trained rows and their anchors, each with `role`, `uid`, `text`,
`rationale` and, because it asks for them, `embeddings`. It returns one score per trained row, in their order; metrics
and columns appear in metrics.jsonl and samples/step_N.jsonl. These two are for trained positives, whose anchors are
queries and negatives; with data.trained_text=query it is the positives that are anchors.

`MarginLoss` also returns the gradient of a loss on the embeddings, which the update follows through the model, beside
the policy gradient (docs/objectives.md).
"""

import numpy as np
import torch
from torch import Tensor

from verl.protocol import DataProto, is_trained
from verl.workers.reward_manager.base import RewardOutput


class MarginReward:
    """min(cos(query, positive) - cos(query, nearest negative), margin): nothing is gained beyond the margin."""

    needs_embeddings = True
    exclude_system_prompt = True

    def __init__(self, margin: float = 0.2) -> None:
        self.margin = margin

    def __call__(self, rows: DataProto) -> RewardOutput:
        gap = self.gaps(rows, rows.batch["embeddings"])
        met = (gap >= self.margin).float()
        return RewardOutput(gap.clamp(max=self.margin), {"margin_met": float(met.mean())}, {"gap": gap})

    def gaps(self, rows: DataProto, vectors: Tensor) -> Tensor:
        """[B] of the trained rows.

        Args:
            vectors: [N,H] of all rows.
        """
        uids, roles = rows.non_tensor_batch["uid"], rows.non_tensor_batch["role"]
        # A sample has as many negatives as data.negatives_per_query says, or as its data has.
        places: dict[tuple[object, str], list[int]] = {}
        for i, key in enumerate(zip(uids, roles, strict=True)):
            places.setdefault(key, []).append(i)
        gaps = []
        for i in np.flatnonzero(is_trained(rows)):
            (query,) = places[uids[i], "query"]
            nearest = (vectors[places[uids[i], "negative"]] @ vectors[query]).max()
            gaps.append(vectors[i] @ vectors[query] - nearest)
        return torch.stack(gaps)


class MarginLoss(MarginReward):
    """The same reward, and what is missing to the margin as a loss on the embeddings themselves.

    Args:
        weight: of that loss.
    """

    # Queries and negatives are trained too. Without this line they are constants.
    trains_anchors = True

    def __init__(self, margin: float = 0.2, weight: float = 1.0) -> None:
        super().__init__(margin)
        self.weight = weight

    def __call__(self, rows: DataProto) -> RewardOutput:
        output = super().__call__(rows)
        vectors = rows.batch["embeddings"].clone().requires_grad_()
        loss = self.weight * (self.margin - self.gaps(rows, vectors)).clamp(min=0).mean()
        (output.embedding_grad,) = torch.autograd.grad(loss, vectors)
        output.metrics["margin_loss"] = float(loss.detach())
        return output
