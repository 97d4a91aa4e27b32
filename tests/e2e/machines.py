"""Two machines on one: each with a network, a name, processes, shared memory and Ray sessions of its own (Linux, root).

They share the file system, as machines of a cluster share storage.
"""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from runs import REPO

# Its mounts are its own, as its mount namespace is private: nobody else sees them.
_SET_UP = """
hostname {name} && ip link set lo up && ip link set wire up && ip address add {address}/24 dev wire &&
mount -t tmpfs tmpfs /dev/shm && mkdir -p /tmp/ray && mount -t tmpfs tmpfs /tmp/ray && echo up && exec sleep infinity
"""


class NotPermitted(RuntimeError):
    """This user, or this container, may not make network namespaces."""


class Machine:
    def __init__(self, name: str, address: str) -> None:
        self.name, self.address = name, address
        namespaces = ["unshare", "--uts", "--pid", "--mount", "--fork", "--mount-proc", "--kill-child"]
        self._outer = subprocess.Popen(
            ["ip", "netns", "exec", name, *namespaces, "sh", "-c", _SET_UP.format(name=name, address=address)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        assert self._outer.stdout is not None
        if (said := self._outer.stdout.readline()) != "up\n":
            raise NotPermitted(said.strip())
        # Every process of the machine ends with its first one.
        self._first = psutil.Process(self._outer.pid).children()[0].pid

    def start(self, *command: str, **environment: str) -> "subprocess.Popen[str]":
        """Run a program there, in the project's folder."""
        enter = ["nsenter", f"--target={self._first}", "--all", f"--wd={REPO}"]
        return subprocess.Popen(
            [*enter, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | environment
        )

    def run(self, *command: str, **environment: str) -> str:
        """Run a program there to its end; return its output."""
        process = self.start(*command, **environment)
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 0, output + errors
        return output

    def cut_off(self) -> None:
        """Pull the network cable: no packet in or out, and nobody is told."""
        _ip("-n", self.name, "link", "set", "wire", "down")

    def switch_off(self) -> None:
        """End every process at once."""
        if self._outer.poll() is None:
            os.kill(self._first, signal.SIGKILL)
            self._outer.wait(timeout=30)


@contextmanager
def two_machines() -> Iterator[tuple[Machine, Machine]]:
    """Two machines with a cable between them; nothing of them is left afterwards.

    Raises:
        NotPermitted: they cannot be made here.
    """
    names, machines = [f"grace-{os.getpid()}-{letter}" for letter in "ab"], list[Machine]()
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip("link", "add", "wire", "netns", names[0], "type", "veth", "peer", "name", "wire", "netns", names[1])
        for number, name in enumerate(names, 1):
            machines.append(Machine(name, f"10.77.0.{number}"))
        yield machines[0], machines[1]
    finally:
        for machine in machines:
            machine.switch_off()
        for name in names:
            if Path("/run/netns", name).exists():
                _ip("netns", "delete", name)


def _ip(*arguments: str) -> None:
    try:
        done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise NotPermitted(str(error)) from error
    if done.returncode:
        raise NotPermitted(done.stderr.strip())
