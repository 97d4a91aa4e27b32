"""The process groups of two workers that hold replicas: how many there come to be, and how long one waits in them."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from steps import trained_rows
from torch.distributed import distributed_c10d

from verl.batch_plan import BatchPlan
from verl.config import RunConfig
from verl.single_controller.worker import NO_LIMIT, WorkerPlace
from verl.workers.fsdp_workers import ActorRolloutRefWorker


def run_rank(rank: int, model: Path, folder: Path) -> None:
    """Two diagnoses' worth of scores by the untrained model, which is loaded for each as there is no KL term."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    values = {
        "data": {"max_prompt_length": 40, "max_response_length": 24, "train_batch_size": 4},
        "actor_rollout_ref": {
            "model": {"path": str(model)},
            "actor": {"ppo_mini_batch_size": 2},
            "ref": {"fsdp_config": {"fsdp_size": 1}},
            "rollout": {"name": "hf", "n": 3},
        },
    }
    config = RunConfig.model_validate(values)
    plan = BatchPlan.from_config(config, num_samples=16, num_anchors=2, world_size=2)
    worker = ActorRolloutRefWorker(WorkerPlace(rank, 2, "cpu", 2, 1), config, plan)
    worker.init_model()
    rows = trained_rows()[list(range(6 * rank, 6 * rank + 6))]
    log_probs, counts = [], []
    for _ in range(2):
        log_probs.append(worker.compute_untrained_log_prob(rows).batch["log_probs"])
        counts.append(len(distributed_c10d._world.pg_map))
    groups = worker.meshes.of("cpu", 1).get_all_groups()
    limits = [group._get_backend(torch.device("cpu")).options._timeout for group in groups]
    torch.save((log_probs, counts, limits), folder / f"rank_{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, tiny_folder) -> list[tuple]:
    folder = tmp_path_factory.mktemp("groups")
    mp.spawn(run_rank, args=(tiny_folder, folder), nprocs=2)
    return [torch.load(folder / f"rank_{rank}.pt", weights_only=False) for rank in (0, 1)]


def test_a_model_that_is_loaded_again_makes_no_more_groups(ranks):
    for log_probs, counts, _ in ranks:
        first, second = counts
        assert second == first
        assert torch.equal(*log_probs) and log_probs[0].any()


def test_no_limit_of_torchs_ends_the_wait_for_a_replica(ranks):
    for _, _, limits in ranks:
        assert limits == [NO_LIMIT, NO_LIMIT]
