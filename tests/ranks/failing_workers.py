"""A program whose workers on Ray fail in every way: FOLDER/said.json gets what the driver is told of each.

    failing_workers.py FOLDER

In a process of its own: the end of a cluster that a run starts ends all children of the process that started it.
"""

import faulthandler
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from verl.errors import UserError, WorkerError
from verl.protocol import DataProto
from verl.single_controller import ray_cluster
from verl.single_controller.dispatch import Dispatch, register
from verl.single_controller.ray_group import RayWorkerGroup
from verl.single_controller.worker import Worker, WorkerPlace

# Longer than it takes to start, and what a test can wait for.
PATIENT_S, IMPATIENT_S = 120, 2
# How long a rank waits for others by default, which is half an hour otherwise.
TORCH_S = 1


class Fragile(Worker):
    def __init__(self, place: WorkerPlace) -> None:
        super().__init__(place)
        distributed_c10d.default_pg_timeout = timedelta(seconds=TORCH_S)

    @register(Dispatch.ONE_TO_ALL)
    def fail(self) -> None:
        if self.rank == 1:
            raise ZeroDivisionError("on rank 1 alone")

    @register(Dispatch.ONE_TO_ALL)
    def refuse(self) -> None:
        raise UserError("data.train_files=x is not there; give another file")

    @register(Dispatch.DP_STREAM_PROTO, columns=("number",))
    def count(self, rows: DataProto):
        yield int(rows.batch["number"])
        if self.rank == 1:
            raise ZeroDivisionError("in the middle")
        yield rows

    @register(Dispatch.ONE_TO_ALL)
    def count_ranks(self, killed: int | None = None) -> float:
        """All ranks together; one that is killed makes the others fail too."""
        if self.rank == killed:
            os.kill(os.getpid(), signal.SIGKILL)
        total = torch.ones(1)
        dist.all_reduce(total)
        return total.item()

    @register(Dispatch.ONE_TO_ALL)
    def count_ranks_late(self) -> float:
        """All ranks together; rank 1 comes when rank 0 has waited longer than torch lets it by default."""
        if self.rank == 1:
            time.sleep(3 * TORCH_S)
        return self.count_ranks()

    @register(Dispatch.ONE_TO_ALL)
    def limit(self, stack_folder: Path, seconds: float) -> None:
        self.report_in(stack_folder, seconds)

    @register(Dispatch.ONE_TO_ALL)
    def hang(self) -> None:
        if self.rank == 1:
            threading.Event().wait()

    @register(Dispatch.ONE_TO_ALL)
    def crash(self) -> None:
        if self.rank == 0:
            faulthandler._sigsegv()


def told(group: RayWorkerGroup, phase: str, call: Callable[..., Any], *args: Any) -> str:
    group.phase = phase
    try:
        call(*args)
    except (UserError, WorkerError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing failed"


def errors_and_a_kill(stacks: Path) -> dict[str, Any]:
    group = RayWorkerGroup(Fragile, (), 1, 2, "cpu", stacks, PATIENT_S)
    numbers, progress = DataProto.from_dict({"number": torch.tensor([3, 5])}), list[int]()
    found = {
        "pids": group._pids,
        "fail": told(group, "score", group.call, Fragile.fail),
        "refuse": told(group, "val", group.call, Fragile.refuse),
        "count": told(group, "gen", group.stream_rows, Fragile.count, numbers, [[0], [1]], progress.append),
        "progress": progress,
        "well": group.call(Fragile.count_ranks),
        "late": told(group, "update", group.call, Fragile.count_ranks_late),
        "killed": told(group, "update", group.call, Fragile.count_ranks, 1),
    }
    shutil.rmtree(stacks)
    found["gone"] = told(group, "gen", group.call, Fragile.count_ranks)
    group.shutdown()
    return found


def a_hang_and_a_crash(stacks: Path) -> dict[str, Any]:
    group = RayWorkerGroup(Fragile, (), 1, 2, "cpu", stacks, PATIENT_S)
    group.call(Fragile.limit, stacks, IMPATIENT_S)
    group._timeout_s = IMPATIENT_S
    found = {"pids": group._pids, "hang": told(group, "ref", group.call, Fragile.hang)}
    group._timeout_s = PATIENT_S
    found["crash"] = told(group, "sync", group.call, Fragile.crash)
    group.shutdown()
    found["left"] = left_of(group._pids)
    return found


def left_of(pids: list[int], seconds: float = 60) -> list[int]:
    """Those that live on."""
    end = time.monotonic() + seconds
    while (living := [pid for pid in pids if command_line(pid)]) and time.monotonic() < end:
        time.sleep(0.1)
    return living


def command_line(pid: int) -> bytes:
    """Empty for a process that has ended, also where nobody has asked for its exit code."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def main(folder: Path) -> None:
    reaper = ray_cluster.start(num_cpus=4)
    said = [errors_and_a_kill(folder / "first"), a_hang_and_a_crash(folder / "second")]
    (folder / "said.json").write_text(json.dumps(said))
    ray.shutdown()
    del reaper


if __name__ == "__main__":
    main(Path(sys.argv[1]))
