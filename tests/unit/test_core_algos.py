"""Advantages, policy loss, KL, loss weights and schedule against double loops over plain floats."""

import math
import random
import re
from collections.abc import Callable
from functools import partial

import pytest
import torch

from verl.algorithm import advantage
from verl.algorithm.advantage import get_adv_estimator_fn, register_adv_est
from verl.algorithm.groups import first_rows, group_index, group_sum
from verl.algorithm.loss import ClipRange, KlController, kl_penalty, policy_loss, token_weights
from verl.config import ESTIMATORS, OptimConfig
from verl.models.fsdp import build_scheduler

Rows = list[list[float]]
"""Token values of each row, its real tokens only."""

LAYOUTS = {
    "equal groups": [[3, 1, 4, 2], [5, 5, 1, 2], [2, 6, 3, 1]],
    "unequal groups": [[3, 7], [1, 4, 4, 6, 2], [5, 2, 2]],
    "one group": [[4, 1, 2, 6, 3]],
    "groups of one among others": [[3], [2, 5, 1], [6], [4, 4]],
    "groups of one alone": [[3], [1], [6]],
}
"""Response lengths, by group."""

WIDTH = 7


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def sample_std(values: list[float]) -> float:
    centre = mean(values)
    return math.sqrt(math.fsum((v - centre) ** 2 for v in values) / (len(values) - 1))


def whitened(rows: Rows) -> Rows:
    flat = [value for row in rows for value in row]
    centre = mean(flat)
    spread = math.sqrt(sample_std(flat) ** 2 + 1e-8)
    return [[(value - centre) / spread for value in row] for row in rows]


def others_of(i: int, groups: list[int]) -> list[int]:
    return [j for j in range(len(groups)) if j != i and groups[j] == groups[i]]


def slow_grpo(rows: Rows, groups: list[int], norm: bool, gamma: float) -> Rows:
    rewards = [math.fsum(row) for row in rows]
    advantages = []
    for i, reward in enumerate(rewards):
        group = [rewards[i], *(rewards[j] for j in others_of(i, groups))]
        centre, spread = (mean(group), sample_std(group)) if len(group) > 1 else (0.0, 1.0)
        advantages.append((reward - centre) / (spread + 1e-6) if norm else reward - centre)
    return [[a] * len(row) for a, row in zip(advantages, rows, strict=True)]


def slow_rloo(rows: Rows, groups: list[int], norm: bool, gamma: float) -> Rows:
    rewards = [math.fsum(row) for row in rows]
    baselines = []
    for i in range(len(rows)):
        rest = [rewards[j] for j in others_of(i, groups)]
        baselines.append(mean(rest) if rest else 0.0)
    return [[rewards[i] - baselines[i]] * len(row) for i, row in enumerate(rows)]


def slow_grpo_passk(rows: Rows, groups: list[int], norm: bool, gamma: float) -> Rows:
    rewards = [math.fsum(row) for row in rows]
    advantages = []
    for i, reward in enumerate(rewards):
        rest = [rewards[j] for j in others_of(i, groups)]
        gain = max(0.0, reward - max(rest))
        advantages.append(gain / (sample_std([reward, *rest]) + 1e-6) if norm else gain)
    return [[a] * len(row) for a, row in zip(advantages, rows, strict=True)]


def slow_opo(rows: Rows, groups: list[int], norm: bool, gamma: float) -> Rows:
    rewards = [math.fsum(row) for row in rows]
    advantages = []
    for i, reward in enumerate(rewards):
        rest = others_of(i, groups)
        weights = math.fsum(len(rows[j]) for j in [i, *rest])
        baseline = math.fsum(len(rows[j]) * rewards[j] for j in [i, *rest]) / weights if rest else 0.0
        advantages.append(reward - baseline)
    return [[a] * len(row) for a, row in zip(advantages, rows, strict=True)]


def slow_baseline(rows: Rows, groups: list[int], norm: bool, gamma: float) -> Rows:
    return whitened(slow_grpo(rows, groups, False, gamma))


def slow_reinforce(rows: Rows, groups: list[int], norm: bool, gamma: float) -> Rows:
    returns = [
        [math.fsum(gamma ** (later - t) * row[later] for later in range(t, len(row))) for t in range(len(row))]
        for row in rows
    ]
    return whitened(returns)


REFERENCES: dict[str, Callable[[Rows, list[int], bool, float], Rows]] = {
    "grpo": slow_grpo,
    "rloo": slow_rloo,
    "grpo_passk": slow_grpo_passk,
    "opo": slow_opo,
    "reinforce_plus_plus_baseline": slow_baseline,
    "reinforce_plus_plus": slow_reinforce,
}


def padded(rows: Rows, filler: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards [N,R] with `filler` past each row's end, and the mask [N,R]."""
    rewards = torch.tensor([row + [filler] * (WIDTH - len(row)) for row in rows])
    mask = torch.tensor([[t < len(row) for t in range(WIDTH)] for row in rows])
    return rewards, mask


def shuffled_rows(layout: list[list[int]], seed: int) -> tuple[Rows, list[int]]:
    """Random token rewards, small at every token and large at the end, rows of the groups mixed up."""
    draw = random.Random(seed)
    pairs = [(length, g) for g, lengths in enumerate(layout) for length in lengths]
    draw.shuffle(pairs)
    rows = [
        [round(draw.uniform(-0.3, 0.3), 3) for _ in range(length - 1)] + [round(draw.uniform(-3, 3), 3)]
        for length, _ in pairs
    ]
    return rows, [g for _, g in pairs]


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", REFERENCES)
def test_estimator_equals_its_loop(name: str, layout: str, norm: bool) -> None:
    alone = any(len(group) == 1 for group in LAYOUTS[layout])
    for seed in range(5):
        rows, groups = shuffled_rows(LAYOUTS[layout], seed)
        rewards, mask = padded(rows, filler=7.5)
        call = get_adv_estimator_fn(name)
        if name == "grpo_passk" and alone:
            with pytest.raises(ValueError, match="two or more rows"):
                call(rewards, mask, torch.tensor(groups), norm_by_std=norm)
            continue
        got = call(rewards, mask, torch.tensor(groups), norm_by_std=norm, gamma=0.9)
        expected, _ = padded(REFERENCES[name](rows, groups, norm, 0.9), filler=0.0)
        torch.testing.assert_close(got, expected, atol=5e-6, rtol=2e-6)


@pytest.mark.parametrize("size", [2, 3, 5, 6, 7, 8])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("name", REFERENCES)
def test_identical_rewards_give_no_advantage_and_no_nan(name: str, norm: bool, size: int) -> None:
    """Rewards that float32 sums and means round: what is left of them must not be blown up by a division."""
    for reward in (0.7, -1.0, 10.137, -3.3):
        # reinforce_plus_plus compares with the whole batch, the others with the group.
        step = 0.0 if name == "reinforce_plus_plus" else 1.37
        groups = [g for g in range(3) for _ in range(size)]
        rows = [[0.0] * (i % 4) + [reward + step * g] for i, g in enumerate(groups)]
        rewards, mask = padded(rows, filler=0.0)
        got = get_adv_estimator_fn(name)(rewards, mask, torch.tensor(groups), norm_by_std=norm)
        largest = got.abs().max().item()
        assert largest <= 5e-6, f"rewards of {reward} in groups of {size}"


def test_best_row_of_a_tied_group_gains_nothing() -> None:
    rewards, mask = padded([[2.5], [2.5], [-1.0]], filler=0.0)
    got = get_adv_estimator_fn("grpo_passk")(rewards, mask, torch.tensor([0, 0, 0]))
    assert got.abs().max() == 0


def test_unknown_estimator_error_lists_the_six_known_ones() -> None:
    with pytest.raises(ValueError, match="grpoo is unknown") as error:
        get_adv_estimator_fn("grpoo")
    listed = re.split(r", ", str(error.value).split("known: ")[-1])
    assert sorted(listed) == sorted(REFERENCES)


def test_registering_a_taken_name_is_an_error_and_changes_nothing() -> None:
    before = get_adv_estimator_fn("grpo")
    with pytest.raises(ValueError, match="'grpo' exists already"):
        register_adv_est("grpo")(lambda rewards, mask, group, norm_by_std, gamma: rewards)
    assert get_adv_estimator_fn("grpo") is before


def test_registered_estimator_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advantage, "_ADVANTAGE_ESTIMATORS", {})

    @register_adv_est("doubled")
    def doubled(rewards: torch.Tensor, *_: object) -> torch.Tensor:
        return rewards * 2

    assert get_adv_estimator_fn("doubled") is doubled


def test_groups_are_numbered_by_first_appearance() -> None:
    assert group_index(["b", "a", "b", "c", "a", "c", "b"]).tolist() == [0, 1, 0, 2, 1, 2, 0]


def test_first_rows_and_sums_of_groups_are_those_by_hand() -> None:
    group = torch.tensor([0, 1, 0, 2, 1])
    assert first_rows(group).tolist() == [0, 1, 3]
    assert group_sum(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), group).tolist() == [4, 7, 4]
    pairs = torch.tensor([[1.0, -1.0], [2.0, 0.0], [3.0, 3.0], [4.0, 4.0], [5.0, 1.0]])
    assert group_sum(pairs, group).tolist() == [[4, 2], [7, 1], [4, 4]]


def slow_policy_loss(old: float, new: float, advantage: float, clip: ClipRange) -> tuple[float, bool, bool, float]:
    log_ratio = min(20.0, max(-20.0, new - old))
    ratio = math.exp(log_ratio)
    plain = -advantage * ratio
    clipped = -advantage * min(1 + clip.high, max(1 - clip.low, ratio))
    loss = max(plain, clipped)
    took_over = advantage < 0 and loss > -advantage * clip.dual
    return (-advantage * clip.dual if took_over else loss), clipped > plain, took_over, -log_ratio


def test_policy_loss_equals_its_loop_for_both_signs_and_all_ratios() -> None:
    draw = random.Random(0)
    clip = ClipRange(low=0.2, high=0.28, dual=3.0)
    cases = []
    for _ in range(400):
        old = round(draw.uniform(-8, 0), 3)
        gap = draw.choice([0.0, draw.uniform(-0.1, 0.1), draw.uniform(-1, 1), draw.uniform(-3, 3), 40.0, -40.0])
        cases.append((old, old + round(gap, 3), draw.choice([0.0, draw.uniform(-2, 2), draw.uniform(-2, 2)])))
    table = torch.tensor(cases)
    losses, parts = policy_loss(table[:, 0], table[:, 1], table[:, 2], clip)
    exact = [slow_policy_loss(old, new, advantage, clip) for old, new, advantage in table.tolist()]
    # float32: a log ratio from values up to 48 is off by 4e-6, a ratio of e^20 by that times 5e8.
    torch.testing.assert_close(losses, torch.tensor([e[0] for e in exact]), atol=1e-6, rtol=5e-6)
    torch.testing.assert_close(parts["ppo_kl"], torch.tensor([e[3] for e in exact]), atol=1e-6, rtol=1e-6)
    assert parts["pg_clipfrac"].tolist() == [float(e[1]) for e in exact]
    assert parts["pg_clipfrac_lower"].tolist() == [float(e[2]) for e in exact]
    seen = {(a > 0, e[1], e[2]) for (_, _, a), e in zip(cases, exact, strict=True)}
    assert seen >= {(True, True, False), (True, False, False), (False, True, False), (False, False, True)}


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "clipped", "lower"),
    [
        (2.0, 1.1, -2.2, 0, 0),
        (2.0, 1.9, -2.6, 1, 0),  # 1 + high
        (2.0, 0.5, -1.0, 0, 0),
        (-2.0, 0.5, 1.6, 1, 0),  # 1 - low
        (-2.0, 1.9, 3.8, 0, 0),
        (-2.0, 2.9, 5.8, 0, 0),
        (-2.0, 9.0, 6.0, 0, 1),  # the dual bound
        (0.0, 9.0, 0.0, 0, 0),
    ],
)
def test_policy_loss_by_hand(advantage: float, ratio: float, loss: float, clipped: int, lower: int) -> None:
    clip = ClipRange(low=0.2, high=0.3, dual=3.0)
    old = torch.tensor([-1.5])
    losses, parts = policy_loss(old, old + math.log(ratio), torch.tensor([advantage]), clip)
    assert losses.item() == pytest.approx(loss, rel=1e-6, abs=1e-6)
    assert (parts["pg_clipfrac"].item(), parts["pg_clipfrac_lower"].item()) == (clipped, lower)


def test_log_ratio_is_clamped_at_twenty_both_ways() -> None:
    unbounded = ClipRange(low=1.0, high=1e12, dual=1e12)
    new = torch.tensor([35.0, 20.0, -35.0, -20.0])
    losses, parts = policy_loss(torch.zeros(4), new, torch.tensor([-1.0, -1.0, -1.0, -1.0]), unbounded)
    expected = torch.tensor([math.exp(20.0), math.exp(20.0), math.exp(-20.0), math.exp(-20.0)])
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=0)
    assert parts["ppo_kl"].tolist() == [-20.0, -20.0, 20.0, 20.0]


def test_gradient_of_the_loss_is_cut_where_the_clip_is_active() -> None:
    """It is -A x ratio inside the range, and 0 where the clipped or the dual bound is the loss."""
    clip = ClipRange(low=0.2, high=0.2, dual=3.0)
    ratios, advantages = [1.1, 1.5, 0.5, 5.0], [1.0, 1.0, -1.0, -1.0]
    log_prob = torch.tensor([math.log(r) for r in ratios], requires_grad=True)
    policy_loss(torch.zeros(4), log_prob, torch.tensor(advantages), clip)[0].sum().backward()
    torch.testing.assert_close(log_prob.grad, torch.tensor([-1.1, 0.0, 0.0, 0.0]), atol=1e-6, rtol=0)


def slow_kl(log_prob: float, reference: float, kind: str) -> float:
    d = log_prob - reference
    if kind in ("k1", "kl"):
        return d
    if kind == "abs":
        return abs(d)
    if kind in ("k2", "mse"):
        return d * d / 2
    inverse = min(20.0, max(-20.0, -d))
    return min(10.0, max(-10.0, math.exp(inverse) - inverse - 1))


@pytest.mark.parametrize("kind", ["k1", "kl", "abs", "k2", "mse", "k3", "low_var_kl"])
def test_kl_equals_its_loop(kind: str) -> None:
    draw = random.Random(1)
    pairs = [(draw.uniform(-6, 0), draw.uniform(-6, 0)) for _ in range(100)]
    pairs += [(-1.0, -1.0), (0.0, -30.0), (-30.0, 0.0)]
    log_prob, reference = (torch.tensor(column, dtype=torch.float32) for column in zip(*pairs, strict=True))
    expected = [slow_kl(a, b, kind) for a, b in zip(log_prob.tolist(), reference.tolist(), strict=True)]
    torch.testing.assert_close(kl_penalty(log_prob, reference, kind), torch.tensor(expected), atol=1e-6, rtol=2e-6)


def test_unknown_kl_kind_is_an_error_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'k4' is unknown; known: k1 .*abs.*k2.*k3"):
        kl_penalty(torch.zeros(1), torch.zeros(1), "k4")


def slow_aggregate(rows: Rows, mode: str, max_length: int) -> float:
    sums = [math.fsum(row) for row in rows]
    if mode == "token-mean":
        return math.fsum(sums) / sum(len(row) for row in rows)
    if mode == "seq-mean-token-sum":
        return mean(sums)
    if mode == "seq-mean-token-mean":
        return mean([s / len(row) for s, row in zip(sums, rows, strict=True)])
    return math.fsum(sums) / max_length


def weighted(rows: Rows, mode: str, total: Rows, max_length: int) -> float:
    """The share of `rows` in the loss of the mini-batch `total`."""
    lengths = torch.tensor([len(row) for row in rows])
    weights = token_weights(lengths, mode, sum(len(row) for row in total), len(total), max_length)
    losses = [value for row in rows for value in row]
    return math.fsum(w * v for w, v in zip(weights.tolist(), losses, strict=True))


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
def test_weighted_token_sum_is_the_mode_and_does_not_depend_on_the_cut(mode: str) -> None:
    draw = random.Random(2)
    rows = [[draw.uniform(-2, 2) for _ in range(length)] for length in (3, 1, 7, 4, 2, 6)]
    expected = slow_aggregate(rows, mode, max_length=9)
    assert weighted(rows, mode, rows, 9) == pytest.approx(expected, abs=1e-6)
    for cut in range(1, len(rows)):
        parts = weighted(rows[:cut], mode, rows, 9) + weighted(rows[cut:], mode, rows, 9)
        assert parts == pytest.approx(expected, abs=1e-6)


def test_unknown_loss_mode_is_an_error() -> None:
    with pytest.raises(ValueError, match="'token-sum' is unknown"):
        token_weights(torch.tensor([1]), "token-sum", 1, 1, 1)


@pytest.mark.parametrize(
    ("current", "factor"),
    [
        (0.1, 1.0),
        (0.11, 1 + 0.1 * 0.05),
        (0.5, 1 + 0.2 * 0.05),
        (0.0, 1 - 0.2 * 0.05),
        (0.09, 1 - 0.1 * 0.05),
    ],
)
def test_adaptive_kl_coefficient_moves_by_the_bounded_error(current: float, factor: float) -> None:
    controller = KlController(0.3, adaptive=True, target=0.1, horizon=1280)
    controller.update(current, num_samples=64)
    assert controller.coef == pytest.approx(0.3 * factor, abs=1e-12)
    controller.update(current, num_samples=64)
    assert controller.coef == pytest.approx(0.3 * factor**2, abs=1e-12)


def test_fixed_kl_coefficient_stays() -> None:
    controller = KlController(0.3, adaptive=False, target=0.1, horizon=10)
    controller.update(5.0, num_samples=64)
    assert controller.coef == 0.3


def learning_rates(config: OptimConfig, total_steps: int) -> list[float]:
    """The learning rate that each of `total_steps` + 1 steps would use."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.lr)
    scheduler = build_scheduler(optimizer, config, total_steps)
    rates = []
    for _ in range(total_steps + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_schedule_without_warm_up_is_constant() -> None:
    assert learning_rates(OptimConfig(lr=0.5), 20) == [0.5] * 21


def test_warm_up_rises_linearly_from_zero_to_the_peak() -> None:
    rates = learning_rates(OptimConfig(lr=0.5, lr_warmup_steps=4, lr_warmup_steps_ratio=0.9), 12)
    assert rates == pytest.approx([0.0, 0.125, 0.25, 0.375] + [0.5] * 9, abs=1e-12)


def test_zero_warm_up_steps_are_not_replaced_by_the_ratio() -> None:
    rates = learning_rates(OptimConfig(lr=0.5, lr_warmup_steps=0, lr_warmup_steps_ratio=0.5), 8)
    assert rates == [0.5] * 9


def test_warm_up_by_ratio_counts_steps_of_the_run() -> None:
    rates = learning_rates(OptimConfig(lr=0.5, lr_warmup_steps_ratio=0.25), 8)
    assert rates == pytest.approx([0.0, 0.25] + [0.5] * 7, abs=1e-12)


@pytest.mark.parametrize(
    ("step", "factor"),
    [
        (0, 0.1),
        (2, 0.55),  # the warm-up begins at the minimum, too
        (4, 1.0),
        (6, 0.1 + 0.9 * (2 + math.sqrt(2)) / 4),  # a quarter of the fall
        (8, 0.55),
        (10, 0.1 + 0.9 * (2 - math.sqrt(2)) / 4),
        (12, 0.1),
    ],
)
def test_cosine_falls_once_from_the_peak_to_the_minimum(step: int, factor: float) -> None:
    config = OptimConfig(lr=2.0, lr_warmup_steps=4, warmup_style="cosine", min_lr_ratio=0.1)
    assert learning_rates(config, 12)[step] == pytest.approx(2.0 * factor, abs=1e-9)


def test_a_constant_rate_warms_up_from_zero_whatever_the_minimum_of_a_cosine_is() -> None:
    assert learning_rates(OptimConfig(lr=1.0, lr_warmup_steps=2, min_lr_ratio=0.1), 3) == [0.0, 0.5, 1.0, 1.0]


def test_cosine_with_a_whole_wave_is_back_at_the_peak_in_the_end() -> None:
    rates = learning_rates(OptimConfig(lr=2.0, warmup_style="cosine", num_cycles=1.0), 8)
    assert [rates[0], rates[4], rates[8]] == pytest.approx([2.0, 0.0, 2.0], abs=1e-9)


def test_what_the_config_says_of_estimators_is_what_they_do():
    """Read off their results: which argument changes one, and whether a row alone has an advantage."""
    assert {name for name, fn in advantage._ADVANTAGE_ESTIMATORS.items() if fn.__module__ == advantage.__name__} == set(
        ESTIMATORS
    )
    rewards = torch.zeros(4, 3)
    rewards[:, 2] = torch.tensor([0.0, 1.0, 3.0, 3.5])
    mask, pairs = torch.ones(4, 3, dtype=torch.bool), torch.tensor([0, 0, 1, 1])
    for name, said in ESTIMATORS.items():
        estimate = partial(advantage.get_adv_estimator_fn(name), rewards, mask, pairs)
        by_std, gamma = (
            not torch.allclose(estimate(), estimate(**change)) for change in ({"norm_by_std": False}, {"gamma": 0.5})
        )
        assert (by_std, gamma) == (said.reads_std, said.reads_gamma), name
