"""How a call of the driver reaches the workers: declared beside the worker's method."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from functools import wraps
from typing import Any, TypeVar

Method = TypeVar("Method", bound=Callable[..., Any])


class Dispatch(Enum):
    ONE_TO_ALL = "every rank gets the same arguments; the result is rank 0's"
    DP_COMPUTE_PROTO = "each rank gets its part of the rows and returns one result"
    DP_STREAM_PROTO = "as DP_COMPUTE_PROTO, and the method yields progress counts before its result"


@dataclass(frozen=True)
class Remote:
    """What the driver must know of a worker method."""

    mode: Dispatch
    columns: tuple[str, ...]
    """The columns of the rows that are sent."""
    optional_columns: tuple[str, ...]
    """Columns that are sent where the rows have them."""


def register(
    mode: Dispatch, columns: tuple[str, ...] = (), optional_columns: tuple[str, ...] = ()
) -> Callable[[Method], Method]:
    """Make a worker method callable from the driver; a call that takes too long writes the worker's stacks to a file.

    Args:
        columns: of the rows that the method gets, when it gets rows (see verl/protocol.py).
        optional_columns: those that some runs do not have.
    """

    def mark(method: Method) -> Method:
        @wraps(method)
        def whole(self: Any, *args: Any, **kwargs: Any) -> Any:
            with self.stacks.call():
                return method(self, *args, **kwargs)

        @wraps(method)
        def streamed(self: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
            with self.stacks.call():
                for item in method(self, *args, **kwargs):
                    self.stacks.restart()
                    yield item

        watched: Any = streamed if mode is Dispatch.DP_STREAM_PROTO else whole
        watched.remote_call = Remote(mode, columns, optional_columns)
        return watched

    return mark


def remote_call(method: Callable[..., Any], *modes: Dispatch) -> Remote:
    """How a worker method is called.

    Raises:
        TypeError: the method has no `@register`, or is registered for another mode than `modes`.
    """
    remote = getattr(method, "remote_call", None)
    if remote is None:
        raise TypeError(f"{method.__qualname__} is not registered for calls from the driver")
    if remote.mode not in modes:
        raise TypeError(f"{method.__qualname__} is registered for {remote.mode.name}, not {[m.name for m in modes]}")
    return remote
