"""Stopping a run from outside: SIGINT and SIGTERM.

A handler may run in the middle of any code, a library's native code included, where an exception ends in errors of that
code's own. So no handler here raises: the first signal is noted and raised by the next `check`, the second one ends the
process on the spot.
"""

import os
import signal
import sys
from types import FrameType
from typing import Any

_SHOW_CURSOR = b"\x1b[?25h"


class Interrupted(BaseException):
    """The run was asked to stop. A BaseException, like KeyboardInterrupt: handlers of failures must not catch it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = exit_code(number)


def exit_code(number: int) -> int:
    """The code that a shell reports for a process which a signal ended."""
    return 128 + number


class StopSignals:
    """The first signal is raised by the next `check`; the second one ends the process at once.

    What the process leaves running then is ended by `single_controller.reaper`, or by the Ray cluster it had joined.
    Used in a `with`, which restores the former handlers. Only in the main thread.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._former: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        self._former = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        self.listen()
        return self

    def listen(self) -> None:
        """Install the handlers, also over those that another library installed meanwhile."""
        for number in self._former:
            signal.signal(number, self._note)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raise Interrupted if a signal has come."""
        if self._received is not None:
            raise Interrupted(self._received)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self._received is not None:
            _leave(number)
        self._received = number
        _tell(number, "saving the last finished step, then stopping; signal again to exit without saving")


def _leave(number: int) -> None:
    _tell(number, "stopped without saving; the newest checkpoint is as it was")
    if sys.stdout.isatty():
        os.write(1, _SHOW_CURSOR)  # the progress bars hide it
    os._exit(exit_code(number))


def _tell(number: int, text: str) -> None:
    # Not through sys.stderr: a handler may run in the middle of one of its writes.
    os.write(2, f"\n{signal.Signals(number).name}: {text}\n".encode())
