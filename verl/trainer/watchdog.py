"""Ends a run whose driver is stuck: a deadlock in a library, or a reward function that waits for ever.

Workers are watched by `single_controller.ray_group`, which reads their progress. The driver cannot watch itself from
the code that is stuck, so a second thread does.
"""

import faulthandler
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# What has a limit of its own, as data workers do, says more: it comes first.
_MARGIN_S = 3


@contextmanager
def watch(phase: str, seconds: int) -> Iterator[None]:
    """End the process with the stacks of all its threads and exit code 1 if the block takes longer than this.

    Args:
        seconds: 0 = no limit.
    """
    timer = threading.Timer(seconds + _MARGIN_S, _end, (phase, seconds))
    timer.daemon = True
    if seconds:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _end(phase: str, seconds: int) -> None:
    # Not through sys.stderr, whose lock the stuck thread may hold.
    os.write(
        2,
        f"\nmain_ppo: the driver made no progress for {seconds} s in phase {phase} (trainer.phase_timeout_s={seconds}; "
        "raise it if the phase takes so long). The checkpoints are as they were. Stacks of all threads:\n".encode(),
    )
    faulthandler.dump_traceback(file=2, all_threads=True)
    os._exit(1)
