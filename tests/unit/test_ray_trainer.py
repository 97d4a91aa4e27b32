"""The driver's part of the update: advantages as they are reported, and as they are sent to the workers."""

import torch
from test_config import ORIGINAL

from verl.algorithm.advantage import get_adv_estimator_fn
from verl.protocol import DataProto
from verl.trainer.ppo.ray_trainer import RayPPOTrainer
from verl.trainer.prepare import compose_config
from verl.workers.reward_manager.base import RewardOutput

ENGINE = torch.tensor([[-1.0, -2.0], [-0.5, -1.5], [-3.0, -1.0], [-1.0, -1.0]])
TRAINER = torch.tensor([[-0.9, -2.5], [-0.5, -1.0], [-1.0, -1.2], [-1.1, -0.9]])
SCORES = torch.tensor([1.0, 3.0, -2.0, 0.0])


class Recorder:
    """Stands where the workers are; keeps what it is sent."""

    def update_actor(self, rows: DataProto, num_mini_batches: int) -> dict[str, float]:
        self.rows = rows
        return {}


def updated(tmp_path, cap: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages [4,2] of two groups of two, as the step reports them and as the workers get them."""
    for name in ("train.parquet", "test.parquet"):
        (tmp_path / name).touch()
    files = [f"data.train_files={tmp_path}/train.parquet", f"data.val_files={tmp_path}/test.parquet"]
    sizes = ["data.train_batch_size=2", "actor_rollout_ref.actor.ppo_mini_batch_size=2", "+data.train_mode=supervised"]
    trainer = object.__new__(RayPPOTrainer)
    trainer.config = compose_config([*ORIGINAL, *files, *sizes, f"actor_rollout_ref.actor.tis_imp_ratio_cap={cap}"])
    trainer.estimate_advantage = get_adv_estimator_fn("grpo")
    trainer.workers = Recorder()
    rows = DataProto.from_dict(
        {
            "responses": torch.zeros(4, 2, dtype=torch.int64),
            "response_length": torch.tensor([2, 2, 2, 2]),
            "old_log_probs": TRAINER,
            "rollout_log_probs": ENGINE,
        },
        {"uid": [0, 0, 1, 1]},
    )
    batch = trainer.add_advantages(rows, RewardOutput(SCORES, {}, {}))
    trainer.update(batch, step=1)
    return batch.batch["advantages"], trainer.workers.rows.batch["advantages"]


def test_importance_weights_go_to_the_workers_and_not_into_the_report(tmp_path):
    reported, sent = updated(tmp_path, "null")
    plain = torch.tensor([[-1.0, -1.0], [1.0, 1.0], [-1.0, -1.0], [1.0, 1.0]])
    torch.testing.assert_close(reported, plain)
    weights = torch.minimum(TRAINER.exp() / ENGINE.exp(), torch.tensor(2.0))
    assert (weights == 2).any() and (weights < 1).any()
    torch.testing.assert_close(sent, plain * weights)


def test_a_cap_of_zero_sends_advantages_as_they_are(tmp_path):
    reported, sent = updated(tmp_path, "0")
    torch.testing.assert_close(sent, reported)
