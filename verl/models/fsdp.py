"""Sharding a policy with torch FSDP2, moving it between devices, its optimizer, and its full weights.

On a CPU with one process there is nothing to shard and the plain module is used. Knows nothing of
Ray, rollout engines or rewards.
"""

import math
from collections.abc import Collection, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from verl.config import FsdpConfig, OptimConfig
from verl.errors import UserError
from verl.models.lora import Adapter, adapters, file_name, is_part, plain_name
from verl.models.policy import PolicyModel

LM_PREFIX = "lm."

CUDA_PRECISION = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
"""Forwards and backwards in bfloat16; shards, gradients and their sums over ranks in float32.

Weights alone are rounded, as by an encoder, which shards nothing. Inputs in float32 stay so: the weights of means, and
the cosines and sines that OLMo gives its layers."""


class Meshes:
    """How the ranks are grouped to shard over; each grouping is made once.

    Its process groups, with their connections, are there until the worker ends, whoever used them.

    Args:
        limit: longest wait of a rank for the others of its group; None = torch's own.
    """

    def __init__(self, limit: timedelta | None = None) -> None:
        self._limit = limit
        self._made: dict[tuple[str, int], DeviceMesh] = {}

    def of(self, device_type: str, size: int) -> DeviceMesh:
        """Groups of `size` ranks; each group holds all weights."""
        if (device_type, size) not in self._made:
            self._made[device_type, size] = self._make(device_type, size)
        return self._made[device_type, size]

    def _make(self, device_type: str, size: int) -> DeviceMesh:
        replicas = dist.get_world_size() // size
        shape, names = ((size,), ("fsdp",)) if replicas == 1 else ((replicas, size), ("ddp", "fsdp"))
        mesh = init_device_mesh(device_type, shape, mesh_dim_names=names)
        if self._limit is not None:
            for group in mesh.get_all_groups():
                group.set_timeout(self._limit)
        return mesh


def shard(
    policy: PolicyModel, device: torch.device, config: FsdpConfig, offload_policy: bool, section: str = "actor",
    compute_as: str | None = None, meshes: Meshes | None = None,
) -> PolicyModel:  # fmt: skip
    """Shard the decoder layers and the root over all ranks: float32 master weights, bfloat16 compute on CUDA.

    Weights on the meta device stay there; see `models.sharded_load`.

    Args:
        offload_policy: keep the shards in host memory by torch's CPUOffloadPolicy.
        section: of the config, for messages: actor or ref.
        compute_as: the type of device whose precision is used; None = the device's own.
        meshes: where the groups of ranks are kept; None = they are made for this policy.

    Raises:
        UserError: config.fsdp_size does not divide the number of workers, or the model names no decoder layers.
    """
    world_size = dist.get_world_size()
    compute_as = compute_as or device.type
    if not is_sharded(compute_as):
        return policy
    # FSDP moves the layers one after the other, so the device never holds the whole model.
    policy.device = device
    mesh = (meshes or Meshes()).of(device.type, shard_group(config, world_size, section))
    precision = CUDA_PRECISION if compute_as == "cuda" else MixedPrecisionPolicy()
    offload = CPUOffloadPolicy() if offload_policy else OffloadPolicy()
    shard_over(policy, mesh, precision, offload, config.reshard_after_forward)
    return policy


def shard_group(config: FsdpConfig, world_size: int, section: str) -> int:
    """How many ranks share the shards of a model.

    Raises:
        UserError: config.fsdp_size does not divide the number of workers.
    """
    group = config.fsdp_size if 0 < config.fsdp_size < world_size else world_size
    if world_size % group:
        raise UserError(
            f"actor_rollout_ref.{section}.fsdp_config.fsdp_size={group} does not divide the {world_size} workers; "
            "use a divisor, or -1 for all"
        )
    return group


def is_sharded(device_type: str) -> bool:
    """Whether `shard` shards what computes on that type of device."""
    return device_type != "cpu" or dist.get_world_size() > 1


def shard_over(
    policy: PolicyModel, mesh: DeviceMesh, precision: MixedPrecisionPolicy, offload: OffloadPolicy | None = None,
    reshard_after_forward: bool = True,
) -> None:  # fmt: skip
    """Shard the decoder layers and the root, in place.

    Raises:
        UserError: the model names no decoder layers.
    """
    offload = offload or OffloadPolicy()
    for layer in decoder_layers(policy):
        fully_shard(
            layer, mesh=mesh, mp_policy=precision, offload_policy=offload, reshard_after_forward=reshard_after_forward
        )
    fully_shard(policy, mesh=mesh, mp_policy=precision, offload_policy=offload)


def reshard(policy: nn.Module) -> None:
    """Free the gathered weights that a forward without a backward leaves; the parameters are float32 shards again.

    FSDP keeps the root's (embedding and LM head) for a backward, and with reshard_after_forward=False all. As long as
    they exist `policy.named_parameters()` are these, in the dtype of the forward.
    """
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def decoder_layers(policy: PolicyModel) -> list[nn.Module]:
    """The repeated blocks of the model, found by the class names transformers marks as unsplittable."""
    names = set(policy.lm._no_split_modules or [])
    layers = [m for m in policy.lm.modules() if type(m).__name__ in names]
    if not layers:
        raise UserError(
            f"models of type {policy.lm.config.model_type!r} name no decoder layers; they cannot be sharded"
        )
    return layers


def build_optimizer(policy: PolicyModel, config: OptimConfig) -> Optimizer:
    """AdamW over the parameters that are trained."""
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True)


def build_scheduler(optimizer: Optimizer, config: OptimConfig, total_steps: int) -> LambdaLR:
    """Linear warm-up, then constant or cosine, as in verl 0.4; stepped once per training step.

    With cosine, min_lr_ratio x lr is the lowest rate of the warm-up too.
    """
    warmup = config.lr_warmup_steps
    if warmup < 0:
        warmup = int(config.lr_warmup_steps_ratio * total_steps)

    lowest = config.min_lr_ratio if config.warmup_style == "cosine" else 0.0

    def factor(step: int) -> float:
        if step < warmup:
            share = step / warmup
        elif config.warmup_style == "constant":
            share = 1.0
        else:
            progress = (step - warmup) / max(1, total_steps - warmup)
            share = max(0.0, 0.5 * (1 + math.cos(2 * math.pi * config.num_cycles * progress)))
        return lowest + (1 - lowest) * share

    return LambdaLR(optimizer, factor)


def move_optimizer(optimizer: Optimizer, device: torch.device) -> None:
    """Move the optimizer's state tensors; its step counters stay where they are."""
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor) and name != "step":
                state[name] = value.to(device, non_blocking=True)
    if torch.cuda.is_available():
        # A checkpoint may read the copies next.
        torch.cuda.synchronize()


def full_weights(
    policy: PolicyModel, names: Collection[str] | None = None, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Weights under their transformers names on the policy's device, gathered one at a time. All ranks must iterate.

    Offloaded shards are moved there first, one weight at a time. A weight with an adapter is the sum of both, added
    before it is converted.

    Args:
        names: only these; None = all.
        dtype: None = as they are.
    """
    reshard(policy)
    adapter_of = adapters(policy)
    for own_name, parameter in policy.named_parameters():
        name = plain_name(own_name.removeprefix(LM_PREFIX))
        if is_part(name) or (names is not None and name not in names):
            continue
        adapter = adapter_of.get(own_name)
        if adapter is None:
            yield name, _gathered(policy, parameter, dtype)
        else:
            weight = _gathered(policy, parameter) + _product(policy, adapter)
            yield name, weight.to(dtype or weight.dtype)


def adapted_weights(policy: PolicyModel, names: Collection[str]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Of the named weights that have an adapter, the weight without it and what it adds. All ranks must iterate."""
    reshard(policy)
    weights = dict(policy.named_parameters())
    for own_name, adapter in adapters(policy).items():
        name = plain_name(own_name.removeprefix(LM_PREFIX))
        if name in names:
            yield name, _gathered(policy, weights[own_name]), _product(policy, adapter)


def adapter_weights(policy: PolicyModel) -> Iterator[tuple[str, Tensor]]:
    """The parts of the adapters under the names of a peft file, gathered one at a time. All ranks must iterate."""
    reshard(policy)
    for own_name, parameter in policy.named_parameters():
        if is_part(own_name):
            yield file_name(own_name.removeprefix(LM_PREFIX)), _gathered(policy, parameter)


def _gathered(policy: PolicyModel, parameter: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The full parameter on the policy's device; converted before it is gathered."""
    tensor = parameter.detach().to(policy.device, dtype or parameter.dtype)
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _product(policy: PolicyModel, adapter: Adapter) -> Tensor:
    """What an adapter adds to its weight, s B A."""
    return (_gathered(policy, adapter.b) @ _gathered(policy, adapter.a)) * adapter.scaling


def take_gradient(policy: PolicyModel) -> list[Tensor | None]:
    """The gradient, by parameter; the policy has none from then on."""
    taken = [parameter.grad for parameter in policy.parameters()]
    policy.zero_grad(set_to_none=True)
    return taken


def combine_gradient(policy: PolicyModel, scale: float, other: list[Tensor | None]) -> None:
    """Make the policy's gradient scale x what it is + other, which is used up."""
    for parameter, added in zip(policy.parameters(), other, strict=True):
        if parameter.grad is None:
            parameter.grad = added
            continue
        parameter.grad.mul_(scale)
        if added is not None:
            parameter.grad.add_(added)


def clip_gradient(policy: PolicyModel, max_norm: float) -> float:
    """Scale the gradient down to `max_norm`; return its norm before that, over all ranks."""
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), max_norm)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
