"""The interface of a reward manager: all rows of a step in, one reward per trained row out.

Your own manager is a class with this interface in any Python file, selected by
`reward_model.reward_manager=path/to/file.py:ClassName`; its constructor takes reward_model.reward_kwargs.
"""

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from verl.protocol import DataProto


@dataclass
class RewardOutput:
    scores: Tensor
    """[B] float32, the reward of each trained row (`protocol.is_trained`), in their order."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Logged as reward/<name>."""
    columns: dict[str, Tensor] = field(default_factory=dict)
    """[B] each, parts of the reward, shown beside it in samples/step_N.jsonl."""
    embedding_grad: Tensor | None = None
    """[N,H] float32, the gradient of a loss by the column `embeddings` of every row of the step, in the rows' order:
    the update minimises that loss too, through the model. None = the policy gradient alone, as in the paper."""


class RewardManager(Protocol):
    needs_embeddings: bool
    """True: queries and negatives are generated too, and rows carry `embeddings` [N,H]. False: the step
    has trained rows alone."""
    exclude_system_prompt: bool
    """Where pooling starts: at the user's text (True) or at the first token of the prompt."""
    trains_anchors: bool
    """Whether `embedding_grad` trains queries and negatives too; else they are constants, and their rows of it are not
    used. A manager without this attribute trains no anchors."""
    text_share: float | None
    """Share of the text in the embeddings, see `EmbedderSettings`; a manager without it says None."""
    no_rationale_weight: float
    """Weight of the vector without the rationale in the embeddings, see there; a manager without it says 0."""
    matryoshka_dims: list[int] | None
    """Numbers of first dimensions that it trains to be used alone, see there; a manager without it says None."""

    def __call__(self, rows: DataProto) -> RewardOutput:
        """Reward the trained rows of a step.

        Args:
            rows: every row of the step; see verl/protocol.py for the columns.
        """
        ...
