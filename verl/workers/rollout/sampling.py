"""Drawing tokens: each row from a seed of its own, so that rounding hardly ever changes a token.

Shapes: B rows, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# The likeliest tokens, which are drawn by their cumulative probabilities; see `sample`.
_HEAD_TOKENS = 64


def uniform_draws(seeds: Sequence[int], count: int) -> Tensor:
    """[B, count] float64 in [0,1): `count` numbers from each of B seeds, the same for every device."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.rand(count, dtype=torch.float64, generator=generator) for generator in generators])


def sample(logits: Tensor, temperature: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token per row, so that rounding hardly ever changes it (other rows in the batch change the rounding).

    Inverting the cumulative distribution of the whole vocabulary has tens of thousands of bin edges, and rounding can
    move a draw across any of them. So only the `_HEAD_TOKENS` likeliest tokens are drawn that way. Where `uniform` lies
    beyond their cumulative probability, the token is drawn among all others by the Gumbel-max trick (`_race`), whose
    result changes only where two candidates are almost equal.

    Args:
        logits: [B,V].
        temperature: [B]; 0 takes the likeliest token.
        uniform: [B] float64 in [0,1); decides the token.

    Returns:
        Tokens [B] int64 and their log-probs [B] float32 under softmax(logits / temperature).
    """
    greedy = temperature == 0
    scaled = logits.float() / torch.where(greedy, torch.ones_like(temperature), temperature).unsqueeze(1)
    log_z = scaled.logsumexp(-1, keepdim=True)
    size = min(_HEAD_TOKENS, scaled.shape[1])
    head, ids = scaled.topk(size)
    sums = (head - log_z).double().exp().cumsum(-1)
    place = torch.searchsorted(sums, uniform.unsqueeze(1), right=True)
    token = ids.gather(1, place.clamp(max=size - 1)).squeeze(1)
    if size < scaled.shape[1]:
        for row in (place.squeeze(1) == size).nonzero().flatten().tolist():
            token[row] = _race(scaled[row], ids[row], float(uniform[row]))
    token = torch.where(greedy, ids[:, 0], token)
    return token, (scaled.gather(1, token.unsqueeze(1)) - log_z).squeeze(1)


def _race(scaled: Tensor, excluded: Tensor, uniform: float) -> Tensor:
    """Draw from softmax(scaled [V]) without the tokens `excluded`: the largest of logits plus Gumbel noise.

    The noise is seeded by `uniform`. Source: the Gumbel-max trick, see Maddison et al. 2014 (arXiv 1411.0030).
    """
    generator = torch.Generator().manual_seed(int(uniform * 2**53))
    noise = torch.rand(len(scaled), dtype=torch.float64, generator=generator).to(scaled.device)
    weights = scaled.double().index_fill(0, excluded, -torch.inf)
    return (weights - (-noise.log()).log()).argmax()
