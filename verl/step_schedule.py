"""Which steps of a run write rationales, and which samples a step takes.

All of it follows from the number of a step, of which 1 is the first: so a resumed run goes on as the whole one would
have, without any saved state. Imports no torch.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, takewhile
from typing import NamedTuple

# Where all steps are meant, however many they are.
ALL_STEPS = sys.maxsize


class Place(NamedTuple):
    """The samples of a step."""

    epoch: int
    """The pass over the data, from 0."""
    start: int
    """Position of the first one in the pass."""
    size: int


@dataclass(frozen=True)
class StepSchedule:
    num_samples: int
    """In the training file; no step takes more."""
    samples: int
    """Of a step with rationales."""
    contrastive_samples: int
    """Of a step without."""
    warm_up_steps: int = 0
    """First steps without rationales, or ALL_STEPS."""
    steps_between: int = 0
    """Steps without rationales after each one with them."""

    @property
    def has_one_size(self) -> bool:
        return self.samples == self.contrastive_samples

    def writes_rationales(self, step: int) -> bool:
        later = step - self.warm_up_steps - 1
        return later >= 0 and later % (1 + self.steps_between) == 0

    def samples_of(self, step: int) -> int:
        return self.samples if self.writes_rationales(step) else self.contrastive_samples

    def steps_with_rationales(self, steps: int) -> int:
        """How many of the first `steps` steps write rationales."""
        return -(-max(steps - self.warm_up_steps, 0) // (1 + self.steps_between))

    def samples_seen(self, steps: int) -> int:
        """Samples of the first `steps` steps, each as often as it was in one."""
        writing = self.steps_with_rationales(steps)
        return writing * self.samples + (steps - writing) * self.contrastive_samples

    def places(self) -> Iterator[Place]:
        """The samples of every step from the first on, without end.

        A step that finds too few samples left begins the next pass, so that no sample is twice in a step.
        """
        epoch, start = 0, 0
        for size in map(self.samples_of, count(1)):
            if start + size > self.num_samples:
                epoch, start = epoch + 1, 0
            yield Place(epoch, start, size)
            start += size

    def steps_of(self, epochs: int) -> int:
        """How many steps so many passes make."""
        return sum(1 for _ in takewhile(lambda place: place.epoch < epochs, self.places()))
