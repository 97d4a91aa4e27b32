"""Seeds of a step's rows: never shared by two rows of a run, and those of one engine as they have always been."""

import itertools

import torch

from verl.workers.rollout.base import row_seeds, step_seeds


def test_steps_and_engines_never_share_a_seed():
    # 1000 engines apart, and 1000 steps apart by the factor between steps: where a plain sum would meet.
    cases = itertools.product((0, 7), (1, 2, 3, 1001), (0, 1, 999, 1000, 2047))
    drawn = [seed for base, step, engine in cases for seed in step_seeds(base, step, engine, 5)]
    assert len(set(drawn)) == len(drawn)
    assert all(0 <= seed < 2**63 for seed in drawn)
    torch.Generator().manual_seed(max(drawn))


def test_the_first_engine_draws_from_the_seeds_of_checkpoints_of_before():
    assert step_seeds(seed=3, step=2, engine=0, count=4) == [2003 * 2**20 + row for row in range(4)]
    assert row_seeds(5, 3) == [5 * 2**20, 5 * 2**20 + 1, 5 * 2**20 + 2]
