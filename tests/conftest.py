"""Fixtures that all tests share."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
# Last, as some of its programs have common names.
sys.path.append(str(Path(__file__).parents[1] / "bench"))

from tiny import save_tiny

# The caller's cluster, key, proxies and settings of the shell scripts would change what the tested programs do.
OF_THE_CALLER = {
    "GRACE_API_KEY", "RAY_ADDRESS", "MODE", "RECIPE", "GPUS", "MODEL", "TRAIN_FILE", "VAL_FILE", "RUN", "STEP", "SUITE",
    "TASKS", "TASK_DIR",
}  # fmt: skip
for name in list(os.environ):
    if name in OF_THE_CALLER or name.lower().endswith("_proxy"):
        del os.environ[name]
os.environ["NO_PROXY"] = "127.0.0.1,localhost"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For two test processes, which take a file each: the long tests first."""
    items.sort(key=lambda item: "unit" in item.path.parts)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny random model with its tokenizer."""
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def repo() -> Path:
    return Path(__file__).parent.parent


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """torch.distributed with this process alone."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No keys and no servers of trackers, and a home folder of its own."""
    import wandb

    services = ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "MLFLOW_TRACKING_URI")
    for name in (*services, "SWANLAB_API_KEY", "SWANLAB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    yield
    wandb.teardown()  # it remembers keys and servers
