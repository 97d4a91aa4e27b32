"""The reward manager `naive`: a rule per `data_source`, or a function of the user's, scores each text.

It makes the trainer usable for anything whose answer can be checked; no embedding is computed.
"""

import traceback
from collections.abc import Callable
from typing import Any

import torch

from verl.protocol import DataProto
from verl.utils.answers import extract
from verl.workers.reward_manager.base import RewardOutput
from verl.workers.reward_manager.checked import RewardError, describe_row, finite_number

ScoreFn = Callable[..., float | dict[str, float]]


def gsm8k(solution: str, ground_truth: str) -> float:
    """1 when solution and ground truth answer with the same number, see `verl.utils.answers`."""
    (answer, _), (truth, _) = extract(solution), extract(str(ground_truth))
    return float(answer is not None and answer == truth)


def exact_match(solution: str, ground_truth: str) -> float:
    """1 when the solution is the ground truth up to case and outer spaces."""
    return float(solution.strip().casefold() == str(ground_truth).strip().casefold())


RULES: dict[str, Callable[[str, str], float]] = {
    "openai/gsm8k": gsm8k,
    "gsm8k": gsm8k,
    "exact_match": exact_match,
}


def default_compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> float:
    """Score by the rule of `data_source`.

    Raises:
        ValueError: there is no rule of that name.
    """
    if data_source not in RULES:
        raise ValueError(
            f"no rule scores data_source={data_source!r} (rules: {', '.join(RULES)}); set "
            "custom_reward_function.path to a file with your own, or reward_model.reward_manager=hidden"
        )
    return RULES[data_source](solution_str, ground_truth)


class NaiveRewardManager:
    """Calls a score function for each row.

    Args:
        compute_score: called with data_source, solution_str, ground_truth and extra_info; returns a number,
            or a dict with `score` and other numbers to be logged.
    """

    needs_embeddings = False
    exclude_system_prompt = True

    def __init__(self, compute_score: ScoreFn = default_compute_score) -> None:
        self.compute_score = compute_score

    def __call__(self, rows: DataProto) -> RewardOutput:
        """Reward each row.

        Raises:
            RewardError: the function raised, or returned something else than what it may.
        """
        parts = [self._parts(rows, i) for i in range(len(rows))]
        for i, part in enumerate(parts):
            if part.keys() != parts[0].keys():
                raise RewardError(
                    f"{self._name} returned the keys {sorted(part)} for {describe_row(rows, i)}, and "
                    f"{sorted(parts[0])} for {describe_row(rows, 0)}; return the same keys for every row."
                )
        tensors = {name: torch.tensor([part[name] for part in parts]) for name in parts[0]}
        scores = tensors.pop("score")
        return RewardOutput(scores, {name: float(t.mean()) for name, t in tensors.items()}, tensors)

    @property
    def _name(self) -> str:
        function = getattr(self.compute_score, "func", self.compute_score)
        return f"the score function {getattr(function, '__name__', function)!s}"

    def _parts(self, rows: DataProto, i: int) -> dict[str, float]:
        """`score` and the other numbers of one row."""
        columns = rows.non_tensor_batch
        try:
            result = self.compute_score(
                data_source=columns["data_source"][i],
                solution_str=columns["rationale"][i],
                ground_truth=columns["reward_model"][i]["ground_truth"],
                extra_info=columns["extra_info"][i],
            )
        except Exception as error:
            raise RewardError(
                f"{traceback.format_exc()}\n{self._name} failed for {describe_row(rows, i)}: {error}"
            ) from error
        parts = result if isinstance(result, dict) else {"score": result}
        numbers = {name: finite_number(value) for name, value in parts.items()}
        if "score" not in numbers or None in numbers.values():
            raise RewardError(
                f"{self._name} returned {result!r} for {describe_row(rows, i)}; return a finite number, or a dict of "
                "them with 'score'."
            )
        return {name: value for name, value in numbers.items() if value is not None}
