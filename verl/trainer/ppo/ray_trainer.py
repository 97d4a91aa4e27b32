"""The training loop. `RayPPOTrainer.fit` is GRACE; everything else here serves one of its lines.

Runs in the driver process: it sees batches of rows and calls workers, and never touches a device.
Shapes: N rows of a step, B trained rows among them, R response tokens.
"""

import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from verl.algorithm.loss import KlController
from verl.checkpoint.model_card import write_checkpoint_card
from verl.checkpoint.resume import ResumePoint
from verl.checkpoint.saver import CheckpointSaver
from verl.data.dataset import StepBatches, prompt_batches
from verl.protocol import DataProto, is_trained, object_array, response_ids, scored_width
from verl.report.page import write_report
from verl.trainer.display import RunDisplay, model_lines
from verl.trainer.ppo import step_rows
from verl.trainer.ppo.alerts import AlertError
from verl.trainer.ppo.diagnostics import Diagnostics
from verl.trainer.ppo.metrics import prefixed, step_metrics, time_metrics
from verl.trainer.ppo.mismatch import MismatchGuard, mismatch_metrics
from verl.trainer.ppo.samples import step_samples
from verl.trainer.ppo.validation import is_better
from verl.trainer.record import write_record
from verl.trainer.run import TrainingRun
from verl.trainer.signals import Interrupted, StopSignals
from verl.trainer.tracking import LOGGED, Tracking
from verl.trainer.watchdog import watch
from verl.utils.run_files import REPORT
from verl.utils.versions import installed_versions
from verl.workers.group import ActorRolloutRefGroup
from verl.workers.reward_manager.base import RewardOutput
from verl.workers.reward_manager.checked import RewardError

# Until these phases begin, weights and optimizer are those of the last finished step, so the run may stop and save.
_BEFORE_THE_UPDATE = ("data", "sync", "gen", "score", "val", "diag")
# In these the driver calls no worker, so that nothing but a limit of its own would end them.
_IN_THE_DRIVER = ("data", "reward")
# Figures that a step has once it is validated, and diagnosed.
_VALIDATED, _DIAGNOSED = "time/val_s", "time/diag_s"


class RayPPOTrainer:
    """Trains a policy to write rationales whose embeddings earn reward.

    Args:
        run: what it trains on and with, already checked.
        signals: how the run is asked to stop.
    """

    def __init__(self, run: TrainingRun, workers: ActorRolloutRefGroup, signals: StopSignals) -> None:
        self.run, self.config, self.plan = run, run.config, run.plan
        self.workers = workers
        self.signals = signals
        self.reward_manager = run.reward_manager
        state: dict[str, Any] = run.resume.state if run.resume else {"step": 0, "run_ids": {}}
        self.first_step = self.done_step = int(state["step"])
        trainer = self.config.trainer
        self.saver = CheckpointSaver(run.folder, self.first_step, trainer.max_actor_ckpt_to_keep)
        kl = self.config.algorithm.kl_ctrl
        self.kl_controller = KlController(
            state.get("kl_coef", kl.kl_coef), kl.type == "adaptive", kl.target_kl, kl.horizon
        )
        self.mismatch_guard = MismatchGuard(state.get("first_probs_diff"))
        # Those of another run's folder are that run's.
        self.run_ids: dict[str, str] = state["run_ids"] if self.goes_on else {}
        self.display = RunDisplay(self.plan.total_steps, self.first_step, "console" in trainer.logger, trainer.use_ray)
        self.tracking = Tracking(
            self.config.run_dir, list(trainer.logger), trainer.project_name, trainer.experiment_name,
            self.config.model_dump(), self.display.say,
        )  # fmt: skip
        self.diagnostics: Diagnostics | None = None
        """Once the run has started, where it diagnoses."""
        self.seconds: dict[str, float] = {}
        """Of the phases of the current step."""
        self.train_seconds = 0.0
        """Of all steps that this process has finished."""

    def fit(self) -> None:
        """Train from the first step to the last."""
        with self.saving_when_stopped():
            self.start()
            for step, prompts in self.steps():
                found: dict[str, dict[str, float]] = {}
                writes = self.plan.schedule.writes_rationales(step)
                trains_policy = writes and self.config.actor_rollout_ref.actor.trains_policy
                if writes:
                    with self.phase("sync"):
                        found["sync"] = self.workers.sync_rollout_weights()
                    with self.phase("gen"):
                        rows = self.generate(step_rows.expand(prompts, self.config.actor_rollout_ref.rollout), step)
                else:
                    rows = step_rows.without_rationales(prompts, self.config.actor_rollout_ref.actor.has_kl_loss)
                with self.phase("score"):
                    rows = self.add_embeddings_and_log_probs(rows, trains_policy)
                if trains_policy:
                    found["rollout"] = self.compare_engine(rows)
                rows = self.add_reference_log_probs(rows, trains_policy)
                with self.phase("reward"):
                    reward = self.reward(rows, trains_policy)
                    batch, found["reward"] = self.add_advantages(rows, reward, trains_policy)
                with self.phase("update"):
                    found["actor"] = self.update(batch, rows, reward, step)
                self.report(step, rows, batch, reward, found)
                self.finish(step)

    @property
    def goes_on(self) -> bool:
        """Whether this run's own folder has the checkpoint that it resumes from."""
        return self.run.resume is not None and self.run.resume.folder == self.run.folder.step(self.first_step)

    def start(self) -> None:
        """Load the models, and the checkpoint that the run resumes from."""
        self.display.start()
        for line in self.run.folder.remove_leftovers():
            self.display.say(line)
        facts = self.workers.init_model()
        for line in model_lines(f"{self.config.actor_rollout_ref.model.path}", facts):
            self.display.say(line)
        if self.config.trainer.save_freq != 0:
            self.saver.check_room(facts["checkpoint_bytes"])
        if self.run.resume:
            self.resume(self.run.resume)
        if aside := self.run.folder.set_aside_after(self.first_step, also=() if self.run.resume else LOGGED):
            self.display.say(f"what an earlier run left after step {self.first_step} was moved to {aside}")
        write_record(self.run.folder.path, self.config, self.plan.total_steps)
        logged = self.tracking.begin(self.first_step, self.run_ids)
        if self.run.probe:
            self.diagnostics = Diagnostics(self.run, self.run.probe, self.workers, self.write_held_out)
        if self.config.trainer.val_before_train and not self.run.resume:
            self.validate(0)
        if self.goes_on:
            # The earlier run may have been stopped between training this step and judging it.
            self.judge(self.first_step, logged)
        if self.diagnostics and not self.diagnostics.has_begun:
            self.diagnose(self.first_step)
        self.say_alerts(self.first_step)

    def resume(self, point: ResumePoint) -> None:
        """Load a checkpoint into the workers."""
        with self.phase("resume"):
            self.workers.load_checkpoint(point.folder)
        if self.goes_on:
            # The earlier run may have been killed between publishing this step and marking it as the best.
            self.run.folder.mark_best(self.first_step)
        seconds = self.seconds.pop("resume")
        self.display.say(f"resumed from {point.folder} in {seconds:.1f} s: {self.first_step} steps done")
        for note in point.notes:
            self.display.say(f"  {note}")
        if self.first_step >= self.plan.total_steps:
            self.display.say(
                f"nothing left to train: the run has {self.plan.total_steps} steps (trainer.total_training_steps, or "
                "trainer.total_epochs); raise it to go on"
            )

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a part of a step, and name it in errors of the workers.

        Raises:
            Interrupted: the run was asked to stop, and weights and optimizer are still those of the last finished step.
        """
        if name in _BEFORE_THE_UPDATE:
            self.signals.check()
        self.workers.enter_phase(name)
        start = time.perf_counter()
        # Without Ray a person may sit in a debugger.
        watched = name in _IN_THE_DRIVER and self.config.trainer.use_ray
        with watch(name, self.config.trainer.phase_timeout_s) if watched else nullcontext():
            yield
        self.seconds[name] = time.perf_counter() - start

    @contextmanager
    def saving_when_stopped(self) -> Iterator[None]:
        """Save the last finished step when the run is asked to stop, cannot reward, or ends at an alert; what has begun
        is dropped. However it ends, the bars and the trackers end too.

        In these three cases the workers are well, and their weights those of the last finished step.
        """
        try:
            yield
        except (Interrupted, RewardError, AlertError):
            if self.done_step > self.saver.saved_step:
                self.save(self.done_step)
            mode = "" if self.config.trainer.resume_mode == "auto" else " with trainer.resume_mode=auto"
            self.display.say(f"stopped; the same command{mode} resumes from step {self.saver.saved_step}")
            raise
        finally:
            self.display.stop()
            self.tracking.finish()

    def steps(self) -> Iterator[tuple[int, DataProto]]:
        """The number and the prompt rows of every remaining step."""
        data, schedule, total = self.config.data, self.plan.schedule, self.plan.total_steps
        order = StepBatches(schedule, self.first_step, total, data.seed if data.shuffle else None)
        batches = prompt_batches(
            self.run.dataset, order, self.run.collate, data.dataloader_num_workers, self.config.trainer.phase_timeout_s
        )
        for step, place in enumerate(islice(schedule.places(), self.first_step, total), self.first_step + 1):
            with self.phase("data"):
                prompts = next(batches)
            prompts.meta_info |= {"step": step, "epoch": place.epoch}
            yield step, prompts

    def generate(self, rows: DataProto, step: int) -> DataProto:
        """Add a rationale to every row that gets one: all roles in one engine call."""
        with self.display.generating(len(rows)) as advance:
            responses = self.workers.generate(rows, step, advance)
        rows = rows.union(responses)
        texts = self.run.collate.renderer.tokenizer.batch_decode(response_ids(rows), skip_special_tokens=True)
        rows.non_tensor_batch["rationale"] = object_array(texts)
        return rows

    def add_embeddings_and_log_probs(self, rows: DataProto, log_probs: bool) -> DataProto:
        """Add embeddings of all rows, and old log-probs of the trained ones where wanted: one forward for both."""
        manager = self.reward_manager
        columns = self.workers.score(
            rows, log_probs, embed=manager.needs_embeddings, for_update=True, train_anchors=manager.trains_anchors
        )
        return rows.union(columns.renamed("log_probs", "old_log_probs"))

    def compare_engine(self, rows: DataProto) -> dict[str, float]:
        """How far the engine's probabilities are from the trainer's; too far for too long ends the run."""
        metrics = mismatch_metrics(rows[is_trained(rows)], self.config.importance_cap)
        if warning := self.mismatch_guard.check(metrics["probs_diff_mean"]):
            self.display.say(warning)
        return metrics

    def add_reference_log_probs(self, rows: DataProto, trains_policy: bool) -> DataProto:
        """Add the reference model's log-probs of the trained rows, where a KL term has part in the step."""
        in_reward = trains_policy and self.config.has_kl_in_reward
        if not (in_reward or self.config.actor_rollout_ref.actor.has_kl_loss):
            return rows
        trained = is_trained(rows)
        log_probs = torch.zeros(len(rows), scored_width(rows))
        with self.phase("ref"):
            log_probs[torch.from_numpy(trained)] = self.workers.compute_ref_log_prob(rows[trained]).batch["log_probs"]
        return rows.with_tensors(ref_log_prob=log_probs)

    def reward(self, rows: DataProto, trains_policy: bool) -> RewardOutput:
        """Reward the step's rows.

        Raises:
            RewardError: see `CheckedRewardManager`; or there is nothing to train by.
        """
        reward = self.reward_manager(rows)
        if not trains_policy and reward.embedding_grad is None:
            raise RewardError(
                f"step {rows.meta_info['step']} trains nothing: it follows no policy gradient "
                "(trainer.contrastive_warmup_steps, trainer.contrastive_steps_between, "
                "actor_rollout_ref.actor.embedding_grad_share=1), and the reward manager gave no embedding_grad"
            )
        return reward

    def add_advantages(
        self, rows: DataProto, reward: RewardOutput, trains_policy: bool
    ) -> tuple[DataProto, dict[str, float]]:
        """The trained rows, with advantages if their policy is trained, and metrics of the KL in the reward."""
        batch = rows[is_trained(rows)]
        if not trains_policy:
            return batch, {}
        return step_rows.add_advantages(batch, reward.scores, self.config.algorithm, self.kl_controller)

    def update(self, batch: DataProto, rows: DataProto, reward: RewardOutput, step: int) -> dict[str, float]:
        """Optimizer steps on mini-batches of whole groups, weighed by what engine and trainer disagree on.

        They follow the policy gradient where there are advantages, and the gradient on the embeddings where the reward
        manager gives one.
        """
        num_mini_batches = self.config.num_mini_batches
        batch = step_rows.add_embedding_grad(
            batch, rows, reward.embedding_grad, self.reward_manager.trains_anchors, num_mini_batches
        )
        seed = self.config.data.seed + step if self.config.actor_rollout_ref.actor.shuffle else None
        batch = step_rows.assign_mini_batches(batch, num_mini_batches, seed)
        batch = step_rows.weigh_by_importance(batch, self.config.importance_cap)
        return self.workers.update_actor(batch, num_mini_batches)

    def finish(self, step: int) -> None:
        """What follows a step that is trained and logged: held-out figures, alerts and a checkpoint, where due."""
        self.done_step = step
        self.judge(step)
        self.say_alerts(step)
        if self.save_is_due(step):
            self.save(step)

    def judge(self, step: int, logged: Collection[str] = ()) -> None:
        """Held-out figures of a trained step, where due.

        Args:
            logged: figures that the step has already.
        """
        if self.validation_is_due(step) and _VALIDATED not in logged:
            self.validate(step)
        if self.diagnostics and self.diagnostics.is_due(step) and _DIAGNOSED not in logged:
            self.diagnose(step)

    def cost(self, step: int, rows: DataProto) -> dict[str, float]:
        """What the step took, in seconds by phase, tokens per second and bytes sent."""
        seconds, self.seconds = self.seconds, {}
        self.train_seconds += sum(seconds.values())
        moved = self.workers.take_bytes_moved()
        return time_metrics(seconds, rows, moved) | {"training/epoch": rows.meta_info["epoch"]}

    def report(
        self, step: int, rows: DataProto, batch: DataProto, reward: RewardOutput, found: dict[str, dict[str, float]]
    ) -> None:
        """Log a finished step, before its checkpoint: a run that is killed in between drops the line and repeats it."""
        metrics = step_metrics(rows, batch, reward, self.config)
        metrics |= prefixed(**found, memory=self.workers.memory()) | self.cost(step, rows)
        self.tracking.log(metrics, step)
        self.display.step_done(step, metrics)
        if self.plan.schedule.writes_rationales(step):
            self.tracking.log_samples(step_samples(rows, batch, reward, self.config.trainer.samples_per_step), step)

    def validation_is_due(self, step: int) -> bool:
        frequency = self.config.trainer.test_freq
        return frequency > 0 and (step % frequency == 0 or step == self.plan.total_steps)

    def save_is_due(self, step: int) -> bool:
        frequency, is_last = self.config.trainer.save_freq, step == self.plan.total_steps
        return (
            self.saver.saved_step < step and frequency != 0 and (is_last or (frequency > 0 and step % frequency == 0))
        )

    def validate(self, step: int) -> None:
        """Log the figures of the held-out texts; save the step if it is the best by trainer.save_best."""
        assert self.run.validation is not None
        with self.phase("val"):
            embed = self.embed_held_out if self.reward_manager.needs_embeddings else self.write_held_out
            metrics = self.run.validation.run(embed, self.reward_manager, step)
        self.workers.take_bytes_moved()  # not to be counted for the next step
        seconds = self.seconds.pop("val")
        self.tracking.log({**metrics, _VALIDATED: seconds}, step)
        finished = step - self.first_step
        step_seconds = self.train_seconds / finished if finished else None
        self.display.say(self.run.validation.line(step, metrics, seconds, step_seconds))
        name = self.config.trainer.save_best
        if name is None or step == 0:
            return
        best = self.run.folder.best()
        if is_better(name, metrics[name], best.value if best else None):
            self.save(step, metrics[name])
            self.display.say(f"the best {name} so far: {metrics[name]:.4f}, step {step}")

    def write_held_out(self, prompts: DataProto) -> DataProto:
        """Prompt rows with one rationale each, drawn with the same seeds in every call."""
        self.workers.sync_rollout_weights()
        return self.generate(prompts, step=0)

    def embed_held_out(self, prompts: DataProto) -> DataProto:
        """As `write_held_out`, with embeddings."""
        rows = self.write_held_out(prompts)
        return rows.union(self.workers.score(rows, log_probs=False, embed=True, for_update=False))

    def diagnose(self, step: int) -> None:
        """Log the figures of the probe's texts; see `Diagnostics`."""
        assert self.diagnostics is not None
        with self.phase("diag"):
            diagnosis = self.diagnostics.run(step)
        self.workers.take_bytes_moved()  # not to be counted for the next step
        self.tracking.log({**diagnosis.figures, _DIAGNOSED: self.seconds.pop("diag")}, step)
        self.tracking.log_diagnosis(diagnosis.texts, step)

    def say_alerts(self, step: int) -> None:
        """Say the alerts that have begun, and end the run if it is to end at one.

        Raises:
            AlertError: with trainer.stop_on_alert; but not before the first step, as training is to change what was
                found then.
        """
        begun = self.tracking.log_new_alerts(step)
        for alert in begun:
            self.display.say(f"ALERT at step {step}, {alert.name}: {alert.text}")
        if begun and self.config.trainer.stop_on_alert and step > self.first_step:
            raise AlertError(f"stopped at step {step} by the alert {begun[0].name}: {begun[0].text}")

    def save(self, step: int, best_value: float | None = None) -> None:
        """Save the step.

        Args:
            best_value: its figure by trainer.save_best, if that is the best so far.

        Raises:
            CheckpointError: it could not be written; the run's other checkpoints are as they were.
        """
        with self.phase("save"):
            folder, complaints = self.saver.save(step, partial(self.write_checkpoint, step), best_value)
        seconds = self.seconds.pop("save")
        self.tracking.log({"time/save_s": seconds}, step)
        for line in (f"saved {folder} in {seconds:.1f} s", *complaints):
            self.display.say(line)
        if self.config.trainer.report:
            self.refresh_report()

    def refresh_report(self) -> None:
        """Write the run's page anew; a full disk or a file that cannot be read costs the page, not the run."""
        folder = self.run.folder.path
        try:
            write_report([folder], folder / REPORT)
        except (OSError, ValueError) as error:
            self.display.say(f"{folder / REPORT} was not written (trainer.report): {error}")

    def write_checkpoint(self, step: int, folder: Path) -> dict[str, Any]:
        """Write everything of a step but the trainer's own state, which is returned."""
        run, versions = self.run, installed_versions()
        self.workers.save_checkpoint(folder, run.collate.settings)
        write_checkpoint_card(
            folder / "huggingface", self.config, run.collate.settings, self.plan.schedule, step, versions
        )
        return {
            "step": step,
            "samples_seen": self.plan.schedule.samples_seen(step),
            "world_size": self.workers.world_size,
            "data_sha256": run.dataset.sha256,
            "num_samples": len(run.dataset),
            "kl_coef": self.kl_controller.coef,
            "first_probs_diff": self.mismatch_guard.first,
            "run_ids": self.tracking.run_ids,
            "versions": versions,
            "config": self.config.model_dump(mode="json"),
        }
