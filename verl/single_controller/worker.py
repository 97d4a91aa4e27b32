"""The base class of a worker: its rank, its device and its process group."""

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from verl.single_controller.stacks import StackDump
from verl.utils.cpus import share_of_cpus

# A rank may wait for another one for as long as the run lets that one work. What hangs is ended by the driver, which
# says more (`ray_group`, trainer.phase_timeout_s); torch by itself would end the wait after 5 to 30 minutes. This is
# about the longest wait that torch can count, in milliseconds of 32 bits.
NO_LIMIT = timedelta(days=24)


@dataclass(frozen=True)
class WorkerPlace:
    """A worker's rank and device."""

    rank: int
    world_size: int
    device: str
    """cuda or cpu."""
    workers_per_node: int
    num_threads: int | None
    """Threads of torch; None = its share of the CPUs of its machine."""


class Worker:
    def __init__(self, place: WorkerPlace) -> None:
        self.place = place
        self.rank = place.rank
        self.world_size = place.world_size
        self.stacks = StackDump()
        self._meeting_place: socket.socket | None = None
        # Ray shows each worker its own GPU alone.
        self.device = torch.device(place.device, 0) if place.device == "cuda" else torch.device("cpu")

    def report_in(self, stack_folder: Path, phase_timeout_s: float) -> int:
        """Write stacks to a file in this folder from now on; return the process id."""
        self.stacks = StackDump(stack_folder, self.rank, phase_timeout_s)
        return os.getpid()

    def ping(self) -> None:
        """Return once earlier calls are done; fails at once when the process is dead."""

    def open_port(self, address: str) -> int:
        """Listen at one address of this machine, where the process group will be formed; return the port."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._meeting_place = socket.create_server((address, 0), family=family)
        return self._meeting_place.getsockname()[1]

    def close_port(self) -> None:
        """Stop listening; for a worker that ends before its process does."""
        if self._meeting_place:
            self._meeting_place.close()

    def join_process_group(self, own_address: str, master_address: str, port: int) -> None:
        """Start torch.distributed over the whole group: nccl on CUDA, gloo on a CPU.

        Args:
            own_address: of this machine, at which the others reach it.
            master_address: of rank 0's machine, where it has opened `port`.
        """
        os.environ.update(
            MASTER_ADDR=master_address,
            MASTER_PORT=str(port),
            RANK=str(self.rank),
            WORLD_SIZE=str(self.world_size),
            LOCAL_RANK="0",
        )
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self._set_threads()
        # By default gloo takes the interface that the machine's name resolves to, which is often loopback.
        if interface := _interface_of(own_address):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        store = self._meet(master_address, port)
        # Only now: a rank that cannot be reached is still told within torch's own limit, with the address.
        store.set_timeout(NO_LIMIT)
        dist.init_process_group(backend, rank=self.rank, world_size=self.world_size, store=store, timeout=NO_LIMIT)

    def _set_threads(self) -> None:
        """Ray has set OMP_NUM_THREADS to the CPUs of the worker's slot, which is 1."""
        threads = self.place.num_threads or share_of_cpus(self.place.workers_per_node)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)

    def _meet(self, address: str, port: int) -> dist.Store:
        if self.world_size == 1:
            return dist.HashStore()
        listening = self._meeting_place.detach() if self._meeting_place else None
        return dist.TCPStore(address, port, self.world_size, self.rank == 0, master_listen_fd=listening)


def _interface_of(address: str) -> str | None:
    """The network interface that has this address."""
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, found in interfaces if any(one.address == address for one in found)), None)
