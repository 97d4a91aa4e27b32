"""What the data programs write for the person who runs them: messages and a progress bar.

The bar goes to stderr and only to a terminal, so that logs and pipes stay clean.
"""

import io
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")

_REFRESH_EVERY = 5_000
"""Items between two looks at the position."""


def show_any_text() -> None:
    """Write a character that the terminal's encoding lacks as \\xfc, rather than end the program by it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def say(message: str) -> None:
    """Write one message to stdout."""
    sys.stdout.write(message + "\n")
    sys.stdout.flush()


def complain(program: str, error: Exception) -> int:
    """Write `error` to stderr as one line and return the exit code for it."""
    sys.stderr.write(f"{program}: {' '.join(str(error).split())}\n")
    return 2


def exit_code_of(
    program: str, run: Callable[[], None], failures: tuple[type[Exception], ...] = (),
    wrong: tuple[type[Exception], ...] = (ValueError, OSError),
) -> int:  # fmt: skip
    """Do a program's work; what goes wrong becomes a line on stderr and an exit code.

    Args:
        failures: errors of the work itself, which give 1.
        wrong: errors of what was given, which give 2.
    """
    try:
        run()
    except failures as error:
        complain(program, error)
        return 1
    except wrong as error:
        return complain(program, error)
    return 0


def track(items: Iterable[T], title: str, position: Callable[[], int], total: int) -> Iterator[T]:
    """Yield `items` under a progress bar that shows `position()` of `total` bytes."""
    if not sys.stderr.isatty():
        yield from items
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=total)
        for number, item in enumerate(items):
            if number % _REFRESH_EVERY == 0:
                progress.update(task, completed=position())
            yield item
