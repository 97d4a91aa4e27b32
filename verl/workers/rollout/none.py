"""In place of an engine where no rationale is written."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NoReturn

from torch import Tensor

from verl.workers.rollout.base import HeldWeight, Responses, Rollout, RolloutError


class NoRollout(Rollout):
    """Takes no memory and no weights, and generates nothing."""

    name = "none"

    def __init__(self) -> None:
        super().__init__(weight_names=())

    def wake_weights(self) -> NoReturn:
        raise RolloutError("there is no rollout engine in a run that writes no rationales (data.think=False)")

    def sleep(self, keep_weights: bool = False) -> None:
        pass

    def held(self, name: str, tensor: Tensor, most_columns: int | None) -> list[HeldWeight]:
        self.wake_weights()

    def _generate(
        self, prompts: Sequence[Sequence[int]], temperatures: Sequence[float], limits: Sequence[int],
        seeds: Sequence[int],
    ) -> Iterator[Responses]:  # fmt: skip
        self.wake_weights()

    def _load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.wake_weights()

    def _score(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        self.wake_weights()

    def _wake_cache(self) -> None:
        self.wake_weights()
