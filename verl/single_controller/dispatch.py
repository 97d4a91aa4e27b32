"""How the driver's call reaches the workers: the mode is declared beside the worker's method."""

from collections.abc import Callable, Iterator
from enum import Enum
from functools import wraps
from typing import Any, TypeVar

Method = TypeVar("Method", bound=Callable[..., Any])


class Dispatch(Enum):
    ONE_TO_ALL = "every rank gets the same arguments; the result is rank 0's"
    DP_COMPUTE_PROTO = "each rank gets its part of the rows; the results are put back in the rows' order"
    DP_STREAM_PROTO = "as DP_COMPUTE_PROTO, and the method yields progress counts before its result"


def register(mode: Dispatch) -> Callable[[Method], Method]:
    """Mark a worker method as callable from the driver; the worker's stacks are written when it takes too long."""

    def mark(method: Method) -> Method:
        @wraps(method)
        def whole(self: Any, *args: Any, **kwargs: Any) -> Any:
            with self.stacks.call():
                return method(self, *args, **kwargs)

        @wraps(method)
        def streamed(self: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
            with self.stacks.call():
                for item in method(self, *args, **kwargs):
                    self.stacks.still_going()
                    yield item

        watched: Any = streamed if mode is Dispatch.DP_STREAM_PROTO else whole
        watched.dispatch_mode = mode
        return watched

    return mark


def dispatch_mode(method: Callable[..., Any]) -> Dispatch:
    """Raises TypeError for a method without `@register`."""
    mode = getattr(method, "dispatch_mode", None)
    if mode is None:
        raise TypeError(f"{method.__qualname__} is not registered for calls from the driver")
    return mode
