"""Ends the processes that a run started on this machine after its driver died, also by SIGKILL.

When a driver is killed with SIGKILL, Ray's processes end with it, except its two agents, which would run for ever. So
the driver starts this program beside its cluster. It records the driver's descendants until its standard input closes,
which the kernel does when the driver dies, and then ends those that are still running.
"""

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

_LOOK_EVERY_S = 1.0
# Seconds that the processes get to end by themselves.
_PATIENCE_S = 5.0

Process = tuple[int, str]
"""Process id and start time: the id alone may have been reused by another process."""


class Reaper:
    """This program as a child process; it runs as long as this object exists."""

    def __init__(self) -> None:
        # In a session of its own, so that a signal to the driver's group does not end it; small, without site packages.
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, str(os.getpid())],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip


def _stat(pid: int) -> tuple[int, str] | None:
    """The parent of a process, and its start time."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return None
    return int(fields[1]), fields[19]


def _descendants(roots: set[int]) -> set[Process]:
    pids = (int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdigit())
    stats = {pid: stat for pid in pids if (stat := _stat(pid))}
    found = roots
    while more := {pid for pid, (parent, _) in stats.items() if parent in found} - found:
        found = found | more
    return {(pid, stats[pid][1]) for pid in found - roots - {os.getpid()}}


def _alive(process: Process) -> bool:
    stat = _stat(process[0])
    return stat is not None and stat[1] == process[1]


def main(driver: int) -> None:
    seen: set[Process] = set()
    while not select.select([sys.stdin], [], [], _LOOK_EVERY_S)[0]:
        seen = {process for process in seen if _alive(process)} | _descendants({driver})
    # Those that were started since the last look.
    seen |= _descendants({pid for pid, _ in filter(_alive, seen)})
    end = time.monotonic() + _PATIENCE_S
    while any(map(_alive, seen)) and time.monotonic() < end:
        time.sleep(0.2)
    for process in filter(_alive, seen):
        try:
            os.kill(process[0], signal.SIGKILL)
        except ProcessLookupError:
            continue


if __name__ == "__main__":
    main(int(sys.argv[1]))
