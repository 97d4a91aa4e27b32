"""Locks end with their process, however it ends, and tell who holds them."""

import subprocess
import sys

import pytest

from verl.utils import locks
from verl.utils.locks import HeldError, hold, share_on_this_machine

HOLDER = """
import sys, time
from pathlib import Path
from verl.utils import locks
if len(sys.argv) > 3:
    locks._boot_id = lambda: sys.argv[3]
kept = getattr(locks, sys.argv[2])(Path(sys.argv[1]))
if sys.argv[2] == "hold":
    kept.__enter__()
print("held", flush=True)
time.sleep(600)
"""


def start_holder(*arguments: str) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_lock_names_its_holder_and_ends_with_it(tmp_path):
    file = tmp_path / "lock"
    holder = start_holder(str(file), "hold")
    with pytest.raises(HeldError, match=rf"pid {holder.pid} on \S+, since \d{{4}}-"), hold(file):
        pass
    holder.kill()
    holder.wait()
    with hold(file):
        pass


def test_processes_of_one_machine_share_and_another_machine_is_told(tmp_path):
    file = tmp_path / "lock"
    holder = start_holder(str(file), "share_on_this_machine")
    first, second = share_on_this_machine(file), share_on_this_machine(file)
    first.close()
    holder.kill()
    holder.wait()
    # The second process still shares it, although the one that wrote its name into the file is gone.
    with pytest.MonkeyPatch.context() as elsewhere, pytest.raises(HeldError, match=rf"pid {holder.pid} on "):
        elsewhere.setattr(locks, "_boot_id", lambda: "another machine")
        share_on_this_machine(file)
    second.close()
    elsewhere = start_holder(str(file), "share_on_this_machine", "another machine")
    with pytest.raises(HeldError):
        share_on_this_machine(file)
    elsewhere.kill()
    elsewhere.wait()
    share_on_this_machine(file).close()
