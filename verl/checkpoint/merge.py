"""Merging the shards of a checkpoint into a transformers folder, and comparing the two: `verl.merge_model`'s work."""

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterator, KeysView
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict, snapshot_download
from huggingface_hub.errors import StrictDataclassError
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from verl.checkpoint.disk_errors import disk_errors
from verl.checkpoint.hub import HUB_ERRORS, check_repo, in_one_line, upload_files
from verl.checkpoint.merged_adapter import MergedAdapter, is_adapter
from verl.checkpoint.shards import ModelKeys, Shards, find_shards, model_keys, open_shards, read_weights, same_bits
from verl.embedding import centre, settings
from verl.errors import UserError
from verl.models.lora import whole_model_of
from verl.utils.console import complain, say
from verl.utils.files import is_taken, new_folder
from verl.utils.logging import quiet_libraries

PROGRAM = "merge_model"
# Written into every merged folder; only a folder that has it is replaced.
RECORD = "merge_model.json"
# Differences up to this are none in `test`.
TOLERANCE = 1e-6
# Most differing tensors that are listed.
SHOWN = 20


@dataclass
class Checkpoint:
    """The shards, and the config, keys and dtype of the model they are merged into."""

    shards: Shards
    model_folder: Path
    config: Any
    keys: ModelKeys
    dtype: torch.dtype

    def read(self, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the model but the tied ones, with a progress bar on stderr; see `read_weights`."""
        weights = read_weights(self.shards, self.keys, dtype)
        yield from track(weights, "reading", len(self.keys.shapes), console=Console(stderr=True))


def run_program(args: argparse.Namespace) -> int:
    """Merge or compare, as the arguments of `verl.merge_model` ask for; the exit code."""
    quiet_libraries()
    try:
        if args.backend != "fsdp":
            raise UserError(f"--backend={args.backend}: only fsdp checkpoints exist here; give --backend fsdp")
        return run_merge(args) if args.command == "merge" else run_test(args)
    except (UserError, OSError, SafetensorError) as error:
        return complain(PROGRAM, error)


def run_merge(args: argparse.Namespace) -> int:
    target = args.target_dir.resolve()
    check_target(args.target_dir)
    check_upload(args.hf_upload_path, args.private)
    checkpoint = open_checkpoint(args.local_dir, args.hf_model_path, args.dtype)
    weights = dict(checkpoint.read(checkpoint.dtype))
    size = write_folder(target, weights, checkpoint)
    say(
        f"{PROGRAM}: wrote {args.target_dir}: {checkpoint.keys.architecture}, {len(weights)} tensors, "
        f"{_name(checkpoint.dtype)}, {size / 1e6:,.1f} MB; read back, every tensor equals the merged one"
    )
    if args.hf_upload_path:
        upload(target, args.hf_upload_path, args.private)
    return 0


def run_test(args: argparse.Namespace) -> int:
    if not args.test_hf_dir.is_dir():
        raise UserError(f"--test_hf_dir={args.test_hf_dir} is not a folder; give one with the model to compare with")
    reference = SavedTensors(args.test_hf_dir)
    checkpoint = open_checkpoint(args.local_dir, args.hf_model_path, args.dtype)
    differences, other_dtypes = find_differences(checkpoint, reference)
    if not differences:
        agreed = "dtype and values"
        if other_dtypes:
            agreed = (
                f"and values, compared in the coarser dtype: {_name(checkpoint.dtype)} merged, "
                f"{', '.join(map(_name, other_dtypes))} there"
            )
        say(
            f"{PROGRAM}: {args.test_hf_dir} is the merged model: {len(reference)} tensors agree in key, shape, {agreed}"
        )
        return 0
    say_differences(differences)
    say(f"{PROGRAM}: {args.test_hf_dir} is not the merged model: {len(differences)} tensors differ")
    return 1


def open_checkpoint(local_dir: Path, hf_model_path: str | None, dtype: str) -> Checkpoint:
    """Find and open the checkpoint that the arguments of the same names tell, and print what was found."""
    if not local_dir.is_dir():
        raise UserError(f"--local_dir={local_dir} is not a folder; give a run, step, shard or adapter folder")
    shards = find_weights(local_dir)
    model_folder = find_model_folder(shards, hf_model_path)
    say(f"{PROGRAM}: {shards.folder}: {shards}; config and tokenizer of {model_folder}")
    config, keys = read_config(model_folder)
    wanted = (config.dtype or torch.float32) if dtype == "auto" else getattr(torch, dtype)
    return Checkpoint(shards, model_folder, config, keys, wanted)


def read_config(folder: Path) -> tuple[Any, ModelKeys]:
    """The config of a model folder, of an adapter's folder that of its model, and the keys of what it describes.

    Raises:
        UserError: that is no causal language model.
    """
    try:
        config = AutoConfig.from_pretrained(whole_model_of(str(folder)), trust_remote_code=False)
        return config, model_keys(config)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise UserError(
            f"{folder / 'config.json'} does not describe a causal language model: {in_one_line(error)}"
        ) from error


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A model folder with all weights: itself, or of an adapter a merged copy in float32, removed afterwards."""
    if not is_adapter(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory() as place:
        merged = Path(place) / folder.resolve().name
        checkpoint = open_checkpoint(folder, None, "float32")
        write_folder(merged, dict(checkpoint.read(checkpoint.dtype)), checkpoint)
        yield merged


def find_weights(local_dir: Path) -> Shards:
    """The shards that --local_dir names; of a run that trained an adapter, and of an adapter's folder, the sum of both.

    A run's adapter is read from its model folder, where it has the numbers of the shards.
    """
    if is_adapter(local_dir):
        return MergedAdapter(local_dir)
    folder, skipped = find_shards(local_dir)
    for line in skipped:
        say(f"{PROGRAM}: skipped: {line}")
    shards = open_shards(folder)
    return MergedAdapter(shards.model_folder) if is_adapter(shards.model_folder) else shards


def find_model_folder(shards: Shards, hf_model_path: str | None) -> Path:
    """The folder with config and tokenizer: the checkpoint's own if it has one, else --hf_model_path."""
    if is_adapter(shards.model_folder) or (shards.model_folder / "config.json").is_file():
        return shards.model_folder
    if not hf_model_path:
        raise UserError(f"{shards.model_folder} has no config.json; give --hf_model_path, the model that was trained")
    folder = Path(hf_model_path)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(hf_model_path, allow_patterns=["*.json", "*.jinja", "*.txt", "*.model"]))
        except HUB_ERRORS as error:
            raise UserError(
                f"--hf_model_path={hf_model_path} is neither a folder nor a model of the hub: {in_one_line(error)}"
            ) from error
    if not (folder / "config.json").is_file():
        raise UserError(f"--hf_model_path={hf_model_path} has no config.json; give a transformers folder")
    return folder


def check_target(target: Path) -> None:
    """Check that the target does not exist, is empty, or was written by this program."""
    if is_taken(target) and not (target / RECORD).is_file():
        raise UserError(f"--target_dir={target} exists and is not an earlier result of this program; give another")


def check_upload(repo: str | None, private: bool) -> None:
    if private and not repo:
        raise UserError("--private is for uploads; give --hf_upload_path too")
    if repo:
        check_repo(repo, "--hf_upload_path")


def write_folder(target: Path, weights: dict[str, Tensor], checkpoint: Checkpoint) -> int:
    """Write and check the folder under a temporary name, then rename it; return the bytes of its weights."""
    with new_folder(target, replace=True) as folder:
        with disk_errors():
            write_model_files(folder, checkpoint)
            save_torch_state_dict(weights, folder)
        if wrong := unequal(SavedTensors(folder), weights):
            raise UserError(
                f"{folder.parent}: {', '.join(wrong)} read back differently from what was written; check the disk"
            )
        record = {
            "source": str(checkpoint.shards.folder), "shards": str(checkpoint.shards),
            "model": str(checkpoint.model_folder), "dtype": _name(checkpoint.dtype),
        }  # fmt: skip
        (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    return sum(file.stat().st_size for file in target.glob("*.safetensors"))


def write_model_files(folder: Path, checkpoint: Checkpoint) -> None:
    """Config, tokenizer with its chat template, generation settings, and the embedder's settings and centre."""
    source = checkpoint.model_folder
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{source} has no tokenizer that can be loaded: {in_one_line(error)}; add its files there"
        ) from error
    tokenizer.save_pretrained(folder)
    checkpoint.config.dtype = checkpoint.dtype
    checkpoint.config.architectures = [checkpoint.keys.architecture]
    checkpoint.config.save_pretrained(folder)
    for name in ("generation_config.json", settings.FILE_NAME, centre.FILE_NAME):
        if (source / name).is_file():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, folder / name)


class SavedTensors:
    """The safetensors of a folder, read one tensor at a time."""

    def __init__(self, folder: Path) -> None:
        # The order in which transformers looks: the single file, else the files of the index.
        single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
        if not single.is_file() and not index.is_file():
            raise UserError(f"{folder} has no {single.name} and no {index.name}; give a folder with safetensors")
        try:
            names = {single.name} if single.is_file() else set(json.loads(index.read_text())["weight_map"].values())
            files = [safe_open(folder / name, framework="pt") for name in sorted(names)]
        except (SafetensorError, FileNotFoundError, ValueError, KeyError) as error:
            raise UserError(
                f"the safetensors of {folder} cannot be read: {in_one_line(error)}; copy them again"
            ) from error
        self._files = {name: file for file in files for name in file.keys()}

    def __len__(self) -> int:
        return len(self._files)

    def keys(self) -> KeysView[str]:
        return self._files.keys()

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)


def unequal(saved: SavedTensors, weights: dict[str, Tensor]) -> list[str]:
    """Names that only one side has, or whose tensors differ in shape, dtype or any bit."""
    both = saved.keys() & weights.keys()
    return sorted(saved.keys() ^ weights.keys()) + [name for name in both if not same_bits(saved[name], weights[name])]


def find_differences(checkpoint: Checkpoint, reference: SavedTensors) -> tuple[dict[str, str], list[torch.dtype]]:
    """By key, a description of the difference; and the reference's dtypes that are not those of the merged tensors.

    A tied key may be missing in the reference.
    """
    found = dict.fromkeys(reference.keys(), "only in --test_hf_dir")
    other_dtypes: dict[torch.dtype, None] = {}
    # `compare` gets the tensor as it was stored, and the dtype that --dtype or the config asks for.
    for name, tensor in checkpoint.read(None):
        dtype = checkpoint.dtype if tensor.is_floating_point() else tensor.dtype
        copies = {key for key, owner in checkpoint.keys.tied.items() if owner == name} & reference.keys()
        for key in (name, *copies):
            if key not in reference.keys():
                found[key] = "not in --test_hf_dir"
                continue
            other = reference[key]
            found[key] = compare(tensor, dtype, other)
            if other.dtype != dtype:
                other_dtypes[other.dtype] = None
    return {key: difference for key, difference in found.items() if difference}, list(other_dtypes)


def compare(merged: Tensor, dtype: torch.dtype, reference: Tensor) -> str:
    """How a tensor, converted to `dtype`, differs from its reference; an empty string = not at all.

    Of two floating-point dtypes the coarser one is compared: the same weights may be stored in either.
    """
    if merged.shape != reference.shape or not (is_float(dtype, reference.dtype) or dtype == reference.dtype):
        return f"{list(merged.shape)} {_name(dtype)}, in --test_hf_dir {list(reference.shape)} {_name(reference.dtype)}"
    dtype = coarser(dtype, reference.dtype)
    # Rounded in the same steps as the reference: float32 to float16 to bfloat16 is not float32 to bfloat16.
    merged, reference = merged.to(reference.dtype).to(dtype), reference.to(dtype)
    if same_bits(merged, reference):
        return ""
    gap = (merged.double() - reference.double()).abs()
    count = int((~(gap <= TOLERANCE)).sum())  # NaN counts as a difference
    return f"{count} of {gap.numel()} values differ, by up to {float(gap.max()):.3g}" if count else ""


def is_float(*dtypes: torch.dtype) -> bool:
    return all(dtype.is_floating_point for dtype in dtypes)


def coarser(one: torch.dtype, two: torch.dtype) -> torch.dtype:
    """The one with fewer digits of two floating-point dtypes; of two others, which are equal, the first."""
    return two if is_float(one, two) and torch.finfo(two).eps > torch.finfo(one).eps else one


def say_differences(differences: dict[str, str]) -> None:
    width = max(map(len, differences))
    for key in sorted(differences)[:SHOWN]:
        say(f"  {key:{width}}  {differences[key]}")
    if len(differences) > SHOWN:
        say(f"  ... and {len(differences) - SHOWN} more")


def upload(folder: Path, repo: str, private: bool) -> None:
    """Upload a merged folder to the hub.

    Raises:
        UserError: the hub cannot be reached or rejects it, or --private is given and the repository is public.
    """
    files = {
        str(path.relative_to(folder)): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != RECORD
    }
    try:
        commit = upload_files(files, repo, f"Upload {folder.name}", private=private)
    except UserError as error:
        raise UserError(
            f"--hf_upload_path: {error}; the merged folder is complete, upload it later with hf upload {repo} {folder}"
        ) from error
    say(f"{PROGRAM}: uploaded: {commit.commit_url}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
