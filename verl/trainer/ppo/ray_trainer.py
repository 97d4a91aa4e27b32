"""The training loop. `RayPPOTrainer.fit` is GRACE; everything else here serves one of its lines.

Runs in the driver process: it sees batches of rows and calls workers, and never touches a device.
Shapes: N rows of a step, B trained rows among them, R response tokens.
"""

import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from verl.algorithm.advantage import get_adv_estimator_fn
from verl.algorithm.groups import group_index
from verl.algorithm.loss import KlController, kl_penalty, truncated_importance_weights
from verl.checkpoint.model_card import write_checkpoint_card
from verl.checkpoint.resume import ResumePoint
from verl.checkpoint.run_folder import CheckpointError, RunFolder
from verl.config import RunConfig
from verl.data.dataset import PromptDataset, StepBatches, prompt_loader
from verl.embedding.metrics import spread_report
from verl.embedding.prompts import PromptRenderer, system_prompt_of
from verl.embedding.settings import EmbedderSettings
from verl.errors import UserError
from verl.protocol import DataProto, object_array, response_mask
from verl.single_controller.ray_group import WorkerError
from verl.trainer.ppo.batch_plan import BatchPlan
from verl.trainer.ppo.metrics import (
    duplicate_share,
    length_metrics,
    reward_metrics,
    time_metrics,
)
from verl.trainer.ppo.mismatch import MismatchGuard, mismatch_metrics
from verl.trainer.ppo.samples import step_samples
from verl.trainer.ppo.validation import Validation, is_better
from verl.trainer.signals import Interrupted, StopSignals
from verl.trainer.tracking import Tracking
from verl.utils.progress import RunDisplay, Stopwatch
from verl.workers.group import ActorRolloutRefGroup
from verl.workers.reward_manager.base import RewardManager, RewardOutput, trained

# Before these phases the state of the run is still that of the last whole step.
_LEAVES_NO_TRACE = ("sync", "gen", "score", "val")
_VERSIONS = ("torch", "transformers", "ray", "verl")


class RayPPOTrainer:
    """Trains a policy to write rationales whose embeddings earn reward.

    Args:
        plan: sizes of a step, already checked.
        renderer: of the model's tokenizer.
        validation: when the config validates.
        run: the run's folder.
        resume: the checkpoint to go on from, or None.
        signals: how the run is asked to end.
    """

    def __init__(  # noqa: PLR0913 - the parts of a run meet here
        self,
        config: RunConfig,
        plan: BatchPlan,
        dataset: PromptDataset,
        validation: Validation | None,
        renderer: PromptRenderer,
        reward_manager: RewardManager,
        workers: ActorRolloutRefGroup,
        run: RunFolder,
        resume: ResumePoint | None,
        signals: StopSignals,
    ) -> None:
        self.config = config
        self.plan = plan
        self.dataset = dataset
        self.validation = validation
        self.renderer = renderer
        self.tokenizer = renderer.tokenizer
        self.reward_manager = reward_manager
        self.workers = workers
        self.run = run
        self.resume = resume
        self.signals = signals
        state: dict[str, Any] = resume.state if resume else {"step": 0, "run_ids": {}}
        self.first_step: int = state["step"]
        self.done_step = self.saved_step = self.first_step
        self.estimate_advantage = get_adv_estimator_fn(config.algorithm.adv_estimator)
        ctrl = config.algorithm.kl_ctrl
        self.kl_controller = KlController(
            state.get("kl_coef", ctrl.kl_coef), ctrl.type == "adaptive", ctrl.target_kl, ctrl.horizon
        )
        self.mismatch_guard = MismatchGuard(state.get("first_probs_diff"))
        names = config.trainer
        self.tracking = Tracking(
            config.run_dir, list(names.logger), names.project_name, names.experiment_name,
            config.model_dump(), state["run_ids"],
        )  # fmt: skip
        self.display = RunDisplay(plan.total_steps, self.first_step, "console" in names.logger)

    def fit(self) -> None:
        """Train from the first step to the last."""
        with self.saving_when_interrupted():
            self.start()
            for step, prompts in enumerate(self.prompt_batches(), start=self.first_step + 1):
                watch, found = Stopwatch(self.enter_phase), {}
                with watch.phase("sync"):
                    found["sync"] = self.workers.sync_rollout_weights()
                rows = self.expand(prompts)
                with watch.phase("gen"):
                    rows = self.generate(rows, step)
                with watch.phase("score"):
                    rows = self.embed_and_score(rows)
                found["rollout"] = self.compare_engine(rows)
                if self.config.needs_reference:
                    with watch.phase("ref"):
                        rows = self.score_by_reference(rows)
                with watch.phase("reward"):
                    reward = self.reward_manager(rows)
                    batch = self.add_advantages(rows[trained(rows)], reward)
                with watch.phase("update"):
                    found["actor"] = self.update(batch, step)
                self.finish_step(step, rows, batch, reward, found, watch)
        self.stop()

    def start(self) -> None:
        """Load the models and what is resumed."""
        self.display.start()
        for name in self.run.remove_leftovers():
            self.display.say(f"removed {name}, which a run was killed over")
        facts = self.workers.init_model()
        self.display.say(
            f"{self.config.actor_rollout_ref.model.path}: {facts['parameters'] / 1e6:.1f}M parameters, "
            f"{facts['device']}, "
            f"reference model {'loaded' if facts['reference'] else 'not needed (no KL term has weight)'}"
        )
        self.check_room(facts["checkpoint_bytes"])
        if self.resume:
            watch = Stopwatch()
            with watch.phase("resume"):
                self.workers.load_checkpoint(self.resume.folder)
            if self.resume.folder == self.run.step(self.first_step):
                self.run.mark_best(self.first_step)
            self.tracking.forget_after(self.first_step)
            self.display.say(f"resumed from {self.resume.folder} in {watch.total:.1f} s: {self.first_step} steps done")
            for note in self.resume.notes:
                self.display.say(f"  {note}")
        else:
            self.tracking.start_over()
        if aside := self.run.set_aside_after(self.first_step):
            self.display.say(f"checkpoints beyond step {self.first_step} were moved to {aside}")
        if self.config.trainer.val_before_train and not self.resume:
            self.validate(0)

    def stop(self) -> None:
        self.display.stop()
        self.tracking.finish()

    def check_room(self, checkpoint_bytes: int) -> None:
        """Raise CheckpointError if the disk has no room for one checkpoint: now, and not after hours."""
        free = shutil.disk_usage(self.run.path).free
        if self.config.trainer.save_freq != 0 and free < checkpoint_bytes:
            raise CheckpointError(
                f"a checkpoint takes about {checkpoint_bytes / 2**30:.1f} GiB and {self.run.path} has "
                f"{free / 2**30:.1f} GiB left; free some, or set trainer.default_local_dir to a larger disk."
            )

    def enter_phase(self, name: str) -> None:
        """Called when a phase begins. A run that was asked to end does so here, while the step has changed nothing."""
        if name in _LEAVES_NO_TRACE:
            self.signals.check()
        self.workers.phase = name

    @contextmanager
    def saving_when_interrupted(self) -> Iterator[None]:
        """Save the last whole step when the run is asked to end; what has begun of the next one is dropped."""
        try:
            yield
        except Interrupted as interrupted:
            if self.done_step > self.saved_step and not interrupted.at_once:
                self.save(self.done_step)
            self.display.say(f"ended; the same command goes on from step {self.saved_step}")
            self.stop()
            raise

    def prompt_batches(self) -> DataLoader:
        """One batch of prompt rows per remaining step."""
        data = self.config.data
        batches = StepBatches(
            len(self.dataset), data.train_batch_size, self.first_step, self.plan.total_steps,
            data.seed if data.shuffle else None,
        )  # fmt: skip
        return prompt_loader(
            self.dataset, batches, self.renderer, self.tokenizer.pad_token_id, data.dataloader_num_workers
        )

    def expand(self, prompts: DataProto) -> DataProto:
        """Prompt rows to the N rows of a step: n copies of each positive, one of each anchor, with temperatures."""
        rollout = self.config.actor_rollout_ref.rollout
        positive = trained(prompts)
        temperature = np.where(positive, rollout.temperature, rollout.anchor_temperature)
        prompts.batch["temperature"] = torch.tensor(temperature, dtype=torch.float32)
        return prompts.repeat(np.where(positive, rollout.n, 1).tolist())

    def generate(self, rows: DataProto, step: int) -> DataProto:
        """Add a rationale to every row: all roles in one engine call."""
        # Seeds of neighbouring steps lie apart, so that every rank of a step has one of its own.
        seed = self.config.actor_rollout_ref.rollout.seed + 1000 * step
        with self.display.generating(len(rows)) as advance:
            responses = self.workers.generate(rows, seed, self.config.data.max_response_length, advance)
        rows = rows.union(responses)
        ids = [
            r[:length].tolist()
            for r, length in zip(rows.batch["responses"], rows.batch["response_length"], strict=True)
        ]
        rows.non_tensor_batch["rationale"] = object_array(self.tokenizer.batch_decode(ids, skip_special_tokens=True))
        return rows

    def embed_and_score(self, rows: DataProto) -> DataProto:
        """Add embeddings of all rows and old log-probs of the trained ones: one forward for both."""
        columns = self.workers.compute_log_prob(rows, embed=self.reward_manager.needs_embeddings, for_update=True)
        return rows.union(_renamed(columns, "log_probs", "old_log_probs"))

    def compare_engine(self, rows: DataProto) -> dict[str, float]:
        """How far the engine's probabilities are from the trainer's; too far for too long ends the run."""
        metrics = mismatch_metrics(rows[trained(rows)], self.config.importance_cap)
        if warning := self.mismatch_guard.check(metrics["probs_diff_mean"]):
            self.display.say(warning)
        return metrics

    def score_by_reference(self, rows: DataProto) -> DataProto:
        """Add the reference model's log-probs of the trained rows."""
        scored = self.workers.compute_ref_log_prob(rows[trained(rows)])
        log_probs = torch.zeros_like(rows.batch["old_log_probs"])
        log_probs[torch.from_numpy(trained(rows))] = scored.batch["log_probs"]
        return rows.union(DataProto.from_dict({"ref_log_prob": log_probs}))

    def add_advantages(self, batch: DataProto, reward: RewardOutput) -> DataProto:
        """Scores [B] to advantages [B,R], with the KL to the reference subtracted if it is part of the reward."""
        mask = response_mask(batch)
        rewards = torch.zeros(mask.shape)
        rewards[torch.arange(len(batch)), batch.batch["response_length"] - 1] = reward.scores.float()
        algorithm = self.config.algorithm
        if algorithm.use_kl_in_reward and self.kl_controller.coef != 0:
            kl = kl_penalty(batch.batch["old_log_probs"], batch.batch["ref_log_prob"], algorithm.kl_penalty) * mask
            rewards = rewards - self.kl_controller.coef * kl
            reward.metrics["kl"] = float(kl.sum() / mask.sum())
            reward.metrics["kl_coef"] = self.kl_controller.coef
            self.kl_controller.update(reward.metrics["kl"], len(batch))
        group = group_index(batch.non_tensor_batch["uid"])
        advantages = self.estimate_advantage(
            rewards, mask, group, norm_by_std=algorithm.norm_adv_by_std_in_grpo, gamma=algorithm.gamma
        )
        return batch.union(DataProto.from_dict({"advantages": advantages}))

    def update(self, batch: DataProto, step: int) -> dict[str, float]:
        """Optimizer steps on mini-batches of whole groups, weighed by what engine and trainer disagree on."""
        actor, data = self.config.actor_rollout_ref.actor, self.config.data
        samples = torch.arange(data.train_batch_size)
        if actor.shuffle:
            samples = torch.randperm(len(samples), generator=torch.Generator().manual_seed(data.seed + step))
        group = group_index(batch.non_tensor_batch["uid"])
        batch = batch.union(DataProto.from_dict({"mini_batch": samples[group] // actor.ppo_mini_batch_size}))
        if cap := self.config.importance_cap:
            # Every term of the clipped loss is proportional to its advantage, so this weighs the loss.
            old, engine = batch.batch["old_log_probs"], batch.batch["rollout_log_probs"]
            batch.batch["advantages"] = batch.batch["advantages"] * truncated_importance_weights(old, engine, cap)
        return self.workers.update_actor(batch, data.train_batch_size // actor.ppo_mini_batch_size)

    def finish_step(
        self, step: int, rows: DataProto, batch: DataProto, reward: RewardOutput,
        found: dict[str, dict[str, float]], watch: Stopwatch,
    ) -> None:  # fmt: skip
        """Log the step; validate and save when it is time."""
        memory = self.workers.end_step()
        columns = batch.non_tensor_batch
        metrics = {
            **reward_metrics(reward.scores, columns["uid"], reward.metrics),
            "group/duplicate_share": duplicate_share(columns["rationale"], columns["uid"]),
            **{f"{part}/{name}": value for part, values in found.items() for name, value in values.items()},
            "actor/entropy": float(batch.batch["entropy"].mean()),
            **length_metrics(rows, rows.meta_info["num_shortened"]),
            **time_metrics(watch.seconds, rows, self.workers.take_bytes_moved()),
            **{f"memory/{name}": value for name, value in memory.items()},
            "training/epoch": (step - 1) // self.plan.steps_per_epoch,
        }
        if "embeddings" in rows.batch.keys():
            metrics |= {f"embedding/{k}": v for k, v in spread_report(rows.batch["embeddings"]).items()}
        # Before the checkpoint: a run that is killed in between forgets the line and does the step again.
        self.tracking.log(metrics, step)
        self.tracking.log_samples(step_samples(rows, batch, reward, self.config.trainer.samples_per_step), step)
        self.display.step_done(step, metrics)
        self.done_step = step
        frequency = self.config.trainer.test_freq
        if self._is_due(step, frequency, and_last=frequency > 0):
            self.validate(step, watch.total)
        if self._is_due(step, self.config.trainer.save_freq, and_last=True) and self.saved_step < step:
            self.save(step)

    def save(self, step: int, best_value: float | None = None) -> None:
        """Write a checkpoint under a temporary name, then publish it.

        Args:
            best_value: the step's figure by trainer.save_best, if that is the best so far.

        Raises:
            CheckpointError: it could not be written; the run's other checkpoints are as they were.
        """
        watch = Stopwatch()
        self.workers.phase = "save"
        with watch.phase("save"):
            try:
                folder = self.run.publish(step, self._write_checkpoint(step), best_value)
                if keep := self.config.trainer.max_actor_ckpt_to_keep:
                    self.run.keep_newest(keep)
            except (OSError, WorkerError) as error:
                raise self._save_failed(step, error) from error
        self.saved_step = step
        self.tracking.log({"time/save_s": watch.total}, step)
        self.display.say(f"saved {folder} in {watch.total:.1f} s")

    def _write_checkpoint(self, step: int) -> dict[str, Any]:
        """Write everything under a step's temporary name; return the trainer's own state."""
        settings, folder = self._embedder_settings(), self.run.begin(step)
        self.workers.save_checkpoint(folder, settings)
        versions = {"python": platform.python_version(), **{name: version(name) for name in _VERSIONS}}
        write_checkpoint_card(folder / "huggingface", self.config, settings, len(self.dataset), step, versions)
        return {
            "step": step,
            "samples_seen": step * self.config.data.train_batch_size,
            "world_size": self.workers.world_size,
            "data_sha256": self.dataset.sha256,
            "kl_coef": self.kl_controller.coef,
            "first_probs_diff": self.mismatch_guard.first,
            "run_ids": self.tracking.run_ids,
            "versions": versions,
            "config": self.config.model_dump(mode="json"),
        }

    def _save_failed(self, step: int, error: Exception) -> CheckpointError:
        free = shutil.disk_usage(self.run.path).free
        self.run.abandon(step)
        whole = [found for found in self.run.steps() if found <= self.done_step]
        last = f"step {whole[-1]}" if whole else "the beginning, as there is no checkpoint yet"
        return CheckpointError(
            f"{error}\nstep {step} could not be saved in {self.run.path} ({free / 2**30:.2f} GiB free). Free some "
            f"space, or make it writable, and start the same command again: it goes on from {last}."
        )

    def validate(self, step: int, step_seconds: float | None = None) -> None:
        """Log the figures of the held-out texts; save the step if it is the best by trainer.save_best.

        Args:
            step_seconds: of the training step, for how much of the run validation takes.
        """
        watch = Stopwatch(self.enter_phase)
        with watch.phase("val"):
            metrics = self.embed_held_out()
        # Not the next step's.
        self.workers.take_bytes_moved()
        self.tracking.log({**metrics, "time/val_s": watch.total}, step)
        figures = ", ".join(f"{name[4:]} {value:.3f}" for name, value in metrics.items())
        self.display.say(f"step {step} held-out: {figures}  ({self._cost_of_validation(watch.total, step_seconds)})")
        name = self.config.trainer.save_best
        if name is None or step == self.first_step:
            return
        if name not in metrics:
            raise UserError(f"trainer.save_best={name} is not one of the validation's: {', '.join(metrics)}.")
        best = self.run.best()
        if is_better(name, metrics[name], best.value if best else None):
            self.save(step, metrics[name])
            self.display.say(f"the best {name} so far: {metrics[name]:.4f}, step {step}")

    def embed_held_out(self) -> dict[str, float]:
        """Give every held-out text one rationale, with the same seed every time."""
        assert self.validation is not None
        val = self.config.actor_rollout_ref.rollout.val_kwargs
        embedded = []
        for part, prompts in self.validation.batches():
            self.workers.sync_rollout_weights()
            temperature = val.temperature if val.do_sample else 0.0
            prompts.batch["temperature"] = torch.full((len(prompts),), temperature)
            rows = self.generate(prompts, step=0)
            embedded.append((part, rows.union(self.workers.compute_log_prob(rows, embed=True, for_update=False))))
        if self.reward_manager.needs_embeddings:
            return self.validation.report(embedded)
        return {"val/reward": float(torch.cat([self.reward_manager(rows).scores for _, rows in embedded]).mean())}

    def _cost_of_validation(self, seconds: float, step_seconds: float | None) -> str:
        """What validation costs, and its share of a run that validates every test_freq steps."""
        assert self.validation is not None
        text = f"{self.validation.num_texts} texts in {seconds:.1f} s"
        if step_seconds is None:
            return text
        share = seconds / (seconds + self.config.trainer.test_freq * step_seconds)
        return f"{text}: {share:.0%} of the run at every {self.config.trainer.test_freq} steps"

    def _is_due(self, step: int, frequency: int, and_last: bool) -> bool:
        last = and_last and frequency != 0 and step == self.plan.total_steps
        return last or (frequency > 0 and step % frequency == 0)

    def _embedder_settings(self) -> EmbedderSettings:
        """What an encoder needs to embed as training did."""
        data, rollout = self.config.data, self.config.actor_rollout_ref.rollout
        return EmbedderSettings(
            system_prompt=system_prompt_of(self.dataset[0]["chats"]["positive"]),
            pool_system_prompt=not self.reward_manager.exclude_system_prompt,
            max_prompt_length=data.max_prompt_length,
            max_new_tokens=data.max_response_length,
            # An encoder that stops at a long text is of no use.
            truncation="right" if data.truncation == "error" else data.truncation,
            temperature=rollout.temperature,
            base_model=self.config.actor_rollout_ref.model.path,
        )


def _renamed(rows: DataProto, old: str, new: str) -> DataProto:
    names = [str(name) for name in rows.batch.keys()]
    return DataProto.from_dict({new if name == old else name: rows.batch[name] for name in names})
