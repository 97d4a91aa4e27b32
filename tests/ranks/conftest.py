"""Fixtures of the tests with several processes."""

from pathlib import Path

import pytest
from sharded_checkpoints import Single, write_checkpoints
from tiny import save_tiny, tiny_model


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folders by the names in `sharded_checkpoints.DCP` and `FSDP`; read only."""
    folder = tmp_path_factory.mktemp("checkpoints")
    write_checkpoints(folder)
    return folder


@pytest.fixture
def single(tmp_path: Path) -> Single:
    made = Single(tmp_path / "single", save_tiny(tmp_path / "model", tie=False))
    made.write(tiny_model(False).state_dict())
    return made
