"""Errors of the disk as Python's OSError, from libraries that raise them as something else."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

_RUST = re.compile(r"\(os error (\d+)\)")


@contextmanager
def disk_errors() -> Iterator[None]:
    """Raise a failed write as the OSError that it is; other errors pass as they are.

    torch hides it behind a RuntimeError of its zip format. safetensors and tokenizers, written in Rust, raise a
    SafetensorError and a plain Exception, whose message ends with "(os error 28)".
    """
    try:
        yield
    except Exception as error:
        found = _disk_error(error)
        if found is None:
            raise
        raise found from error


def _disk_error(error: Exception) -> OSError | None:
    # No subclass: an error in this project's words may have an OSError behind it, or name one, and says more than that.
    if type(error) is RuntimeError:
        return error.__context__ if isinstance(error.__context__, OSError) else None
    if type(error) in (SafetensorError, Exception) and (named := _RUST.search(str(error))):
        return OSError(int(named[1]), os.strerror(int(named[1])))
    return None
