"""One worker inside this process, without Ray: for debugging (breakpoints work), tests and benchmarks."""

import gc
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from verl.single_controller.worker import Worker, WorkerPlace
from verl.single_controller.worker_group import WorkerGroup
from verl.utils.cpus import threads_wanted

_LOOPBACK = "127.0.0.1"


class LocalWorkerGroup(WorkerGroup):
    """A worker group of one. An error of the worker is raised as it is, with its own traceback.

    Args:
        worker_class: a `Worker`; constructed with its `WorkerPlace` and then `args`.
        device: cuda or cpu.
    """

    world_size = 1

    def __init__(self, worker_class: type[Worker], args: Sequence[Any], device: str) -> None:
        self._environment, self._threads = dict(os.environ), torch.get_num_threads()
        self._worker = worker_class(WorkerPlace(0, 1, device, 1, threads_wanted()), *args)
        self._worker.join_process_group(_LOOPBACK, _LOOPBACK, self._worker.open_port(_LOOPBACK))

    def shutdown(self) -> None:
        """Leave the process as it was: no process group, the former environment and number of threads."""
        self._worker.close_port()
        # An engine that outlives the process group it was built in fails when it is freed.
        del self._worker
        gc.collect()
        if dist.is_initialized():
            dist.destroy_process_group()
        os.environ.clear()
        os.environ.update(self._environment)
        torch.set_num_threads(self._threads)

    def _call_all(self, method: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        return [getattr(self._worker, method.__name__)(*own) for own in arguments]

    def _stream_all(
        self, method: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], on_progress: Callable[[int], None]
    ) -> list[Any]:
        results = []
        for own in arguments:
            for item in getattr(self._worker, method.__name__)(*own):
                if isinstance(item, int):
                    on_progress(item)
                else:
                    results.append(item)
        return results
