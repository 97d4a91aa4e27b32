"""How far the engine's and the trainer's probabilities of the same tokens differ, and when that ends a run."""

import math

from verl.algorithm.loss import truncated_importance_weights
from verl.protocol import DataProto, response_mask

# Healthy runs in bfloat16 stay below this.
_SUSPICIOUS = 0.01
_JUMP = 5.0
# Below this a jump is rounding: float32 engines start near 1e-7.
_FLOOR = 1e-3
_STEPS_IN_A_ROW = 2


class StaleEngineError(RuntimeError):
    """The engine's probabilities differ from the trainer's as they do when it generates with old weights."""


class MismatchGuard:
    """Watches the mean difference of probabilities from step to step.

    Args:
        first: value of the run's first step; None when there was none yet.
    """

    def __init__(self, first: float | None = None) -> None:
        self.first = first
        self._jumps = 0

    def check(self, probs_diff_mean: float) -> str | None:
        """Take one step's `rollout/probs_diff_mean`; return a warning when there is one.

        Raises:
            StaleEngineError: for two steps in a row it was more than five times the first step's, and above 0.001.
        """
        if self.first is None and math.isfinite(probs_diff_mean):
            self.first = probs_diff_mean
        limit = max(_JUMP * (self.first or 0.0), _FLOOR)
        self._jumps = self._jumps + 1 if not probs_diff_mean <= limit else 0
        if self._jumps >= _STEPS_IN_A_ROW:
            raise StaleEngineError(
                f"rollout/probs_diff_mean is {probs_diff_mean:.3g}, in the first step it was {self.first}: the "
                "rollout engine appears to run old weights. Set actor_rollout_ref.rollout.check_weight_sync=full to "
                "find the weight, or actor_rollout_ref.rollout.name=hf to continue without the engine."
            )
        if not probs_diff_mean <= _SUSPICIOUS:
            return (
                f"warning: rollout/probs_diff_mean is {probs_diff_mean:.3g}; engine and trainer disagree about the "
                f"probabilities of tokens (healthy: below {_SUSPICIOUS})"
            )
        return None


def mismatch_metrics(trained: DataProto, cap: float | None) -> dict[str, float]:
    """How far the engine's log-probs are from the trainer's on the same tokens.

    Args:
        trained: the trained rows.
        cap: of the importance weights, when there are any.
    """
    mask = response_mask(trained)
    engine, trainer = (trained.batch[key][mask] for key in ("rollout_log_probs", "old_log_probs"))
    gap = (engine.exp() - trainer.exp()).abs()
    metrics = {
        "probs_diff_mean": float(gap.mean()),
        "probs_diff_max": float(gap.max()),
        "kl": float((engine - trainer).mean()),
    }
    if cap is None:
        return metrics
    weights = truncated_importance_weights(trainer, engine, cap)
    return metrics | {
        "is_weight_mean": float(weights.mean()),
        "is_clipped_share": float((weights >= cap).float().mean()),
    }
