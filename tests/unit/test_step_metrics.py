"""What a step reports: rewards, groups, lengths, entropy, times, and that nothing was learned."""

import math
from types import SimpleNamespace

import pytest
import torch

from verl.config import RunConfig
from verl.protocol import DataProto, is_trained, object_array
from verl.step_schedule import StepSchedule
from verl.trainer.display import step_line
from verl.trainer.ppo import ray_trainer
from verl.trainer.ppo.metrics import (
    duplicate_share,
    length_metrics,
    mean_entropy,
    reward_metrics,
    step_metrics,
    text_metrics,
    time_metrics,
)
from verl.trainer.ppo.ray_trainer import RayPPOTrainer
from verl.workers.reward_manager.base import RewardOutput


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token-mean", (1 * 0.5 + 3 * 2.0) / 4),
        ("seq-mean-token-sum", (1 * 0.5 + 3 * 2.0) / 2),
        ("seq-mean-token-mean", (0.5 + 2.0) / 2),
        ("seq-mean-token-sum-norm", (1 * 0.5 + 3 * 2.0) / 10),
    ],
)
def test_entropy_is_averaged_like_the_loss(mode, expected):
    rows = DataProto.from_dict({"entropy": torch.tensor([0.5, 2.0]), "response_length": torch.tensor([1, 3])})
    config = {"actor_rollout_ref": {"actor": {"loss_agg_mode": mode}}, "data": {"max_response_length": 10}}
    assert mean_entropy(rows, RunConfig.model_validate(config)) == pytest.approx(expected)


def test_the_spread_is_that_of_groups_in_which_something_can_differ():
    rewards, group = torch.tensor([1.0, 3.0, 5.0, 2.0, 2.0]), torch.tensor([0, 0, 1, 2, 2])
    found = reward_metrics(rewards, group)
    # Of the groups of two: standard deviations of 2 ** 0.5 and 0.
    assert found["group/flat_share"] == 0.5
    assert found["group/std_median"] == pytest.approx(float(torch.tensor([2**0.5, 0.0]).median()))
    alone = reward_metrics(rewards, torch.arange(5))
    assert alone == {"reward/mean": pytest.approx(2.6), "reward/max": 5, "reward/min": 1}
    line = step_line(3, 9, {name: value for name, value in STEP.items() if name != "group/std_median"})
    assert "group std" in step_line(3, 9, STEP) and "group std" not in line


STEP = {
    "reward/mean": 0.1, "group/std_median": 0.2, "group/duplicate_share": 0.0, "actor/grad_norm": 0.3,
    "rationale/trained_tokens_mean": 9.0, "rationale/trained_truncated": 0.5, "perf/tokens_per_s": 100.0,
    "time/step_s": 2.0, "actor/pg_loss": 0.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("found", "why"),
    [
        ({"rationale/trained_truncated": 1.0}, "every rationale was cut at data.max_response_length"),
        ({"group/duplicate_share": 1.0}, "the rationales of each group are equal"),
        ({}, "the rewards of each group are equal"),
    ],
)
def test_a_step_without_a_gradient_says_so_and_why(found, why):
    line = step_line(3, 9, {**STEP, **found, "actor/grad_norm": 0.0})
    assert f"NOTHING LEARNED: the gradient is 0; {why}" in line


@pytest.mark.parametrize("grad", [1e-12, float("nan")])
def test_a_step_with_the_smallest_gradient_does_not(grad):
    assert "NOTHING LEARNED" not in step_line(3, 9, {**STEP, "actor/grad_norm": grad})


def test_a_kl_term_is_in_the_line_of_every_step():
    without = {"actor/grad_norm": 0.3, "time/step_s": 2.0}
    for step in (STEP, without):
        assert "KL" not in step_line(3, 9, step) and "  KL 0.12  " in step_line(3, 9, {**step, "actor/kl_loss": 0.12})


# ---- a step of two groups, by hand: two rewarded rows and a query each ----

SCORES = torch.tensor([1.0, 3.0, 2.0, 5.0])


def whole_step() -> DataProto:
    """The first group's rationales are equal. The second's first is too, but in another group; its second repeats
    itself and is cut off, as the first query's is."""
    responses = [[5, 6, 5], [5, 6, 5], [7, 7, 7, 7], [5, 6], [8, 8, 8, 8, 8, 9], [7]]
    return DataProto.from_dict(
        {
            "responses": torch.tensor([ids + [0] * (6 - len(ids)) for ids in responses]),
            "response_length": torch.tensor([len(ids) for ids in responses]),
            "prompt_length": torch.tensor([10, 10, 12, 8, 8, 6]),
            "truncated": torch.tensor([False, False, True, False, True, False]),
            "trained": torch.tensor([True, True, False, True, True, False]),
            "entropy": torch.tensor([0.1, 0.2, 0.9, 0.3, 0.4, 0.9]),
            "embeddings": torch.eye(2)[[0, 1, 0, 1, 0, 1]],
        },
        {
            "uid": ["a", "a", "a", "b", "b", "b"],
            "role": ["positive", "positive", "query"] * 2,
            "rationale": ["one", "one", "none", "one", "two", "none"],
        },
        {"num_shortened": 2},
    )


GROUPS = {
    # Both of the first group, and none of the second, though "one" is in the step three times.
    "group/duplicate_share": 2 / 4,
    # Different tokens of all: 2 of 6, and 5, 6, 8, 9 of 8. Pairs: 56, 65 of 4; and 56, 88, 89 of 6.
    "group/distinct_1": (2 / 6 + 4 / 8) / 2,
    "group/distinct_2": (2 / 4 + 3 / 6) / 2,
    # One rationale has four tokens in a row, three times: 8888, 8888, 8889.
    "rationale/repetition": 1 / 3,
    # Lengths are 0, 0 and -2, 2 from their group's mean, rewards -1, 1 and -1.5, 1.5.
    "group/length_reward_correlation": (2 * 1.5 + 2 * 1.5) / math.sqrt((4 + 4) * (1 + 1 + 1.5**2 + 1.5**2)),
}
LENGTHS = {
    "data/prompt_tokens_mean": 54 / 6,
    "data/prompts_shortened": 2,
    "rationale/trained_tokens_mean": (3 + 3 + 2 + 6) / 4,
    "rationale/trained_tokens_min": 2,
    "rationale/trained_tokens_max": 6,
    "rationale/trained_truncated": 1 / 4,
    "rationale/query_tokens_mean": (4 + 1) / 2,
    "rationale/query_tokens_min": 1,
    "rationale/query_tokens_max": 4,
    "rationale/query_truncated": 1 / 2,
}
REWARDS = {
    "reward/mean": 11 / 4,
    "reward/max": 5,
    "reward/min": 1,
    # torch's median of two is the smaller one, that of 1 and 3.
    "group/std_median": math.sqrt(2),
    "group/flat_share": 0,
}
EMBEDDINGS = {
    # Of 15 pairs 6 are of equal vectors, 9 of orthogonal ones at a squared distance of 2.
    "embedding/mean_cosine": 6 / 15,
    "embedding/uniformity": math.log((6 + 9 * math.exp(-4)) / 15),
    "embedding/effective_rank": 2,
}


def test_a_steps_figures_are_those_by_hand():
    rows = whole_step()
    batch = rows[is_trained(rows)]
    reward = RewardOutput(SCORES, {"positive/raw": 0.25})
    assert step_metrics(rows, batch, reward, RunConfig()) == pytest.approx(
        {
            **REWARDS, **GROUPS, **LENGTHS, **EMBEDDINGS, "reward/positive/raw": 0.25,
            "actor/entropy": (3 * 0.1 + 3 * 0.2 + 2 * 0.3 + 6 * 0.4) / 14,
        },
        abs=1e-6,
    )  # fmt: skip


def test_the_parts_of_a_steps_figures_are_those_by_hand():
    rows = whole_step()
    batch = rows[is_trained(rows)]
    assert length_metrics(rows, 2) == pytest.approx(LENGTHS)
    repeated = {name: value for name, value in GROUPS.items() if name != "group/duplicate_share"}
    assert text_metrics(batch, SCORES) == pytest.approx(repeated)
    # Where nothing differs within a group there is no correlation.
    assert text_metrics(batch, torch.ones(4)).keys() == repeated.keys() - {"group/length_reward_correlation"}
    columns = batch.non_tensor_batch
    assert duplicate_share(columns["rationale"], columns["uid"]) == 0.5
    assert duplicate_share(columns["rationale"], object_array(["a"] * 4)) == 0.75
    assert duplicate_share(columns["rationale"], object_array([*"abcd"])) == 0


def test_a_step_without_rationales_has_figures_of_its_rewards_and_vectors_alone():
    rows = whole_step()
    rows.batch["response_length"].zero_()
    del rows.batch["entropy"]
    reward = RewardOutput(SCORES, {"contrastive/loss": 0.5})
    found = step_metrics(rows, rows[is_trained(rows)], reward, RunConfig())
    assert found == pytest.approx({**EMBEDDINGS, "reward/contrastive/loss": 0.5}, abs=1e-6)


def test_times_are_summed_and_tokens_counted_by_what_made_them():
    rows = whole_step()
    found = time_metrics({"gen": 2.0, "score": 0.5, "update": 3.0}, rows, 3 * 2**20)
    # 19 tokens of rationales and 54 of prompts.
    assert found == pytest.approx(
        {
            "time/gen_s": 2, "time/score_s": 0.5, "time/update_s": 3, "time/step_s": 5.5, "perf/generated_tokens": 19,
            "perf/generated_tokens_per_s": 19 / 2, "perf/tokens_per_s": (19 + 54) / 5.5, "perf/ray_mb": 3,
        }
    )  # fmt: skip
    rows.batch["response_length"].zero_()
    assert time_metrics({"score": 2.0}, rows, 0) == pytest.approx(
        {
            "time/score_s": 2, "time/step_s": 2, "perf/generated_tokens": 0,
            "perf/tokens_per_s": 54 / 2, "perf/ray_mb": 0,
        }
    )  # fmt: skip


class Workers:
    """Count what is sent, as the workers' group does."""

    sent = 0

    def enter_phase(self, name: str) -> None: ...

    def take_bytes_moved(self) -> int:
        sent, self.sent = self.sent, 0
        return sent


def test_what_is_done_and_sent_between_two_steps_counts_for_neither(monkeypatch):
    monkeypatch.setattr(ray_trainer, "prompt_batches", lambda *_: iter([whole_step(), whole_step()]))
    trainer, workers, found = RayPPOTrainer.__new__(RayPPOTrainer), Workers(), []
    vars(trainer).update(
        config=RunConfig.model_validate({"trainer": {"use_ray": False}}), workers=workers, first_step=0, seconds={},
        train_seconds=0.0, signals=SimpleNamespace(check=lambda: None), run=SimpleNamespace(dataset=None, collate=None),
        plan=SimpleNamespace(schedule=StepSchedule(num_samples=4, samples=2, contrastive_samples=2), total_steps=2),
    )  # fmt: skip
    for _, rows in trainer.steps():
        with trainer.phase("score"):
            workers.sent += 3 * 2**20
        found.append(trainer.step_timing(rows))
        with trainer.phase("val"):
            workers.sent += 5 * 2**20
    assert [timing["perf/ray_mb"] for timing in found] == [3, 3]
    times = [{name for name in timing if name.startswith("time/")} for timing in found]
    assert times == [{"time/data_s", "time/score_s", "time/step_s"}] * 2
    assert trainer.train_seconds == pytest.approx(sum(timing["time/step_s"] for timing in found))
