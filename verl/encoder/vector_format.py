"""The form in which an encoder returns its vectors: dimensions, length, precision, container."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from verl.embedding.pooling import unit
from verl.encoder.arguments import whole_number
from verl.errors import UserError

Precision = Literal["float32", "int8"]


@dataclass(frozen=True)
class VectorFormat:
    """See the arguments of `GraceEncoder.encode`."""

    normalize: bool
    truncate_dim: int | None
    precision: Precision
    int8_ranges: Any
    """Least and largest value of each dimension, [2,D] after truncation."""
    as_tensor: bool

    def check(self, hidden: int) -> None:
        """Check it for vectors of `hidden` dimensions.

        Raises:
            UserError: a value is out of its range, or does not fit the others.
        """
        if self.precision not in get_args(Precision):
            raise UserError(f"precision={self.precision!r} must be one of {', '.join(get_args(Precision))}")
        if self.truncate_dim is not None:
            whole_number("truncate_dim", self.truncate_dim, 1, hidden)
        if self.precision == "int8":
            self._check_ranges(self.truncate_dim or hidden)
        elif self.int8_ranges is not None:
            raise UserError(f"int8_ranges has no effect with precision={self.precision}; give precision='int8' too")

    def apply(self, means: np.ndarray) -> np.ndarray | Tensor:
        """[N,D] of the format from [N,H] float32 means. They are cut first, so that the result has unit length."""
        vectors = torch.from_numpy(means[:, : self.truncate_dim])
        vectors = unit(vectors) if self.normalize else vectors
        if self.precision == "float32":
            return vectors if self.as_tensor else vectors.numpy()
        # Imported here: it takes seconds, and only int8 needs it.
        from sentence_transformers.util import quantize_embeddings

        quantized = quantize_embeddings(vectors.numpy(), self.precision, np.asarray(self.int8_ranges, np.float32))
        assert isinstance(quantized, np.ndarray)
        return torch.from_numpy(quantized) if self.as_tensor else quantized

    def _check_ranges(self, dimensions: int) -> None:
        if self.int8_ranges is None:
            raise UserError(
                "precision='int8' needs int8_ranges, because vectors that are quantised over different ranges cannot "
                "be compared; take them once from typical texts: v = encode(texts), "
                "int8_ranges = np.stack([v.min(axis=0), v.max(axis=0)]), and give them in every call"
            )
        try:
            ranges = np.asarray(self.int8_ranges, np.float32)
        except (TypeError, ValueError) as error:
            raise UserError(f"int8_ranges must hold numbers: {error}") from None
        if ranges.shape != (2, dimensions):
            raise UserError(
                f"int8_ranges has the shape {list(ranges.shape)} and must have [2, {dimensions}]: the least value of "
                "every dimension, and the largest"
            )
        if not np.isfinite(ranges).all() or (ranges[0] > ranges[1]).any():
            raise UserError("int8_ranges must be finite, and no least value above its largest one")
