"""Memory of this machine and of some of its processes, sampled while they live: of a dead process it cannot be read."""

from collections.abc import Iterable
from pathlib import Path

_OOM_COUNTERS = (Path("/sys/fs/cgroup/memory.events"), Path("/sys/fs/cgroup/memory/memory.oom_control"))


class HostMemory:
    """Samples /proc; on a system without it, everything stays unknown."""

    def __init__(self) -> None:
        self._peaks: dict[int, int] = {}
        self._least_free: int | None = None
        self._oom_kills = _oom_kills()

    def sample(self, pids: Iterable[int]) -> None:
        """Look at these processes of this machine."""
        for pid in pids:
            if peak := _field(Path(f"/proc/{pid}/status"), "VmHWM"):
                self._peaks[pid] = max(peak, self._peaks.get(pid, 0))
        if (free := _field(Path("/proc/meminfo"), "MemAvailable")) is not None:
            self._least_free = free if self._least_free is None else min(free, self._least_free)

    def describe(self, pid: int) -> str:
        """What was seen of a process and of the machine."""
        peak = self._peaks.get(pid)
        parts = [f"its memory peaked at {peak / 2**20:.1f} GiB" if peak else "its memory was not seen"]
        total = _field(Path("/proc/meminfo"), "MemTotal")
        if total and self._least_free is not None:
            parts.append(f"the machine had {self._least_free / 2**20:.1f} of {total / 2**20:.1f} GiB left at its worst")
        return ", ".join(parts)

    def was_out_of_memory(self) -> bool:
        """Whether the kernel's out-of-memory killer ended any process of this container since the start."""
        return _oom_kills() > self._oom_kills


def _field(file: Path, name: str) -> int | None:
    """A number of a /proc file, in KiB."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)


def _oom_kills() -> int:
    for file in _OOM_COUNTERS:
        if file.is_file():
            found = [int(line.split()[1]) for line in file.read_text().splitlines() if line.startswith("oom_kill ")]
            return found[0] if found else 0
    return 0
