"""Data that the end-to-end tests share."""

from pathlib import Path

import pytest
from runs import prepare, write_triplets


@pytest.fixture(scope="session")
def triplets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 triplets, prepared and split: a folder with train.parquet and test.parquet."""
    folder = tmp_path_factory.mktemp("triplets")
    return prepare("supervised", write_triplets(folder / "raw.jsonl"), folder / "data")
