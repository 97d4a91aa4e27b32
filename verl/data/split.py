"""Which samples form the test split, decided in one pass over samples whose number is known."""

import random
from collections.abc import Callable

import numpy as np

Splitter = Callable[[int], np.ndarray]
"""Given the size of the next batch, the mask of its test samples."""


def build_splitter(num_samples: int, test_ratio: float, seed: int | None) -> Splitter:
    """Mark exactly int(num_samples * test_ratio) samples: the leading ones, or with a seed random ones."""
    num_test = int(num_samples * test_ratio)
    return _leading(num_test) if seed is None else _random(num_samples, num_test, seed)


def _leading(num_test: int) -> Splitter:
    left = num_test

    def mask(num_rows: int) -> np.ndarray:
        nonlocal left
        taken = min(left, num_rows)
        left -= taken
        return np.arange(num_rows) < taken

    return mask


def _random(num_samples: int, num_test: int, seed: int) -> Splitter:
    """Selection sampling (Knuth, volume 2, algorithm S): every subset of the size is equally likely.

    Both splits keep the order of the file; training shuffles.
    """
    draw = random.Random(seed).random
    samples_left, test_left = num_samples, num_test

    def choose() -> bool:
        nonlocal samples_left, test_left
        chosen = draw() * samples_left < test_left
        samples_left -= 1
        test_left -= chosen
        return chosen

    return lambda num_rows: np.fromiter((choose() for _ in range(num_rows)), bool, num_rows)


_NONE = np.empty(0, np.int64)


class DuplicateCounter:
    """Counts equal samples by their 64-bit hashes.

    It holds 8 bytes a sample (16 while it counts): the only memory that grows with the input.
    """

    def __init__(self) -> None:
        self._hashes: dict[str, list[np.ndarray]] = {"train": [], "test": []}

    def add(self, split: str, hashes: np.ndarray) -> None:
        self._hashes[split].append(hashes)

    def count(self) -> tuple[int, int]:
        """Samples equal to an earlier one, and test samples that are also in the training split."""
        train, test = (np.concatenate([_NONE, *self._hashes.pop(split)]) for split in ("train", "test"))
        train.sort()
        overlap = np.searchsorted(train, test, "right") > np.searchsorted(train, test, "left")
        both = np.concatenate([train, test])
        both.sort()
        return int(np.count_nonzero(both[1:] == both[:-1])), int(np.count_nonzero(overlap))
