"""A resumed run takes what was learned from the checkpoint, and every setting from its own configuration."""

import math
import re
from typing import Any

import pytest
import torch

from verl.checkpoint import resume
from verl.checkpoint.resume import ResumePoint, find_resume
from verl.checkpoint.run_folder import RunFolder
from verl.checkpoint.training_state import load_training_state, save_training_state
from verl.config import OptimConfig, RunConfig
from verl.config_fields import nested
from verl.errors import UserError
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


STATE = {
    "step": 5, "data_sha256": "ab", "kl_coef": 0.123, "first_probs_diff": 1e-6, "run_ids": {"wandb": "x"},
    "num_samples": 40,
}  # fmt: skip


def resume_point(tmp_path, before: dict, now: dict, num_samples: int = 40) -> ResumePoint:
    run = RunFolder(tmp_path)
    run.begin(5)
    run.publish(5, {**STATE, "config": RunConfig.model_validate(before).model_dump(mode="json")})
    point = find_resume(RunConfig.model_validate(now), run, "ab", num_samples)
    assert point is not None
    return point


def resumed_state(tmp_path, before: dict, now: dict, num_samples: int = 40) -> dict:
    return resume_point(tmp_path, before, now, num_samples).state


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


def test_another_number_of_samples_is_another_order_of_them(tmp_path):
    before, now = ({"data": {"max_prompt_length": m, "filter_overlong_prompts": True}} for m in (200, 100))
    with pytest.raises(UserError, match=r"40 samples are left of it, 39 now \(data.max_prompt_length"):
        resumed_state(tmp_path, before, now, num_samples=39)
    forced = {**now, "trainer": {"resume_force": True}}
    assert resumed_state(tmp_path / "forced", before, forced, num_samples=39)["step"] == 5


# Of each setting that makes another run, a value of a checkpoint and another one; a new setting has to be added here.
OTHER_RUN = {
    "actor_rollout_ref.model.path": ("one-model", "other-model"),
    "actor_rollout_ref.model.override_config": ({"rope_theta": 10000.0}, {"rope_theta": 500000.0}),
    "actor_rollout_ref.model.lora_rank": (0, 8),
    "actor_rollout_ref.model.lora_alpha": (16, 32),
    "actor_rollout_ref.model.target_modules": ("all-linear", ["q_proj", "v_proj"]),
    "actor_rollout_ref.model.lora_adapter_path": (None, "adapter"),
    "actor_rollout_ref.rollout.n": (8, 4),
    "data.train_mode": ("supervised", "unsupervised"),
    "data.train_batch_size": (64, 32),
    "data.contrastive_batch_size": (None, 128),
    "data.prompt_key": ("prompt", "messages"),
    "data.system_prompt": ("Read the text", "Read it twice"),
    "data.system_prompt_in": ("system", "user"),
    "data.template_date": ("2024-07-26", "2025-01-01"),
    "data.trained_text": ("positive", "query"),
    "data.template": ("{text}", "Text: {text}"),
    "data.instructions": ({"default": "Find answers"}, {"default": "Find duplicates"}),
    "data.think": (True, False),
    "data.query.template": (None, "Query: {text}"),
    "data.query.think": (True, False),
    "data.document.template": (None, "Passage: {text}"),
    "data.document.think": (True, False),
    "data.filter_overlong_prompts": (False, True),
    "data.negatives_per_query": (1, 3),
    "data.shuffle": (True, False),
    "data.seed": (1, 2),
}


def shown(value: Any) -> str:
    """What a message shows at least: of a mapping the entry that differs."""
    return repr(next(iter(value.values())) if isinstance(value, dict) else value)


def test_every_setting_that_makes_another_run_is_walked():
    assert OTHER_RUN.keys() == set(resume._SAME_RUN)


@pytest.mark.parametrize("key", OTHER_RUN)
def test_another_run_is_refused_with_both_values_unless_it_is_forced(tmp_path, key):
    before, now = (nested({key: value}) for value in OTHER_RUN[key])
    with pytest.raises(UserError, match="is of another run") as caught:
        resumed_state(tmp_path, before, now)
    (line,) = [line for line in str(caught.value).splitlines() if re.match(rf"\s*{re.escape(key)}[.:]", line)]
    old, new = map(shown, OTHER_RUN[key])
    told_before, told_now = line.split(" before, ")
    assert old in told_before and new in told_now
    forced = {**now, "trainer": {"resume_force": True}}
    assert resumed_state(tmp_path / "forced", before, forced)["step"] == 5


@pytest.mark.parametrize(
    ("key", "before", "now"),
    [
        ("actor_rollout_ref.model.override_config", {}, {"rope_theta": 500000.0}),
        ("actor_rollout_ref.model.override_config", {"rope_theta": 500000.0}, {}),
        ("actor_rollout_ref.model.override_config", {"a": 1}, {"b": 1}),
        ("data.instructions", {"default": "Find answers"}, {"default": "Find answers", "web": "Find pages"}),
    ],
)
def test_an_entry_that_only_one_of_two_mappings_has_makes_another_run_too(tmp_path, key, before, now):
    with pytest.raises(UserError, match=rf"is of another run:\n  {re.escape(key)}"):
        resumed_state(tmp_path, nested({key: before}), nested({key: now}))


OWN = {"data.template": "Text: {text}"}


@pytest.mark.parametrize(
    ("null", "spelled_out", "other"),
    [
        ({}, {"data.train_mode": "supervised"}, {"data.train_mode": "unsupervised"}),
        ({}, {"data.contrastive_batch_size": 64}, {"data.contrastive_batch_size": 32}),
        ({}, {"data.query.template": "{text}"}, {"data.query.template": "Query: {text}"}),
        (OWN, {**OWN, "data.query.template": "Text: {text}"}, {**OWN, "data.query.template": "{text}"}),
        (OWN, {**OWN, "data.document.template": "Text: {text}"}, {**OWN, "data.document.template": "{text}"}),
    ],
)
def test_what_null_stands_for_may_be_spelled_out_or_left_out_again(tmp_path, null, spelled_out, other):
    assert resume_point(tmp_path / "spelled out", nested(null), nested(spelled_out)).notes == []
    assert resume_point(tmp_path / "left out", nested(spelled_out), nested(null)).notes == []
    for i, (before, now) in enumerate([(null, other), (other, null)]):
        with pytest.raises(UserError, match="is of another run"):
            resume_point(tmp_path / f"other {i}", nested(before), nested(now))


@pytest.mark.parametrize(("contrastive", "changes"), [(64, 1), (32, 2)])
def test_what_is_spelled_out_is_compared_with_what_null_stood_for_before(tmp_path, contrastive, changes):
    now = {"data.train_batch_size": 32, "data.contrastive_batch_size": contrastive}
    with pytest.raises(UserError) as caught:
        resume_point(tmp_path, nested({"data.train_batch_size": 64}), nested(now))
    assert "data.train_batch_size: 64 before, 32 now" in str(caught.value)
    assert str(caught.value).count(" before, ") == changes
