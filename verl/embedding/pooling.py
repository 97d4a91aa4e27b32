"""Pooling of hidden states to one embedding per row, for training and encoding.

Shapes: N rows, K packed tokens, M pooled positions, H hidden size.
"""

import torch


def mean_pool(hidden: torch.Tensor, pool_token: torch.Tensor, pool_row: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Mean of the hidden states at each row's pooled positions (arXiv 2510.04506).

    Sums and means are computed in float32, whatever the dtype of the states.

    Args:
        hidden: [K,H] last hidden states.
        pool_token: [M] int64, pooled positions.
        pool_row: [M] int64, the row of each pooled position.

    Returns:
        [N,H] float32.

    Raises:
        ValueError: a row has no pooled position.
    """
    counts = torch.bincount(pool_row, minlength=num_rows)
    if (counts == 0).any():
        raise ValueError(f"rows {(counts == 0).nonzero().flatten().tolist()} have no token to pool")
    sums = torch.zeros(num_rows, hidden.shape[1], dtype=torch.float32, device=hidden.device)
    # `index_select`: the backward of indexing adds the gradients of a position that several rows pool in any order.
    sums = sums.index_add(0, pool_row, hidden.index_select(0, pool_token).float())
    return sums / counts.unsqueeze(1)


def unit(vectors: torch.Tensor) -> torch.Tensor:
    """[N,H]: the vectors scaled to unit length; zero vectors stay zero."""
    return torch.nn.functional.normalize(vectors, dim=1)
