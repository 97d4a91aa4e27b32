"""How much memory a process may use."""

from pathlib import Path

import psutil

# The limit of a container, of control groups version 2 and 1; "max", or a number beyond the machine's memory, is none.
_LIMITS = ("memory.max", "memory/memory.limit_in_bytes")
_CONTROL_GROUPS = Path("/sys/fs/cgroup")


def usable_memory() -> int:
    """Bytes of host memory that this process may use at most: the machine's, or its control group's limit."""
    machine = psutil.virtual_memory().total
    files = [_CONTROL_GROUPS / name for name in _LIMITS]
    limits = [text for file in files if file.is_file() and (text := file.read_text().strip()).isdecimal()]
    return min([machine, *map(int, limits)])
