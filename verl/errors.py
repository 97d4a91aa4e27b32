"""The error of everything that the person who runs a program can put right."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A setting, a file or an argument that cannot work; programs show it without a traceback and exit with code 2.

    The message names the setting or the line, its value, and a way out.
    """


class WorkerError(RuntimeError):
    """A worker process failed, died or hangs.

    The message names the worker and the phase, and ends with the worker's own traceback where it has one.
    """


@contextmanager
def as_user_error(*kinds: type[Exception], say: Callable[[Exception], str] = str) -> Iterator[None]:
    """Re-raise these exceptions as UserError, and those that are one already as they are.

    Args:
        say: the message, of the exception that came.
    """
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        raise UserError(say(error)) from error
