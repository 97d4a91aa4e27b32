"""The least time that the demo model's matrix products need on this machine.

Attention is left out, which is below 2 % of the arithmetic at the lengths measured here.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from common import MODEL, REPO
from transformers import AutoConfig

from verl.config import DataConfig
from verl.data.dataset import PromptDataset
from verl.embedding.prompts import PromptRenderer
from verl.models.packing import Row, pack
from verl.utils.cpus import usable_cpus
from verl.utils.tokenizer import load_tokenizer


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


def step_flop(train_file: Path, shape: tuple[int, int, int]) -> dict[str, float]:
    """FLOP of each phase's matrix products in a training step of `common.train`."""
    triplets, n, new = shape
    body, head = flop_of_a_token()
    roles = ("positive", "query", "negative")
    renderer = PromptRenderer(load_tokenizer(str(REPO / MODEL)), 160)
    samples = PromptDataset([str(train_file)], DataConfig(), roles, renderer)
    chats = [samples[i]["chats"] for i in range(triplets)]
    prompts = {role: [tuple(p.ids) for p in renderer.render([chat[role] for chat in chats])] for role in roles}

    def packed_tokens(kinds: tuple[str, ...], response: int) -> int:
        rows = [p for k in kinds for p in prompts[k] for _ in range(n if k == "positive" else 1)]
        return distinct_tokens(rows, response)

    trained = triplets * n * new
    generated = triplets * (n + 2) * new
    return {
        "gen": packed_tokens(roles, 0) * body + generated * (body + head),
        "score": packed_tokens(roles, new) * body + trained * head,
        # Two products in the backward; the head's logits are not kept but computed again.
        "update": 2 * packed_tokens(("positive",), new) * body + 3 * trained * head,
    }
