"""What a checkpoint holds: torch DCP shards to resume from, and a transformers folder to use.

global_step_N/actor/                       DCP shards: weights (float32), optimizer
global_step_N/actor/extra_rank_R.pt        learning-rate schedule, RNG, norms of the gradients
global_step_N/huggingface/                 loads with AutoModelForCausalLM
"""

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers.utils import GENERATION_CONFIG_NAME

from verl.algorithm.gradient_balance import GradientBalance
from verl.checkpoint.disk_errors import disk_errors
from verl.checkpoint.safe_dcp import SafePlanner, SafeReader
from verl.config import RunConfig
from verl.embedding.settings import EmbedderSettings
from verl.models.lora import WEIGHTS_NAME, write_adapter_config

# What DCP's names of an optimizer's state by weight begin with.
_MOMENTS = "optimizer.state."


def checkpoint_size(config: RunConfig, trained: int, parameters: int, dtype: torch.dtype | None) -> int:
    """About the bytes of a checkpoint: what is trained, with AdamW's moments in float32, and the model folder.

    Args:
        trained: parameters that are trained.
        parameters: all of the model's.
        dtype: of the model that training starts from; None = float32.
    """
    return trained * 3 * torch.float32.itemsize + folder_size(config, trained, parameters, dtype)


def folder_size(config: RunConfig, trained: int, parameters: int, dtype: torch.dtype | None) -> int:
    """About the bytes of a checkpoint's model folder; see `checkpoint_size`."""
    if not config.saves_whole_model:
        return trained * torch.float32.itemsize
    return parameters * (dtype or torch.float32).itemsize


def save_training_state(
    folder: Path, model: torch.nn.Module, optimizer: Optimizer, scheduler: LambdaLR, rank: int,
    balance: GradientBalance | None = None,
) -> None:  # fmt: skip
    """Write weights, optimizer, schedule, RNG and what `balance` has measured; all ranks call it with the same folder.

    Raises:
        OSError: the disk is full, or the folder cannot be written to.
    """
    state: dict[str, Any] = {"model": _trained_state(model)}
    # Before its first step (all updates so far were skipped) it has no state, and torch would make one by a step.
    if optimizer.state:
        state["optimizer"] = get_optimizer_state_dict(model, optimizer)
    try:
        dcp.save(state, storage_writer=_ShardWriter(folder))
    except CheckpointException as error:
        raise _cause(error) from error
    extra = {"scheduler": scheduler.state_dict(), "rng": torch.get_rng_state()}
    if balance:
        extra["gradient_balance"] = balance.state_dict()
    # Opened by Python, whose errors say what failed on the disk.
    with disk_errors(), (folder / f"extra_rank_{rank}.pt").open("wb") as file:
        torch.save(extra, file)


class _ShardWriter(dcp.FileSystemWriter):
    """torch's writer of shards, which raises the disk's own error on the rank where it happens.

    An error loses its cause on its way to rank 0.
    """

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        with disk_errors():
            return super().write_data(plan, planner)


def load_training_state(
    folder: Path, model: torch.nn.Module, optimizer: Optimizer, scheduler: LambdaLR, rank: int,
    balance: GradientBalance | None = None,
) -> None:  # fmt: skip
    """Load what `save_training_state` wrote, on any number of ranks.

    What was learned and counted is the checkpoint's. Learning rate, its schedule, betas and weight decay stay those
    that `optimizer` and `scheduler` were built with, so that a setting changed for the resumed run takes effect; so do
    those of `balance`, which measures anew where the checkpoint has no measurement.
    Weights that no step had changed have no optimizer state there; theirs begins anew.

    Raises:
        DcpError: a file is damaged or could run code.
    """
    settings = [{name: group[name] for name in group if name != "params"} for group in optimizer.param_groups]
    reader = SafeReader(folder)
    stored = reader.read_metadata().state_dict_metadata
    state: dict[str, Any] = {"model": _trained_state(model)}
    if any(name.startswith(_MOMENTS) for name in stored):
        state["optimizer"] = get_optimizer_state_dict(model, optimizer)
        new = _take_unsaved(state["optimizer"]["state"], stored)
    try:
        dcp.load(state, storage_reader=reader, planner=SafePlanner())
    except CheckpointException as error:
        raise _cause(error) from error
    set_model_state_dict(model, state["model"], options=StateDictOptions(strict=False))
    if "optimizer" in state:
        state["optimizer"]["state"] |= new
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
    own = folder / f"extra_rank_{rank}.pt"
    # With more ranks than before, the new ones take rank 0's schedule and keep their own random state.
    extra = torch.load(own if own.is_file() else folder / "extra_rank_0.pt", weights_only=True)
    scheduler.load_state_dict({**extra["scheduler"], "base_lrs": scheduler.base_lrs})
    _put_back(settings, optimizer, scheduler)
    if balance and "gradient_balance" in extra:
        balance.load_state_dict(extra["gradient_balance"])
    if own.is_file():
        torch.set_rng_state(extra["rng"])


def _trained_state(model: torch.nn.Module) -> dict[str, Any]:
    """The state without frozen weights, which, beside adapters, are those of the model that training started from."""
    # torch's own ignore_frozen_params keeps a frozen weight under the second of two names that it is tied to.
    frozen = {name for name, weight in model.named_parameters(remove_duplicate=False) if not weight.requires_grad}
    return {name: value for name, value in get_model_state_dict(model).items() if name not in frozen}


def _put_back(settings: list[dict[str, Any]], optimizer: Optimizer, scheduler: LambdaLR) -> None:
    """Give the optimizer the settings of its groups again, with the learning rates of the schedule's present step."""
    factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
    rates = [base * factor for base, factor in zip(scheduler.base_lrs, factors, strict=True)]
    for group, configured, rate in zip(optimizer.param_groups, settings, rates, strict=True):
        group.update(configured, lr=rate)
    scheduler._last_lr = rates


def _take_unsaved(moments: dict[str, dict[str, Tensor]], stored: Collection[str]) -> dict[str, dict[str, Tensor]]:
    """Remove from an optimizer's state by weight what a checkpoint does not hold; return that, as before any step."""
    names = [name for name in moments if not any(f"{_MOMENTS}{name}.{part}" in stored for part in moments[name])]
    unsaved = {name: moments.pop(name) for name in names}
    for own in unsaved.values():
        for value in own.values():
            value.zero_()
    return unsaved


def _cause(error: CheckpointException) -> BaseException:
    """The error of the first rank that failed, in place of torch's list of tracebacks."""
    rank = min(error.failures)
    return error.failures[rank][0]


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

    Raises:
        OSError: the disk is full, or the folder cannot be written to.
    """
    kept = _on_rank_0(weights, lm.config.dtype or torch.float32, rank)
    if rank != 0:
        return
    with disk_errors():
        folder.mkdir(parents=True)
        save_torch_state_dict(kept, folder)
        lm.config.save_pretrained(folder)
        _save_generation_config(lm, folder)
        tokenizer.save_pretrained(folder)
        embedder.write(folder)


def save_adapter_folder(
    folder: Path,
    weights: Iterable[tuple[str, Tensor]],
    lm: Any,
    base: str,
    tokenizer: Any,
    embedder: EmbedderSettings,
    rank: int,
) -> None:
    """Write a folder with a peft adapter in float32, which transformers and the encoder load with its model.

    It has no config.json: with one, transformers takes the folder for a whole model.

    All ranks iterate over `weights`, the adapter's parts under peft's names; rank 0 writes.

    Args:
        base: folder or hub name of the model that the adapter belongs to.

    Raises:
        OSError: the disk is full, or the folder cannot be written to.
    """
    kept = _on_rank_0(weights, torch.float32, rank)
    if rank != 0:
        return
    with disk_errors():
        folder.mkdir(parents=True)
        save_file(kept, folder / WEIGHTS_NAME, {"format": "pt"})
        write_adapter_config(lm, folder, base)
        _save_generation_config(lm, folder)
        tokenizer.save_pretrained(folder)
        embedder.write(folder)


def _save_generation_config(lm: Any, folder: Path) -> None:
    """As it was loaded: its `save_pretrained` refuses what transformers loads with a warning, such as a temperature
    without do_sample, which models come with."""
    lm.generation_config.to_json_file(folder / GENERATION_CONFIG_NAME)


def _on_rank_0(weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype, rank: int) -> dict[str, Tensor]:
    """Copies in host memory on rank 0; other ranks take part in gathering them and keep none."""
    return {name: tensor.to("cpu", dtype, copy=True).contiguous() for name, tensor in weights if rank == 0}
