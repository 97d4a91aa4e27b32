"""Which cluster a run uses, what devices it has, and how soon a run says that there is none."""

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from verl.config import RunConfig
from verl.errors import UserError
from verl.single_controller import ray_cluster
from verl.trainer.prepare import find_devices


def test_an_address_without_a_cluster_is_said_with_the_way_out(monkeypatch):
    """Ray itself tries for minutes, and then ends the process."""
    # It goes before any address. "auto" is not tried: it joins whatever cluster runs on the machine.
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray_cluster, "_PROBE_ENVIRONMENT", dict.fromkeys(ray_cluster._PROBE_ENVIRONMENT, "1"))
    with socket.create_server(("0.0.0.0", 0)) as another_service:
        port = another_service.getsockname()[1]
        addresses = ["nonsense", "ray://localhost:10001", "localhost:1", f"localhost:{port}"]

        def complaint(address: str) -> str:
            with pytest.raises(UserError) as refused:
                ray_cluster._check_answer(address)
            return str(refused.value)

        with ThreadPoolExecutor() as pool:
            complaints = list(pool.map(complaint, addresses))
    for address, text in zip(addresses, complaints, strict=True):
        assert text.startswith(f"RAY_ADDRESS={address}: no Ray cluster can be joined there (")
        assert "unset RAY_ADDRESS to run on this machine alone" in text


@pytest.mark.parametrize("value", ["", "local"])
def test_no_cluster_is_given_by(monkeypatch, value):
    monkeypatch.setenv("RAY_ADDRESS", value)
    assert ray_cluster.given_address() is None


@pytest.fixture
def cluster(monkeypatch):
    """A head without a GPU, where the driver is, and two machines with GPUs."""
    resources = [{"CPU": 2.0}, {"CPU": 64.0, "GPU": 8.0}, {"CPU": 32.0, "GPU": 4.0}]
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    monkeypatch.setattr(ray_cluster, "join", lambda: None)
    monkeypatch.setattr(ray_cluster, "machines", lambda: [{"Resources": found} for found in resources])
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)


@pytest.mark.parametrize(
    ("trainer", "found"),
    [
        ({}, ("cuda", 8)),
        ({"nnodes": 2}, ("cuda", 4)),
        ({"nnodes": 2, "n_gpus_per_node": 3, "device": "cuda"}, ("cuda", 3)),
        ({"nnodes": 3}, ("cpu", 1)),
        ({"nnodes": 2, "device": "cpu", "n_gpus_per_node": 32}, ("cpu", 32)),
    ],
)
def test_the_devices_are_the_clusters_not_the_drivers(cluster, trainer, found):
    assert find_devices(RunConfig.model_validate({"trainer": trainer})) == found


@pytest.mark.parametrize(
    ("trainer", "complaint"),
    [
        ({"nnodes": 2, "n_gpus_per_node": 5}, "n_gpus_per_node=5, but a machine of the cluster has 4 visible GPUs"),
        ({"nnodes": 3, "device": "cuda"}, r"has no 3 machine\(s\) with a GPU"),
        ({"nnodes": 4}, r"trainer.nnodes=4, but the cluster at RAY_ADDRESS has 3 machine\(s\)"),
    ],
)
def test_what_the_cluster_does_not_have_is_refused(cluster, trainer, complaint):
    with pytest.raises(UserError, match=complaint):
        find_devices(RunConfig.model_validate({"trainer": trainer}))
