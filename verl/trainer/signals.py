"""Ending a run from outside: SIGINT and SIGTERM."""

import os
import signal
from types import FrameType
from typing import Any


class Interrupted(BaseException):
    """The run was asked to end. A BaseException, as KeyboardInterrupt is: nothing may take it for a failure."""

    def __init__(self, number: int, at_once: bool) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number
        self.at_once = at_once
        """Raised wherever the process stood, maybe in the middle of a change: nothing may be saved."""


class StopSignals:
    """The first signal is noted and heard by `check`; the second ends the process where it stands.

    Used in a `with`, which puts the former handlers back. Only in the main thread.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._former: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        self._former = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        self.listen()
        return self

    def listen(self) -> None:
        """Take the signals over, also from whoever did so meanwhile."""
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
        line = f"\n{signal.Signals(number).name}: saving the last whole step, then ending; once more ends at once\n"
        os.write(2, line.encode())
