"""The prompt rows of each step.

Which samples make up a step follows from the seed and the step number alone. So a resumed run sees the same samples
without any saved loader state, on any number of workers.
"""

from collections.abc import Iterator
from itertools import islice

import torch
from torch.utils.data import DataLoader

from verl.data.collator import PromptCollator
from verl.data.dataset import PromptDataset
from verl.errors import WorkerError
from verl.protocol import DataProto
from verl.step_schedule import StepSchedule


class StepBatches:
    """The dataset positions of every step after `first_step` steps: a new shuffled pass for each epoch."""

    def __init__(self, schedule: StepSchedule, first_step: int, num_steps: int, seed: int | None) -> None:
        self.schedule = schedule
        self.steps = range(first_step, num_steps)
        self.seed = seed

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """The samples of each step as (pass, position)."""
        shuffled, order = -1, list(range(self.schedule.num_samples))
        for epoch, start, size in islice(self.schedule.places(), self.steps.start, self.steps.stop):
            if self.seed is not None and epoch != shuffled:
                generator = torch.Generator().manual_seed(self.seed + epoch)
                shuffled, order = epoch, torch.randperm(len(order), generator=generator).tolist()
            yield [(epoch, index) for index in order[start : start + size]]


def prompt_batches(
    dataset: PromptDataset, batches: StepBatches, collate: PromptCollator, num_workers: int, timeout_s: int
) -> Iterator[DataProto]:
    """The prompt rows of each step.

    Args:
        num_workers: processes that prepare them; 0 = none but this one.
        timeout_s: longest time without a batch from them; 0 = no limit.

    Raises:
        WorkerError: one of the processes died, or none gave a batch in time.
    """
    loader = DataLoader(
        dataset, batch_sampler=batches, num_workers=num_workers, collate_fn=collate,
        timeout=timeout_s if num_workers else 0,
        # A fork of this process would wait for ever for locks of threads that it does not have, as tokenizers' are.
        multiprocessing_context="spawn" if num_workers else None,
    )  # fmt: skip
    try:
        yield from loader
    except RuntimeError as error:
        if not num_workers:
            raise
        raise WorkerError(
            f"the processes of data.dataloader_num_workers={num_workers} gave no batch ({error}). With 0 the driver "
            "prepares the batches itself, which takes milliseconds a step."
        ) from error
