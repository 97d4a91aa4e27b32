"""The model card of a checkpoint: what a reader of the weights wants to know of the run."""

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from verl.config import RunConfig, file_list
from verl.embedding.settings import EmbedderSettings
from verl.utils.model_card import write_card


def write_checkpoint_card(
    folder: Path,
    config: RunConfig,
    settings: EmbedderSettings,
    num_samples: int,
    step: int,
    versions: Mapping[str, str],
) -> None:
    """Write README.md into the model folder of step `step`."""
    arguments = ["python3", "-m", "verl.trainer.main_ppo", *sys.argv[1:]]
    name = f"{config.trainer.experiment_name}, step {step}"
    write_card(
        folder, name, settings.model_dump(), _training(config, num_samples, step), shlex.join(arguments), versions
    )


def _training(config: RunConfig, num_samples: int, step: int) -> dict[str, Any]:
    data, section, algorithm = config.data, config.actor_rollout_ref, config.algorithm
    reward = config.reward_model
    return {
        "data": f"{config.train_mode}, {num_samples:,} samples of {', '.join(file_list(data.train_files))}",
        "steps": f"{step} of {data.train_batch_size} samples x {section.rollout.n} rationales",
        "reward": f"{reward.reward_manager} {dict(reward.reward_kwargs)}",
        "advantage": f"{algorithm.adv_estimator}, divided by the group's standard deviation: "
        f"{algorithm.norm_adv_by_std_in_grpo}",
        "optimizer": f"AdamW, learning rate {section.actor.optim.lr:g}, mini-batches of "
        f"{section.actor.ppo_mini_batch_size} samples",
        "rationales": f"{section.rollout.name}, at most {data.max_response_length} tokens, temperature "
        f"{section.rollout.temperature:g} (anchors {section.rollout.anchor_temperature:g})",
        "seeds": f"data {data.seed}, rollout {section.rollout.seed}",
    }
