"""What a reward manager returns is checked before it is used: a wrong reward would train without a word."""

import math
import traceback
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from verl.protocol import DataProto, is_trained
from verl.workers.reward_manager.base import RewardManager, RewardOutput

_SHOWN = 200


class RewardError(RuntimeError):
    """A reward manager failed or returned something that cannot be a reward; the message names manager and row."""


class CheckedRewardManager:
    """A reward manager whose output has the form that `RewardOutput` describes, or is refused.

    Args:
        name: the manager's, as the configuration has it.
    """

    def __init__(self, manager: RewardManager, name: str) -> None:
        self.manager, self.name = manager, name
        self.needs_embeddings = manager.needs_embeddings
        self.exclude_system_prompt = manager.exclude_system_prompt
        self.trains_anchors: bool = getattr(manager, "trains_anchors", False)
        self.text_share: float | None = getattr(manager, "text_share", None)
        self.no_rationale_weight: float = getattr(manager, "no_rationale_weight", 0.0)
        self.matryoshka_dims: list[int] | None = getattr(manager, "matryoshka_dims", None)

    def __call__(self, rows: DataProto) -> RewardOutput:
        """Reward the trained rows.

        Raises:
            RewardError: the manager raised, or its output has a wrong type, shape, dtype or a value that is not finite.
        """
        try:
            output = self.manager(rows)
        except RewardError:
            raise
        except Exception as error:
            raise RewardError(f"{traceback.format_exc()}\n{self._who} failed: {error}") from error
        if not isinstance(output, RewardOutput):
            raise RewardError(f"{self._who} returned {type(output).__name__}; return a RewardOutput(scores).")
        trained = rows[is_trained(rows)]
        self._check_scores(output.scores, trained)
        for name, column in output.columns.items():
            self._check_tensor(f"columns[{name!r}]", column, len(trained))
        if output.embedding_grad is not None:
            self._check_embedding_grad(output.embedding_grad, rows)
        # Numbers of NumPy and torch, too, become Python's, which trackers and files take.
        return replace(output, metrics={name: self._number(name, value) for name, value in output.metrics.items()})

    @property
    def _who(self) -> str:
        return f"reward_model.reward_manager={self.name}"

    def _number(self, name: str, value: Any) -> float:
        try:
            if not isinstance(value, str | bytes):
                return float(value)
        except (TypeError, ValueError, RuntimeError):
            pass
        raise RewardError(f"{self._who}: metrics[{name!r}] is {value!r}; give a number.")

    def _check_scores(self, scores: Any, trained: DataProto) -> None:
        self._check_tensor("scores", scores, len(trained))
        self._check_dtype("scores", scores)
        self._check_detached("scores", scores)
        wrong = (~scores.isfinite()).nonzero().flatten().tolist()
        if wrong:
            raise RewardError(
                f"{self._who}: {len(wrong)} of {len(scores)} scores are not finite, the first is "
                f"{float(scores[wrong[0]])} for {describe_row(trained, wrong[0])}"
            )

    def _check_embedding_grad(self, grad: Any, rows: DataProto) -> None:
        if "embeddings" not in rows.batch.keys():
            raise RewardError(f"{self._who} returned embedding_grad, but asks for no embeddings; set needs_embeddings.")
        expected = list(rows.batch["embeddings"].shape)
        if not isinstance(grad, Tensor):
            raise RewardError(f"{self._who}: embedding_grad is {type(grad).__name__}; give a torch tensor {expected}.")
        if list(grad.shape) != expected:
            raise RewardError(
                f"{self._who}: embedding_grad has the shape {list(grad.shape)}; give {expected}, a gradient for every "
                "row of the step, in the rows' order (zeros for rows that the loss does not reach)."
            )
        self._check_on_cpu("embedding_grad", grad)
        self._check_dtype("embedding_grad", grad)
        self._check_detached("embedding_grad", grad)
        wrong = (~grad.isfinite()).any(1).nonzero().flatten().tolist()
        if wrong:
            raise RewardError(
                f"{self._who}: embedding_grad is not finite in {len(wrong)} of {len(rows)} rows, the first is "
                f"the {rows.non_tensor_batch['role'][wrong[0]]} of {describe_row(rows, wrong[0])}"
            )

    def _check_tensor(self, what: str, value: Any, count: int) -> None:
        if not isinstance(value, Tensor):
            raise RewardError(f"{self._who}: {what} is {type(value).__name__}; give a torch tensor [{count}].")
        if value.shape != (count,):
            raise RewardError(
                f"{self._who}: {what} has the shape {list(value.shape)}; give one value for each of the {count} "
                "trained rows (protocol.is_trained), in their order."
            )
        self._check_on_cpu(what, value)

    def _check_on_cpu(self, what: str, value: Tensor) -> None:
        if value.device.type != "cpu":
            raise RewardError(f"{self._who}: {what} is on {value.device}; give it on the CPU ({what}.cpu()).")

    def _check_detached(self, what: str, value: Tensor) -> None:
        # The loss would go on backward into the manager.
        if value.requires_grad:
            raise RewardError(f"{self._who}: {what} carries a graph; return {what}.detach().")

    def _check_dtype(self, what: str, value: Tensor) -> None:
        if value.dtype != torch.float32:
            raise RewardError(f"{self._who}: {what} are {value.dtype}; return float32 ({what}.float()).")


def finite_number(value: Any) -> float | None:
    """A number of any kind as a float; None if it is something else (a string too), or not finite."""
    if isinstance(value, str | bytes):
        return None
    try:
        result = float(value)
    except (TypeError, ValueError):
        return None
    return result if math.isfinite(result) else None


def describe_row(rows: DataProto, index: int) -> str:
    """A row by its sample, text and rationale, for a message."""
    uid, text, rationale = (rows.non_tensor_batch[name][index] for name in ("uid", "text", "rationale"))
    return f"sample {uid}, text {text[:_SHOWN]!r}, rationale {rationale[:_SHOWN]!r}"
