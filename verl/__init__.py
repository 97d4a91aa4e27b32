"""GRACE on a compact verl: text embeddings through rationales, trained by reinforcement learning."""

from importlib import import_module
from typing import Any

__version__ = "0.4.0.dev0+grace"
__all__ = ["DataProto", "GraceEncoder", "__version__"]

_PLACES = {"DataProto": "verl.protocol", "GraceEncoder": "verl.encoder.grace_encoder"}


def __getattr__(name: str) -> Any:
    # Resolved on first use, so that the data programs can import verl.* without loading torch.
    if name in _PLACES:
        return getattr(import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'verl' has no attribute {name!r}")
