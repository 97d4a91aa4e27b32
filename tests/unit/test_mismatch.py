"""The distance of engine and trainer: its metrics and weights against plain loops, and when it ends a run."""

import math

import pytest
import torch

from verl.algorithm.loss import ClipRange, policy_loss, truncated_importance_weights
from verl.protocol import DataProto
from verl.trainer.ppo.mismatch import MismatchGuard, StaleEngineError, mismatch_metrics

LENGTHS = [3, 7, 1, 6, 2, 7]
WIDTH = 7


def trained_rows() -> DataProto:
    """Ragged rows; whoever looks past the end of one finds no number."""
    generator = torch.Generator().manual_seed(0)
    trainer = -2 * torch.rand(len(LENGTHS), WIDTH, generator=generator)
    engine = trainer + 0.4 * torch.randn(len(LENGTHS), WIDTH, generator=generator)
    past_the_end = torch.arange(WIDTH) >= torch.tensor(LENGTHS).unsqueeze(1)
    return DataProto.from_dict(
        {
            "responses": torch.zeros(len(LENGTHS), WIDTH, dtype=torch.int64),
            "response_length": torch.tensor(LENGTHS),
            "old_log_probs": trainer.masked_fill(past_the_end, math.nan),
            "rollout_log_probs": engine.masked_fill(past_the_end, math.nan),
        }
    )


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


@pytest.mark.parametrize("cap", [None, 1.2, 50.0])
def test_metrics_are_those_of_a_loop_over_rows_and_tokens(cap):
    rows = trained_rows()
    gaps, log_ratios, weights = [], [], []
    for row, length in enumerate(LENGTHS):
        for place in range(length):
            trainer = float(rows.batch["old_log_probs"][row, place])
            engine = float(rows.batch["rollout_log_probs"][row, place])
            gaps.append(abs(math.exp(engine) - math.exp(trainer)))
            log_ratios.append(engine - trainer)
            weights.append(math.exp(trainer) / math.exp(engine))
    expected = {
        "probs_diff_mean": mean(gaps),
        "probs_diff_max": max(gaps),
        "kl": mean(log_ratios),
    }
    if cap is not None:
        clipped = [weight > cap for weight in weights]
        assert any(clipped) == (cap == 1.2) and not all(clipped)
        expected["is_weight_mean"] = mean([min(weight, cap) for weight in weights])
        expected["is_clipped_share"] = sum(clipped) / len(clipped)
    assert mismatch_metrics(rows, cap) == pytest.approx(expected, rel=1e-5)


def test_an_importance_weight_is_the_ratio_of_probabilities_up_to_the_cap():
    generator = torch.Generator().manual_seed(1)
    trainer, engine = (-3 * torch.rand(200, generator=generator) for _ in range(2))
    expected = [min(math.exp(t) / math.exp(e), 2.0) for t, e in zip(trainer.tolist(), engine.tolist(), strict=True)]
    found = truncated_importance_weights(trainer, engine, 2.0)
    assert found.tolist() == pytest.approx(expected, rel=1e-5)
    assert 0 < sum(weight == 2.0 for weight in expected) < 200 and min(expected) < 0.5


def test_weighting_the_advantages_is_weighting_the_token_losses():
    generator = torch.Generator().manual_seed(2)
    old, advantages = torch.randn(2, 2000, generator=generator)
    new = old + 0.8 * torch.randn(2000, generator=generator)
    weights = 2 * torch.rand(2000, generator=generator)
    weights[::7] = 0
    clip = ClipRange(0.2, 0.28, 3.0)
    losses, found = policy_loss(old, new, advantages, clip)
    branches = found["pg_clipfrac"] + 2 * found["pg_clipfrac_lower"] + 4 * (advantages < 0)
    # Plain and clipped with either sign, and the dual clip.
    assert set(branches.tolist()) >= {0, 1, 4, 5, 6}
    weighted, _ = policy_loss(old, new, weights * advantages, clip)
    torch.testing.assert_close(weighted, weights * losses, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 1e-7, 0.003, 0.5])
def test_a_difference_that_stays_never_stops(value):
    guard = MismatchGuard()
    for _ in range(20):
        guard.check(value)


def test_rounding_never_stops():
    guard = MismatchGuard()
    for value in (1e-8, *[9.9e-4] * 10):
        assert guard.check(value) is None


def test_one_jump_does_not_stop_and_a_second_one_after_it_does():
    guard = MismatchGuard()
    guard.check(0.002)
    guard.check(0.0101)
    message = r"is 0\.03, in the first step it was 0\.002.*appears to run old weights"
    with pytest.raises(StaleEngineError, match=message):
        guard.check(0.03)


def test_five_times_the_first_step_is_not_a_jump():
    guard = MismatchGuard()
    for value in (0.002, *[0.0099] * 10):
        guard.check(value)


def test_jumps_with_a_calm_step_between_them_do_not_stop():
    guard = MismatchGuard()
    for value in (0.002, 0.03, 0.002, 0.03, 0.004, 0.03):
        guard.check(value)


@pytest.mark.parametrize("jumps", [(math.nan, math.nan), (math.nan, 0.03), (0.03, math.nan)])
def test_a_difference_that_is_no_number_is_a_jump(jumps):
    guard = MismatchGuard()
    guard.check(0.002)
    guard.check(jumps[0])
    with pytest.raises(StaleEngineError):
        guard.check(jumps[1])


def test_a_suspicious_difference_is_warned_about():
    guard = MismatchGuard(first=0.004)
    assert guard.check(0.0099) is None
    warning = guard.check(0.015)
    assert warning.startswith("warning: rollout/probs_diff_mean is 0.015;")
    assert "disagree about the probabilities of tokens (healthy: below 0.01)" in warning


def test_a_run_that_is_off_from_the_start_is_warned_about_in_every_step():
    guard = MismatchGuard()
    assert all(guard.check(0.4) for _ in range(3))


def test_a_first_step_that_is_no_number_sets_no_measure():
    guard = MismatchGuard()
    assert guard.check(math.nan)
    assert guard.check(1e-7) is None and guard.first == 1e-7
    assert guard.check(1e-7) is None


def test_a_run_that_goes_on_is_measured_by_its_own_first_step():
    fresh, resumed = MismatchGuard(), MismatchGuard(first=0.002)
    fresh.check(0.03)
    fresh.check(0.03)
    resumed.check(0.03)
    with pytest.raises(StaleEngineError, match=r"in the first step it was 0\.002"):
        resumed.check(0.03)
    assert (fresh.first, resumed.first) == (0.03, 0.002)
