"""What the records of every evaluation share: the model's name, the versions, and files that are whole."""

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def name_of(path: str) -> str:
    """A model's name from its path; the folder of a checkpoint is called by its run and step."""
    folder = Path(path)
    # "." and "runs/.." are folders too, and have no name as they stand.
    parts = (folder.resolve() if folder.name in ("", "..") else folder).parts
    if parts[-1] == "huggingface" and len(parts) >= 3:
        return f"{parts[-3]}-{parts[-2]}"
    return parts[-1]


def installed_versions(packages: Sequence[str]) -> dict[str, str]:
    """Version of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def replace_file(file: Path, text: str) -> None:
    """Readers see the old file or the new one."""
    written = file.with_name(f".{file.name}.writing")
    written.write_text(text)
    written.replace(file)
