"""Killing a run at random moments and starting it again."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

from runs import start_main_ppo


def run_with_kills(overrides: list[str], kills: int, draw: random.Random, longest_s: float) -> list[dict[str, object]]:
    """Start the run, kill its driver or its worker with SIGKILL, start it again, `kills` times; then let it end.

    Args:
        longest_s: a kill comes at most so long after the models are loaded.

    Returns:
        For each kill what was killed, when, and which processes were left a minute later.

    Raises:
        AssertionError: the run ended with an error that no kill explains.
    """
    found: list[dict[str, object]] = []
    while len(found) < kills:
        mark = f"GRACE_KILLS_{time.time_ns()}"
        process = start_main_ppo(*overrides, **{mark: "1"})
        if not _wait_for_models(process):
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
            raise AssertionError("the run ended before it had all its kills; give it more steps")
        after = draw.uniform(0, longest_s)
        time.sleep(after)
        workers = [pid for pid in pids_with(mark) if "ActorRolloutRefWorker" in command_line(pid)]
        whom, pids = ("worker", workers) if workers and draw.random() < 0.5 else ("driver", [process.pid])
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        _, errors = process.communicate(timeout=300)
        if process.returncode == 0:
            raise AssertionError("the run ended before it had all its kills; give it more steps")
        found.append({"killed": whom, "after_s": round(after, 2), "left": left_after(mark), "errors": errors})
    process = start_main_ppo(*overrides)
    _, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    return found


def _wait_for_models(process: "subprocess.Popen[str]") -> bool:
    """Whether the run came so far."""
    assert process.stdout is not None
    return any("parameters, " in line for line in iter(process.stdout.readline, ""))


def left_after(mark: str, seconds: float = 60) -> list[str]:
    """Command lines of processes with this environment variable that live on."""
    end = time.monotonic() + seconds
    while (pids := pids_with(mark)) and time.monotonic() < end:
        time.sleep(0.1)
    return [command_line(pid) for pid in pids]


def pids_with(mark: str) -> list[int]:
    """Living processes, this one aside, that were started with the environment variable `mark`."""
    return [
        int(folder.name)
        for folder in Path("/proc").iterdir()
        if folder.name.isdigit() and f"{mark}=".encode() in _read(folder / "environ") and _read(folder / "cmdline")
    ]


def command_line(pid: int) -> str:
    return _read(Path(f"/proc/{pid}/cmdline")).replace(b"\0", b" ").decode(errors="replace")


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:
        return b""
