"""How strongly the gradient of a loss on the embeddings acts beside the policy gradient."""

import math


class GradientBalance:
    """Scales the embedding gradient to a share of the sum of the two norms.

    The norms at the parameters are known where both gradients were computed apart. Between measurements the last policy
    norm is reused, and the embedding norm is estimated as gain x the gradient norm at the vectors: so a weight that
    changes meanwhile does not change the share.

    Args:
        share: s in |scaled embedding gradient| = s * (|scaled embedding gradient| + |policy gradient|); None, and 1,
            with which there is no policy gradient = the embedding gradient as it comes.
        every: updates from one measurement to the next.
    """

    def __init__(self, share: float | None, every: int) -> None:
        self.share = share
        self.every = every
        self._policy_norm: float | None = None
        self._gain = 0.0
        """Norm of the embedding gradient at the parameters over that at the embeddings."""
        self._updates = 0
        """Since the last measurement, the measured one included."""

    @property
    def is_due(self) -> bool:
        """Whether the next update should measure."""
        return self._policy_norm is None or self._updates >= self.every

    def measure(self, policy_norm: float, embedding_norm: float, vector_norm: float) -> float:
        """Take the two norms; return what to multiply the embedding gradient by. A norm that is 0 or not finite is not
        taken, and the next update is due again.

        Args:
            vector_norm: of the gradient by the embeddings, above 0.
        """
        if all(math.isfinite(norm) and norm > 0 for norm in (policy_norm, embedding_norm)):
            self._policy_norm, self._gain, self._updates = policy_norm, embedding_norm / vector_norm, 0
        return self.scale(vector_norm)

    def scale(self, vector_norm: float) -> float:
        """What to multiply the embedding gradient of an update by, from the last measurement; 1 before the first, and
        for a gradient of 0."""
        self._updates += 1
        if self.share in (None, 1) or self._policy_norm is None or not vector_norm:
            return 1.0
        return self.share / (1 - self.share) * self._policy_norm / (self._gain * vector_norm)

    def state_dict(self) -> dict[str, float | int | None]:
        """What was measured, for a checkpoint; the settings are not in it."""
        return {"policy_norm": self._policy_norm, "gain": self._gain, "updates": self._updates}

    def load_state_dict(self, state: dict[str, float | int | None]) -> None:
        self._policy_norm, self._gain = state["policy_norm"], state["gain"] or 0.0
        self._updates = int(state["updates"] or 0)
