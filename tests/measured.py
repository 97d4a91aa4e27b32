"""What a CPU's allocator gives out while real updates run, as torch's profiler sees every allocation."""

from collections.abc import Callable

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

STAGE = "the stage to measure"


def peak_of(build: Callable[[], Callable[[], object]]) -> int:
    """Most bytes allocated at once, of what `build` and the stage that it returns allocate, during the stage."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as found:
        stage = build()
        with record_function(STAGE):
            stage()
    events = found.profiler.kineto_results.events()
    (window,) = (event for event in events if event.name() == STAGE)
    total = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        if event.device_type() != DeviceType.CPU:
            continue
        total += event.nbytes()
        if window.start_ns() <= event.start_ns() <= window.start_ns() + window.duration_ns():
            peak = max(peak, total)
    return peak
