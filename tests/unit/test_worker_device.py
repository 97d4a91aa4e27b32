"""The order in which a worker uses a GPU, shown on a CPU: what would move or be freed is recorded, all else runs."""

import pytest
import torch
from steps import trained_rows

from verl.batch_plan import BatchPlan
from verl.config import RunConfig
from verl.embedding.settings import EmbedderSettings
from verl.models.fsdp import full_weights
from verl.single_controller.worker import WorkerPlace
from verl.workers import fsdp_workers
from verl.workers.fsdp_workers import ActorRolloutRefWorker

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture
def on_gpu(tiny_folder, monkeypatch):
    """Build a worker that takes its device for a GPU, and the list of what it did there."""

    def build(override_config=None, **fsdp) -> tuple[ActorRolloutRefWorker, list[str]]:
        values = {
            "data": {"max_prompt_length": 40, "max_response_length": 24, "train_batch_size": 4},
            "actor_rollout_ref": {
                "model": {"path": str(tiny_folder), "override_config": override_config or {}},
                "actor": {
                    "ppo_mini_batch_size": 2, "use_kl_loss": True, "strategy": "fsdp2", "fsdp_config": fsdp,
                    "optim": {"lr": 1e-3},
                },
                "ref": {"fsdp_config": fsdp},
                "rollout": {"name": "hf", "n": 3},
            },
        }  # fmt: skip
        config = RunConfig.model_validate(values)
        plan = BatchPlan.from_config(config, num_samples=16, num_anchors=2, world_size=1)
        worker = ActorRolloutRefWorker(WorkerPlace(0, 1, "cpu", 1, 1), config, plan)
        worker.facts = worker.init_model()
        return worker, record_moves(worker, monkeypatch)

    return build


def record_moves(worker: ActorRolloutRefWorker, monkeypatch) -> list[str]:
    events: list[str] = []

    def move(name: str, model):
        def to(device):
            gradients = any(p.grad is not None for p in model.parameters())
            events.append(f"{name}{' with gradients' if gradients else ''} to {torch.device(device).type}")
            return model

        monkeypatch.setattr(model, "to", to)

    move("policy", worker.actor.policy)
    move("reference", worker.reference)
    monkeypatch.setattr(
        fsdp_workers, "move_optimizer", lambda _, device: events.append(f"optimizer to {torch.device(device).type}")
    )
    for name in ("wake_weights", "_wake_cache", "_load"):
        plain = getattr(worker.rollout, name)
        monkeypatch.setattr(worker.rollout, name, lambda *args, n=name, p=plain: (events.append(n), p(*args))[1])
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: events.append("cache emptied"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**30, 2**31))
    worker.device = worker.stages._device = torch.device("cuda", 0)
    return events


BY_HAND = {"param_offload": True, "optimizer_offload": True}


def test_after_a_resume_the_optimizer_is_in_host_memory(on_gpu, tmp_path):
    worker, events = on_gpu(**BY_HAND)
    worker.update_actor(trained_rows(), 2)
    worker.save_checkpoint(tmp_path / "step", EmbedderSettings())
    events.clear()
    worker.load_checkpoint(tmp_path / "step")
    assert events == ["policy to cuda", "optimizer to cpu", "policy to cpu", "cache emptied"]


def test_an_update_leaves_no_gradients_behind_and_none_travel(on_gpu):
    worker, events = on_gpu(**BY_HAND)
    worker.update_actor(trained_rows(), 2)
    assert events == ["policy to cuda", "optimizer to cuda", "optimizer to cpu", "policy to cpu", "cache emptied"]
    assert all(weight.grad is None for weight in worker.actor.policy.parameters())


def test_the_reference_is_on_the_device_only_while_it_scores(on_gpu):
    worker, events = on_gpu(**BY_HAND)
    worker.compute_ref_log_prob(trained_rows())
    assert events == ["reference to cuda", "reference to cpu", "cache emptied"]


def test_after_an_error_nothing_is_moved_that_could_hide_it(on_gpu, monkeypatch):
    worker, events = on_gpu(**BY_HAND)

    def fail(*_):
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(worker.actor, "update", fail)
    with pytest.raises(RuntimeError, match="an illegal memory access"):
        worker.update_actor(trained_rows(), 2)
    assert events == ["policy to cuda", "optimizer to cuda"]


@pytest.mark.parametrize("fsdp", [BY_HAND, {}], ids=["offload", "no offload"])
def test_cached_memory_is_given_back_before_the_engine_takes_any(on_gpu, fsdp):
    worker, events = on_gpu(**fsdp)
    worker.update_actor(trained_rows(), 2)
    events.clear()
    worker.sync_rollout_weights()
    in_order = [event for event in events if "policy" not in event]
    assert in_order.index("cache emptied") < in_order.index("wake_weights") < in_order.index("_load")
    assert in_order[-3:] == ["cache emptied", "wake_weights", "_wake_cache"]


def test_the_same_before_a_validation_that_needs_no_new_weights(on_gpu):
    worker, events = on_gpu(**BY_HAND)
    worker.sync_rollout_weights()
    worker.rollout.sleep()
    events.clear()
    worker.sync_rollout_weights()
    assert events == ["cache emptied", "wake_weights", "_wake_cache"]


def test_with_torchs_offload_policy_nothing_is_moved_by_hand(on_gpu, tmp_path):
    worker, events = on_gpu(offload_policy=True, **BY_HAND)
    rows = trained_rows()
    worker.update_actor(rows, 2)
    worker.compute_ref_log_prob(rows)
    worker.save_checkpoint(tmp_path / "step", EmbedderSettings())
    worker.load_checkpoint(tmp_path / "step")
    worker.sync_rollout_weights()
    assert not [event for event in events if " to " in event]


def test_weights_are_gathered_on_the_policys_device_wherever_their_shards_lie(on_gpu):
    worker, _ = on_gpu(offload_policy=True)
    policy = worker.actor.policy
    policy.device = torch.device("meta")
    assert {weight.device.type for _, weight in full_weights(policy, dtype=torch.bfloat16)} == {"meta"}
    assert {weight.device.type for weight in policy.parameters()} == {"cpu"}


def test_a_model_with_dropout_is_trained_without_it_and_that_is_reported(on_gpu):
    rows = trained_rows()
    plain, other = (on_gpu(override_config={"attention_dropout": rate})[0] for rate in (0.0, 0.3))
    assert (plain.facts["dropout"], other.facts["dropout"]) == ({}, {"attention_dropout": 0.3})
    assert plain.update_actor(rows, 2) == other.update_actor(rows, 2)
