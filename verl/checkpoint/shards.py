"""Full weights from the shards of a checkpoint, in one process and without a process group.

Two layouts are read, both without letting a file run code: a file that holds anything but tensors is rejected.

    .metadata, __R_K.distcp             torch DCP shards of verl.checkpoint.training_state, of any number of ranks
    model_world_size_W_rank_R.pt        the FSDP shards of verl 0.4, one state dict per rank
"""

import copy
import math
import re
import zipfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import DeviceMesh

# This import also registers DTensor as a class that torch.load may unpickle.
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers import AutoModelForCausalLM

from verl.checkpoint.run_folder import MODEL, SHARDS, STATE, saved_steps, step_folder, unfinished_steps
from verl.checkpoint.safe_dcp import DCP_METADATA, UNREADABLE, DcpError, read_metadata, unreadable_reason
from verl.errors import UserError

_DCP_MODEL, _POLICY = "model.", "lm."
# What torch.compile, DDP and FSDP1 put into the names of a model that they wrap.
_WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.|^module\.")
_LORA = re.compile(r"\blora_|\.base_layer\.|^base_model\.model\.")
_FSDP_GLOB, _FSDP_NAME = "model_world_size_*_rank_*.pt", re.compile(r"model_world_size_(\d+)_rank_(\d+)\.pt")


@dataclass(frozen=True)
class ModelKeys:
    """Keys and shapes of a model's state dict."""

    architecture: str
    shapes: dict[str, torch.Size]
    """The shape of every key but the tied ones."""
    tied: dict[str, str]
    """Tied keys, and the key whose tensor each shares."""


class Shards(Protocol):
    """The weights of a checkpoint under their transformers names, read one at a time."""

    folder: Path
    model_folder: Path
    """The folder where the checkpoint has its config and tokenizer."""
    names: frozenset[str]

    def read(self, name: str, shape: torch.Size) -> Tensor:
        """The full tensor of a name, in the dtype that it was stored in.

        Raises:
            UserError: the shards cannot be read, or do not form a tensor of that shape.
        """
        ...


def find_shards(local_dir: Path) -> tuple[Path, list[str]]:
    """Find the shards of a run folder, a step folder, or a folder of shards.

    Returns:
        The folder with the shards, and a line for each step of a run that was skipped.

    Raises:
        UserError: there are none.
    """
    if _has_shards(local_dir):
        return local_dir, []
    if (local_dir / SHARDS).is_dir():
        return local_dir / SHARDS, []
    skipped = [
        f"{path.name} is not complete (still being written, or the run ended while writing it)"
        for path in unfinished_steps(local_dir)
    ]
    for step in reversed(saved_steps(local_dir)):
        folder = step_folder(local_dir, step)
        if _is_complete(folder):
            return folder / SHARDS, skipped
        skipped.append(f"{folder.name} is not complete (neither trainer_state.json nor the FSDP shards of all ranks)")
    if skipped:
        raise UserError(f"--local_dir={local_dir} holds no complete step: {'; '.join(skipped)}; give another folder")
    raise UserError(
        f"--local_dir={local_dir} holds no checkpoint; give a run folder, a global_step_N folder, or a folder with "
        f"{DCP_METADATA} or model_world_size_W_rank_R.pt files"
    )


def _has_shards(folder: Path) -> bool:
    return (folder / DCP_METADATA).is_file() or any(folder.glob(_FSDP_GLOB))


def _is_complete(step: Path) -> bool:
    if (step / STATE).is_file():
        return True
    try:
        return bool(_fsdp_files(step / SHARDS))
    except UserError:
        return False


def _fsdp_files(folder: Path) -> list[Path]:
    """The FSDP shards of all ranks, in rank order."""
    found = [match for path in folder.glob(_FSDP_GLOB) if (match := _FSDP_NAME.fullmatch(path.name))]
    sizes = sorted({int(match[1]) for match in found})
    if len(sizes) != 1:
        raise UserError(
            f"{folder} holds FSDP shards of the world sizes {sizes}; keep those of one, and move the others away"
        )
    present = {int(match[2]) for match in found}
    missing = [rank for rank in range(sizes[0]) if rank not in present]
    files = [folder / f"model_world_size_{sizes[0]}_rank_{rank}.pt" for rank in range(sizes[0])]
    if missing:
        raise UserError(
            f"{folder} lacks {_listed([files[rank].name for rank in missing])}; copy the files of all "
            f"{sizes[0]} ranks there"
        )
    return files


def open_shards(folder: Path) -> Shards:
    """The shards of a folder, in either layout.

    Raises:
        UserError: a file is missing or damaged, or could run code.
    """
    if (folder / DCP_METADATA).is_file():
        if any(folder.glob(_FSDP_GLOB)):
            raise UserError(f"{folder} holds both {DCP_METADATA} and model_world_size_W_rank_R.pt; move one set away")
        return DcpShards(folder)
    if any(folder.glob(_FSDP_GLOB)):
        return FsdpShards(folder)
    raise UserError(
        f"{folder} holds neither {DCP_METADATA} nor model_world_size_W_rank_R.pt; its checkpoint was not "
        "written completely: give another step"
    )


class DcpShards:
    """Shards written by `save_training_state` on any number of ranks. The optimizer's state is not read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model_folder = folder.absolute().parent / MODEL
        try:
            self._metadata = read_metadata(folder / DCP_METADATA)
        except DcpError as error:
            raise UserError(str(error)) from error
        keys = [key for key in self._metadata.state_dict_metadata if key.startswith(_DCP_MODEL)]
        names = unwrapped([key.removeprefix(_DCP_MODEL) for key in keys], folder)
        self._keys = {name.removeprefix(_POLICY): key for name, key in zip(names, keys, strict=True)}
        self.names = frozenset(self._keys)
        self._check_files()
        self._reader = FileSystemReader(folder)
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)

    def __str__(self) -> str:
        return f"torch DCP shards ({len(self.names)} tensors)"

    def _check_files(self) -> None:
        """Check that every file exists and is at least as long as the metadata says."""
        ends: dict[str, int] = {}
        wanted = set(self._keys.values())
        for index, place in self._metadata.storage_data.items():
            if index.fqn in wanted:
                ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
        for name, end in sorted(ends.items()):
            file = self.folder / name
            if Path(name).name != name:
                raise UserError(
                    f"{self.folder / DCP_METADATA} points out of its folder, to {name!r}; this is not allowed"
                )
            if not file.is_file():
                raise UserError(f"{self.folder} lacks {name}; copy the files of all ranks there")
            if file.stat().st_size < end:
                raise UserError(f"{file} is cut off: {file.stat().st_size} of {end} bytes; copy it again")

    def read(self, name: str, shape: torch.Size) -> Tensor:
        key = self._keys[name]
        stored = self._metadata.state_dict_metadata[key]
        if not isinstance(stored, TensorStorageMetadata):
            raise UserError(f"{self.folder}: {name} is not a tensor")
        _check_shape(self.folder, name, stored.size, shape)
        if sum(math.prod(chunk.sizes) for chunk in stored.chunks) != stored.size.numel():
            raise UserError(f"{self.folder}: the shards hold only a part of {name}; give another step")
        state: dict[str, Any] = {key: torch.empty(stored.size, dtype=stored.properties.dtype)}
        # torch.distributed.checkpoint.load does the same and more, for which it needs a process group.
        planner = DefaultLoadPlanner()
        planner.set_up_planner(state, self._metadata, is_coordinator=True)
        try:
            self._reader.read_data(planner.create_local_plan(), planner).wait()
        except UNREADABLE as error:
            raise UserError(f"{self.folder}: {name} cannot be read: {unreadable_reason(error)}") from error
        return state[key]


class FsdpShards:
    """Shards of verl 0.4: a file per rank with its part of the state dict."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model_folder = folder / MODEL
        files = _fsdp_files(folder)
        ranks = [_load_tensors(file) for file in files]
        self._ranks = [dict(zip(unwrapped(held, folder), held.values(), strict=True)) for held in ranks]
        self.names = frozenset(self._ranks[0])
        for file, held in zip(files, self._ranks, strict=True):
            if differing := sorted(self.names ^ held.keys()):
                raise UserError(
                    f"{file} and {files[0].name} hold different keys: {_listed(differing)}; copy the files of one "
                    "checkpoint there"
                )

    def __str__(self) -> str:
        return f"FSDP shards of {len(self._ranks)} ranks ({len(self.names)} tensors)"

    def read(self, name: str, shape: torch.Size) -> Tensor:
        parts = [held[name] for held in self._ranks]
        sharded = [part for part in parts if isinstance(part, DTensor)]
        try:
            if sharded and len(sharded) != len(parts):
                raise ValueError("only some ranks hold it as a DTensor, with its sharding")
            tensor = join_sharded(sharded) if sharded else join_plain(parts, shape)
        except ValueError as error:
            raise UserError(f"{self.folder}: {name} cannot be joined: {error}") from error
        _check_shape(self.folder, name, tensor.shape, shape)
        return tensor


def unwrapped(names: Collection[str], folder: Path) -> list[str]:
    """The names without the parts that torch.compile, DDP and FSDP1 add, in their order.

    Raises:
        UserError: two of them become the same.
    """
    plain = [_unwrapped(name) for name in names]
    if len(set(plain)) < len(plain):
        twice = sorted({name for name in plain if plain.count(name) > 1})
        raise UserError(
            f"{folder} holds {_listed(twice)} twice, once in a wrapped model (_orig_mod., module.); save only one"
        )
    return plain


def _unwrapped(name: str) -> str:
    # A wrapper may hold another: module._orig_mod.model...
    while (inner := _WRAPPERS.sub("", name)) != name:
        name = inner
    return name


def _load_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a rank's file, memory-mapped."""
    if not zipfile.is_zipfile(file):
        raise UserError(f"{file} is cut off, or not a file of torch.save; copy it again")
    try:
        held = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except UNREADABLE as error:
        raise UserError(f"{file} is rejected: {unreadable_reason(error)}") from error
    if not isinstance(held, dict) or not all(isinstance(value, Tensor) for value in held.values()):
        raise UserError(f"{file} is rejected: it is not a dictionary of tensors")
    return held


@torch.no_grad()
def join_sharded(parts: Sequence[DTensor]) -> Tensor:
    """The full tensor from the DTensors of all ranks, in rank order; their parts may differ in size.

    Raises:
        ValueError: the parts do not belong together, or are partial sums.
    """
    mesh, placements = _mesh_ranks(parts[0].device_mesh), parts[0].placements
    for part in parts:
        if part.placements != placements or not torch.equal(_mesh_ranks(part.device_mesh), mesh):
            raise ValueError("the ranks disagree on how it is sharded")
    if sorted(mesh.flatten().tolist()) != list(range(len(parts))):
        raise ValueError(f"it is sharded over ranks {mesh.tolist()}, and there are files of {len(parts)}")

    def join(ranks: Tensor, dimension: int) -> Tensor:
        if ranks.ndim == 0:
            return parts[int(ranks)].to_local()
        pieces = [join(inner, dimension + 1) for inner in ranks]
        placement = placements[dimension]
        if type(placement) is Shard:
            return torch.cat(pieces, placement.dim)
        if type(placement) is not Replicate:
            raise ValueError(f"its placement {type(placement).__name__} is neither Shard nor Replicate")
        if not all(same_bits(piece, pieces[0]) for piece in pieces[1:]):
            raise ValueError("its replicas differ")
        return pieces[0]

    return join(mesh, 0)


def _mesh_ranks(mesh: DeviceMesh) -> Tensor:
    """The ranks of a mesh, in the mesh's shape. A mesh that torch 2.6 saved has them in its __dict__ only."""
    return vars(mesh)["mesh"] if "mesh" in vars(mesh) else mesh.mesh


def join_plain(parts: Sequence[Tensor], shape: torch.Size) -> Tensor:
    """The full tensor from plain tensors, which do not say how they are sharded: the expected shape decides.

    Raises:
        ValueError: the parts are neither copies of it nor, in rank order, slices along its first dimension.
    """
    if all(part.shape == shape for part in parts):
        if all(same_bits(part, parts[0]) for part in parts[1:]):
            return parts[0]
        raise ValueError("the ranks hold different values")
    if all(part.ndim == len(shape) > 0 and part.shape[1:] == shape[1:] for part in parts):
        return torch.cat(list(parts))
    raise ValueError(f"the ranks hold the shapes {[list(part.shape) for part in parts]}, the model has {list(shape)}")


def model_keys(config: Any) -> ModelKeys:
    """The keys and shapes of the causal language model of a transformers config.

    Raises:
        ValueError: the config has no such model.
    """
    with torch.device("meta"):
        # A copy, because from_config changes the config.
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=False)
    first: dict[int, str] = {}
    tied = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = first.setdefault(id(parameter), name)
        if owner != name:
            tied[name] = owner
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items() if name not in tied}
    return ModelKeys(type(model).__name__, shapes, tied)


def read_weights(shards: Shards, keys: ModelKeys, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the model but the tied ones, one at a time.

    Args:
        dtype: of the floating-point tensors; None = as they were stored.

    Raises:
        UserError: a key is missing or unexpected, has another shape, or differs from the key that it is tied to.
    """
    missing = sorted(keys.shapes.keys() - shards.names)
    unexpected = sorted(shards.names - keys.shapes.keys() - keys.tied.keys())
    if missing or unexpected:
        raise UserError(
            f"{shards.folder} does not fit the config of a {keys.architecture}: missing {_listed(missing)}, "
            f"unexpected {_listed(unexpected)}; {_remedy(unexpected)}"
        )
    for name, owner in keys.tied.items():
        if name in shards.names:
            shape = keys.shapes[owner]
            if not same_bits(shards.read(name, shape), shards.read(owner, shape)):
                raise UserError(
                    f"{shards.folder}: {name} and {owner} differ, although the config ties them; set "
                    "tie_word_embeddings to false in config.json"
                )
    for name, shape in keys.shapes.items():
        tensor = shards.read(name, shape)
        yield name, tensor.to(dtype if dtype and tensor.is_floating_point() else tensor.dtype, copy=True).contiguous()


def _remedy(unexpected: Sequence[str]) -> str:
    """What to do about keys that the model of the config does not have."""
    if any(map(_LORA.search, unexpected)):
        return (
            "these are a LoRA's, which this program does not merge: load the base model and the adapter (of verl: "
            "actor/lora_adapter) with peft's PeftModel.from_pretrained, and save what its merge_and_unload() returns"
        )
    return "give the config that the checkpoint was trained with"


def same_bits(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors are equal in shape, dtype and every bit."""
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    first, second = (tensor.contiguous().flatten().view(torch.uint8) for tensor in (one, two))
    return torch.equal(first, second)


def _check_shape(folder: Path, name: str, found: torch.Size, expected: torch.Size) -> None:
    if found != expected:
        raise UserError(
            f"{folder}: {name} has shape {list(found)}, the model of the config {list(expected)}; give the config "
            "that the checkpoint was trained with"
        )


def _listed(names: Collection[str], limit: int = 8) -> str:
    """The first `limit` names in one line."""
    shown = ", ".join(list(names)[:limit]) or "none"
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown
