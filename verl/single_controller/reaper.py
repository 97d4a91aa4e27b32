"""Ends what a run has started on this machine when its driver is gone, however it went.

Ray's own processes follow a driver that is killed with SIGKILL, but for its two agents, which stay for good. So the
driver starts this program beside its cluster. It notes the driver's descendants until its input ends, as the kernel
closes that with the driver, and then ends those that are left.
"""

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

_LOOK_EVERY_S = 1.0
# So long the processes may take to end by themselves.
_PATIENCE_S = 5.0

Process = tuple[int, str]
"""Process id and start time: an id alone may have been given to another process meanwhile."""


class Reaper:
    """The program beside this process; lives as long as this object."""

    def __init__(self) -> None:
        # Alone in its session, so that no signal to the driver's group ends it; without site packages: it is small.
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


def _descendants(root: int) -> set[Process]:
    pids = (int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdigit())
    stats = {pid: stat for pid in pids if (stat := _stat(pid))}
    found = {root}
    while more := {pid for pid, (parent, _) in stats.items() if parent in found} - found:
        found |= more
    return {(pid, stats[pid][1]) for pid in found - {root, os.getpid()}}


def _alive(process: Process) -> bool:
    stat = _stat(process[0])
    return stat is not None and stat[1] == process[1]


def main(driver: int) -> None:
    seen: set[Process] = set()
    while not select.select([sys.stdin], [], [], _LOOK_EVERY_S)[0]:
        seen = {process for process in seen if _alive(process)} | _descendants(driver)
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
