"""What a step reports: the entropy of its tokens, and that nothing was learned."""

import pytest
import torch

from verl.config import RunConfig
from verl.protocol import DataProto
from verl.trainer.display import step_line
from verl.trainer.ppo.metrics import mean_entropy, reward_metrics


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
