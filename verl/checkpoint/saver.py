"""Saving a step of a run: room for it, writing, publishing, removal of old steps, and what to say when it fails."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from verl.checkpoint.run_folder import CheckpointError, RunFolder
from verl.errors import WorkerError


class CheckpointSaver:
    """Writes checkpoints into a run's folder; a failed save leaves the earlier ones as they were.

    Args:
        first_step: the step that the run resumed from; 0 for a new run.
        keep: newest steps to keep besides the best one; None = all.
    """

    def __init__(self, run: RunFolder, first_step: int, keep: int | None) -> None:
        self.run = run
        self.saved_step = first_step
        """The newest step that is saved."""
        self._keep = keep

    def check_room(self, checkpoint_bytes: int) -> None:
        """Raise CheckpointError if the disk has no room for one checkpoint: at the start, not after hours."""
        free = shutil.disk_usage(self.run.path).free
        if free < checkpoint_bytes:
            raise CheckpointError(
                f"a checkpoint takes about {checkpoint_bytes / 2**30:.1f} GiB and {self.run.path} has "
                f"{free / 2**30:.1f} GiB free; free some space, or set trainer.default_local_dir to a larger disk."
            )

    def save(
        self, step: int, write: Callable[[Path], dict[str, Any]], best_value: float | None = None
    ) -> tuple[Path, list[str]]:
        """Write a step under a temporary name, then publish it and remove the steps that are not kept.

        Args:
            write: writes the step into an empty folder and returns the trainer's own state.
            best_value: the step's figure by trainer.save_best, if that is the best so far.

        Returns:
            The step's folder, and a line for each old step that could not be removed.

        Raises:
            CheckpointError: it could not be written; the message names the step that the run can resume from.
        """
        try:
            folder = self.run.publish(step, write(self.run.begin(step)), best_value)
        except (OSError, WorkerError) as error:
            raise self._failure(step, error) from error
        self.saved_step = step
        return folder, self.run.keep_newest(self._keep) if self._keep else []

    def _failure(self, step: int, error: Exception) -> CheckpointError:
        try:
            room = f"{shutil.disk_usage(self.run.path).free / 2**30:.2f} GiB free"
        except OSError as gone:
            room = str(gone)
        self.run.abandon(step)
        left = [found for found in self.run.steps() if found <= step]
        last = f"step {left[-1]}" if left else "the beginning, as there is no checkpoint yet"
        return CheckpointError(
            f"{error}\nstep {step} could not be saved in {self.run.path} ({room}). Free some "
            "space, or make it writable, and start the same command again: with trainer.resume_mode=auto, and without "
            f"trainer.resume_from_path, it resumes from {last}."
        )
