"""Reading torch DCP shards without letting a file run code.

torch unpickles the metadata, and values that are not tensors, without any check. Here only known classes are unpickled;
anything else is an error.
"""

import pickle
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, Metadata
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

DCP_METADATA = ".metadata"

# The exceptions of torch.load and pickle for files that are truncated, damaged or of another kind.
UNREADABLE = (
    pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, TypeError, AttributeError, LookupError,
    ImportError, AssertionError,
)  # fmt: skip

_METADATA_CLASSES = {
    *(("torch.distributed.checkpoint.metadata", name) for name in (
        "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata",
        "ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING",
    )),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"), ("pathlib._local", "PosixPath"),
}  # fmt: skip


class DcpError(ValueError):
    """A file is damaged, or holds something that could run code; the message names the file."""


class SafeReader(FileSystemReader):
    """torch's reader of a folder of shards, with `read_metadata` below."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        metadata = read_metadata(Path(self.path) / DCP_METADATA)
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class SafePlanner(DefaultLoadPlanner):
    """torch's planner; values that are not tensors may only be plain numbers, strings and containers."""

    def load_bytes(self, read_item: ReadItem, value: BytesIO) -> None:
        plain = BytesIO()
        torch.save(torch.load(value, weights_only=True), plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickles the classes that DCP metadata consists of, and no other."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in _METADATA_CLASSES:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which could run code")
        return super().find_class(module, name)


def read_metadata(file: Path) -> Metadata:
    """The metadata of a folder of shards.

    Raises:
        DcpError: it holds anything but metadata.
    """
    try:
        with file.open("rb") as stream:
            metadata = _MetadataUnpickler(stream).load()
    except UNREADABLE as error:
        raise DcpError(f"{file} is rejected: {unreadable_reason(error)}") from error
    if not isinstance(metadata, Metadata):
        raise DcpError(f"{file} is rejected: it holds a {type(metadata).__name__}, not the metadata of a checkpoint")
    return metadata


def unreadable_reason(error: BaseException) -> str:
    """The first sentence of an error's message."""
    if isinstance(error, pickle.UnpicklingError):
        # torch.load wraps the reason in the advice to load without the check.
        error = error.__context__ or error
    return " ".join(str(error).split()).split(". ")[0].removesuffix(".") or type(error).__name__
