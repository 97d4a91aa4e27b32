"""How the driver's call reaches the workers: the mode is declared beside the worker's method."""

from collections.abc import Callable
from enum import Enum
from typing import Any, TypeVar

Method = TypeVar("Method", bound=Callable[..., Any])


class Dispatch(Enum):
    ONE_TO_ALL = "every rank gets the same arguments; the result is rank 0's"
    DP_COMPUTE_PROTO = "each rank gets its part of the rows; the results are put back in the rows' order"
    DP_STREAM_PROTO = "as DP_COMPUTE_PROTO, and the method yields progress counts before its result"


def register(mode: Dispatch) -> Callable[[Method], Method]:
    """Mark a worker method as callable from the driver."""

    def mark(method: Method) -> Method:
        method.dispatch_mode = mode  # type: ignore[attr-defined]
        return method

    return mark


def dispatch_mode(method: Callable[..., Any]) -> Dispatch:
    """Raises TypeError for a method without `@register`."""
    mode = getattr(method, "dispatch_mode", None)
    if mode is None:
        raise TypeError(f"{method.__qualname__} is not registered for calls from the driver")
    return mode
