"""Several processes with a model each, so that an encoder uses all GPUs: work is spread, results come as they are made.

Neighbouring processes may share one vllm engine (tensor parallelism); each embeds rows of its own all the same.
"""

import os
import traceback
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from verl.encoder.backend import Embedded, EmbeddingModel, ModelSize, ModelSpec, Thought, Work, free_port
from verl.utils.logging import quiet_libraries
from verl.utils.seqlen_balancing import balanced_partitions
from verl.workers.rollout.base import RolloutError

_END_SECONDS = 30


class ModelPool:
    """`num_processes` of `EmbeddingModel`, one for each visible GPU, or sharing the cores of a CPU.

    Args:
        spec: its tensor_parallel_size divides num_processes.

    Raises:
        ValueError: it does not.
        RolloutError: a process could not start; the message ends with its own traceback.
    """

    def __init__(self, spec: ModelSpec, num_processes: int) -> None:
        if num_processes % spec.tensor_parallel_size:
            raise ValueError(
                f"tensor_parallel_size={spec.tensor_parallel_size} does not divide the {num_processes} processes"
            )
        self.spec = spec
        self._group = spec.tensor_parallel_size if spec.engine == "vllm" else 1
        context = get_context("spawn")
        self._connections: list[Connection] = []
        self._processes = []
        ports = [free_port() for _ in range(num_processes // self._group)]
        for rank in range(num_processes):
            ours, theirs = context.Pipe()
            place = {"rank": rank, "num_processes": num_processes, "group": self._group,
                     "port": ports[rank // self._group]}  # fmt: skip
            process = context.Process(target=_serve, args=(theirs, spec, place), daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)
        try:
            self.size: ModelSize = [self._receive(rank) for rank in range(num_processes)][0]
        except RolloutError:
            self.close()
            raise

    def run(self, work: Work) -> Iterator[Thought | Embedded]:
        """See `EmbeddingModel.run`; items are spread over the engines by their tokens.

        Raises:
            RolloutError: a process failed or ended; the message ends with its own traceback.
        """
        costs = [len(item.prompt.ids) + (work.max_new_tokens if item.rationale is None else len(item.rationale))
                 for item in work.items]  # fmt: skip
        parts = balanced_partitions(costs, len(self._connections) // self._group)
        if self._connections[0].closed:
            raise RolloutError("the encoder's processes have ended, after a failure or close(); make a new encoder")
        for rank, connection in enumerate(self._connections):
            part = parts[rank // self._group]
            try:
                connection.send(replace(work, items=[work.items[i] for i in part]))
            except BrokenPipeError:
                self._receive(rank)  # says what became of it
        busy: dict[Any, int] = {connection: rank for rank, connection in enumerate(self._connections)}
        try:
            while busy:
                for ready in wait(list(busy)):
                    rank = busy[ready]
                    made = self._receive(rank)
                    if made is None:
                        del busy[ready]
                    else:
                        yield _at(made, parts[rank // self._group])
        finally:
            if busy:  # somebody else's failure: what is under way would answer the next call
                self.close()

    def close(self) -> None:
        """End the processes."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(_END_SECONDS)
            if process.is_alive():
                process.kill()

    def _receive(self, rank: int) -> Any:
        try:
            message = self._connections[rank].recv()
        except (EOFError, ConnectionError):
            self._processes[rank].join(_END_SECONDS)
            code = self._processes[rank].exitcode
            raise RolloutError(
                f"process {rank} of the encoder ended with exit code {code}; -9 is what a lack of memory looks like"
            ) from None
        if isinstance(message, str):
            raise RolloutError(f"process {rank} of the encoder failed:\n{message}")
        return message


def _at(made: Thought | Embedded, part: list[int]) -> Thought | Embedded:
    """With the positions of the whole work."""
    if isinstance(made, Thought):
        return replace(made, responses={part[i]: response for i, response in made.responses.items()})
    return replace(made, places=[part[i] for i in made.places])


def _serve(connection: Connection, spec: ModelSpec, place: dict[str, int]) -> None:
    """The life of a process: its size, then for each work what it makes and None; a traceback as text when it fails."""
    try:
        _take_place(spec, **place)
        model = EmbeddingModel(spec)
        connection.send(model.size)
        while True:
            work = connection.recv()
            for made in model.run(work, place["rank"] % place["group"], place["group"]):
                connection.send(made)
            connection.send(None)
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return  # the encoder is closed
    except BaseException:
        connection.send(traceback.format_exc())
        raise


def _take_place(spec: ModelSpec, rank: int, num_processes: int, group: int, port: int) -> None:
    """Environment and devices, before anything touches them."""
    quiet_libraries()
    if spec.device == "cuda":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(i) for i in range(num_processes)]
        os.environ["CUDA_VISIBLE_DEVICES"] = names[rank]
    threads = max(1, (os.cpu_count() or 1) // num_processes)
    torch.set_num_threads(threads)
    os.environ.update(
        RANK=str(rank % group), LOCAL_RANK="0", WORLD_SIZE=str(group), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        OMP_NUM_THREADS=str(threads),
    )  # fmt: skip
