"""Pooling of hidden states to one embedding per row, for training and encoding.

Shapes: N rows, K packed tokens, M pooled positions, H hidden size.
"""

from collections.abc import Sequence

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


class RunningPool:
    """`mean_pool` of N rows whose tokens are computed one after another, as they are while a row is written.

    Args:
        starts: where pooling starts in each row: a position in its prompt, the prompt's length, or -1 for the row's
            last token.
        hidden_size: H.
    """

    def __init__(self, starts: Sequence[int], hidden_size: int, device: torch.device) -> None:
        self._starts = starts
        self._last_alone = torch.tensor([start == -1 for start in starts], device=device)
        self._sums = torch.zeros(len(starts), hidden_size, device=device)
        self._counts = torch.zeros(len(starts), device=device)

    def start(self, row: int, hidden: torch.Tensor) -> None:
        """Pool a row's prompt: hidden states [K,H] of all its tokens."""
        pooled = hidden[self._starts[row] :]
        self._sums[row], self._counts[row] = pooled.float().sum(0), len(pooled)

    def add(self, rows: torch.Tensor, hidden: torch.Tensor) -> None:
        """Pool the next token of each of the different `rows` [R] int64: hidden states [R,H]."""
        kept = (~self._last_alone[rows]).float()
        self._sums[rows] = self._sums[rows] * kept.unsqueeze(1) + hidden.float()
        self._counts[rows] = self._counts[rows] * kept + 1

    def mean(self, row: int) -> torch.Tensor:
        """[H] float32: the mean of a row's pooled hidden states so far."""
        return self._sums[row] / self._counts[row]


def unit(vectors: torch.Tensor) -> torch.Tensor:
    """[N,H]: the vectors scaled to unit length; zero vectors stay zero."""
    return torch.nn.functional.normalize(vectors, dim=1)
