"""How prompts become rows, mini-batches and micro-batches: worked out once, printed, and checked.

Imports no torch: it runs before anything heavy starts.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from verl.config import RunConfig
from verl.errors import UserError


@dataclass(frozen=True)
class BatchPlan:
    num_samples: int
    """Samples in the training file."""
    world_size: int
    samples_per_step: int
    trained_rows_per_step: int
    anchor_rows_per_step: int
    updates_per_step: int
    """Optimizer steps per training step."""
    trained_rows_per_update: int
    micro_batch: str
    """Limit of one forward, in words."""
    warm_up_steps: int
    """First steps without rationales."""
    steps_between: int
    """Steps without rationales after each one with them."""
    steps_per_epoch: int
    total_steps: int
    decided_by: str
    """The setting that total_steps follows from."""

    @property
    def rows_per_step(self) -> int:
        return self.trained_rows_per_step + self.anchor_rows_per_step

    def writes_rationales(self, step: int) -> bool:
        """Whether a step, of which 1 is the first, writes rationales; it follows from its number alone."""
        later = step - self.warm_up_steps - 1
        return later >= 0 and later % (1 + self.steps_between) == 0

    @classmethod
    def from_config(cls, config: RunConfig, num_samples: int, num_anchors: int, world_size: int) -> "BatchPlan":
        """Work out the plan.

        Args:
            num_anchors: anchor rows of a sample: 2 with queries and negatives, 1 without negatives, or 0.

        Raises:
            UserError: the file is smaller than one step, or an update has fewer rows than there are workers.
        """
        data, actor, n = config.data, config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout.n
        if num_samples < data.train_batch_size:
            raise UserError(
                f"data.train_batch_size={data.train_batch_size} but data.train_files has {num_samples} samples; "
                f"set data.train_batch_size to {num_samples} or less."
            )
        rows_per_update = actor.ppo_mini_batch_size * n
        if rows_per_update < world_size:
            raise UserError(
                f"actor_rollout_ref.actor.ppo_mini_batch_size={actor.ppo_mini_batch_size} x rollout.n={n} = "
                f"{rows_per_update} rows per update, fewer than the {world_size} workers; set ppo_mini_batch_size to "
                f"{-(-world_size // n)} or more."
            )
        steps_per_epoch = num_samples // data.train_batch_size
        tokens, rows = actor.update_limit
        steps, epochs = config.trainer.total_training_steps, config.trainer.total_epochs
        return cls(
            num_samples=num_samples,
            world_size=world_size,
            samples_per_step=data.train_batch_size,
            trained_rows_per_step=data.train_batch_size * n,
            anchor_rows_per_step=data.train_batch_size * num_anchors,
            updates_per_step=data.train_batch_size // actor.ppo_mini_batch_size * actor.ppo_epochs,
            trained_rows_per_update=rows_per_update,
            micro_batch=f"{tokens} tokens" if tokens else f"{rows} rows",
            warm_up_steps=config.trainer.contrastive_warmup_steps,
            steps_between=config.trainer.contrastive_steps_between,
            steps_per_epoch=steps_per_epoch,
            total_steps=steps or steps_per_epoch * epochs,
            decided_by="trainer.total_training_steps" if steps else f"trainer.total_epochs={epochs}",
        )

    def lines(self) -> list[tuple[str, str]]:
        """The plan as (what, how much) lines."""
        per_rank = self.trained_rows_per_update / self.world_size
        return [
            ("samples in the training file", f"{self.num_samples}"),
            ("samples per step", f"{self.samples_per_step}"),
            (
                "rationales per step",
                f"{self.trained_rows_per_step} trained + {self.anchor_rows_per_step} anchors",
            ),
            ("updates per step", f"{self.updates_per_step} of {self.trained_rows_per_update} rationales"),
            ("per worker and update", f"about {per_rank:g} rationales on each of {self.world_size}"),
            ("one forward takes at most", f"{self.micro_batch} per worker"),
            ("steps", f"{self.total_steps} by {self.decided_by} ({self.steps_per_epoch} per epoch)"),
            *self._lines_without_rationales(),
        ]

    def _lines_without_rationales(self) -> Iterator[tuple[str, str]]:
        first = [f"the first {self.warm_up_steps}"] if self.warm_up_steps else []
        between = [f"{self.steps_between} after each one with them"] if self.steps_between else []
        if first or between:
            count = sum(not self.writes_rationales(step) for step in range(1, self.total_steps + 1))
            yield "without rationales", f"{count} of them: {', '.join(first + between)}"
