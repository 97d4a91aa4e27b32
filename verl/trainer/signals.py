"""Stopping a run from outside: SIGINT and SIGTERM."""

import os
import signal
from types import FrameType
from typing import Any


class Interrupted(BaseException):
    """The run was asked to stop. A BaseException, like KeyboardInterrupt: handlers of failures must not catch it."""

    def __init__(self, number: int, at_once: bool) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number
        self.at_once = at_once
        """Raised at any point, possibly in the middle of an update: nothing may be saved."""


class StopSignals:
    """The first signal is recorded, and raised by the next `check`; the second one raises at once.

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
            raise Interrupted(self._received, at_once=False)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self._received is not None:
            raise Interrupted(number, at_once=True)
        self._received = number
        # Not through sys.stderr: a handler may run in the middle of one of its writes.
        text = "saving the last finished step, then stopping; signal again to exit without saving"
        os.write(2, f"\n{signal.Signals(number).name}: {text}\n".encode())
