"""Errors of the disk as Python's OSError, from libraries that raise them as something else."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

_RUST = re.compile(r"\(os error (\d+)\)")


@contextmanager
def disk_errors() -> Iterator[None]:
    """Raise an error of the disk as the OSError that it is.

    torch hides a failed write behind an error of its zip format. safetensors and tokenizers, written in Rust, raise
    classes of their own, whose message ends with "(os error 28)".
    """
    try:
        yield
    except Exception as error:
        found = _disk_error(error)
        if found is None or found is error:
            raise
        raise found from error


def _disk_error(error: BaseException | None) -> OSError | None:
    """The OSError that an error is, that it names, or that was being handled when it was raised."""
    while error is not None:
        if isinstance(error, OSError):
            return error
        if named := _RUST.search(str(error)):
            return OSError(int(named[1]), os.strerror(int(named[1])))
        error = error.__context__
    return None
