"""A driver that is stuck ends with the phase and its stacks; one that is not goes on."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from verl.trainer.ppo import ray_trainer

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


@pytest.mark.parametrize(("use_ray", "expected"), [(True, {"data": 7, "reward": 7}), (False, {})])
def test_on_ray_the_phases_in_which_the_driver_calls_no_worker_are_watched(monkeypatch, use_ray, expected):
    watches: dict[str, int] = {}

    @contextmanager
    def record(phase: str, seconds: int) -> Iterator[None]:
        watches[phase] = seconds
        yield
        watches.clear()

    monkeypatch.setattr(ray_trainer, "watch", record)
    trainer = SimpleNamespace(
        config=SimpleNamespace(trainer=SimpleNamespace(use_ray=use_ray, phase_timeout_s=7)),
        signals=SimpleNamespace(check=lambda: None), workers=SimpleNamespace(enter_phase=lambda name: None), seconds={},
    )  # fmt: skip
    phases = ("resume", "data", "sync", "gen", "score", "ref", "reward", "update", "val", "diag", "save")
    found: dict[str, int] = {}
    for name in phases:
        with ray_trainer.RayPPOTrainer.phase(trainer, name):
            found |= watches
        assert watches == {}
    assert found == expected and tuple(trainer.seconds) == phases
