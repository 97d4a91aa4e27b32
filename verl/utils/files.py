"""Files as a whole: replaced in one moment, and known by their hashes."""

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(file: Path, durable: bool = False) -> Iterator[Path]:
    """Yield a path to write to, which takes the place of `file` in one moment when the block ends.

    After an error `file` is as it was, and what was written is gone.

    Args:
        durable: also after a power cut: the content and the name are on the disk when the block has ended.
    """
    written = file.with_name(f".{file.name}.writing")
    try:
        yield written
        if durable:
            flush_to_disk(written)
        written.replace(file)
    except BaseException:
        written.unlink(missing_ok=True)
        raise
    if durable:
        flush_to_disk(file.parent)


def replace_file(file: Path, content: str | bytes, durable: bool = False) -> None:
    """Write a file so that readers see the old content or the new one, never a part.

    Args:
        content: text is written as UTF-8.
        durable: see `replacing`.
    """
    with replacing(file, durable) as written:
        written.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def new_folder(target: Path, replace: bool = False) -> Iterator[Path]:
    """Yield a folder to write to, which becomes `target` when the block ends.

    After an error there is nothing new, and what is there stays.

    Args:
        replace: remove what is there by then; else only an empty folder may be there.

    Raises:
        OSError: something else is there.
    """
    making = target.with_name(f".{target.name}.making")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    try:
        yield making
        if replace and target.exists():
            shutil.rmtree(target)
        making.rename(target)
    finally:
        shutil.rmtree(making, ignore_errors=True)


def is_taken(folder: Path) -> bool:
    """Whether something is there that a new folder would take the place of."""
    return folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))


def flush_to_disk(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(file: Path) -> str:
    """Hex sha256 of a file."""
    return _digest(file).hex()


def sha256_of_all(files: Iterable[Path]) -> str:
    """Hex sha256 over the sha256 digests of several files, in their order."""
    return hashlib.sha256(b"".join(map(_digest, files))).hexdigest()


def _digest(file: Path) -> bytes:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").digest()
