"""GRACE on a compact verl: text embeddings through rationales, trained by reinforcement learning."""

from importlib import import_module

__version__ = "0.4.0.dev0+grace"
__all__ = ["DataProto", "__version__"]


def __getattr__(name: str) -> object:
    # Resolved on first use, so that the data programs can import verl.* without loading torch.
    if name == "DataProto":
        return import_module("verl.protocol").DataProto
    raise AttributeError(f"module 'verl' has no attribute {name!r}")
