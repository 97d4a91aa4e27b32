"""A progress bar."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextmanager
def count_bar(total: int, title: str, show: bool | None = None) -> Iterator[Callable[[int], None]]:
    """A bar on stderr that counts to `total`; yields the function that advances it by a number.

    Args:
        show: None = only where stderr is a terminal.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn())  # fmt: skip
    hidden = not (sys.stderr.isatty() if show is None else show)
    with Progress(*columns, console=Console(stderr=True), disable=hidden, transient=True) as progress:
        task = progress.add_task(title, total=total)
        yield lambda count: progress.advance(task, count)
