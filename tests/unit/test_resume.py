"""A resumed run takes what was learned from the checkpoint, and every setting from its own configuration."""

import math

import pytest
import torch

from verl.checkpoint.resume import find_resume
from verl.checkpoint.run_folder import RunFolder
from verl.checkpoint.training_state import load_training_state, save_training_state
from verl.config import OptimConfig, RunConfig
from verl.models.fsdp import build_optimizer, build_scheduler

BEFORE = OptimConfig(lr=1e-3, lr_warmup_steps=2)
TOTAL, DONE = 10, 4
# Another value for every setting of the optimizer; a new one has to be added here.
OTHER = {
    "lr": 1e-5,
    "betas": (0.8, 0.95),
    "weight_decay": 0.3,
    "lr_warmup_steps": 8,
    "lr_warmup_steps_ratio": 0.9,
    "warmup_style": "cosine",
    "min_lr_ratio": 0.5,
    "num_cycles": 1.5,
}
# Without these the setting itself has no meaning.
WITH = {
    "lr_warmup_steps_ratio": {"lr_warmup_steps": -1},
    "min_lr_ratio": {"warmup_style": "cosine"},
    "num_cycles": {"warmup_style": "cosine"},
}


def build(config: OptimConfig, total: int = TOTAL):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = build_optimizer(model, config)
    return model, optimizer, build_scheduler(optimizer, config, total)


def train(model, optimizer, scheduler, steps: int) -> list[float]:
    rates = []
    for _ in range(steps):
        model(torch.ones(4, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        rates.append(scheduler.get_last_lr()[0])
        scheduler.step()
    return rates


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("actor")
    parts = build(BEFORE)
    train(*parts, DONE)
    save_training_state(folder, *parts, rank=0)
    return folder


def test_every_setting_of_the_optimizer_is_walked():
    assert OTHER.keys() == OptimConfig.model_fields.keys()
    assert all(getattr(BEFORE, name) != value for name, value in OTHER.items())


@pytest.mark.parametrize("name", OTHER)
def test_a_changed_setting_takes_effect(checkpoint, name):
    """The rates are those of a run that had the setting from the start; moments and weights are the checkpoint's."""
    config = BEFORE.model_copy(update={name: OTHER[name], **WITH.get(name, {})})
    model, optimizer, scheduler = build(config)
    load_training_state(checkpoint, model, optimizer, scheduler, rank=0)
    (group,) = optimizer.param_groups
    assert (group["betas"], group["weight_decay"]) == (config.betas, config.weight_decay)

    fresh = build(config)
    expected = train(*fresh, TOTAL)[DONE:]
    # AdamW by hand, from the moments of a run that did the first steps with the former settings.
    by_hand = build(BEFORE)
    train(*by_hand, DONE)
    by_hand[1].param_groups[0].update(betas=config.betas, weight_decay=config.weight_decay)
    for rate in expected:
        by_hand[1].param_groups[0]["lr"] = rate
        by_hand[0](torch.ones(4, 3)).square().sum().backward()
        by_hand[1].step()
        by_hand[1].zero_grad()
    assert train(model, optimizer, scheduler, TOTAL - DONE) == expected
    assert torch.equal(model.weight, by_hand[0].weight) and torch.equal(model.bias, by_hand[0].bias)


def test_more_steps_stretch_the_schedule(checkpoint):
    config = BEFORE.model_copy(update={"warmup_style": "cosine"})
    parts = build(config, total=20)
    load_training_state(checkpoint, *parts, rank=0)
    progress = (DONE - 2) / (20 - 2)
    assert train(*parts, 1) == [pytest.approx(1e-3 * 0.5 * (1 + math.cos(math.pi * progress)))]


STATE = {"step": 5, "data_sha256": "ab", "kl_coef": 0.123, "first_probs_diff": 1e-6, "run_ids": {"wandb": "x"}}


def resumed_state(tmp_path, before: dict, now: dict) -> dict:
    run = RunFolder(tmp_path)
    run.begin(5)
    run.publish(5, {**STATE, "config": RunConfig.model_validate(before).model_dump(mode="json")})
    point = find_resume(RunConfig.model_validate(now), run, "ab")
    assert point is not None
    return point.state


ADAPTIVE = {"algorithm": {"kl_ctrl": {"type": "adaptive", "kl_coef": 0.1}}}


@pytest.mark.parametrize(
    ("before", "now", "forgotten"),
    [
        (ADAPTIVE, ADAPTIVE, set()),
        (ADAPTIVE, {"algorithm": {"kl_ctrl": {"type": "adaptive", "kl_coef": 0.2}}}, {"kl_coef"}),
        (ADAPTIVE, {"algorithm": {"kl_ctrl": {"type": "fixed", "kl_coef": 0.1}}}, {"kl_coef"}),
        (ADAPTIVE, {"algorithm": {"kl_ctrl": {**ADAPTIVE["algorithm"]["kl_ctrl"], "horizon": 77}}}, set()),
        ({}, {"actor_rollout_ref": {"rollout": {"name": "hf"}}}, {"first_probs_diff"}),
        ({}, {"actor_rollout_ref": {"rollout": {"dtype": "float32"}}}, {"first_probs_diff"}),
        ({}, {"actor_rollout_ref": {"actor": {"optim": {"lr": 1e-3}}}}, set()),
    ],
)
def test_what_a_run_found_out_holds_for_its_settings(tmp_path, before, now, forgotten):
    state = resumed_state(tmp_path, before, now)
    assert {name: state[name] for name in STATE if name not in forgotten} == {
        name: value for name, value in STATE.items() if name not in forgotten
    }
    assert forgotten.isdisjoint(state)
