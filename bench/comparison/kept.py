"""Finished parts of the comparison on disk, found again by their settings."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from verl.utils.files import replace_file

RESULT = "result.json"


def key_of(settings: Any) -> str:
    """A short hash of settings: of their JSON with sorted keys."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


class Kept:
    """Results of named parts below a folder; each has a folder of its own, whose name ends with the settings' key."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, name: str, settings: Any) -> Path:
        return self.root / f"{name}-{key_of(settings)}"

    def find(self, name: str, settings: Any) -> dict[str, Any] | None:
        """The result that was kept for exactly these settings, if it was."""
        file = self.folder(name, settings) / RESULT
        return json.loads(file.read_text())["result"] if file.is_file() else None

    def get(self, name: str, settings: Any, make: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """The kept result, or what `make` returns, which is kept.

        Args:
            make: is given the folder of the part; what it leaves there when it is interrupted, it finds again.
        """
        found = self.find(name, settings)
        if found is not None:
            return found
        folder = self.folder(name, settings)
        folder.mkdir(parents=True, exist_ok=True)
        result = make(folder)
        replace_file(folder / RESULT, json.dumps({"settings": settings, "result": result}) + "\n")
        return result


def clear(folder: Path) -> None:
    """Remove a folder with all that is in it, if it exists."""
    shutil.rmtree(folder, ignore_errors=True)
