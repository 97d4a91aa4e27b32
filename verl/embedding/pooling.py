"""Pooling of hidden states to one embedding per row, for training and encoding.

Shapes: N rows, K packed tokens, M pooled positions, H hidden size.
"""

from collections.abc import Sequence

import torch

from verl.embedding.settings import NO_MIX, Mix


def mean_pool(
    hidden: torch.Tensor, pool_token: torch.Tensor, pool_row: torch.Tensor, num_rows: int,
    pool_weight: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Mean of the hidden states at each row's pooled positions (arXiv 2510.04506).

    Sums and means are computed in float32, whatever the dtype of the states.

    Args:
        hidden: [K,H] last hidden states.
        pool_token: [M] int64, pooled positions.
        pool_row: [M] int64, the row of each pooled position.
        pool_weight: [M] float32, the weight of each pooled position, 1 in sum over a row; None = all of a row the same.

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
    states = hidden.index_select(0, pool_token).float()
    if pool_weight is not None:
        return sums.index_add(0, pool_row, states * pool_weight.unsqueeze(1))
    return sums.index_add(0, pool_row, states) / counts.unsqueeze(1)


def average(whole: torch.Tensor, text: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[N,H]: weight x unit(text) + (1 - weight) x unit(whole), see `EmbedderSettings.no_rationale_weight`.

    Args:
        whole, text: [N,H], vectors with and without the rationale.
        weight: [N,1].
    """
    return weight * unit(text) + (1 - weight) * unit(whole)


def without_direction(vectors: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """[N,H]: the vectors without their component along `mean` [H]; a mean of zeros takes nothing."""
    direction = torch.nn.functional.normalize(mean, dim=0)
    return vectors - (vectors @ direction).unsqueeze(1) * direction


class RunningPool:
    """`mean_pool` of N rows whose tokens are computed one after another, as they are while a row is written.

    Args:
        starts: where pooling starts in each row: a position in its prompt, the prompt's length, or -1 for the row's
            last token.
        hidden_size: H.
        mix: of the rows that have a token after their prompt.
    """

    def __init__(self, starts: Sequence[int], hidden_size: int, device: torch.device, mix: Mix) -> None:
        self._starts = starts
        self._mix = mix
        self._texts = torch.zeros(len(starts) if mix != NO_MIX else 0, hidden_size, device=device)
        self._last_alone = torch.tensor([start == -1 for start in starts], device=device)
        self._sums = torch.zeros(len(starts), hidden_size, device=device)
        self._counts = torch.zeros(len(starts), device=device)

    def start(self, row: int, hidden: torch.Tensor) -> None:
        """Pool a row's prompt: hidden states [K,H] of all its tokens."""
        pooled = hidden[self._starts[row] :]
        self._sums[row], self._counts[row] = pooled.float().sum(0), len(pooled)
        if len(self._texts):
            self._texts[row] = self._sums[row] / self._counts[row]
        if self._mix.text_share is not None:
            self._sums[row], self._counts[row] = 0, 0

    def add(self, rows: torch.Tensor, hidden: torch.Tensor) -> None:
        """Pool the next token of each of the different `rows` [R] int64: hidden states [R,H]."""
        kept = (~self._last_alone[rows]).float()
        self._sums[rows] = self._sums[rows] * kept.unsqueeze(1) + hidden.float()
        self._counts[rows] = self._counts[rows] * kept + 1

    def mean(self, row: int) -> torch.Tensor:
        """[H] float32: the mean of a row's pooled hidden states so far, which include one after its prompt."""
        share, weight = self._mix
        mean = self._sums[row] / self._counts[row]
        if share is not None:
            mean = share * self._texts[row] + (1 - share) * mean
        if weight:
            texts = self._texts[row, None]
            mean = average(mean.unsqueeze(0), texts, torch.full_like(texts[:, :1], weight))[0]
        return mean


def unit(vectors: torch.Tensor) -> torch.Tensor:
    """[N,H]: the vectors scaled to unit length; zero vectors stay zero."""
    return torch.nn.functional.normalize(vectors, dim=1)
