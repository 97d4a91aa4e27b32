"""The Python stacks of a worker that hangs or crashes, in a file that outlives it.

faulthandler writes them from C, so it needs neither the interpreter's lock nor an answer from the code that hangs.
"""

import faulthandler
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


def stack_file(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank}.txt"


def read_stacks(folder: Path, rank: int) -> str:
    """What a worker wrote; empty where this machine does not have its file, or cannot read it."""
    try:
        return stack_file(folder, rank).read_text(errors="replace").strip()
    except OSError:
        return ""


class StackDump:
    """Writes all threads' stacks when a call takes too long, and at a fatal signal such as SIGSEGV.

    Args:
        folder: on this machine; None = watch nothing.
        timeout_s: 0 = a call may take for ever.
    """

    def __init__(self, folder: Path | None = None, rank: int = 0, timeout_s: float = 0) -> None:
        self._file: TextIO | None = None
        self._timeout_s = timeout_s
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            # Open for the life of the process: the signal's handler cannot open it.
            self._file = stack_file(folder, rank).open("w")
            faulthandler.enable(self._file)

    @contextmanager
    def call(self) -> Iterator[None]:
        """Watch what happens inside."""
        self.restart()
        try:
            yield
        finally:
            if self._file:
                faulthandler.cancel_dump_traceback_later()

    def restart(self) -> None:
        """The call made progress: its time starts again from zero."""
        if self._file and self._timeout_s:
            faulthandler.dump_traceback_later(self._timeout_s, file=self._file)
