"""How much rationales repeat: themselves, and each other within a group. Of token ids, so that no language is special.

Shapes: N rows, R tokens of the longest, K n-grams.
"""

import torch
from torch import Tensor


def distinct_n(ids: Tensor, lengths: Tensor, group: Tensor, n: int) -> float:
    """Different n-grams of a group's rows per n-gram, averaged over the groups (arXiv 1510.03055, per group).

    1 = no n-gram occurs twice in a group. Groups without n-grams do not count; 0 where there are no others.

    Args:
        ids: [N,R] int64, right-padded.
        lengths: [N] int64.
        group: [N] int64, numbered from 0.
        n: 1, 2 or 4.
    """
    rows, grams = _ngrams(ids, lengths, n)
    return _mean_distinct_share(group[rows], grams)


def repetition(ids: Tensor, lengths: Tensor, n: int = 4) -> float:
    """Share of a row's n-grams that it has had before, averaged over the rows (seq-rep-n of arXiv 1908.04319).

    Rows without n-grams do not count; 0 where there are no others. Arguments as in `distinct_n`.
    """
    rows, grams = _ngrams(ids, lengths, n)
    return 1.0 - _mean_distinct_share(rows, grams) if len(rows) else 0.0


def _mean_distinct_share(owner: Tensor, grams: Tensor) -> float:
    """Different grams per gram of each owner, averaged over the owners that have any."""
    if not len(grams):
        return 0.0
    most = int(grams.max()) + 1
    different = torch.bincount(torch.unique(owner * most + grams) // most)
    total = torch.bincount(owner)
    return float((different[total > 0] / total[total > 0]).mean())


def _ngrams(ids: Tensor, lengths: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """[K] int64 each: the row of every n-gram, and a number that is the same for equal n-grams."""
    if ids.shape[1] < n:
        return ids.new_zeros(0), ids.new_zeros(0)
    codes, width = ids, 1
    while width < n:
        pairs = codes[:, :-width] * (int(codes.max()) + 1) + codes[:, width:]
        # Numbered anew, so that pairs of pairs fit into 64 bits.
        codes, width = torch.unique(pairs, return_inverse=True)[1], 2 * width
    has_one = torch.arange(codes.shape[1]) <= (lengths - n).unsqueeze(1)
    return has_one.nonzero()[:, 0], codes[has_one]
