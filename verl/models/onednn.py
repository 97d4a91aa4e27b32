"""Linear layers that multiply by oneDNN: float32, on a CPU.

torch multiplies float32 matrices on a CPU by MKL. That is a tenth slower beside a thousand rows; and it lays the weight
out anew in every call, which is most of the time of the few dozen rows that are decoded together. So a weight that is
not trained is held in oneDNN's layout, and one that is trained is multiplied by as it lies.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# oneDNN chooses the layout for a number of rows; one for this many is good from one row to thousands.
_TYPICAL_ROWS = 128


class PackedLinear(nn.Module):
    """y = x W^T + b with a weight that is held in oneDNN's layout alone.

    Args:
        linear: the layer that it takes the place of.
        keep_weight: the weight is another module's too (a tied embedding), so it stays as it is beside the packed copy.
            Otherwise `weight` becomes a parameter without numbers that carries the name and the shape.
    """

    def __init__(self, linear: nn.Linear, keep_weight: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        shape_alone = nn.Parameter(torch.empty_like(linear.weight, device="meta"), requires_grad=False)
        self.weight = linear.weight if keep_weight else shape_alone
        self.bias = linear.bias
        self.load(linear.weight)

    @torch.no_grad()
    def load(self, weight: Tensor) -> None:
        """Take over a weight [out_features, in_features] float32."""
        self._packed = _pack(weight)

    def multiply(self, rows: Tensor) -> Tensor:
        """rows [N, in_features] times W^T, without the bias: [N, out_features]."""
        return _multiply(rows, self._packed)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError("a packed linear layer has no gradient; call it under torch.no_grad()")
        y = self.multiply(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


def pack_linears(lm: nn.Module) -> None:
    """Put a `PackedLinear` in the place of every linear layer of a model that will not be trained.

    Does nothing where it would not help: off the CPU, in another dtype than float32, or without oneDNN.
    """
    if not all(_helps(weight) for weight in lm.parameters()):
        return
    owners: dict[int, int] = {}
    for module in lm.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for parent, name, linear in _linears(lm):
        setattr(parent, name, PackedLinear(linear, keep_weight=owners[id(linear.weight)] > 1))


class TrainedLinear(nn.Linear):
    """A linear layer with a gradient. Off the CPU, or in another dtype, it is torch's own."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        if not _helps(self.weight) or x.dtype != torch.float32:
            return super().forward(x)
        y = _Product.apply(x.reshape(-1, self.in_features), self.weight).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


def replace_linears(lm: nn.Module) -> None:
    """Put a `TrainedLinear` with the same parameters in the place of every linear layer."""
    for parent, name, linear in _linears(lm):
        setattr(parent, name, TrainedLinear(linear))


class _Product(torch.autograd.Function):
    """rows [N, in] times weight [out, in] transposed."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return _multiply(rows, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        of_rows, of_weight = ctx.needs_input_grad
        # The weight's gradient sums over all rows; there MKL is the faster one.
        return _multiply(grad, weight.T) if of_rows else None, grad.T @ rows if of_weight else None


def product(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """The function x [N, in] to x W^T [N, out] of a weight that does not change meanwhile; it has no gradient.

    Packing the weight costs as much as multiplying a few rows, so it pays from some dozen rows on.
    """
    if not _helps(weight):
        return partial(F.linear, weight=weight)
    return partial(_multiply, weight=_pack(weight))


def _linears(lm: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Every plain linear layer, with its parent and its name there; not those of a class that does more."""
    for parent in list(lm.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and type(child) in (nn.Linear, TrainedLinear):
                yield parent, name, child


def _helps(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()


def _pack(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _TYPICAL_ROWS)


def _multiply(rows: Tensor, weight: Tensor) -> Tensor:
    """rows [N, in] times W^T; the weight [out, in] is packed or not."""
    return torch.ops.mkldnn._linear_pointwise(rows, weight, None, "none", [], "")
