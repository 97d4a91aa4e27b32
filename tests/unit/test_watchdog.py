"""A driver that is stuck ends with the phase and its stacks; one that is not goes on."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from verl.config import RunConfig
from verl.trainer.ppo import ray_trainer
from verl.trainer.ppo.ray_trainer import RayPPOTrainer

SCRIPT = """
import sys, time
from verl.trainer import watchdog
watchdog._MARGIN_S = 0
with watchdog.watch("data", 0), watchdog.watch("data", 1):
    pass
time.sleep(1.2)
print("went on", flush=True)
def reward_that_waits_for_ever():
    time.sleep(600)
with watchdog.watch("reward", 1):
    reward_that_waits_for_ever()
"""


def test_a_stuck_driver_ends_with_the_phase_and_its_stacks():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stdout == "went on\n"
    assert "no progress for 1 s in phase reward (trainer.phase_timeout_s=1; raise it" in done.stderr
    assert "reward_that_waits_for_ever" in done.stderr


@pytest.fixture
def limits(monkeypatch) -> dict[str, int]:
    """The limits that hold at the moment, by phase."""
    held: dict[str, int] = {}

    @contextmanager
    def hold(phase: str, seconds: int) -> Iterator[None]:
        held[phase] = seconds
        yield
        del held[phase]

    monkeypatch.setattr(ray_trainer, "watch", hold)
    return held


def trainer_of(use_ray: bool, **parts: Any) -> RayPPOTrainer:
    """A trainer with these parts alone."""
    trainer = RayPPOTrainer.__new__(RayPPOTrainer)
    trainer.config = RunConfig.model_validate({"trainer": {"use_ray": use_ray, "phase_timeout_s": 7}})
    trainer.seconds, trainer.first_step, trainer.train_seconds = {}, 0, 0.0
    nothing = SimpleNamespace(check=lambda: None, log=lambda *_: None, say=lambda _: None)
    workers = SimpleNamespace(enter_phase=lambda name: None)
    vars(trainer).update(signals=nothing, tracking=nothing, display=nothing, workers=workers, **parts)
    return trainer


@pytest.mark.parametrize(("use_ray", "expected"), [(True, {"data": 7, "reward": 7}), (False, {})])
def test_on_ray_the_phases_in_which_the_driver_calls_no_worker_are_watched(limits, use_ray, expected):
    trainer = trainer_of(use_ray)
    phases = ("resume", "data", "sync", "gen", "score", "ref", "reward", "update", "val", "diag", "save")
    found: dict[str, int] = {}
    for name in phases:
        with trainer.phase(name):
            found |= limits
        assert limits == {}
    assert found == expected and tuple(trainer.seconds) == phases


@pytest.mark.parametrize(("use_ray", "expected"), [(True, {"val": 7}), (False, {})])
def test_on_ray_the_rewards_of_held_out_texts_are_watched_and_what_workers_do_before_them_is_not(
    limits, use_ray, expected
):
    seen: dict[str, dict[str, int]] = {}

    class Manager:
        needs_embeddings = False

        def __call__(self, rows: str) -> str:
            seen[f"reward of {rows}"] = dict(limits)
            return f"rewards of {rows}"

    class Held:
        def run(self, embed: Any, reward: Any, step: int) -> dict[str, float]:
            seen["before"] = dict(limits)
            assert reward("rows") == "rewards of rows"
            seen["after"] = dict(limits)
            return {"val/reward": 0.5}

        def line(self, *_: Any) -> str:
            return "held-out"

    trainer = trainer_of(use_ray, reward_manager=Manager(), run=SimpleNamespace(validation=Held()))
    trainer.validate(0)
    assert seen == {"before": {}, "reward of rows": expected, "after": {}}
