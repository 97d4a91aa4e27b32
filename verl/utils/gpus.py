"""How many GPUs a process may use, for programs that have not loaded torch: train.sh and eval.sh."""

import ctypes
from pathlib import Path


def count_gpus() -> int:
    """What `torch.cuda.device_count()` returns; torch is loaded, for seconds, only where there is a driver."""
    if not _has_driver():
        return 0
    import torch

    return torch.cuda.device_count()


def _has_driver() -> bool:
    if Path("/dev/kfd").exists():  # AMD's; its library comes with torch
        return True
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True
