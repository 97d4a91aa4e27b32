"""LoRA, low-rank adapters in a frozen model (Hu et al., arXiv 2106.09685), by peft.

An adapted layer multiplies by W + s B A: W [out, in] stays as it was loaded, A [rank, in] and B [out, rank] are
trained, and s = alpha / rank. B begins as zeros, so that the untrained adapter changes nothing. Everything that needs
plain weights (the rollout engine, a merged checkpoint, the encoder) gets W + s B A, summed in float32.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, inject_adapter_in_model
from peft.tuners.lora import Linear as AdaptedLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn
from transformers.utils import find_adapter_config_file

from verl.config import ModelConfig
from verl.errors import UserError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_NAME = "default"
# What peft puts before a model's own names in a file of adapter weights.
_FILE_PREFIX = "base_model.model."
_KEY = "actor_rollout_ref.model."


@dataclass(frozen=True)
class Adapter:
    """A and B of one weight, as the model holds them: they may be sharded."""

    a: Tensor
    """[rank, in]"""
    b: Tensor
    """[out, rank]"""
    scaling: float


def add_adapter(lm: Any, model: ModelConfig, seed: int) -> None:
    """Freeze a model and give its linear layers adapters: new ones, or those of `lora_adapter_path`.

    Args:
        lm: in float32 on the CPU, or without numbers on the meta device; changed in place. Adapters have numbers.
        seed: of the new adapters' A; the same on all ranks, which hold parts of one.

    Raises:
        UserError: the layers do not exist or cannot have an adapter; or the given adapter does not fit.
    """
    config = _adapter_config(model)
    head = lm.get_output_embeddings()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(config, lm, _NAME)
            _leave_meta(lm, seed)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{_KEY}target_modules={_shown(config.target_modules)}: peft cannot adapt these layers of {model.path!r}: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error
    _check_layers(lm, head, config)
    if model.lora_adapter_path:
        _load_weights(lm, model.lora_adapter_path)


def adapter_line(lm: Any) -> str | None:
    """What is trained, in words; None without an adapter."""
    layers = list(_layers(lm))
    if not layers:
        return None
    trained, whole = count_parameters(lm)
    kinds = sorted({name.rpartition(".")[2] for name, _ in layers})
    config = lm.peft_config[_NAME]
    return (
        f"LoRA of rank {config.r}, alpha {config.lora_alpha:g}, in {len(layers)} layers ({', '.join(kinds)}): "
        f"{trained:,} of {whole:,} parameters ({trained / whole:.2%}); the others are frozen"
    )


def count_parameters(lm: Any) -> tuple[int, int]:
    """Parameters that are trained, and all."""
    sizes = [(weight.numel(), weight.requires_grad) for weight in lm.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters by the name of the parameter W that each is added to; empty for a model without."""
    found = {}
    for name, layer in _layers(model):
        a, b = (model.get_parameter(f"{name}.lora_{part}.{_NAME}.weight") for part in "AB")
        found[f"{name}.base_layer.weight"] = Adapter(a, b, layer.scaling[_NAME])
    return found


def is_part(name: str) -> bool:
    """Whether a parameter of this name is a part of an adapter."""
    return ".lora_" in name


def plain_name(name: str) -> str:
    """The name in the model without adapters of a parameter that is no part of one."""
    return name.replace(".base_layer.", ".")


def file_name(name: str) -> str:
    """The name of a part of an adapter in a file of adapter weights."""
    return f"{_FILE_PREFIX}{name.replace(f'.{_NAME}.', '.')}"


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Let the model compute as it was loaded, without its adapters."""
    layers = [layer for _, layer in _layers(model)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def write_adapter_config(lm: Any, folder: Path, base: str) -> None:
    """Write adapter_config.json.

    Args:
        base: folder or hub name of the model that the adapter belongs to; a folder is written as an absolute path.
    """
    config = lm.peft_config[_NAME]
    config.base_model_name_or_path = str(Path(base).absolute()) if Path(base).is_dir() else base
    config.save_pretrained(folder)


def base_of_adapter(path: str) -> str | None:
    """The model that an adapter belongs to; None where `path` holds a model of its own, and no adapter.

    Args:
        path: folder or hub name.

    Raises:
        UserError: the adapter does not name its model, or that folder is not there.
    """
    found = find_adapter_config_file(path)
    if found is None:
        return None
    base = PeftConfig.from_pretrained(path).base_model_name_or_path
    if not base:
        raise UserError(f"{found} does not name the adapter's model; write it there as base_model_name_or_path")
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise UserError(
            f"{path!r} is an adapter of the model {base!r}, and there is no such folder; bring it there, or write "
            f"where it is as base_model_name_or_path into {found}"
        )
    return base


def whole_model_of(path: str) -> str:
    """The folder or hub name of the whole model, with its config: `path` itself, or the model of an adapter there."""
    base = base_of_adapter(path)
    return path if base is None else whole_model_of(base)


def merge_adapter(lm: Any, path: str) -> Any:
    """The model with an adapter's product added to its weights, in their dtype.

    Raises:
        UserError: the adapter does not fit the model.
    """
    try:
        return PeftModel.from_pretrained(lm, path).merge_and_unload()
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(
            f"the adapter {path!r} does not fit its model {lm.name_or_path!r}: {' '.join(str(error).split())[:300]}"
        ) from error


def _adapter_config(model: ModelConfig) -> LoraConfig:
    if model.lora_adapter_path is None:
        targets = model.target_modules
        return LoraConfig(
            r=model.lora_rank, lora_alpha=model.lora_alpha, task_type="CAUSAL_LM",
            target_modules=targets if isinstance(targets, str) else list(targets),
        )  # fmt: skip
    path = model.lora_adapter_path
    try:
        config = PeftConfig.from_pretrained(path)
    except (ValueError, OSError, TypeError) as error:
        raise UserError(f"{_KEY}lora_adapter_path={path}: there is no adapter of peft: {error}") from error
    if not isinstance(config, LoraConfig):
        raise UserError(f"{_KEY}lora_adapter_path={path} is of the kind {config.peft_type}, and only LoRA is supported")
    if model.lora_rank not in (0, config.r):
        raise UserError(
            f"{_KEY}lora_rank={model.lora_rank}, but the adapter {path} has rank {config.r}; leave lora_rank out"
        )
    config.inference_mode = False
    # Training is without dropout: the update has to compute what was scored.
    config.lora_dropout = 0.0
    return config


def _leave_meta(lm: Any, seed: int) -> None:
    """Make adapters anew that peft has moved to the meta device, where their weights are; with the same numbers."""
    torch.manual_seed(seed)
    for _, layer in _layers(lm):
        if layer.weight.is_meta:
            for parts in (layer.lora_A, layer.lora_B):
                part: Any = parts[_NAME]
                parts[_NAME] = nn.Linear(part.in_features, part.out_features, bias=False)
            layer.reset_lora_parameters(_NAME, True)


def _check_layers(lm: Any, head: nn.Module, config: LoraConfig) -> None:
    """Refuse what the packed forward, or the sum W + s B A, would leave out."""
    for name, module in lm.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        if module.get_base_layer() is head:
            raise UserError(
                f"{_KEY}target_modules={_shown(config.target_modules)} has {name}, the LM head: log-probs are computed "
                "from its plain weight, so an adapter there would have no effect; leave it out"
            )
        if type(module) is not AdaptedLinear or not isinstance(module.get_base_layer(), nn.Linear):
            kind = type(module.get_base_layer()).__name__
            raise UserError(
                f"{_KEY}target_modules={_shown(config.target_modules)} has {name}, a {kind}: only linear layers are "
                "supported"
            )
    others = [
        name
        for name, weight in lm.named_parameters()
        if weight.requires_grad and not name.endswith((f".lora_A.{_NAME}.weight", f".lora_B.{_NAME}.weight"))
    ]
    if others:
        raise UserError(
            f"the adapter trains {others[0]} and {len(others) - 1} others besides its A and B (bias, DoRA or "
            "modules_to_save); only plain LoRA is supported"
        )


def _load_weights(lm: Any, path: str) -> None:
    weights = {name.removeprefix(_FILE_PREFIX): value for name, value in load_peft_weights(path, device="cpu").items()}
    found: Any
    try:
        found = set_peft_model_state_dict(lm, weights, _NAME)
    except RuntimeError as error:
        problem = " ".join(str(error).split())[:300]
        raise UserError(f"{_KEY}lora_adapter_path={path} does not fit the model: {problem}") from error
    missing = [name for name in found.missing_keys if is_part(name)]
    if missing or found.unexpected_keys:
        raise UserError(
            f"{_KEY}lora_adapter_path={path} does not fit the model: missing {missing[:3]}, unexpected "
            f"{found.unexpected_keys[:3]}"
        )


def _layers(model: nn.Module) -> Iterator[tuple[str, AdaptedLinear]]:
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLinear):
            yield name, module


def _shown(targets: Any) -> Any:
    return targets if isinstance(targets, str) else sorted(targets)
