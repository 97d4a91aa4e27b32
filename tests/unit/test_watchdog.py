"""A driver that is stuck ends with the phase and its stacks; one that is not goes on."""

import subprocess
import sys

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
