"""The interface of a rollout engine: prompts in, rationales and their log-probs out, weights from an iterator.

Engines know neither FSDP nor Ray. The state that they share is here: which weights an engine holds, and that it
generates with the policy's only.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
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
    pooled: Tensor | None = None
    """[H] float32, the pooled hidden states of prompt and rationale; None = the engine was not asked to pool."""


NO_RESPONSE = Response([], [], truncated=False)
"""Of a row for which nothing is generated."""

Responses = dict[int, Response]
"""By the position of their prompts."""


@dataclass(frozen=True)
class HeldWeight:
    """A part of a weight as it was sent and as the engine computes with it; they must be equal."""

    place: str
    """The engine's module that holds it."""
    sent: Tensor
    held: Tensor


# One-hot rows of one product when a weight is read back.
_READ_ROWS = 256


@torch.no_grad()
def held_by_product(
    place: str, multiply: Callable[[Tensor], Tensor], sent: Tensor, most_columns: int | None,
    dtype: torch.dtype, device: torch.device,
) -> HeldWeight:  # fmt: skip
    """Read a matrix back by computing with it: a one-hot row picks a column exactly, in every dtype.

    Args:
        place: the engine's module.
        multiply: the module's product, rows [N, in] to [N, out], without a bias.
        sent: [out, in], what should be there.
        most_columns: see `Rollout.held`.
        dtype, device: of the engine.
    """
    width = sent.shape[1]
    count = width if most_columns is None else min(width, most_columns)
    columns = torch.linspace(0, width - 1, count).long().to(sent.device)
    parts = []
    for some in columns.split(_READ_ROWS):
        one_hot = torch.zeros(len(some), width, dtype=dtype, device=device)
        one_hot[torch.arange(len(some), device=device), some.to(device)] = 1
        parts.append(multiply(one_hot).T)
    return HeldWeight(place, sent[:, columns].to(dtype), torch.cat(parts, dim=1))


class EngineState(Enum):
    AWAKE = "it holds the policy's weights and may generate"
    WEIGHTS_ONLY = "it holds the policy's weights, but no memory for a cache"
    ASLEEP = "the policy's weights are in host memory, and its device memory is free"
    STALE = "its weights are not the policy's"


class RolloutError(RuntimeError):
    """The engine cannot generate, or a request failed; the message names the cause."""


class Rollout(ABC):
    """An engine with its state. Subclasses implement the methods with a leading underscore.

        STALE -- update_weights --> WEIGHTS_ONLY -- wake_up --> AWAKE -- sleep --> ASLEEP -- wake_up --> AWAKE
        any state -- mark_stale, or a sleep that drops the weights --> STALE

    An engine starts AWAKE with the weights that it was built from.
    """

    name: str

    def __init__(self, weight_names: Iterable[str]) -> None:
        self.weight_names = frozenset(weight_names)
        self.state = EngineState.AWAKE

    def generate(
        self, prompts: Sequence[Sequence[int]], temperatures: Sequence[float], max_new_tokens: int | Sequence[int],
        seeds: Sequence[int],
    ) -> Iterator[Responses]:  # fmt: skip
        """Yield responses as they end, each once.

        Args:
            prompts: token ids; equal prompts are computed once.
            temperatures: one per prompt; 0 is greedy.
            max_new_tokens: length limits of the responses, 1 or more, one per prompt or one for all.
            seeds: one per prompt, below 2**63. Each row draws from its own, so its response does not depend on the
                other rows.

        Raises:
            RolloutError: the engine is not AWAKE, or a request failed.
        """
        self._require_awake()
        return self._generate(prompts, temperatures, limit_each(max_new_tokens, len(prompts)), seeds)

    def update_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take over full tensors under their transformers names; then the engine holds the policy's weights.

        Raises:
            ValueError: a weight was not sent, was sent twice, or is not one of the model's.
        """
        self.state = EngineState.STALE
        self.wake_weights()
        missing = set(self.weight_names)
        self._load(self._count_off(weights, missing))
        if missing:
            raise ValueError(f"weight sync: {len(missing)} weights were not sent, among them {min(missing)!r}")
        self.state = EngineState.WEIGHTS_ONLY

    def score(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        """The log-prob of every token of each prompt but its first, at temperature 1.

        Raises:
            RolloutError: the engine is not AWAKE.
        """
        self._require_awake()
        return self._score(prompts)

    @abstractmethod
    def wake_weights(self) -> None:
        """Allocate device memory for the weights; their values do not matter."""

    def wake_up(self) -> None:
        """Make ready to generate.

        Raises:
            RolloutError: the engine is STALE.
        """
        if self.state is EngineState.STALE:
            raise RolloutError(f"the rollout engine {self.name} has no weights to wake up with; sync them first")
        self.wake_weights()
        self._wake_cache()
        self.state = EngineState.AWAKE

    @abstractmethod
    def sleep(self, keep_weights: bool = False) -> None:
        """Free device memory, where the engine can.

        Args:
            keep_weights: move them to host memory, where it has room, as the next generation is by the same ones; else
                they are dropped.
        """

    def mark_stale(self) -> None:
        """The policy has new weights: no generation before the next `update_weights`."""
        self.state = EngineState.STALE

    @abstractmethod
    def held(self, name: str, tensor: Tensor, most_columns: int | None) -> list[HeldWeight]:
        """The values that the engine computes with for the weight `name`, and those that it should have.

        Args:
            tensor: the full weight.
            most_columns: look at this many input columns of a matrix, spread evenly; None = at all.
        """

    @abstractmethod
    def _generate(
        self,
        prompts: Sequence[Sequence[int]],
        temperatures: Sequence[float],
        limits: Sequence[int],
        seeds: Sequence[int],
    ) -> Iterator[Responses]: ...

    @abstractmethod
    def _load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copy every tensor to where the engine computes with it."""

    @abstractmethod
    def _score(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]: ...

    @abstractmethod
    def _wake_cache(self) -> None:
        """Allocate device memory for the cache."""

    def _require_awake(self) -> None:
        if self.state is not EngineState.AWAKE:
            raise RolloutError(
                f"the rollout engine {self.name} must not generate while it is {self.state.name}: {self.state.value}"
            )

    def _count_off(self, weights: Iterable[tuple[str, Tensor]], missing: set[str]) -> Iterable[tuple[str, Tensor]]:
        """Yield `weights`, and remove each from `missing`."""
        for name, tensor in weights:
            if name not in missing:
                what = "was sent twice" if name in self.weight_names else "is not one of the engine's"
                raise ValueError(f"weight sync: {name!r} {what}")
            missing.remove(name)
            yield name, tensor


def row_seeds(seed: int, count: int) -> list[int]:
    """A seed for each of `count` rows; those of different `seed`s, below 2**31, never coincide."""
    return [seed * 2**20 + row for row in range(count)]


def step_seeds(seed: int, step: int, engine: int, count: int) -> list[int]:
    """A seed for each row that an engine generates in a training step.

    Args:
        seed: actor_rollout_ref.rollout.seed.
        engine: number of the engine, below 2048: engines draw from disjoint seeds in every step.
    """
    return [own + engine * 2**52 for own in row_seeds(seed + 1000 * step, count)]


def finish(generation: Iterator[Responses]) -> list[Response]:
    """Run a generation to its end; return the responses in the order of their prompts."""
    ended: Responses = {}
    for some in generation:
        ended |= some
    return [ended[row] for row in range(len(ended))]


def limit_each(max_new_tokens: int | Sequence[int], count: int) -> Sequence[int]:
    """The length limit of each of `count` responses, of one for all or of theirs."""
    return [max_new_tokens] * count if isinstance(max_new_tokens, int) else max_new_tokens
