"""What a reward manager is: the whole step in, one score per trained row out.

A manager of your own is a class with this interface in any Python file, named by
`reward_model.reward_manager=path/to/file.py:ClassName`; its constructor takes reward_model.reward_kwargs.
"""

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from torch import Tensor

from verl.protocol import DataProto


@dataclass
class RewardOutput:
    scores: Tensor
    """[N] float32, one per row whose role is `positive`, in their order."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Logged as reward/<name>."""
    columns: dict[str, Tensor] = field(default_factory=dict)
    """[N] each, parts of the score to be shown beside it in samples/step_N.jsonl."""


class RewardManager(Protocol):
    needs_embeddings: bool
    """True: queries and negatives are generated too, and rows carry `embeddings` [N,H]. False: the step
    has trained rows alone."""
    exclude_system_prompt: bool
    """Where pooling starts: at the user's text (True) or at the first token of the prompt."""

    def __call__(self, rows: DataProto) -> RewardOutput:
        """Score a step.

        Args:
            rows: every row of the step; see verl/protocol.py for the columns.
        """
        ...


def trained(rows: DataProto) -> np.ndarray:
    """[N] bool: the rows that are rewarded and trained."""
    return rows.non_tensor_batch["role"] == "positive"
