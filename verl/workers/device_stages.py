"""The stages of a worker's GPU use: free memory after each, and out-of-memory errors that name a setting to change."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class OutOfDeviceMemory(RuntimeError):
    """A stage needed more GPU memory than was free; the message names the stage and a setting."""


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device's memory ran out: vLLM's allocator raises a plain RuntimeError, torch a class of its own."""
    return "out of memory" in str(error).lower()


class DeviceStages:
    """Watches one device. On a CPU there is no free memory to log."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free_gib: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, remedy: str) -> Iterator[None]:
        """Run one stage.

        Args:
            name: what is being done, for the error; in metrics its spaces are underscores.
            remedy: the setting to change when memory does not suffice.

        Raises:
            OutOfDeviceMemory: in place of torch's or vLLM's own error.
        """
        before = self._free()
        try:
            yield
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            free = "" if before is None else f": {before:.1f} GiB were free before it"
            raise OutOfDeviceMemory(f"out of GPU memory while {name}{free}. {remedy}\n({error})") from error
        after = self._free()
        if after is not None:
            self._free_gib[f"free_gb/{name.replace(' ', '_')}"] = after

    def release_cache(self) -> None:
        """Give the device the memory that torch has freed but keeps: an engine's own allocator cannot use it."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def take_free(self) -> dict[str, float]:
        """GiB free after each stage since the last call."""
        free, self._free_gib = self._free_gib, {}
        return free

    def _free(self) -> float | None:
        return torch.cuda.mem_get_info(self._device)[0] / 2**30 if self._device.type == "cuda" else None
