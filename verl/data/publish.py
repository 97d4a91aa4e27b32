"""Finished output files: their description, moving them into a folder, and copying them to another file system."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import fsspec

from verl.errors import UserError
from verl.utils.files import sha256_of


def describe_file(path: Path) -> dict[str, Any]:
    """Size and sha256 of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def move_into(folder: Path, files: Iterable[Path]) -> None:
    """Rename finished files into `folder`, on the same file system, replacing what has their names there."""
    for file in files:
        file.replace(folder / file.name)


def copy_to(target: str, files: Iterable[Path]) -> None:
    """Copy `files` into the folder `target`: a local path, or a URI of any file system that fsspec knows.

    Raises:
        UserError: the target cannot be written, or a copy has another size than its original.
    """
    try:
        filesystem, folder = fsspec.core.url_to_fs(target)
        filesystem.makedirs(folder, exist_ok=True)
        for file in files:
            copy = f"{folder.rstrip('/')}/{file.name}"
            filesystem.put_file(str(file), copy)
            size = filesystem.size(copy)
            if size != file.stat().st_size:
                raise OSError(f"{copy} has {size} bytes there and {file.stat().st_size} here")
    except Exception as error:  # each file system raises its own kinds
        cause = f"{type(error).__name__}: {error}"
        raise UserError(f"the local files are complete, but their copy to {target} failed: {cause}") from error
