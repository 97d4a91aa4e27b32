"""Attention of packed micro-batches and of decoding, registered with transformers as one implementation.

A model that uses it is called with `packed_segments` (a packed line of rows), with `packed_segments` and
`decoding_cache` (a packed line of prompts, whose keys and values are written to the cache), or with `decoding_cache`
(one new token for every row).
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from verl.config import Kernel
from verl.errors import UserError
from verl.models.decoding_cache import Cached, DecodingCache
from verl.models.packing import Segment
from verl.models.varlen import varlen_attention, varlen_problem

ATTENTION = "grace_packed"
ATTENTIONS: dict[Kernel, str] = {"auto": ATTENTION, "varlen": "grace_packed_varlen", "sdpa": "grace_packed_sdpa"}
"""By kernel, the name under which transformers knows the attention."""

_SDPA = "scaled_dot_product_attention"


def grace_attention(  # noqa: PLR0913 - transformers' interface
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    kernel: Kernel = "auto", packed_segments: list[Segment] | None = None,
    decoding_cache: DecodingCache | None = None, scaling: float | None = None, dropout: float = 0.0,
    sliding_window: int | None = None, softcap: float | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """One layer's attention.

    Args:
        query: [1, heads, K, head size] of a packed line, or [B, heads, 1, head size]; keys may have fewer heads.
        packed_segments: which tokens of the line each token attends to.
        sliding_window: a token attends to this many tokens of its row, itself included; None = to all before it.
        softcap: attention scores become softcap x tanh(score / softcap).

    Returns:
        [1, K, heads, head size] or [B, 1, heads, head size], and None.

    Raises:
        ValueError: the model asks for something that is not implemented, or does not pass on `packed_segments`.
    """
    if dropout or attention_mask is not None:
        raise ValueError(f"its attention has {'dropout' if dropout else 'a mask or a bias of its own'}")
    if packed_segments is None:
        if decoding_cache is None:
            raise ValueError("its layers do not pass on to the attention what the model is called with")
        keys, values = decoding_cache.append(module.layer_idx, key, value)  # type: ignore[arg-type]
        return _one_token_attention(query, keys, values, decoding_cache.bias(sliding_window), scaling, softcap), None
    if decoding_cache is not None:
        decoding_cache.record(module.layer_idx, key, value)  # type: ignore[arg-type]
    if _takes_varlen(kernel, query, key, value, sliding_window, softcap):
        assert all(not s.ancestors for s in packed_segments), "varlen_attn needs rows packed without shared prompts"
        lengths = [s.end - s.start for s in packed_segments]
        return varlen_attention(query, key, value, lengths, scaling, sliding_window), None
    return _segment_attention(query, key, value, packed_segments, scaling, sliding_window, softcap), None


for _kernel, _name in ATTENTIONS.items():
    AttentionInterface.register(_name, partial(grace_attention, kernel=_kernel))


def key_shape(text_config: Any) -> tuple[int, int]:
    """The number of key heads of a layer, and the size of a head."""
    heads = text_config.num_attention_heads
    key_heads = getattr(text_config, "num_key_value_heads", None) or heads
    return key_heads, getattr(text_config, "head_dim", None) or text_config.hidden_size // heads


def cache_bytes(text_config: Any, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of one token in all layers."""
    key_heads, size = key_shape(text_config)
    return 2 * text_config.num_hidden_layers * key_heads * size * dtype.itemsize


def kernel_in_use(config: Any, kernel: Kernel, device: torch.device) -> str:
    """In words, what computes the attention of a model in bfloat16 on a device.

    Raises:
        UserError: varlen_attn is asked for and does not work.
    """
    if kernel == "sdpa" or (kernel == "auto" and device.type == "cpu"):
        return _SDPA
    text = config.get_text_config()
    heads = text.num_attention_heads
    key_heads, size = key_shape(text)
    window, softcap = (getattr(text, name, None) for name in ("sliding_window", "attn_logit_softcapping"))
    problem = varlen_problem(device, torch.bfloat16, heads, key_heads, size, window, softcap)
    if problem and kernel == "varlen":
        raise UserError(f"actor_rollout_ref.model.attn_implementation=varlen, but {problem}; set auto or sdpa")
    return f"{_SDPA} ({problem})" if problem else "varlen_attn"


def _takes_varlen(
    kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, window: int | None, softcap: float | None
) -> bool:
    if kernel == "sdpa" or query.device.type == "cpu" or query.shape[3] != value.shape[3]:
        return False
    shape = (query.shape[1], key.shape[1], query.shape[3])
    problem = varlen_problem(query.device, query.dtype, *shape, window, softcap)
    if problem and kernel == "varlen":
        raise ValueError(problem)
    return problem is None


def _segment_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: list[Segment], scaling: float | None, window: int | None,
    softcap: float | None,
) -> Tensor:  # fmt: skip
    # split, not slices: its backward is one concatenation, and that of a slice fills a whole line with zeros.
    lengths = [s.end - s.start for s in segments]
    queries, keys, values = (x.split(lengths, dim=2) for x in (query, key, value))
    place = {(s.start, s.end): i for i, s in enumerate(segments)}
    outputs = []
    for i, s in enumerate(segments):
        seen = [*(place[ancestor] for ancestor in s.ancestors), i]
        k, v = (torch.cat([x[j] for j in seen], dim=2) for x in (keys, values))
        mask = _narrowed(s.mask, lengths[i], k, window)
        if softcap is None:
            out = F.scaled_dot_product_attention(
                queries[i], k, v, attn_mask=mask, is_causal=mask is None, scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            )  # fmt: skip
        else:
            out = _capped_attention(queries[i], k, v, mask, scaling, softcap)
        outputs.append(out)
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _narrowed(mask: Tensor | None, length: int, key: Tensor, window: int | None) -> Tensor | None:
    """The mask [length, keys] of a segment of `length` tokens, narrowed to a sliding window; None = plain causal."""
    keys = key.shape[2]
    if window is None or keys <= window:
        return mask
    depth = keys - length
    visible = torch.ones(length, keys, dtype=torch.bool, device=key.device)
    return visible.tril_(depth).triu_(depth - window + 1)


def _capped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, softcap: float
) -> Tensor:
    """[1, heads, length, head size]; torch's fused attention knows no soft cap."""
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
    scores = _capped(torch.matmul(query * scale, key.transpose(2, 3)), softcap)
    if mask is None:
        mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril_()
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1, dtype=torch.float32)
    return torch.matmul(weights.to(value.dtype), value)


def _capped(scores: Tensor, softcap: float) -> Tensor:
    return (scores / softcap).tanh() * softcap


def _one_token_attention(
    query: Tensor, key: Cached, value: Cached, bias: Tensor, scaling: float | None, softcap: float | None
) -> Tensor:
    """Grouped-query attention of one token: the query heads that share a key head are that head's queries.

    So no key is repeated. Two plain products, because torch's fused attention takes twice as long for one query on a
    CPU.
    """
    rows, heads, _, size = query.shape
    key_heads = key.rows.shape[1]
    grouped = query.reshape(rows, key_heads, heads // key_heads, size) * (size**-0.5 if scaling is None else scaling)
    of_trunk = _times_trunk(grouped, key.trunk.transpose(1, 2))
    scores = torch.cat([of_trunk, torch.matmul(grouped, key.rows.transpose(2, 3))], dim=-1)
    scores = (scores if softcap is None else _capped(scores, softcap)) + bias
    weights = scores.softmax(-1).to(value.rows.dtype).split([of_trunk.shape[-1], key.rows.shape[2]], dim=-1)
    mean = _times_trunk(weights[0], value.trunk) + torch.matmul(weights[1], value.rows)
    return mean.reshape(rows, 1, heads, mean.shape[-1])


def _times_trunk(rows: Tensor, trunk: Tensor) -> Tensor:
    """[B, key heads, group, n] times [key heads, n, m]: for each key head one product for all rows."""
    count, heads, group, _ = rows.shape
    product = torch.matmul(rows.transpose(0, 1).flatten(1, 2), trunk)
    return product.unflatten(1, (count, group)).transpose(0, 1)
