"""Checkpoints: torch DCP shards to go on from, and a transformers folder to use.

    <run>/latest_checkpointed_iteration.txt          the newest complete step
    <run>/global_step_N/actor/                       DCP shards: weights (float32), optimizer
    <run>/global_step_N/actor/extra_rank_R.pt        learning-rate schedule, RNG
    <run>/global_step_N/huggingface/                 loads with AutoModelForCausalLM
    <run>/global_step_N/trainer_state.json           step, samples seen, config, versions

A step is written under a temporary name and renamed when whole; `latest` is written last.
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from verl.embedding.settings import EmbedderSettings

LATEST = "latest_checkpointed_iteration.txt"
STEP_PREFIX = "global_step_"


def step_folder(run_dir: Path, step: int) -> Path:
    return run_dir / f"{STEP_PREFIX}{step}"


def temporary_folder(run_dir: Path, step: int) -> Path:
    """Where a step is written before it is whole."""
    return run_dir / f".{STEP_PREFIX}{step}.writing"


def empty_temporary_folder(run_dir: Path, step: int) -> Path:
    """The temporary folder of a step, without what a killed run may have left there."""
    folder = temporary_folder(run_dir, step)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def save_training_state(
    folder: Path, model: torch.nn.Module, optimizer: Optimizer, scheduler: LRScheduler, rank: int
) -> None:
    """Write weights, optimizer, schedule and RNG; all ranks call it with the same folder."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    extra = {"scheduler": scheduler.state_dict(), "rng": torch.get_rng_state()}
    torch.save(extra, folder / f"extra_rank_{rank}.pt")


def load_training_state(
    folder: Path, model: torch.nn.Module, optimizer: Optimizer, scheduler: LRScheduler, rank: int
) -> None:
    """Read what `save_training_state` wrote, on any number of ranks."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    own = folder / f"extra_rank_{rank}.pt"
    # On more ranks than before, the new ones take over rank 0's schedule and keep their own RNG.
    extra = torch.load(own if own.is_file() else folder / "extra_rank_0.pt", weights_only=True)
    scheduler.load_state_dict(extra["scheduler"])
    if own.is_file():
        torch.set_rng_state(extra["rng"])


def save_transformers_folder(
    folder: Path,
    weights: Iterable[tuple[str, Tensor]],
    lm: Any,
    tokenizer: Any,
    embedder: EmbedderSettings,
    rank: int,
) -> None:
    """Write a folder that transformers loads, in the dtype of the model that training started from.

    All ranks iterate over `weights`, full tensors; rank 0 writes.
    """
    dtype = lm.config.dtype or torch.float32
    kept: dict[str, Tensor] = {}
    for name, tensor in weights:
        if rank == 0:
            kept[name] = tensor.to("cpu", dtype, copy=True).contiguous()
    if rank != 0:
        return
    folder.mkdir(parents=True)
    save_torch_state_dict(kept, folder)
    lm.config.save_pretrained(folder)
    lm.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    embedder.write(folder)


def publish(run_dir: Path, step: int, trainer_state: dict[str, Any], keep: int | None) -> Path:
    """Give a written step its name, make it the latest, and remove the oldest beyond `keep`."""
    written, final = temporary_folder(run_dir, step), step_folder(run_dir, step)
    (written / "trainer_state.json").write_text(json.dumps(trainer_state, indent=1) + "\n")
    if final.exists():
        shutil.rmtree(final)
    written.rename(final)
    latest = run_dir / f".{LATEST}.writing"
    latest.write_text(f"{step}\n")
    latest.replace(run_dir / LATEST)
    steps = sorted(saved_steps(run_dir))
    for old in steps[:-keep] if keep else []:
        shutil.rmtree(step_folder(run_dir, old))
    return final


def saved_steps(run_dir: Path) -> list[int]:
    return [
        int(path.name.removeprefix(STEP_PREFIX)) for path in run_dir.glob(f"{STEP_PREFIX}*") if path.name[12:].isdigit()
    ]


def latest_step(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    tracker = run_dir / LATEST
    return step_folder(run_dir, int(tracker.read_text())) if tracker.is_file() else None
