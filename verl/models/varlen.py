"""torch's attention of rows of different lengths (`varlen_attn`), on CUDA: how it is called, and whether it works here.

That torch has it says little: it needs a GPU that its kernels were built for, and its arguments differ between
versions. So it is run once, and its numbers are compared.
"""

import logging
from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

# What a function raises that is not there, knows other arguments, or has no kernel for this device.
_BROKEN = (ImportError, RuntimeError, AttributeError, TypeError, ValueError, NotImplementedError)
_TRIAL_TOKENS = 16


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], scaling: float | None, window: int | None
) -> Tensor:  # fmt: skip
    """Causal attention of rows that stand one after the other in a line.

    Args:
        query: [1, heads, K, head size], float16 or bfloat16; key and value may have fewer heads.
        lengths: tokens of each row; their sum is K.
        window: a token attends to this many tokens, itself included; None = to all before it.

    Returns:
        [1, K, heads, head size].

    Raises:
        ImportError: this torch has no such function.
    """
    from torch.nn.attention.varlen import varlen_attn

    bounds = F.pad(torch.tensor(lengths, device=query.device).cumsum(0), (1, 0)).to(torch.int32)  # [rows + 1]
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [K, heads, head size]
    longest = max(lengths)
    out = varlen_attn(
        q, k, v, bounds, bounds, longest, longest, scale=scaling,
        window_size=(-1 if window is None else window - 1, 0), enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    return out.unsqueeze(0)


@cache
@torch.no_grad()
def varlen_problem(
    device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, head_size: int, window: int | None = None,
    softcap: float | None = None,
) -> str | None:  # fmt: skip
    """Why `varlen_attention` cannot compute attention of this shape, or None where it can: tried once in a process.

    That it fails or is wrong is logged.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return f"varlen_attn has no {str(dtype).removeprefix('torch.')}"
    if softcap is not None:
        return "varlen_attn has no soft cap"
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, n, _TRIAL_TOKENS, head_size, generator=generator).to(device, dtype)
        for n in (heads, key_heads, key_heads)
    )
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2)
    trial_window = None if window is None else max(window, _TRIAL_TOKENS)
    try:
        found = varlen_attention(query, key, value, [_TRIAL_TOKENS], None, trial_window)
    except _BROKEN as error:
        reason = (
            f"varlen_attn of torch {torch.__version__} does not work here "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        )
    else:
        if torch.allclose(found, expected, atol=0.05, rtol=0.05):
            return None
        reason = "varlen_attn's results are wrong here"
    logging.getLogger(__name__).warning("%s, so rows are computed one by one where there is a choice", reason)
    return reason
