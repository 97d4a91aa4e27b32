"""What a rollout engine is: prompts in, rationales and their log-probs out, weights from an iterator.

Engines know neither FSDP nor Ray.
"""

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Response:
    """One generated rationale."""

    ids: list[int]
    """Token ids, the end token included when there is one."""
    log_probs: list[float]
    """Log-prob of each id under the distribution it was sampled from (temperature applied)."""
    truncated: bool
    """Whether it hit the length limit without an end token."""


class Rollout(Protocol):
    name: str

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        temperatures: Sequence[float],
        max_new_tokens: int,
        seed: int,
    ) -> Generator[int, None, list[Response]]:
        """Yield the number of responses that have just ended, as they do; return one per prompt, in order.

        Args:
            prompts: token ids; equal prompts are computed once.
            temperatures: one per prompt; 0 is greedy.
            max_new_tokens: length limit of a response.
            seed: equal seeds and prompts give equal responses.
        """
        ...

    def update_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take over full tensors under their transformers names."""
        ...

    def sleep(self) -> None:
        """Free what is only needed to generate."""
        ...

    def wake_up(self) -> None:
        """Undo `sleep`."""
        ...


def finish(generation: Generator[int, None, list[Response]]) -> list[Response]:
    """Run a generation to its end without looking at its progress."""
    while True:
        try:
            next(generation)
        except StopIteration as end:
            return end.value
