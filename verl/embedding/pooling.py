"""Pooling of hidden states to one embedding per row: the same functions for training and evaluation.

Shapes: N rows, K packed tokens, M pooled positions, H hidden size.
"""

import torch


def mean_pool(hidden: torch.Tensor, pool_token: torch.Tensor, pool_row: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Mean of the hidden states of each row's pooled positions (arXiv 2510.04506).

    Sum and mean are taken in float32, whatever the states' dtype.

    Args:
        hidden: [K,H] last hidden states.
        pool_token: [M] int64, pooled positions.
        pool_row: [M] int64, the row of each.

    Returns:
        [N,H] float32.

    Raises:
        ValueError: a row has nothing to pool.
    """
    counts = torch.bincount(pool_row, minlength=num_rows)
    if (counts == 0).any():
        raise ValueError(f"rows {(counts == 0).nonzero().flatten().tolist()} have no token to pool")
    sums = torch.zeros(num_rows, hidden.shape[1], dtype=torch.float32, device=hidden.device)
    sums = sums.index_add(0, pool_row, hidden[pool_token].float())
    return sums / counts.unsqueeze(1)


def unit(vectors: torch.Tensor) -> torch.Tensor:
    """[N,H] vectors at length 1."""
    return torch.nn.functional.normalize(vectors, dim=1)
