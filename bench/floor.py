"""The least time that the demo model's matrix products need on this machine.

Attention is left out, which is below 2 % of the arithmetic at the lengths measured here.
"""

import time
from collections.abc import Sequence

import torch
from common import MODEL, REPO
from transformers import AutoConfig

from verl.models.packing import Row, pack
from verl.utils.cpus import usable_cpus


def peak_rate() -> float:
    """FLOP/s of a large float32 product: the best of several, because a floor needs the highest rate."""
    torch.set_num_threads(usable_cpus())
    size, best = 3072, 0.0
    a, b, product = torch.randn(size, size), torch.randn(size, size), torch.empty(size, size)
    for _ in range(12):
        start = time.perf_counter()
        torch.mm(a, b, out=product)
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def flop_of_a_token() -> tuple[int, int]:
    """FLOP of one token's forward through all layers, and through the head."""
    config = AutoConfig.from_pretrained(REPO / MODEL)
    hidden, kv = config.hidden_size, config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * config.intermediate_size
    return 2 * config.num_hidden_layers * layer, 2 * hidden * config.vocab_size


def distinct_tokens(prompts: Sequence[Sequence[int]], new_tokens: int = 0) -> int:
    """Tokens of rows of `new_tokens` responses, where what prompts have in common is counted once."""
    answer = (0,) * new_tokens
    return pack([Row(tuple(p), answer, 0, False) for p in prompts], share_prompts=True).input_ids.shape[1]
