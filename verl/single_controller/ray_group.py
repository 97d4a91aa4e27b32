"""Worker processes on Ray: starting them on every node, calling them, and explaining what made them fail.

A placement group has one bundle per node, on different nodes, which holds that node's workers; each worker owns one
GPU, or one CPU slot.
"""

import os
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from verl.errors import UserError, WorkerError
from verl.single_controller import ray_cluster
from verl.single_controller.host_memory import HostMemory
from verl.single_controller.stacks import read_stacks, stack_file
from verl.single_controller.worker import Worker, WorkerPlace
from verl.single_controller.worker_group import WorkerGroup
from verl.utils.cpus import threads_wanted, waiting_environment

_PLACEMENT_TIMEOUT_S = 120
_POLL_S = 0.5
# A worker may fail because another one died. Seconds that Ray needs to notice a dead process on this machine, and a
# machine that is gone.
_DEATH_NOTICE_S, _NODE_DEATH_NOTICE_S = 5, 60
# Seconds after the workers' own timeout at which the driver reads the stacks that they wrote.
_STACKS_S = 3

# glibc gives the pages of a large tensor back when it is freed, and the kernel clears new ones for the next: a fifth of
# an update on a CPU. With these a worker keeps its pages, in huge ones where the kernel has them.
_KEEP_FREED_MEMORY = {
    "GLIBC_TUNABLES": f"glibc.malloc.mmap_threshold={2**33}:glibc.malloc.trim_threshold={2**33}:glibc.malloc.hugetlb=1"
}


@dataclass(frozen=True)
class _Node:
    """A machine of the cluster."""

    address: str
    host: str
    here: bool
    """Whether the driver runs on it. Names do not tell: two machines may have the same one."""


class RayWorkerGroup(WorkerGroup):
    """`num_nodes * workers_per_node` processes of one worker class.

    Args:
        worker_class: a `Worker`; constructed with its `WorkerPlace` and then `args`.
        device: cuda or cpu.
        stack_folder: where workers that hang or crash write their stacks, on their machines.
        phase_timeout_s: longest time without a result or progress from any worker; 0 = for ever.

    Raises:
        UserError: the cluster does not have the GPUs or CPUs asked for.
        WorkerError: a worker did not start.
    """

    def __init__(
        self,
        worker_class: type[Worker],
        args: Sequence[Any],
        num_nodes: int,
        workers_per_node: int,
        device: str,
        stack_folder: Path,
        phase_timeout_s: int,
    ) -> None:
        self._stack_folder, self._timeout_s = stack_folder, phase_timeout_s
        self._memory, self._last_sign = HostMemory(), time.monotonic()
        self._pids: list[int] = []  # by rank, once they have reported in
        self.world_size = num_nodes * workers_per_node
        self._placement = _reserve(num_nodes, workers_per_node, device)
        self._nodes = [node for node in _nodes_of(self._placement) for _ in range(workers_per_node)]  # by rank
        threads = threads_wanted()
        self._workers = [
            self._start(worker_class, args, WorkerPlace(rank, self.world_size, device, workers_per_node, threads))
            for rank in range(self.world_size)
        ]
        self._pids = self._results([w.report_in.remote(stack_folder, phase_timeout_s) for w in self._workers])
        master = self._nodes[0].address
        port = self._results([self._workers[0].open_port.remote(master)])[0]
        self._results(
            [
                worker.join_process_group.remote(node.address, master, port)
                for worker, node in zip(self._workers, self._nodes, strict=True)
            ]
        )

    def _call_all(self, method: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        return self._results(
            [
                getattr(worker, method.__name__).remote(*own)
                for worker, own in zip(self._workers, arguments, strict=True)
            ]
        )

    def _stream_all(
        self, method: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], on_progress: Callable[[int], None]
    ) -> list[Any]:
        streams = [
            getattr(worker, method.__name__).options(num_returns="streaming").remote(*own)
            for worker, own in zip(self._workers, arguments, strict=True)
        ]
        results: dict[int, Any] = {}
        open_streams = {stream: rank for rank, stream in enumerate(streams)}
        self._last_sign = time.monotonic()
        while open_streams:
            for stream in self._next_signs(open_streams):
                rank = open_streams[stream]
                try:
                    item = ray.get(next(stream))
                except StopIteration:
                    del open_streams[stream]
                except RayError as error:
                    self._raise_root_cause(rank, error)
                else:
                    if isinstance(item, int):
                        on_progress(item)
                    else:
                        results[rank] = item
        return [results[rank] for rank in range(self.world_size)]

    def shutdown(self) -> None:
        """End the workers and free their slots."""
        for worker in self._workers:
            ray.kill(worker)
        # A process that is stopped, or stuck in the kernel, does not react to Ray.
        for pid in self._pids_here():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        ray.util.remove_placement_group(self._placement)

    def _start(self, worker_class: type[Worker], args: Sequence[Any], place: WorkerPlace) -> Any:
        strategy = PlacementGroupSchedulingStrategy(
            placement_group=self._placement, placement_group_bundle_index=place.rank // place.workers_per_node
        )
        environment = {"TOKENIZERS_PARALLELISM": "true", **waiting_environment()}
        if place.device == "cpu":
            environment |= _KEEP_FREED_MEMORY
        remote_class = ray.remote(worker_class).options(
            num_cpus=1,
            num_gpus=1 if place.device == "cuda" else 0,
            scheduling_strategy=strategy,
            runtime_env={"env_vars": environment},
        )
        return remote_class.remote(place, *args)

    def _results(self, references: Sequence[Any]) -> list[Any]:
        """Wait for the results of ranks 0, 1, ...; raise the cause of the first failure as soon as it happens."""
        pending = {reference: rank for rank, reference in enumerate(references)}
        self._last_sign = time.monotonic()
        while pending:
            for reference in self._next_signs(pending):
                rank = pending.pop(reference)
                try:
                    ray.get(reference)
                except RayError as error:
                    self._raise_root_cause(rank, error)
        return ray.get(list(references))

    def _next_signs(self, waiting: dict[Any, int]) -> list[Any]:
        """Those of the references (and their ranks) that are ready; possibly none yet.

        Raises:
            WorkerError: nothing has been ready for too long.
        """
        ready, _ = ray.wait(list(waiting), timeout=_POLL_S)
        self._memory.sample(self._pids_here())
        now = time.monotonic()
        if ready:
            self._last_sign = now
        elif self._timeout_s and now > self._last_sign + self._timeout_s + _STACKS_S:
            raise WorkerError(self._describe_hang(set(waiting.values())))
        return ready

    def _raise_root_cause(self, rank: int, error: RayError) -> None:
        """Raise for what failed first: a worker may only have failed because another one died."""
        if isinstance(error, RayTaskError) and isinstance(error.cause, UserError):
            raise error.cause from None
        if isinstance(error, RayTaskError) and (dead := self._find_dead()):
            raise WorkerError(self._describe_death(*dead)) from error
        if isinstance(error, RayTaskError):
            # As text: Ray's exception takes on the cause's class, and its own attributes are not always there then.
            raise WorkerError(f"{self._name(rank)} failed in phase {self.phase}.\n{error}") from error.cause
        raise WorkerError(self._describe_death(rank, error)) from error

    def _find_dead(self) -> tuple[int, RayError] | None:
        """A rank whose process is dead, with Ray's error for it."""
        pings = {worker.ping.remote(): rank for rank, worker in enumerate(self._workers)}
        here = all(node.here for node in self._nodes)
        end = time.monotonic() + (_DEATH_NOTICE_S if here else _NODE_DEATH_NOTICE_S)
        while pings and time.monotonic() < end:
            for answer in ray.wait(list(pings), timeout=_POLL_S)[0]:
                rank = pings.pop(answer)
                try:
                    ray.get(answer)
                except RayActorError as error:
                    return rank, error
        return None

    def _describe_death(self, rank: int, error: RayError) -> str:
        said = str(error)
        more = "Lower actor_rollout_ref.actor.ppo_max_token_len_per_gpu, or use a machine with more memory."
        if isinstance(error, OutOfMemoryError) or "running low on memory" in said:
            ended = f"{self._name(rank)} was ended by Ray in phase {self.phase}: its machine ran low on memory. {more}"
            return f"{ended}\n{said.splitlines()[0]}"
        if "creation task" in said or not self._pids:
            return f"{self._name(rank)} could not start.\n{said}"
        here = self._nodes[rank].here
        memory = self._memory.describe(self._pids[rank]) if here else "its memory was not watched from here"
        text = f"{self._name(rank)} died in phase {self.phase}; {memory}.\n"
        file = stack_file(self._stack_folder, rank)
        if here and "Fatal Python error" in (stacks := read_stacks(self._stack_folder, rank)):
            return f"{text}It crashed in native code ({file}):\n{stacks.split('Extension modules:')[0]}"
        if here and self._memory.was_out_of_memory():
            return f"{text}The kernel's out-of-memory killer was at work (oom_kill of the cgroup). {more}"
        if "node" in said and ("died" in said or "terminated" in said) and not here:
            return f"{text}Its machine left the cluster: switched off, cut off, or `ray stop`. {said.splitlines()[0]}"
        others = "" if here else ", or the end of its machine"
        return (
            f"{text}It had no time to say why, as with SIGKILL: from the kernel's out-of-memory killer (see dmesg), "
            f"`ray stop`, a batch system or a person{others}. If it was memory: {more[0].lower()}{more[1:]}"
        )

    def _describe_hang(self, waiting: set[int]) -> str:
        seconds = time.monotonic() - self._last_sign
        lines = [
            f"no worker returned or made progress for {seconds:.0f} s in phase {self.phase} (trainer.phase_timeout_s="
            f"{self._timeout_s}; raise it if the phase takes so long)."
        ]
        for rank, node in enumerate(self._nodes):
            file = stack_file(self._stack_folder, rank)
            if rank not in waiting:
                lines.append(f"{self._name(rank)}: finished")
            elif not node.here and not file.is_file():
                lines.append(f"{self._name(rank)}: still running; its stacks are in {file} on that machine")
            elif stacks := read_stacks(self._stack_folder, rank):
                lines.append(f"{self._name(rank)}: still running; its stacks:\n{stacks}")
            else:
                lines.append(f"{self._name(rank)}: no answer and no stacks; it is stopped, or its machine is gone")
        return "\n".join(lines)

    def _name(self, rank: int) -> str:
        pid = f"pid {self._pids[rank]} " if self._pids else ""
        return f"rank {rank} ({pid}on {self._nodes[rank].host})"

    def _pids_here(self) -> Iterable[int]:
        return [pid for pid, node in zip(self._pids, self._nodes, strict=False) if node.here]


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
            for node in ray_cluster.machines()
        ]
        free = ray.available_resources()
        raise UserError(
            f"the cluster has no room for {workers_per_node} workers on {device} (trainer.n_gpus_per_node) on each of "
            f"{num_nodes} nodes (trainer.nnodes), after {_PLACEMENT_TIMEOUT_S} s."
            f" Nodes: {', '.join(nodes)}; free now: {free.get('CPU', 0):g} CPU, {free.get('GPU', 0):g} GPU. "
            "Lower n_gpus_per_node or nnodes, stop the job that holds them (ray list actors), or add nodes "
            "(ray start) and set RAY_ADDRESS."
        ) from None
    return group


def _nodes_of(group: PlacementGroup) -> list[_Node]:
    """The machine of each bundle."""
    known, own_id = {node["NodeID"]: node for node in ray.nodes()}, ray.get_runtime_context().get_node_id()
    places = placement_group_table(group)["bundles_to_node_id"]
    return [
        _Node(known[id_]["NodeManagerAddress"], known[id_]["NodeManagerHostname"], id_ == own_id)
        for _, id_ in sorted(places.items())
    ]
