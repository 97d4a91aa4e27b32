"""Attention of packed micro-batches and of decoding, registered with transformers as one implementation.

A model that uses it is called with `packed_segments` (a packed line of rows), with `packed_segments` and
`decoding_cache` (a packed line of prompts, whose keys and values are written to the cache), or with `decoding_cache`
(one new token for every row).
"""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from verl.models.packing import Segment

ATTENTION = "grace_packed"


class DecodingCache:
    """Keys and values of rows that are being decoded, in buffers of their final size.

    Prompts are right-aligned: in front of a short prompt, columns are empty.

    Args:
        prompt_lengths: tokens of each of the B prompts.
        max_new_tokens: most tokens that will be appended.
    """

    def __init__(self, prompt_lengths: Sequence[int], max_new_tokens: int, device: torch.device) -> None:
        self.width = max(prompt_lengths)
        self.length = self.width  # columns in use
        self._capacity = self.width + max_new_tokens
        first = torch.tensor([self.width - length for length in prompt_lengths], device=device)
        visible = torch.arange(self._capacity, device=device) >= first.unsqueeze(1)
        self._bias = torch.zeros(visible.shape, device=device).masked_fill(~visible, -torch.inf)  # [B, capacity]
        self._keys: dict[int, Tensor] = {}  # by layer, [B, heads, capacity, head size]
        self._values: dict[int, Tensor] = {}
        self._rows = self._source = torch.empty(0)

    @property
    def bias(self) -> Tensor:
        """[B, 1, 1, length] float32: 0 in the columns that a row's newest token may attend to, -inf in others."""
        return self._bias[:, None, None, : self.length]

    def expect(self, rows: Tensor, source: Tensor) -> None:
        """Set where the keys and values of the next forward's prompts are written.

        Args:
            rows: [R] int64, rows of this cache.
            source: [R, width] int64, for every column the position in the packed line that it comes from; any value
                for an empty column.
        """
        self._rows, self._source = rows, source

    def record(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Write a layer's keys and values [1, heads, K, head size] of packed prompts."""
        for buffers, packed in ((self._keys, key), (self._values, value)):
            if layer not in buffers:
                heads, size = packed.shape[1], packed.shape[3]
                buffers[layer] = packed.new_empty(len(self._bias), heads, self._capacity, size)
            buffers[layer][self._rows, :, : self.width] = packed[0][:, self._source].transpose(0, 1)

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add the newest token's keys and values [B, heads, 1, head size]; return those of all its columns."""
        found = []
        for buffers, new in ((self._keys, key), (self._values, value)):
            buffer = buffers[layer][: len(self._bias), :, : self.length]
            buffer[:, :, -1:] = new
            found.append(buffer)
        return found[0], found[1]

    def keep(self, going: Tensor) -> Tensor:
        """Keep the rows where `going` [B] bool is True; return [B'] int64, the former index of every row kept.

        The last rows are copied over the dropped ones, so dropping a row costs the copy of one row.
        """
        count = int(going.sum())
        place = torch.arange(len(going), device=going.device)
        free, moved = place[:count][~going[:count]], place[count:][going[count:]]
        for buffers in (self._keys, self._values):
            for buffer in buffers.values():
                buffer[free, :, : self.length] = buffer[moved, :, : self.length]
        order = place[:count].clone()
        order[free] = moved
        self._bias = self._bias[order]
        return order


def grace_attention(  # noqa: PLR0913 - transformers' interface
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed_segments: list[Segment] | None = None,
    decoding_cache: DecodingCache | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """One layer's attention.

    Args:
        query: [1, heads, K, head size] of a packed line, or [B, heads, 1, head size]; key and value may have
            fewer heads.
        packed_segments: which tokens of the line each token attends to.

    Returns:
        [1, K, heads, head size] or [B, 1, heads, head size], and None.

    Raises:
        ValueError: the model asks for attention that is not plain causal (soft cap, dropout, or a sliding
            window shorter than a row).
    """
    if softcap is not None or dropout:
        raise ValueError("models with attention soft-capping or dropout are not supported by the packed forward")
    if packed_segments is None:
        assert decoding_cache is not None
        _check_window(sliding_window, decoding_cache.length)
        key, value = decoding_cache.append(module.layer_idx, key, value)  # type: ignore[arg-type]
        return _one_token_attention(query, key, value, decoding_cache.bias, scaling), None
    longest = max(s.end - s.start + sum(b - a for a, b in s.ancestors) for s in packed_segments)
    _check_window(sliding_window, longest)
    if decoding_cache is not None:
        decoding_cache.record(module.layer_idx, key, value)  # type: ignore[arg-type]
    if query.device.type == "cuda" and find_spec("flash_attn"):
        return _flash_attention(query, key, value, packed_segments, scaling), None
    return _segment_attention(query, key, value, packed_segments, scaling), None


AttentionInterface.register(ATTENTION, grace_attention)


def _check_window(sliding_window: int | None, longest: int) -> None:
    if sliding_window is not None and longest > sliding_window:
        raise ValueError(
            f"a row has {longest} tokens, more than the model's sliding attention window of {sliding_window}; "
            "lower data.max_prompt_length + data.max_response_length"
        )


def _segment_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: list[Segment], scaling: float | None
) -> Tensor:
    # split, not slices: its backward is one concatenation, and that of a slice fills a whole line with zeros.
    lengths = [s.end - s.start for s in segments]
    queries, keys, values = (x.split(lengths, dim=2) for x in (query, key, value))
    place = {(s.start, s.end): i for i, s in enumerate(segments)}
    outputs = []
    for i, s in enumerate(segments):
        seen = [*(place[ancestor] for ancestor in s.ancestors), i]
        k, v = (torch.cat([x[j] for j in seen], dim=2) for x in (keys, values))
        outputs.append(
            F.scaled_dot_product_attention(
                queries[i], k, v, attn_mask=s.mask, is_causal=s.mask is None, scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        )  # fmt: skip
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _one_token_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scaling: float | None) -> Tensor:
    """Grouped-query attention of one token: the query heads that share a key head are that head's queries.

    So no key is repeated. Two plain products, because torch's fused attention takes twice as long for one query on a
    CPU.
    """
    rows, heads, _, size = query.shape
    grouped = query.reshape(rows, key.shape[1], heads // key.shape[1], size)
    scores = torch.matmul(grouped * (size**-0.5 if scaling is None else scaling), key.transpose(2, 3)) + bias
    return torch.matmul(scores.softmax(-1).to(value.dtype), value).reshape(rows, 1, heads, size)


def _flash_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: list[Segment], scaling: float | None
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    assert all(not s.ancestors for s in segments), "flash-attention needs rows packed without shared prompts"
    lengths = torch.tensor([s.end - s.start for s in segments], device=query.device)
    bounds = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)  # [rows + 1]
    longest = int(lengths.max())
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [K, heads, head size]
    out = flash_attn_varlen_func(q, k, v, bounds, bounds, longest, longest, softmax_scale=scaling, causal=True)
    return out.unsqueeze(0)
