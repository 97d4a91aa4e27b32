"""The training loop. `RayPPOTrainer.fit` is the algorithm; the other methods are its steps.

Runs in the driver process: it sees batches of rows and calls workers, and never touches a device.
Shapes: N rows of a step, B trained rows among them, R response tokens.
"""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from verl.algorithm.loss import KlController
from verl.checkpoint.model_card import write_checkpoint_card
from verl.checkpoint.resume import ResumePoint
from verl.checkpoint.run_folder import MODEL
from verl.checkpoint.saver import CheckpointSaver
from verl.config import RunConfig
from verl.config_checks import step_without_policy
from verl.data.step_batches import StepBatches, prompt_batches
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
# Phases that run in the driver alone; workers' timeouts do not cover them.
_IN_THE_DRIVER = ("data", "reward")
# Figures that a step has once it is validated, and diagnosed.
_VALIDATED, _DIAGNOSED = "time/val_s", "time/diag_s"


class RayPPOTrainer:
    """Trains a policy to write rationales whose embeddings earn reward.

    Args:
        run: what it trains on and with, already checked.
        workers: hold the policy, the reference and the engine; `fit` loads these.
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
        # When resuming from another run's folder, trackers start new runs.
        self.run_ids: dict[str, str] = state["run_ids"] if self.continues_own_folder else {}
        self.display = RunDisplay(self.plan.total_steps, self.first_step, "console" in trainer.logger, trainer.use_ray)
        self.tracking = Tracking(
            self.config.run_dir, list(trainer.logger), trainer.project_name, trainer.experiment_name,
            self.config.model_dump(), self.display.say,
        )  # fmt: skip
        self.diagnostics: Diagnostics | None = None
        """Once the run has started, where it diagnoses."""
        self.seconds: dict[str, float] = {}
        """Seconds of each phase since the current step began."""
        self.train_seconds = 0.0
        """Seconds of all steps that this process has finished."""

    def fit(self) -> None:
        """Train from the first step to the last.

        A step of GRACE, with the names of its phases:

        1. Write (sync, gen): the engine gets the policy's weights. It writes n rationales for each trained text, which
           are its group, and one for each anchor that the text is compared with, such as its query and its negatives.
        2. Embed (score): one forward over every text and its rationale. The mean of their hidden states is the
           embedding; the same forward gives the log-probs that the policy gradient begins at. Those of a reference
           model are added where there is a KL term (ref).
        3. Reward (reward): each rationale by the similarities of its embedding to those of the anchors and of the other
           rationales. Its advantage is its reward in comparison with its group.
        4. Update (update): optimizer steps by the policy gradient. Where the reward manager has a loss on the
           embeddings, such as a contrastive one, they follow its gradient too.
        5. Log the step; then figures of held-out texts (val), a checkpoint (save), a diagnosis (diag) and alerts, where
           due.

        Steps without rationales (trainer.contrastive_warmup_steps, trainer.contrastive_steps_between) embed the texts
        alone. They follow no policy gradient, as no step does with actor_rollout_ref.actor.embedding_grad_share=1. With
        data.think=False there are no other steps.

        Raises:
            Interrupted: the run was asked to stop.
            RewardError: the reward manager failed, or gave nothing to train by.
            AlertError: an alert began, and trainer.stop_on_alert is set.
            StaleEngineError: the rollout engine appears to run old weights.
            CheckpointError: a checkpoint has no room, or could not be written.
            WorkerError: a worker, or a process that prepares batches, failed, died or hangs.
            UserError: something that was given does not work with the model, the devices or the run's folder.
        """
        actor, rollout = self.config.actor_rollout_ref.actor, self.config.actor_rollout_ref.rollout
        with self.saving_when_stopped():
            self.start()
            for step, prompts in self.steps():
                metrics: dict[str, dict[str, float]] = {}
                writes = self.plan.schedule.writes_rationales(step)
                trains_policy = writes and actor.trains_policy
                if writes:
                    with self.phase("sync"):
                        metrics["sync"] = self.workers.sync_rollout_weights()
                    with self.phase("gen"):
                        rows = self.generate(step_rows.expand(prompts, rollout), step)
                else:
                    rows = step_rows.without_rationales(prompts, score_texts=actor.has_kl_loss)
                with self.phase("score"):
                    rows = self.add_embeddings_and_log_probs(rows, log_probs=trains_policy)
                if trains_policy:
                    metrics["rollout"] = self.compare_engine(rows)
                if actor.has_kl_loss or (trains_policy and self.config.algorithm.has_kl_in_reward):
                    with self.phase("ref"):
                        rows = self.add_reference_log_probs(rows)
                with self.phase("reward"):
                    reward = self.reward_manager(rows)
                    trained = rows[is_trained(rows)]
                    if trains_policy:
                        trained, metrics["reward"] = self.add_advantages(trained, reward)
                    else:
                        check_has_embedding_grad(reward, step, self.config)
                with self.phase("update"):
                    metrics["actor"] = self.update(trained, rows, reward, step)
                self.log_step(step, rows, trained, reward, metrics)
                self.after_step(step)

    @property
    def continues_own_folder(self) -> bool:
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
        if self.config.saves:
            self.saver.check_room(facts["checkpoint_bytes"])
        if self.run.resume:
            self.resume(self.run.resume)
        # Of a run that did not lead to this one, nothing stays.
        kept, also = (self.first_step, ()) if self.continues_own_folder else (0, LOGGED)
        if aside := self.run.folder.set_aside_after(kept, also):
            self.display.say(f"what an earlier run left after step {kept} was moved to {aside}")
        write_record(self.run.folder.path, self.config, self.plan.total_steps)
        logged = self.tracking.begin(self.first_step, self.run_ids)
        if self.run.probe:
            self.diagnostics = Diagnostics(self.run, self.run.probe, self.workers, self.write_held_out)
        if self.config.trainer.val_before_train and not self.run.resume:
            self.validate(0)
        if self.continues_own_folder:
            # The earlier run may have been stopped between training this step and what follows it.
            if self.validation_is_due(self.first_step) and _VALIDATED not in logged:
                self.validate(self.first_step)
            if self.diagnosis_is_due(self.first_step) and _DIAGNOSED not in logged:
                self.diagnose(self.first_step)
        if self.diagnostics and not self.diagnostics.has_begun:
            self.diagnose(self.first_step)
        self.say_alerts(self.first_step)

    def resume(self, point: ResumePoint) -> None:
        """Load a checkpoint into the workers."""
        with self.phase("resume"):
            self.workers.load_checkpoint(point.folder)
        if self.continues_own_folder:
            # The earlier run may have been killed between publishing this step and marking it as the best.
            self.run.folder.mark_best(self.first_step)
        seconds = self.seconds["resume"]
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
        """Time the block, into `seconds`, and name it in errors of the workers.

        Raises:
            Interrupted: the run was asked to stop, and weights and optimizer are still those of the last finished step.
        """
        if name in _BEFORE_THE_UPDATE:
            self.signals.check()
        self.workers.enter_phase(name)
        start = time.perf_counter()
        with self.watched(name) if name in _IN_THE_DRIVER else nullcontext():
            yield
        self.seconds[name] = time.perf_counter() - start

    def watched(self, phase: str) -> AbstractContextManager[None]:
        """End the run with its stacks if the block, which calls no worker, takes longer than a phase may."""
        trainer = self.config.trainer
        # Without Ray a person may sit in a debugger.
        return watch(phase, trainer.phase_timeout_s) if trainer.use_ray else nullcontext()

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
            if self.done_step > self.first_step:
                self.refresh_report()
            self.display.say(f"stopped; {self.how_to_go_on()}")
            raise
        finally:
            self.display.stop()
            self.tracking.finish()

    def how_to_go_on(self) -> str:
        """Which command resumes this run from its newest saved step."""
        mode, saved = self.config.trainer.resume_mode, self.saver.saved_step
        in_own_folder = saved > self.first_step or self.continues_own_folder or not self.run.resume
        if mode == "auto" or not in_own_folder:
            return f"the same command resumes from step {saved}"
        without = " and without trainer.resume_from_path" if mode == "resume_path" else ""
        return f"the same command with trainer.resume_mode=auto{without} resumes from step {saved}"

    def steps(self) -> Iterator[tuple[int, DataProto]]:
        """The number and the prompt rows of every remaining step."""
        data, schedule, total = self.config.data, self.plan.schedule, self.plan.total_steps
        order = StepBatches(schedule, self.first_step, total, data.seed if data.shuffle else None)
        batches = prompt_batches(
            self.run.dataset, order, self.run.collate, data.dataloader_num_workers, self.config.trainer.phase_timeout_s
        )
        for step, place in enumerate(islice(schedule.places(), self.first_step, total), self.first_step + 1):
            # What was done and sent since the last step is no part of this one.
            self.seconds = {}
            self.workers.take_bytes_moved()
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
            rows, log_probs=log_probs, embed=manager.needs_embeddings, for_update=True,
            train_anchors=manager.trains_anchors,
        )  # fmt: skip
        return rows.union(columns.renamed("log_probs", "old_log_probs"))

    def compare_engine(self, rows: DataProto) -> dict[str, float]:
        """How far the engine's probabilities are from the trainer's; too far for too long ends the run."""
        metrics = mismatch_metrics(rows[is_trained(rows)], self.config.importance_cap)
        if warning := self.mismatch_guard.check(metrics["probs_diff_mean"]):
            self.display.say(warning)
        return metrics

    def add_reference_log_probs(self, rows: DataProto) -> DataProto:
        """Add the reference model's log-probs of the trained rows."""
        mask = is_trained(rows)
        log_probs = torch.zeros(len(rows), scored_width(rows))
        log_probs[torch.from_numpy(mask)] = self.workers.compute_ref_log_prob(rows[mask]).batch["log_probs"]
        return rows.with_tensors(ref_log_prob=log_probs)

    def add_advantages(self, trained: DataProto, reward: RewardOutput) -> tuple[DataProto, dict[str, float]]:
        """The trained rows with advantages, and metrics of the KL in the reward."""
        return step_rows.add_advantages(trained, reward.scores, self.config.algorithm, self.kl_controller)

    def update(self, trained: DataProto, rows: DataProto, reward: RewardOutput, step: int) -> dict[str, float]:
        """Optimizer steps on mini-batches of whole groups, weighed by what engine and trainer disagree on.

        They follow the policy gradient where there are advantages, and the gradient on the embeddings where the reward
        manager gives one.
        """
        num_mini_batches = self.config.num_mini_batches
        update_rows = step_rows.add_embedding_grad(
            trained, rows, reward.embedding_grad, self.reward_manager.trains_anchors, num_mini_batches
        )
        seed = self.config.data.seed + step if self.config.actor_rollout_ref.actor.shuffle else None
        update_rows = step_rows.assign_mini_batches(update_rows, num_mini_batches, seed)
        update_rows = step_rows.weigh_by_importance(update_rows, self.config.importance_cap)
        return self.workers.update_actor(update_rows, num_mini_batches)

    def log_step(
        self, step: int, rows: DataProto, trained: DataProto, reward: RewardOutput, by_part: dict[str, dict[str, float]]
    ) -> None:
        """Log a finished step, before its checkpoint: a run that is killed in between drops the line and repeats it.

        Args:
            by_part: metrics of the parts of the step, by the part's name.
        """
        metrics = step_metrics(rows, trained, reward, self.config)
        metrics |= prefixed(**by_part, memory=self.workers.memory()) | self.step_timing(rows)
        self.tracking.log(metrics, step)
        self.display.step_done(step, metrics)
        if self.plan.schedule.writes_rationales(step):
            self.tracking.log_samples(step_samples(rows, trained, reward, self.config.trainer.samples_per_step), step)

    def step_timing(self, rows: DataProto) -> dict[str, float]:
        """What the step took, in seconds by phase, tokens per second and bytes sent."""
        self.train_seconds += sum(self.seconds.values())
        moved = self.workers.take_bytes_moved()
        return time_metrics(self.seconds, rows, moved) | {"training/epoch": rows.meta_info["epoch"]}

    def after_step(self, step: int) -> None:
        """What follows a step that is trained and logged: held-out figures, a checkpoint and alerts, where due."""
        self.done_step = step
        if self.validation_is_due(step):
            self.validate(step)
        if self.save_is_due(step):
            self.save(step)
        # After the save, as the first diagnosis of a trained model also loads the untrained one, which may fail.
        if self.diagnosis_is_due(step):
            self.diagnose(step)
        self.say_alerts(step)
        if self.saver.saved_step == step:
            self.refresh_report()

    def validation_is_due(self, step: int) -> bool:
        frequency = self.config.trainer.test_freq
        return frequency > 0 and (step % frequency == 0 or step == self.plan.total_steps)

    def diagnosis_is_due(self, step: int) -> bool:
        return self.diagnostics is not None and self.diagnostics.is_due(step)

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
            metrics = self.run.validation.run(embed, self.reward_held_out, step)
        seconds = self.seconds["val"]
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
        """Prompt rows with one rationale each, drawn with the same seeds in every call; or with none."""
        if not self.config.data.think:
            return step_rows.without_rationales(prompts, score_texts=False)
        self.workers.sync_rollout_weights()
        return self.generate(prompts, step=0)

    def embed_held_out(self, prompts: DataProto) -> DataProto:
        """As `write_held_out`, with embeddings."""
        rows = self.write_held_out(prompts)
        return rows.union(self.workers.score(rows, log_probs=False, embed=True, for_update=False))

    def reward_held_out(self, rows: DataProto) -> RewardOutput:
        """Rewards of held-out rows: the part of a validation that calls no worker."""
        with self.watched("val"):
            return self.reward_manager(rows)

    def diagnose(self, step: int) -> None:
        """Log the figures of the probe's texts; see `Diagnostics`."""
        assert self.diagnostics is not None
        with self.phase("diag"):
            diagnosis = self.diagnostics.run(step)
        self.tracking.log({**diagnosis.figures, _DIAGNOSED: self.seconds["diag"]}, step)
        self.tracking.log_diagnosis(diagnosis.texts, step)

    def say_alerts(self, step: int) -> None:
        """Say the alerts that have begun, and end the run if it is to end at one.

        Raises:
            AlertError: with trainer.stop_on_alert; but not before the first step of a run, as training is to change
                what was found then.
        """
        begun = self.tracking.log_new_alerts(step)
        for alert in begun:
            self.display.say(f"ALERT at step {step}, {alert.name}: {alert.text}")
        trained_here = step > self.first_step or self.continues_own_folder
        if begun and self.config.trainer.stop_on_alert and trained_here:
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
        seconds = self.seconds["save"]
        self.tracking.log({"time/save_s": seconds}, step)
        for line in (f"saved {folder} in {seconds:.1f} s", *complaints):
            self.display.say(line)

    def refresh_report(self) -> None:
        """Write the run's page anew, with trainer.report; a full disk or a file that cannot be read costs the page, not
        the run."""
        folder = self.run.folder.path
        if not self.config.trainer.report:
            return
        try:
            write_report([folder], folder / REPORT)
        except (OSError, ValueError) as error:
            self.display.say(f"{folder / REPORT} was not written (trainer.report): {error}")

    def write_checkpoint(self, step: int, folder: Path) -> dict[str, Any]:
        """Write everything of a step but the trainer's own state, which is returned."""
        run, versions = self.run, installed_versions()
        self.workers.save_checkpoint(folder, run.collate.settings)
        write_checkpoint_card(folder / MODEL, self.config, run.collate.settings, self.plan.schedule, step, versions)
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


def check_has_embedding_grad(reward: RewardOutput, step: int, config: RunConfig) -> None:
    """Raise RewardError if a step that follows no policy gradient has nothing else to train by."""
    found = step_without_policy(config, step)
    if found and reward.embedding_grad is None:
        raise RewardError(
            f"step {step} trains nothing: with {found[1]} it follows no policy gradient, and the reward manager gave "
            "no embedding_grad"
        )
