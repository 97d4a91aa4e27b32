"""The rows of a step: copies and temperatures, advantages, mini-batches of whole groups, importance weights."""

import math
import re
import statistics

import pytest
import torch

from verl.algorithm.loss import KlController
from verl.config import AlgorithmConfig, RolloutConfig
from verl.protocol import DataProto
from verl.trainer.ppo.step_rows import (
    add_advantages,
    assign_mini_batches,
    expand,
    weigh_by_importance,
    without_rationales,
)

ENGINE = torch.tensor([[-1.0, -2.0], [-0.5, -1.5], [-3.0, -1.0], [-1.0, -1.0]])
TRAINER = torch.tensor([[-0.9, -2.5], [-0.5, -1.0], [-1.0, -1.2], [-1.1, -0.9]])
REWARDS = torch.tensor([1.0, 3.0, -2.0, 0.0])
FIXED = KlController(0.5, adaptive=False, target=0.1, horizon=10)


def batch(uid=(0, 0, 1, 1), lengths=(2, 2, 2, 2), **columns: torch.Tensor) -> DataProto:
    """Trained rows of two groups."""
    return DataProto.from_dict(
        {
            "responses": torch.zeros(len(uid), 2, dtype=torch.int64),
            "response_length": torch.tensor(lengths),
            "old_log_probs": TRAINER[: len(uid)],
            "rollout_log_probs": ENGINE[: len(uid)],
            **columns,
        },
        {"uid": list(uid)},
    )


def test_trained_prompts_are_copied_and_anchors_are_not_and_each_has_its_temperature():
    prompts = DataProto.from_dict(
        {"number": torch.arange(4), "trained": torch.tensor([True, False, True, False])}, {"uid": [0, 0, 1, 1]}
    )
    rows = expand(prompts, RolloutConfig(n=3, temperature=0.9, anchor_temperature=0.25))
    assert rows.batch["number"].tolist() == [0, 0, 0, 1, 2, 2, 2, 3]
    assert rows.batch["temperature"].tolist() == pytest.approx([0.9] * 3 + [0.25] + [0.9] * 3 + [0.25])
    assert "temperature" not in prompts.batch.keys(), "the prompts themselves must not change"


# Tokens of the responses that earn REWARDS.
LENGTHS = (2, 1, 2, 2)
# Both groups have two rewards that differ by 2.
STD = 2**0.5 + 1e-6


def whitened(rows: list[list[float]]) -> list[list[float]]:
    """By mean and unbiased deviation of all tokens."""
    tokens = [value for row in rows for value in row]
    deviation = math.sqrt(statistics.variance(tokens) + 1e-8)
    return [[(value - statistics.mean(tokens)) / deviation for value in row] for row in rows]


def estimates(by_std: bool, gamma: float) -> dict[str, list[list[float]]]:
    """The advantages of each token by estimator, by hand."""
    std = STD if by_std else 1
    return {
        "grpo": [[-1 / std, -1 / std], [1 / std], [-1 / std, -1 / std], [1 / std, 1 / std]],
        "grpo_passk": [[0, 0], [2 / std], [0, 0], [2 / std, 2 / std]],
        "rloo": [[1 - 3, 1 - 3], [3 - 1], [-2, -2], [2, 2]],
        # The first group's mean by lengths is (2 x 1 + 1 x 3) / 3.
        "opo": [[1 - 5 / 3, 1 - 5 / 3], [3 - 5 / 3], [-1, -1], [1, 1]],
        "reinforce_plus_plus_baseline": whitened([[-1, -1], [1], [-1, -1], [1, 1]]),
        "reinforce_plus_plus": whitened([[gamma * 1, 1], [3], [gamma * -2, -2], [0, 0]]),
    }


@pytest.mark.parametrize("gamma", [1, 0.5])
@pytest.mark.parametrize("by_std", [True, False])
@pytest.mark.parametrize("name", estimates(True, 1))
def test_advantages_are_those_of_the_estimator_that_is_named(name, by_std, gamma):
    algorithm = AlgorithmConfig(adv_estimator=name, norm_adv_by_std_in_grpo=by_std, gamma=gamma)
    rows, metrics = add_advantages(batch(lengths=LENGTHS), REWARDS, algorithm, FIXED)
    expected = [[*row, 0][:2] for row in estimates(by_std, gamma)[name]]
    torch.testing.assert_close(rows.batch["advantages"], torch.tensor(expected).float(), atol=1e-6, rtol=1e-6)
    assert metrics == {}


def test_every_estimator_that_the_configuration_names_has_a_case_here():
    description = AlgorithmConfig.model_fields["adv_estimator"].description
    named = set(re.findall(r"[a-z_]+", description.split(";")[0])) - {"or"}
    assert named == estimates(True, 1).keys()


@pytest.mark.parametrize(
    ("kind", "of_rows"),
    [
        ("k1", [0.1 + 0.3, 0.2, 0.4 + 0.4, 0.2]),
        ("k2", [(0.1**2 + 0.3**2) / 2, 0.2**2 / 2, (0.4**2 + 0.4**2) / 2, 0.2**2 / 2]),
    ],
)
def test_the_kl_in_the_reward_is_taken_from_every_token(kind, of_rows):
    reference = TRAINER - torch.tensor([[0.1, 0.3], [0.2, 0.0], [0.4, 0.4], [0.0, 0.2]])
    algorithm = AlgorithmConfig(use_kl_in_reward=True, kl_penalty=kind, norm_adv_by_std_in_grpo=False)
    rows, metrics = add_advantages(batch(ref_log_prob=reference), REWARDS, algorithm, FIXED)
    # 0.5 x the sum of a row's token-wise estimates, by hand.
    left = [reward - 0.5 * kl for reward, kl in zip(REWARDS.tolist(), of_rows, strict=True)]
    means = [(left[0] + left[1]) / 2, (left[2] + left[3]) / 2]
    expected = [left[0] - means[0], left[1] - means[0], left[2] - means[1], left[3] - means[1]]
    assert rows.batch["advantages"][:, 0].tolist() == pytest.approx(expected, abs=1e-6)
    assert metrics == pytest.approx({"kl": sum(of_rows) / 8, "kl_coef": 0.5}, abs=1e-6)


def test_the_kl_that_moves_the_coefficient_is_the_mean_over_rows_of_their_tokens_mean():
    controller = KlController(0.5, adaptive=True, target=0.25, horizon=100)
    reference = TRAINER - torch.tensor([[0.1, 0.3], [0.6, 9.0], [0.2, 9.0], [0.0, 0.2]])
    algorithm = AlgorithmConfig(use_kl_in_reward=True, kl_penalty="k1")
    _, metrics = add_advantages(batch(lengths=(2, 1, 1, 2), ref_log_prob=reference), REWARDS, algorithm, controller)
    # Of the tokens alike it would be 1.4 / 6.
    assert metrics["kl"] == pytest.approx((0.2 + 0.6 + 0.2 + 0.1) / 4)
    assert controller.coef == pytest.approx(0.5 * (1 + (0.275 / 0.25 - 1) * 4 / 100))


def test_an_adaptive_coefficient_is_moved_by_the_steps_kl_and_reported_as_it_was_used():
    controller = KlController(0.5, adaptive=True, target=0.1, horizon=100)
    algorithm = AlgorithmConfig(use_kl_in_reward=True, kl_penalty="k1")
    _, metrics = add_advantages(batch(ref_log_prob=TRAINER - 1), REWARDS, algorithm, controller)
    assert metrics["kl_coef"] == 0.5
    assert controller.coef == pytest.approx(0.5 * (1 + 0.2 * 4 / 100))


@pytest.mark.parametrize("seed", [None, 3])
def test_mini_batches_are_of_whole_groups_and_of_one_size(seed):
    uid = [7, 7, 5, 5, 9, 9, 1, 1, 4, 4, 2, 2]
    rows = DataProto.from_dict({"responses": torch.zeros(12, 2, dtype=torch.int64)}, {"uid": uid})
    mini_batch = assign_mini_batches(rows, 2, seed).batch["mini_batch"].tolist()
    assert sorted(mini_batch) == [0] * 6 + [1] * 6
    assert all(len(set(mini_batch[i : i + 2])) == 1 for i in range(0, 12, 2))
    if seed is None:
        assert mini_batch == sorted(mini_batch)


def test_a_seed_decides_which_groups_are_trained_together():
    uid = [group for group in range(8) for _ in range(2)]
    rows = DataProto.from_dict({"responses": torch.zeros(16, 2, dtype=torch.int64)}, {"uid": uid})
    draws = [assign_mini_batches(rows, 4, seed).batch["mini_batch"].tolist() for seed in (1, 1, 2, 3)]
    assert draws[0] == draws[1] and len({tuple(draw) for draw in draws}) == 3


def test_importance_weights_multiply_the_advantages_that_are_trained_and_not_those_that_are_reported():
    plain = torch.tensor([[-1.0, -1.0], [1.0, 1.0], [-1.0, -1.0], [1.0, 1.0]])
    reported = batch(advantages=plain.clone())
    trained = weigh_by_importance(reported, cap=2.0)
    weights = torch.minimum(TRAINER.exp() / ENGINE.exp(), torch.tensor(2.0))
    assert (weights == 2).any() and (weights < 1).any()
    torch.testing.assert_close(trained.batch["advantages"], plain * weights)
    torch.testing.assert_close(reported.batch["advantages"], plain)


def test_without_a_cap_advantages_are_trained_as_they_are():
    rows = batch(advantages=torch.ones(4, 2))
    assert weigh_by_importance(rows, cap=None) is rows


@pytest.mark.parametrize(("text_start", "expected"), [(3, 3), (0, 1)])
def test_a_texts_first_token_is_scored_where_one_comes_before_it(text_start, expected):
    prompts = DataProto.from_dict({"text_start": torch.tensor([text_start])})
    assert without_rationales(prompts, score_texts=True).batch["score_start"].tolist() == [expected]
    assert "score_start" not in without_rationales(prompts, score_texts=False).batch.keys()
