"""Linear layers that multiply by oneDNN: float32, on a CPU.

torch multiplies float32 matrices on a CPU with MKL. That is about 10 % slower than oneDNN with a thousand rows, and it
repacks the weight in every call, which is most of the time of the few dozen rows that are decoded together. So a weight
that is not trained is kept in oneDNN's layout, and one that is trained is multiplied in torch's.

The operations are private ones of torch. Where they are missing or compute something else, the layers are torch's own.
"""

import logging
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# oneDNN chooses the layout for a number of rows; the layout for this many is fast from one row to thousands.
_TYPICAL_ROWS = 128


class PackedLinear(nn.Module):
    """y = x W^T + b with a weight that is kept only in oneDNN's layout.

    Args:
        linear: the layer that it replaces.
        keep_weight: another module uses the weight too (a tied embedding), so it is kept as well as the packed copy.
            Otherwise `weight` becomes a meta parameter: a name and a shape without numbers.
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
        """Use a new weight [out_features, in_features] float32."""
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
    """Replace every linear layer of a model that will not be trained by a `PackedLinear`.

    Does nothing off the CPU, in another dtype than float32, or where oneDNN's operations do not work.
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
    """A linear layer with a gradient. It is torch's own where oneDNN does not help (see `pack_linears`)."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32 or not _helps(self.weight):
            return super().forward(x)
        y = _Product.apply(x.reshape(-1, self.in_features), self.weight).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


def replace_linears(lm: nn.Module) -> None:
    """Replace every linear layer by a `TrainedLinear` with the same parameters."""
    for parent, name, linear in _linears(lm):
        setattr(parent, name, TrainedLinear(linear))


class _Product(torch.autograd.Function):
    """rows [N, in] times weight [out, in] transposed."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        # A frozen weight, beside an adapter, needs no rows.
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, weight)
        return _multiply(rows, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        of_rows, of_weight = ctx.needs_input_grad
        # The weight's gradient is a sum over all rows; MKL is faster there.
        return _multiply(grad, weight.T) if of_rows else None, grad.T @ rows if of_weight else None


def product(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """The function x [N, in] to x W^T [N, out], without a gradient, of a weight that does not change meanwhile.

    Packing the weight costs as much as multiplying a few rows, so it pays from a few dozen rows on.
    """
    return partial(_multiply, weight=_pack(weight)) if _helps(weight) else plain_product(weight)


def plain_product(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """The same function by torch's own product."""
    return partial(F.linear, weight=weight)


def _linears(lm: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Every plain linear layer, with its parent and its name there; a subclass that does more is left alone."""
    for parent in list(lm.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and type(child) in (nn.Linear, TrainedLinear):
                yield parent, name, child


def _helps(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and _works()


@cache
@torch.no_grad()
def _works() -> bool:
    """Whether torch has the operations and they multiply correctly: tried once in a process, a failure is logged."""
    rows, weight = (torch.linspace(-1, 1, n * 16, device="cpu").view(n, 16) for n in (3, 8))
    try:
        found = [_multiply(rows, weight), _multiply(rows, _pack(weight))]
    except (AttributeError, RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0]
    else:
        if all(torch.allclose(y, rows @ weight.T, atol=1e-5) for y in found):
            return True
        reason = "their results are wrong"
    logging.getLogger(__name__).warning(
        "torch %s: oneDNN's linear operations do not work (%s); torch's own linear layers are used, which are slower",
        torch.__version__, reason,
    )  # fmt: skip
    return False


def _pack(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _TYPICAL_ROWS)


def _multiply(rows: Tensor, weight: Tensor) -> Tensor:
    """rows [N, in] times W^T; the weight [out, in] is packed or not."""
    return torch.ops.mkldnn._linear_pointwise(rows, weight, None, "none", [], "")
