"""How many CPUs a process may use, and how its threads wait for each other."""

import os

# They decide it for GNU's runtime of OpenMP, which torch brings, and for Intel's and LLVM's.
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def usable_cpus() -> int:
    """CPUs that this process may use, by its affinity and by the quota of its control group, rounded up."""
    # It takes a third of a second to load, for which a help text need not wait.
    from joblib import cpu_count

    return cpu_count()


def threads_wanted() -> int | None:
    """Threads that the user wants in each process that computes, OMP_NUM_THREADS; None = not set."""
    given = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return int(given) if given.isdecimal() and int(given) > 0 else None


def share_of_cpus(processes: int) -> int:
    """Threads for each of several processes of this machine that compute at the same time, at least 1."""
    return max(1, usable_cpus() // processes)


def waiting_environment() -> dict[str, str]:
    """Environment variables that decide how a thread waits for others: as the user has set, else asleep very soon.

    OpenMP's default is to spin for milliseconds. Where the thread that is waited for is not scheduled, as beside other
    programs or in a container with a part of a CPU, that takes the very CPU that it needs. A thousand turns are some
    ten microseconds; docs/performance.md has figures. GNU's runtime reads the second, others the first.
    """
    said = {name: os.environ[name] for name in _WAITING if name in os.environ}
    return said or {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "1000"}


def let_waiting_threads_sleep() -> None:
    """Set `waiting_environment` for this process and its children. Torch reads it when it is imported."""
    os.environ.update(waiting_environment())
