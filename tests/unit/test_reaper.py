"""What a killed driver leaves running is ended, and nothing else."""

import subprocess
import sys
import time

from verl.single_controller import reaper

# A driver whose child starts a grandchild; both would outlive it.
_DRIVER = """
import subprocess, sys, time
from verl.single_controller.reaper import Reaper
kept = Reaper()
child = "import subprocess, time; print(subprocess.Popen(['sleep', '300']).pid, flush=True); time.sleep(300)"
process = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE, text=True, start_new_session=True)
print(process.pid, process.stdout.readline().strip(), flush=True)
time.sleep(300)
"""


def test_children_and_grandchildren_of_a_killed_driver_end():
    with subprocess.Popen(["sleep", "300"]) as stranger:
        with subprocess.Popen([sys.executable, "-c", _DRIVER], stdout=subprocess.PIPE, text=True) as driver:
            pids = [int(pid) for pid in driver.stdout.readline().split()]
            assert len(pids) == 2
            end = time.monotonic() + 30
            processes = {(pid, reaper._stat(pid)[1]) for pid in pids}
            # It looks once a second; a kill before the first look is what is not covered.
            while time.monotonic() < end and not processes <= reaper._descendants({driver.pid}):
                time.sleep(0.1)
            time.sleep(2 * reaper._LOOK_EVERY_S)
            driver.kill()
        end = time.monotonic() + 30
        while time.monotonic() < end and any(map(reaper._alive, processes)):
            time.sleep(0.1)
        assert not any(map(reaper._alive, processes))
        assert stranger.poll() is None
        stranger.kill()
