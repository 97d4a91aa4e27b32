"""Ends what a run has started on this machine when its driver is gone, however it went.

Ray's own processes follow a driver that is killed with SIGKILL, but for its two agents, which stay for good. So the
driver starts this program beside its cluster: it waits for the end of its input, which the kernel closes with the
driver, and then ends every process that has the run's mark in its environment.
"""

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

_MARK = "GRACE_RUN"
# So long the processes may take to end by themselves.
_GRACE_S = 5.0


def start_reaper() -> None:
    """Mark everything that this process starts from now on; end it when this process has ended."""
    environment = {name: value for name, value in os.environ.items() if name != _MARK}
    os.environ[_MARK] = mark = uuid.uuid4().hex
    subprocess.Popen(
        # Alone in its session, so that no signal to the driver's group ends it; without site packages: it is small.
        [sys.executable, "-I", "-S", __file__, mark],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment,
        start_new_session=True,
    )  # fmt: skip


def _marked(mark: str) -> list[int]:
    needle, found = f"{_MARK}={mark}".encode(), []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                # A process that has ended and waits for its parent has no environment any more.
                if needle in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
            except OSError:
                continue
    return found


def main(mark: str) -> None:
    sys.stdin.read()
    end = time.monotonic() + _GRACE_S
    while (left := _marked(mark)) and time.monotonic() < end:
        time.sleep(0.2)
    for pid in left:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


if __name__ == "__main__":
    main(sys.argv[1])
