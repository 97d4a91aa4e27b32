"""Worker processes on Ray: starting them on every node, calling them, collecting their results.

With main_ppo the only code that knows Ray. One bundle of a placement group holds a node's workers, and bundles
lie on different nodes; each worker owns one GPU, or one CPU slot.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from verl.config import ConfigError
from verl.protocol import DataProto
from verl.single_controller.dispatch import Dispatch, dispatch_mode
from verl.single_controller.worker import Worker, WorkerPlace

_PLACEMENT_TIMEOUT_S = 120
_POLL_S = 0.5


# glibc gives the pages of a large tensor back when it is freed, and the kernel clears new ones for the next: a fifth of
# an update on a CPU. With these a worker keeps its pages, in huge ones where the kernel has them.
_KEEP_FREED_MEMORY = {
    "GLIBC_TUNABLES": f"glibc.malloc.mmap_threshold={2**33}:glibc.malloc.trim_threshold={2**33}:glibc.malloc.hugetlb=1"
}


class WorkerError(RuntimeError):
    """A worker failed; the message ends with its own traceback."""


class RayWorkerGroup:
    """`num_nodes * workers_per_node` processes of one worker class.

    Args:
        worker_class: a `Worker`; constructed with its `WorkerPlace` and then `args`.
        device: cuda or cpu.

    Raises:
        ConfigError: the cluster does not have the GPUs or CPUs asked for.
    """

    def __init__(
        self,
        worker_class: type[Worker],
        args: Sequence[Any],
        num_nodes: int,
        workers_per_node: int,
        device: str,
    ) -> None:
        self.world_size = num_nodes * workers_per_node
        self.bytes_moved = 0
        self._placement = _reserve(num_nodes, workers_per_node, device)
        threads = max(1, (os.cpu_count() or 1) // workers_per_node)
        self._workers = [
            self._start(worker_class, args, WorkerPlace(rank, self.world_size, device, workers_per_node, threads))
            for rank in range(self.world_size)
        ]
        address, port = _collect([self._workers[0].find_master_address.remote()])[0]
        _collect([worker.join_process_group.remote(address, port) for worker in self._workers])

    def call(self, method: Callable[..., Any], *args: Any) -> Any:
        """Call a registered method with the same arguments on every rank; return rank 0's result."""
        assert dispatch_mode(method) is Dispatch.ONE_TO_ALL, method
        return _collect([getattr(worker, method.__name__).remote(*args) for worker in self._workers])[0]

    def map_rows(self, method: Callable[..., Any], rows: DataProto, parts: list[list[int]], *args: Any) -> list[Any]:
        """Call a registered method with each rank's part of the rows; return the ranks' results.

        Args:
            parts: for each rank, positions in `rows`.
        """
        assert dispatch_mode(method) is Dispatch.DP_COMPUTE_PROTO, method
        refs = [
            getattr(worker, method.__name__).remote(self._send(rows[part]), *args)
            for worker, part in zip(self._workers, parts, strict=True)
        ]
        return [self._receive(result) for result in _collect(refs)]

    def stream_rows(
        self,
        method: Callable[..., Any],
        rows: DataProto,
        parts: list[list[int]],
        on_progress: Callable[[int], None],
        *args: Any,
    ) -> list[Any]:
        """As `map_rows`, for a method that yields progress counts and, last, its result."""
        assert dispatch_mode(method) is Dispatch.DP_STREAM_PROTO, method
        streams = [
            getattr(worker, method.__name__).options(num_returns="streaming").remote(self._send(rows[part]), *args)
            for worker, part in zip(self._workers, parts, strict=True)
        ]
        results: dict[int, Any] = {}
        open_streams = dict(enumerate(streams))
        while open_streams:
            ready, _ = ray.wait(list(open_streams.values()), timeout=_POLL_S)
            for rank in [r for r, stream in open_streams.items() if stream in ready]:
                item = _next_item(open_streams[rank])
                if item is None:
                    del open_streams[rank]
                elif isinstance(item, int):
                    on_progress(item)
                else:
                    results[rank] = self._receive(item)
        return [results[rank] for rank in range(self.world_size)]

    def shutdown(self) -> None:
        """End the workers and give their slots back."""
        for worker in self._workers:
            ray.kill(worker)
        ray.util.remove_placement_group(self._placement)

    def _start(self, worker_class: type[Worker], args: Sequence[Any], place: WorkerPlace) -> Any:
        strategy = PlacementGroupSchedulingStrategy(
            placement_group=self._placement, placement_group_bundle_index=place.rank // place.workers_per_node
        )
        # Ray sets OMP_NUM_THREADS to the CPUs of the slot, which would leave a CPU worker with one thread.
        environment = {"TOKENIZERS_PARALLELISM": "true", "OMP_NUM_THREADS": str(place.num_threads)}
        if place.device == "cpu":
            environment |= _KEEP_FREED_MEMORY
        remote_class = ray.remote(worker_class).options(
            num_cpus=1,
            num_gpus=1 if place.device == "cuda" else 0,
            scheduling_strategy=strategy,
            runtime_env={"env_vars": environment},
        )
        return remote_class.remote(place, *args)

    def _send(self, rows: DataProto) -> DataProto:
        self.bytes_moved += rows.num_bytes()
        return rows

    def _receive(self, result: Any) -> Any:
        self.bytes_moved += result.num_bytes() if isinstance(result, DataProto) else 0
        return result


def restore_order(results: Sequence[DataProto], parts: list[list[int]]) -> DataProto:
    """Put the rows of the ranks' results back where `parts` took them from."""
    order = [row for part in parts for row in part]
    inverse = [0] * len(order)
    for place, row in enumerate(order):
        inverse[row] = place
    filled = [result for result, part in zip(results, parts, strict=True) if part]
    return DataProto.concat(filled)[inverse]


def _reserve(num_nodes: int, workers_per_node: int, device: str) -> PlacementGroup:
    """Slots for all workers, one bundle on each of `num_nodes` different nodes."""
    slots = float(workers_per_node)
    bundle = {"CPU": slots, "GPU": slots} if device == "cuda" else {"CPU": slots}
    group = placement_group([bundle] * num_nodes, strategy="STRICT_SPREAD")
    try:
        ray.get(group.ready(), timeout=_PLACEMENT_TIMEOUT_S)
    except GetTimeoutError:
        nodes = [
            f"{node['NodeManagerAddress']} ({node['Resources'].get('CPU', 0):g} CPU, "
            f"{node['Resources'].get('GPU', 0):g} GPU)"
            for node in ray.nodes()
            if node["Alive"]
        ]
        free = ray.available_resources()
        raise ConfigError(
            f"the cluster has no room for {workers_per_node} workers on {device} (trainer.n_gpus_per_node) on each of "
            f"{num_nodes} nodes (trainer.nnodes), after {_PLACEMENT_TIMEOUT_S} s."
            f" Nodes: {', '.join(nodes)}; free now: {free.get('CPU', 0):g} CPU, {free.get('GPU', 0):g} GPU. "
            "Lower n_gpus_per_node or nnodes, stop the job that holds them (ray list actors), or add nodes "
            "(ray start) and set RAY_ADDRESS."
        ) from None
    return group


def _next_item(stream: Any) -> Any:
    """The next thing a worker yielded, or None at its end."""
    try:
        reference = next(stream)
    except StopIteration:
        return None
    return _collect([reference])[0]


def _collect(references: list[Any]) -> list[Any]:
    """Wait for results; raise the first failure as soon as it happens, with the worker's traceback."""
    pending = list(references)
    try:
        while pending:
            done, pending = ray.wait(pending, num_returns=1)
            ray.get(done)
        return ray.get(references)
    except RayTaskError as error:
        if isinstance(error.cause, ConfigError):
            raise error.cause from None
        # As text: Ray's exception takes on the cause's class, and its own attributes are not always there then.
        raise WorkerError(str(error)) from error.cause
