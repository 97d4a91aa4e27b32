"""Runs whose engine gives other probabilities than the trainer: their advantages are weighed, or they end."""

import math
import re
from collections.abc import Callable

import pytest
from runs import message, read_samples, recipe, steps_of, train_here
from torch import Tensor

from verl.workers.group import ActorRolloutRefGroup

USUAL = ("trainer.save_freq=0", "trainer.diag_freq=-1")


def change_engine(monkeypatch, change: Callable[[Tensor], Tensor], first_step: int) -> None:
    """From a step on, the log-probs that the engine reports are others than those it draws by."""
    generate = ActorRolloutRefGroup.generate

    def changed(self, rows, step, on_progress):
        responses = generate(self, rows, step, on_progress)
        if step < first_step:
            return responses
        return responses.with_tensors(rollout_log_probs=change(responses.batch["rollout_log_probs"]))

    monkeypatch.setattr(ActorRolloutRefGroup, "generate", changed)


def test_the_advantages_that_are_trained_are_weighed_by_what_engine_and_trainer_disagree_on(
    tmp_path, tiny_folder, triplets, monkeypatch
):
    update, sent = ActorRolloutRefGroup.update_actor, []

    def recorded(self, rows, num_mini_batches):
        sent.append(rows)
        return update(self, rows, num_mini_batches)

    monkeypatch.setattr(ActorRolloutRefGroup, "update_actor", recorded)
    # Every token is three times as likely to the trainer, and the weights are capped at two.
    change_engine(monkeypatch, lambda log_probs: log_probs - math.log(3), first_step=1)
    done = train_here(
        *recipe(tiny_folder, triplets, tmp_path / "run"), *USUAL, "trainer.total_training_steps=1",
        "actor_rollout_ref.actor.tis_imp_ratio_cap=2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (rows,) = sent
    samples = [sample for sample in read_samples(tmp_path / "run", 1) if "advantage" in sample]
    assert len(samples) == 12 and max(abs(sample["advantage"]) for sample in samples) > 1e-3
    assert rows.non_tensor_batch["rationale"].tolist() == [sample["rationale"] for sample in samples]
    for weighed, sample in zip(rows.batch["advantages"].tolist(), samples, strict=True):
        expected = [2 * sample["advantage"]] * sample["tokens"]
        assert weighed == pytest.approx(expected + [0] * (len(weighed) - len(expected)), rel=1e-6)
    (step,) = steps_of(tmp_path / "run")
    assert step["rollout/is_weight_mean"] == pytest.approx(2) and step["rollout/is_clipped_share"] == 1
    assert step["rollout/kl"] == pytest.approx(-math.log(3), abs=1e-3)


def test_an_engine_that_falls_behind_is_warned_about_and_ends_the_run_in_the_next_step(
    tmp_path, tiny_folder, triplets, monkeypatch
):
    change_engine(monkeypatch, lambda log_probs: log_probs / 2, first_step=2)
    run_dir = tmp_path / "run"
    done = train_here(*recipe(tiny_folder, triplets, run_dir), *USUAL, "trainer.total_training_steps=5")
    assert done.returncode == 1, done.stderr
    assert re.search(
        r"rollout/probs_diff_mean is 0\.\d+, in the first step it was \S+: the rollout engine appears to run old "
        r"weights\. Set actor_rollout_ref\.rollout\.check_weight_sync=full",
        message(done.stderr),
    )
    first, second = steps_of(run_dir)
    assert first["rollout/probs_diff_mean"] < 1e-4 and second["rollout/probs_diff_mean"] > 0.01
    assert done.stdout.count("engine and trainer disagree about the probabilities of tokens") == 1
