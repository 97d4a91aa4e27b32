"""What a group of workers is to the driver: calls by method, with rows sent in parts."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from verl.protocol import DataProto
from verl.single_controller.dispatch import Dispatch, Remote, remote_call

Parts = list[list[int]]
"""For each rank, the positions of its rows."""


class WorkerGroup(ABC):
    """`world_size` workers of one class. Subclasses say how a call reaches them."""

    world_size: int
    phase = "start"
    """What the run is doing, for messages about workers that fail or hang."""
    bytes_moved = 0
    """Bytes of rows sent to workers and back."""

    def call(self, method: Callable[..., Any], *args: Any) -> Any:
        """Call a registered method with the same arguments on every rank; return rank 0's result."""
        remote_call(method, Dispatch.ONE_TO_ALL)
        return self._call_all(method, [args] * self.world_size)[0]

    def map_rows(self, method: Callable[..., Any], rows: DataProto, parts: Parts, *args: Any) -> list[Any]:
        """Call a registered method with each rank's part of the rows; return the ranks' results.

        Raises:
            KeyError: the rows lack a column that the method declares.
        """
        sent = self._parts_of(rows, parts, remote_call(method, Dispatch.DP_COMPUTE_PROTO))
        results = self._call_all(method, [(part, *args) for part in sent])
        self._count(results)
        return results

    def stream_rows(
        self, method: Callable[..., Any], rows: DataProto, parts: Parts, on_progress: Callable[[int], None], *args: Any
    ) -> list[Any]:
        """As `map_rows`, for a method that yields progress counts (int) and, last, its result."""
        sent = self._parts_of(rows, parts, remote_call(method, Dispatch.DP_STREAM_PROTO))
        results = self._stream_all(method, [(part, *args) for part in sent], on_progress)
        self._count(results)
        return results

    @abstractmethod
    def shutdown(self) -> None:
        """End the workers and give back what they hold."""

    @abstractmethod
    def _call_all(self, method: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call each rank with its arguments; return the results by rank."""

    @abstractmethod
    def _stream_all(
        self, method: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], on_progress: Callable[[int], None]
    ) -> list[Any]:
        """As `_call_all`, for a method that yields."""

    def _parts_of(self, rows: DataProto, parts: Parts, remote: Remote) -> list[DataProto]:
        rows.require(*remote.columns)
        wanted = rows.only((*remote.columns, *remote.optional_columns))
        sent = [wanted[part] for part in parts]
        self._count(sent)
        return sent

    def _count(self, moved: Sequence[Any]) -> None:
        self.bytes_moved += sum(rows.num_bytes() for rows in moved if isinstance(rows, DataProto))


def restore_order(results: Sequence[DataProto], parts: Parts) -> DataProto:
    """The rows of the ranks' results, in the order of the rows that `parts` were taken from."""
    order = [row for part in parts for row in part]
    inverse = [0] * len(order)
    for place, row in enumerate(order):
        inverse[row] = place
    filled = [result for result, part in zip(results, parts, strict=True) if part]
    return DataProto.concat(filled)[inverse]
