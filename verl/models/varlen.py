"""torch's kernel for packed rows, `varlen_attn`: how it is called, and whether it works here.

That torch has it says little: it runs on some GPUs only, for some dtypes and head sizes, and its arguments differ
between releases. So it is run once, and its results and gradients are compared with plain attention.
"""

import logging
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# What a call raises where torch, its build or the GPU does not support it.
_BROKEN = (ImportError, OSError, RuntimeError, AttributeError, LookupError, TypeError, ValueError, AssertionError)
_TRIAL_LENGTHS = (11, 5)
_TRIAL_WINDOW = 4


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], scaling: float | None, window: int | None
) -> Tensor:
    """Causal attention of rows that stand one after the other in a line.

    Args:
        query: [1, heads, K, head size], float16 or bfloat16; key and value may have fewer heads.
        lengths: tokens of each row; their sum is K.
        window: a token attends to this many tokens, itself included; None = to all before it.

    Returns:
        [1, K, heads, head size].

    Raises:
        ModuleNotFoundError: torch is older than 2.10.
        TypeError: torch is older than 2.11, or than 2.12 where key heads are fewer than heads.
    """
    from torch.nn.attention.varlen import varlen_attn

    bounds = _bounds(tuple(lengths), query.device)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [K, heads, head size]
    # Only where the model needs it, since torch 2.11 does not have this argument.
    further: dict[str, Any] = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    before = -1 if window is None else window - 1
    longest = max(lengths)
    out = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scaling, window_size=(before, 0), **further)
    assert isinstance(out, Tensor)
    return out.unsqueeze(0)


@lru_cache(maxsize=1)
def _bounds(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """[rows + 1] int32: where each row begins, and the end.

    The layers of a forward share them: every copy to a GPU waits until the GPU has done all work before it.
    """
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(device, torch.int32)


@cache
def varlen_problem(
    device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, head_size: int, window: int | None = None,
    softcap: float | None = None,
) -> str | None:  # fmt: skip
    """Why `varlen_attn` cannot compute attention of this shape, or None where it can: tried once in a process.

    That it does not work although it should is logged.
    """
    if softcap is not None:
        return "torch's varlen_attn has no soft cap"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"torch's varlen_attn has no {str(dtype).removeprefix('torch.')}"
    generator, tokens = torch.Generator().manual_seed(0), sum(_TRIAL_LENGTHS)
    line = [torch.randn(1, n, tokens, head_size, generator=generator).to(dtype) for n in (heads, key_heads, key_heads)]
    trial_window = None if window is None else _TRIAL_WINDOW
    expected = _with_gradients(lambda q, k, v: _plain(q, k, v, trial_window), [x.float() for x in line])
    try:
        found = _with_gradients(
            lambda q, k, v: varlen_attention(q, k, v, _TRIAL_LENGTHS, None, trial_window), [x.to(device) for x in line]
        )
        found = [x.float().cpu() for x in found]  # here a kernel's own errors come to light
    except ModuleNotFoundError:
        return f"torch {torch.__version__} has no varlen_attn"
    except _BROKEN as error:
        message = " ".join(str(error).split())[:200]
        reason = f"torch {torch.__version__}'s varlen_attn does not work here ({type(error).__name__}: {message})"
    else:
        near = [torch.allclose(x, y, atol=0.05, rtol=0.05) for x, y in zip(found, expected, strict=True)]
        if all(near):
            return None
        reason = f"torch's varlen_attn computes wrong {'gradients' if near[0] else 'results'} here"
    logging.getLogger(__name__).warning("%s, so scaled_dot_product_attention is used where there is a choice", reason)
    return reason


@torch.enable_grad()
def _with_gradients(attend: Callable[[Tensor, Tensor, Tensor], Tensor], line: Sequence[Tensor]) -> list[Tensor]:
    """The output of an attention, and its gradients by query, key and value."""
    query, key, value = (x.detach().requires_grad_() for x in line)
    out = attend(query, key, value)
    weight = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.device, out.dtype)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), (query, key, value))]


def _plain(query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
    """The trial's attention by torch's plain one, under a mask."""
    row = torch.repeat_interleave(torch.arange(len(_TRIAL_LENGTHS)), torch.tensor(_TRIAL_LENGTHS))
    place = torch.arange(len(row))
    distance = place[:, None] - place
    seen = (row[:, None] == row) & (distance >= 0) & (distance < (len(row) if window is None else window))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=seen, enable_gqa=True).transpose(1, 2)
