"""flash-attn's kernel for packed rows: how it is called, and whether it works here.

That it is installed says little: a build for another torch or another GPU imports and fails at its first call, and a
leftover folder imports as an empty package. So it is run once.
"""

import logging
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# What packages that do not match each other raise when they are imported or called.
_BROKEN = (ImportError, OSError, RuntimeError, AttributeError, LookupError, TypeError, ValueError, AssertionError)
_TRIAL_TOKENS = 16


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], scaling: float | None, window: int | None,
    softcap: float | None,
) -> Tensor:  # fmt: skip
    """Causal attention of rows that stand one after the other in a line.

    Args:
        query: [1, heads, K, head size], float16 or bfloat16; key and value may have fewer heads.
        lengths: tokens of each row; their sum is K.
        window: a token attends to this many tokens, itself included; None = to all before it.

    Returns:
        [1, K, heads, head size].
    """
    from flash_attn import flash_attn_varlen_func

    bounds = F.pad(torch.tensor(lengths, device=query.device).cumsum(0), (1, 0)).to(torch.int32)  # [rows + 1]
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [K, heads, head size]
    # Only what the model needs, since earlier versions do not have these arguments.
    further: dict[str, Any] = {} if window is None else {"window_size": (window - 1, 0)}
    further |= {} if softcap is None else {"softcap": softcap}
    longest = max(lengths)
    out = flash_attn_varlen_func(
        q, k, v, bounds, bounds, longest, longest, softmax_scale=scaling, causal=True, **further
    )
    return out.unsqueeze(0)


@cache
@torch.no_grad()
def flash_problem(
    device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, head_size: int, window: int | None = None,
    softcap: float | None = None,
) -> str | None:  # fmt: skip
    """Why flash-attn cannot compute attention of this shape, or None where it can: tried once in a process.

    That it is installed and does not work is logged.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return f"flash-attn has no {str(dtype).removeprefix('torch.')}"
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, n, _TRIAL_TOKENS, head_size, generator=generator).to(device, dtype)
        for n in (heads, key_heads, key_heads)
    )
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2)
    trial_window = None if window is None else max(window, _TRIAL_TOKENS)
    try:
        found = flash_attention(query, key, value, [_TRIAL_TOKENS], None, trial_window, softcap)
    except ModuleNotFoundError:
        return "flash-attn is not installed"
    except _BROKEN as error:
        reason = f"flash-attn does not work here ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    else:
        if torch.allclose(found, expected, atol=0.05, rtol=0.05):
            return None
        reason = "flash-attn's results are wrong here"
    logging.getLogger(__name__).warning("%s, so torch's own attention is used where there is a choice", reason)
    return reason
