"""The Ray cluster of a run: the one at RAY_ADDRESS, or one that is started on this machine for this run alone."""

import logging
import os
import secrets
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants

from verl.errors import UserError
from verl.single_controller.reaper import Reaper

_ANSWER_S = 13
# Ray waits three times as long for a cluster that does not answer.
_PROBE_ENVIRONMENT = {
    f"RAY_{name}": "4"
    for name in (
        "gcs_rpc_server_connect_timeout_s",
        "gcs_rpc_server_reconnect_timeout_s",
        "gcs_server_request_timeout_seconds",
    )
}
_PROBE = "import sys, logging, ray; ray.init(sys.argv[1], logging_level=logging.ERROR)"


def given_address() -> str | None:
    """RAY_ADDRESS, where it names a cluster to join."""
    address = os.environ.get("RAY_ADDRESS")
    return None if address in (None, "", "local") else address


def join() -> None:
    """Join the cluster at RAY_ADDRESS, unless this process has.

    Raises:
        UserError: no cluster answers there.
    """
    if ray.is_initialized():
        return
    address = given_address()
    assert address is not None
    _check_answer(address)
    _configure()
    ray.init(address, logging_level=logging.ERROR)


def machines() -> list[dict[str, Any]]:
    """The living machines of the cluster, as `ray.nodes` describes them."""
    return [node for node in ray.nodes() if node["Alive"]]


def start(num_cpus: int) -> Reaper:
    """Start Ray on the loopback address, with SIGTERM blocked in its processes.

    Ray's processes inherit the mask. A batch system sends SIGTERM to all processes of a job, and the last step can only
    be saved while Ray is running.

    Returns:
        What ends Ray's processes when this one dies; keep it as long as the cluster runs.

    Raises:
        UserError: the folder for temporary files is too long for a socket.
    """
    _configure()
    # Ray lowers the priority of its workers, so that any other program of the machine takes their CPUs.
    os.environ.setdefault("RAY_worker_niceness", "0")
    _give_ray_a_token()
    reaper = Reaper()
    former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        # Otherwise Ray listens on all interfaces in spite of the loopback address, for clusters of several machines.
        ray_constants.ENABLE_RAY_CLUSTER = False
        ray.init(
            # Without it Ray joins whatever cluster was last started on this machine.
            "local",
            num_cpus=num_cpus, include_dashboard=False, logging_level=logging.ERROR, _node_ip_address="127.0.0.1",
            # No idle worker processes for tasks: a run has no tasks, and they cost memory and time.
            _system_config={"prestart_worker_first_driver": False},
        )  # fmt: skip
    except OSError as error:
        if "AF_UNIX" not in str(error):
            raise
        name = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
        raise UserError(
            f"{name}={os.environ.get(name)} is too long for the paths of Ray's sockets; export RAY_TMPDIR=/tmp, or "
            "another folder with a short path."
        ) from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)
    return reaper


def _give_ray_a_token() -> None:
    """Where the home folder cannot be written to, in which Ray keeps the token of its processes, one for this run."""
    given = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    home = Path.home()
    kept = (home / ".ray/auth_token").is_file() or os.access(home, os.W_OK)
    if not kept and not any(name in os.environ for name in given):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _configure() -> None:
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Under `uv run` Ray would build an environment of its own for the workers; they use the driver's.
    ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = False


def _check_answer(address: str) -> None:
    """Join in another process first: where no cluster answers, Ray tries for minutes and then ends the process."""
    command = [sys.executable, "-c", _PROBE, address]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_ANSWER_S,
            env={**os.environ, **_PROBE_ENVIRONMENT},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        reason = f"no answer in {_ANSWER_S} s"
    else:
        if done.returncode == 0:
            return
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        reason = said[-1].split("It's either")[0] if said else f"exit code {done.returncode}"
    raise UserError(
        f"RAY_ADDRESS={address}: no Ray cluster can be joined there ({reason.strip()}). Give HOST:PORT of a head that "
        "was started with `ray start --head` (port 6379 unless it says another), on a machine that has joined it with "
        "`ray start --address=HOST:PORT`, with the same RAY_AUTH_MODE and RAY_AUTH_TOKEN; or unset RAY_ADDRESS to run "
        "on this machine alone."
    )
