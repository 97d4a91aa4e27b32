"""How prompts become rows, mini-batches and micro-batches: worked out once, printed, and checked.

Imports no torch: it runs before anything heavy starts.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from verl.config import RunConfig
from verl.errors import UserError
from verl.step_schedule import ALL_STEPS, StepSchedule


@dataclass(frozen=True)
class BatchPlan:
    schedule: StepSchedule
    world_size: int
    trained_rows_per_step: int
    unit: str
    """What a row of a step is: rationales, or texts where none is written."""
    anchor_rows_per_step: int
    """At most: a sample may have fewer negatives than data.negatives_per_query."""
    updates_per_step: int
    """Optimizer steps per training step."""
    trained_rows_per_update: int
    micro_batch: str
    """Limit of one forward, in words."""
    total_steps: int
    decided_by: str
    """The setting that total_steps follows from."""

    @property
    def rows_per_step(self) -> int:
        return self.trained_rows_per_step + self.anchor_rows_per_step

    @classmethod
    def from_config(cls, config: RunConfig, num_samples: int, num_anchors: int, world_size: int) -> "BatchPlan":
        """Work out the plan.

        Args:
            num_anchors: most anchor rows of a sample: a query and its negatives, or none.

        Raises:
            UserError: the file is smaller than one step, or an update has fewer rows than there are workers.
        """
        data, actor, n = config.data, config.actor_rollout_ref.actor, config.rows_per_text
        sizes = {"train_batch_size": data.train_batch_size, "contrastive_batch_size": data.contrastive_size}
        for name, size in sizes.items():
            if num_samples < size:
                raise UserError(
                    f"data.{name}={size} but data.train_files has {num_samples} samples; set data.{name} to "
                    f"{num_samples} or less."
                )
        rows_per_update = actor.ppo_mini_batch_size * n
        if rows_per_update < world_size:
            per_text = f" x rollout.n={n}" if data.think else ""
            raise UserError(
                f"actor_rollout_ref.actor.ppo_mini_batch_size={actor.ppo_mini_batch_size}{per_text} = "
                f"{rows_per_update} rows per update, fewer than the {world_size} workers; set ppo_mini_batch_size to "
                f"{-(-world_size // n)} or more."
            )
        schedule = config.schedule(num_samples)
        tokens, rows = actor.update_limit
        steps, epochs = config.trainer.total_training_steps, config.trainer.total_epochs
        return cls(
            schedule=schedule,
            world_size=world_size,
            unit="rationales" if data.think else "texts",
            trained_rows_per_step=data.train_batch_size * n,
            anchor_rows_per_step=data.train_batch_size * num_anchors,
            updates_per_step=config.num_mini_batches * actor.ppo_epochs,
            trained_rows_per_update=rows_per_update,
            micro_batch=f"{tokens} tokens" if tokens else f"{rows} rows",
            total_steps=steps or schedule.steps_of(epochs),
            decided_by="trainer.total_training_steps" if steps else f"trainer.total_epochs={epochs}",
        )

    def lines(self) -> list[tuple[str, str]]:
        """The plan as (what, how much) lines."""
        per_rank = self.trained_rows_per_update / self.world_size
        per_epoch = "per epoch" if self.schedule.has_one_size else "in the first epoch"
        return [
            ("samples in the training file", f"{self.schedule.num_samples}"),
            ("samples per step", f"{self.schedule.samples}"),
            (
                f"{self.unit} per step",
                f"{self.trained_rows_per_step} trained + {self.anchor_rows_per_step} anchors",
            ),
            ("updates per step", f"{self.updates_per_step} of {self.trained_rows_per_update} {self.unit}"),
            ("per worker and update", f"about {per_rank:g} {self.unit} on each of {self.world_size}"),
            ("one forward takes at most", f"{self.micro_batch} per worker"),
            ("steps", f"{self.total_steps} by {self.decided_by} ({self.schedule.steps_of(1)} {per_epoch})"),
            *self._lines_without_rationales(),
        ]

    def _lines_without_rationales(self) -> Iterator[tuple[str, str]]:
        schedule = self.schedule
        if schedule.warm_up_steps == ALL_STEPS:
            yield "without rationales", "all of them (data.think=False)"
            return
        first = [f"the first {schedule.warm_up_steps}"] if schedule.warm_up_steps else []
        between = [f"{schedule.steps_between} after each one with them"] if schedule.steps_between else []
        if first or between:
            size = "" if schedule.has_one_size else f", with {schedule.contrastive_samples} samples each"
            count = self.total_steps - schedule.steps_with_rationales(self.total_steps)
            yield "without rationales", f"{count} of them: {', '.join(first + between)}{size}"
