"""Locks on files. A lock ends with the process that holds it, however it ends; NFS hands them to other machines too."""

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO

_NO_LOCKS_HERE = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


class HeldError(RuntimeError):
    """Another process holds the lock; the message says which one: pid, machine, and since when."""


class NoLocksError(RuntimeError):
    """The file system has no locks."""


@contextmanager
def hold(file: Path) -> Iterator[None]:
    """Hold a lock that one process can have at a time.

    Raises:
        HeldError: another process has it.
        NoLocksError: the file system has no locks.
    """
    with file.open("a+") as opened:
        try:
            _lock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise HeldError(_read_holder(opened)) from None
        _write_holder(opened)
        yield


def share_on_this_machine(file: Path) -> IO[str]:
    """Hold a lock that processes of one machine can share, until the returned file is closed.

    Raises:
        HeldError: processes of another machine have it.
        NoLocksError: the file system has no locks.
    """
    opened = file.open("a+")
    try:
        _lock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _write_holder(opened)
    except BlockingIOError:
        pass  # its holders are on this machine, or not: their entry tells
    # Waits only while another process writes its entry.
    _lock(opened, fcntl.LOCK_SH)
    holder = _read_holder(opened)
    if _entry(opened).get("boot") != _boot_id():
        opened.close()
        raise HeldError(holder)
    return opened


def _lock(opened: IO[str], kind: int) -> None:
    try:
        fcntl.flock(opened, kind)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno in _NO_LOCKS_HERE:
            raise NoLocksError(f"{opened.name}: {error.strerror}") from error
        raise


def _write_holder(opened: IO[str]) -> None:
    since = datetime.now().astimezone().isoformat(" ", "seconds")
    opened.truncate(0)
    json.dump({"pid": os.getpid(), "host": socket.gethostname(), "boot": _boot_id(), "since": since}, opened)
    opened.flush()


def _read_holder(opened: IO[str]) -> str:
    entry = _entry(opened)
    return f"pid {entry['pid']} on {entry['host']}, since {entry['since']}" if entry else "a process that just started"


def _entry(opened: IO[str]) -> dict[str, str]:
    opened.seek(0)
    text = opened.read()
    return json.loads(text) if text else {}


def _boot_id() -> str:
    """Of the running kernel: names of machines are not always different."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
