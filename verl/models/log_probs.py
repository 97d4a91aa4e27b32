"""Log-probs of tokens from hidden states without keeping logits: forward and backward work in chunks of tokens.

Shapes: S tokens, H hidden size, V vocabulary. One chunk's logits [chunk,V] exist at a time, and they are changed in
place: on a CPU a chunk fits the cache, so that all these passes cost little compared with the matrix products.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from verl.models.logits import LogitForm
from verl.models.onednn import TrainedLinear, plain_product, product

# Bytes of a chunk's float32 logits: about half of a CPU's last-level cache; on CUDA enough to keep the device busy.
CHUNK_BYTES = {"cpu": 16 * 2**20, "cuda": 128 * 2**20}

_Product = Callable[[Tensor], Tensor]
_Multiplier = Callable[[Tensor], _Product]


def token_log_probs(
    head: nn.Module, hidden: Tensor, target: Tensor, form: LogitForm, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """Log-probs of `target` under softmax(logits), differentiable in hidden and the head.

    Args:
        head: the model's output layer, `weight` [V,H] and `bias` [V] or None. A `TrainedLinear` multiplies by oneDNN
            where that helps.
        hidden: [S,H].
        target: [S] int64.
        form: how the head's numbers become logits.
        entropy: whether to compute the entropies of the distributions too.

    Returns:
        Log-probs [S] float32, and entropies [S] float32 or None.
    """
    multiplier = product if isinstance(head, TrainedLinear) else plain_product
    log_probs, entropies = _TokenLogProbs.apply(hidden, head.weight, head.bias, target, entropy, multiplier, form)
    return log_probs, entropies if entropy else None


class _TokenLogProbs(torch.autograd.Function):
    """With z the logits at their temperature, p = softmax(z), H the entropy and t the target:

    d log p_t / dz = onehot(t) - p,    dH / dz = -p (log p + H).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, entropy: bool,
        multiplier: _Multiplier, form: LogitForm,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        # A micro-batch that holds only anchors has no scored tokens: then the weight need not be packed.
        multiply = multiplier(weight) if len(hidden) else None
        log_z, log_probs = (torch.empty(len(hidden), device=hidden.device) for _ in range(2))
        entropies = torch.zeros_like(log_probs)
        for rows in _chunks(hidden, weight):
            z = form.logits(_head_numbers(multiply, hidden[rows], bias))
            log_z[rows] = z.logsumexp(-1)
            log_probs[rows] = z.gather(-1, target[rows].unsqueeze(-1)).squeeze(-1) - log_z[rows]
            if entropy:
                entropies[rows] = log_z[rows] - torch.linalg.vecdot((z - log_z[rows].unsqueeze(-1)).exp_(), z)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, target, log_z, entropies)
        ctx.multiplier, ctx.form = multiplier, form
        return log_probs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_probs: Tensor | None, grad_entropies: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, target, log_z, entropies = ctx.saved_tensors
        grad_log_probs = torch.zeros_like(log_z) if grad_log_probs is None else grad_log_probs
        multiply, multiply_back = ctx.multiplier(weight), ctx.multiplier(weight.T)
        grad_hidden = torch.empty_like(hidden)
        # Sums over all tokens, so in float32: with a bfloat16 sum the error would grow with the number of chunks.
        # A frozen head, beside an adapter, has none.
        of_weight, of_bias = ctx.needs_input_grad[1:3]
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if of_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if of_bias else None
        for rows in _chunks(hidden, weight):
            z = ctx.form.logits(_head_numbers(multiply, hidden[rows], bias))
            slope = ctx.form.slope(z)
            log_p = z.sub_(log_z[rows].unsqueeze(-1))
            g = grad_log_probs[rows].unsqueeze(-1)
            if grad_entropies is not None:
                factor = -(g + grad_entropies[rows].unsqueeze(-1) * (log_p + entropies[rows].unsqueeze(-1)))
                grad = log_p.exp_().mul_(factor)
            else:
                grad = log_p.exp_().mul_(-g)
            grad.scatter_add_(-1, target[rows].unsqueeze(-1), g)
            grad = grad.mul_(slope).to(hidden.dtype)
            grad_hidden[rows] = multiply_back(grad)
            if grad_weight is not None:
                _add_product(grad_weight, grad.T, hidden[rows])
            if grad_bias is not None:
                grad_bias += grad.sum(0, dtype=torch.float32)
        grads = (None if total is None else total.to(weight.dtype) for total in (grad_weight, grad_bias))
        return grad_hidden, *grads, None, None, None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to the float32 `total`, without a copy where they are float32 too."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    size = max(1, CHUNK_BYTES[hidden.device.type] // (4 * len(weight)))
    return [slice(start, start + size) for start in range(0, len(hidden), size)]


def _head_numbers(multiply: Any, hidden: Tensor, bias: Tensor | None) -> Tensor:
    """[chunk,V] float32, before the form of the logits; the caller may change it in place."""
    numbers = multiply(hidden) if bias is None else multiply(hidden) + bias
    return numbers.float()
