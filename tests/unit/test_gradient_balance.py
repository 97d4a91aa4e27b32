"""How strongly the gradient on the embeddings acts: what is taken for a measurement, and what follows from it."""

import math

import pytest

from verl.algorithm.gradient_balance import GradientBalance


def measured(share: float | None = 0.2, every: int = 3) -> GradientBalance:
    """After a measurement: a policy gradient of 2, and an embedding gradient of 6 from one of 3 by the vectors."""
    balance = GradientBalance(share, every)
    # 0.2 of the sum of both norms: 0.5 of 2.5.
    assert balance.measure(2.0, 6.0, 3.0) == (pytest.approx(0.5 / 6) if share else 1)
    return balance


@pytest.mark.parametrize("norms", [(math.inf, 1.0), (1.0, math.inf), (math.nan, 1.0), (0.0, 1.0), (1.0, 0.0)])
def test_a_norm_that_is_zero_or_not_finite_is_not_taken_and_is_due_again(norms):
    balance = GradientBalance(0.2, every=3)
    assert balance.measure(*norms, 3.0) == 1 and balance.is_due
    balance = measured()
    # The former measurement counts on: 6 / 3 x 1.5 at the parameters.
    assert balance.measure(*norms, 1.5) == pytest.approx(0.5 / 3)


def test_a_gradient_of_zero_is_left_as_it_is():
    """A step whose texts are all each other's false negatives."""
    balance = measured()
    assert balance.scale(0.0) == 1
    assert balance.scale(3.0) == pytest.approx(0.5 / 6)


@pytest.mark.parametrize("share", [0.2, None])
def test_every_third_update_measures_with_a_share_and_without(share):
    balance, due = measured(share), []
    for _ in range(6):
        due.append(balance.is_due)
        balance.measure(2.0, 6.0, 3.0) if balance.is_due else balance.scale(3.0)
    assert due == [False, False, True, False, False, True]
