"""The backend of an encoder in several processes: texts are spread over them, and results come back as they are made.

With tensor parallelism neighbouring processes share one vllm engine; each of them still embeds texts of its own.
"""

import os
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from verl.embedding.settings import EmbedderSettings
from verl.encoder.backend import Backend, Batch, ModelFacts, ModelSpec, require_gpus
from verl.encoder.record import Sampling, TextRecord
from verl.utils.cpus import let_waiting_threads_sleep, share_of_cpus, threads_wanted
from verl.utils.logging import quiet_libraries
from verl.utils.meeting_place import MeetingPlace
from verl.utils.seqlen_balancing import balanced_partitions
from verl.workers.rollout.base import RolloutError

# Seconds that a process has to end after its connection is closed.
_END_SECONDS = 30


@dataclass(frozen=True)
class _Process:
    """Which of the processes one is."""

    rank: int
    num_processes: int
    group: int
    """Processes that share an engine."""
    meeting: dict[str, str]
    """Environment variables: where those of an engine meet."""


class ProcessesBackend:
    """A `Backend` in each of `num_processes` processes, one per visible GPU, or sharing the cores of a CPU.

    Args:
        spec: its tensor_parallel_size divides num_processes.

    Raises:
        ValueError: it does not.
        UserError: there are fewer GPUs than processes.
        RolloutError: a process could not start; the message ends with its own traceback.
    """

    def __init__(self, spec: ModelSpec, num_processes: int) -> None:
        if num_processes % spec.tensor_parallel_size:
            raise ValueError(
                f"tensor_parallel_size={spec.tensor_parallel_size} does not divide the {num_processes} processes"
            )
        if spec.device == "cuda":
            require_gpus(num_processes)
        self.spec = spec
        self._group = spec.tensor_parallel_size if spec.engine == "vllm" else 1
        context = get_context("spawn")
        self._connections: list[Connection] = []
        self._processes = []
        self._meetings = [MeetingPlace() for _ in range(num_processes // self._group)]
        let_waiting_threads_sleep()
        for rank in range(num_processes):
            ours, theirs = context.Pipe()
            meeting = self._meetings[rank // self._group].environment
            which = _Process(rank, num_processes, self._group, meeting)
            process = context.Process(target=_serve, args=(theirs, spec, which), daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)
        try:
            self.facts: ModelFacts = [self._receive(rank) for rank in range(num_processes)][0]
        except RolloutError:
            self.close()
            raise

    def run(
        self, texts: Sequence[TextRecord], settings: EmbedderSettings, sampling: Sampling | None, batch_size: int | None
    ) -> Iterator[Batch]:
        """See `Backend.run`; texts are spread over the engines by their tokens.

        Raises:
            RolloutError: a process failed or ended; the message ends with its own traceback.
        """
        by_index = {text.index: text for text in texts}
        self._send(texts, settings, sampling, batch_size)
        busy: dict[Any, int] = {connection: rank for rank, connection in enumerate(self._connections)}
        try:
            while busy:
                for connection in wait(list(busy)):
                    batch = self._receive(busy[connection])
                    if batch is None:
                        del busy[connection]
                        continue
                    own = [by_index[copy.index] for copy in batch.texts]
                    for text, copy in zip(own, batch.texts, strict=True):
                        setattr(text, batch.filled, getattr(copy, batch.filled))
                    yield replace(batch, texts=own)
        finally:
            if busy:  # One failed, or the caller stopped: what the others still send would answer the next call.
                self.close()

    def close(self) -> None:
        """End the processes."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(_END_SECONDS)
            if process.is_alive():
                process.kill()

    def _send(
        self, texts: Sequence[TextRecord], settings: EmbedderSettings, sampling: Sampling | None, batch_size: int | None
    ) -> None:
        """Give each engine a share of the texts with about as many tokens as the others' shares."""
        if self._connections[0].closed:
            raise RolloutError("the encoder's processes have ended, after a failure or close(); make a new encoder")
        limit = sampling.max_new_tokens if sampling else 0
        costs = [len(t.prompt.ids) + (limit if t.rationale is None else len(t.rationale.ids)) for t in texts]
        parts = balanced_partitions(costs, len(self._connections) // self._group)
        for rank, connection in enumerate(self._connections):
            share = [texts[i] for i in parts[rank // self._group]]
            try:
                connection.send((share, settings, sampling, batch_size))
            except BrokenPipeError:
                self._receive(rank)  # raises, with the reason

    def _receive(self, rank: int) -> Any:
        try:
            message = self._connections[rank].recv()
        except (EOFError, ConnectionError):
            self._processes[rank].join(_END_SECONDS)
            code = self._processes[rank].exitcode
            raise RolloutError(
                f"process {rank} of the encoder ended with exit code {code}; -9 usually means that memory ran out"
            ) from None
        if isinstance(message, str):
            raise RolloutError(f"process {rank} of the encoder failed:\n{message}")
        return message


def _serve(connection: Connection, spec: ModelSpec, which: _Process) -> None:
    """What a process does.

    It sends the model's size, then for each request its batches and None. When it fails it sends the traceback, a
    string.
    """
    try:
        _set_up_process(spec, which)
        backend = Backend(spec, which.num_processes)
        connection.send(backend.facts)
        while True:
            texts, settings, sampling, batch_size = connection.recv()
            for batch in backend.run(texts, settings, sampling, batch_size, which.rank % which.group, which.group):
                connection.send(batch)
            connection.send(None)
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return  # the encoder was closed
    except BaseException:
        connection.send(traceback.format_exc())
        raise


def _set_up_process(spec: ModelSpec, which: _Process) -> None:
    """Set environment and threads, before any library reads them."""
    quiet_libraries()
    if spec.device == "cuda":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(i) for i in range(which.num_processes)]
        os.environ["CUDA_VISIBLE_DEVICES"] = names[which.rank]
    threads = threads_wanted() or share_of_cpus(which.num_processes)
    torch.set_num_threads(threads)
    os.environ.update(
        RANK=str(which.rank % which.group), LOCAL_RANK="0", WORLD_SIZE=str(which.group), OMP_NUM_THREADS=str(threads),
        **which.meeting,
    )  # fmt: skip
