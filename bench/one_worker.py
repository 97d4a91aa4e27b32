"""Training steps by one worker in this process, without Ray, phase by phase: for measurements of what a phase takes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from verl.batch_plan import BatchPlan
from verl.config import RunConfig
from verl.data.collator import PromptCollator
from verl.data.dataset import PromptDataset
from verl.embedding.prompts import PromptRenderer
from verl.embedding.settings import EmbedderSettings
from verl.protocol import DataProto, is_trained
from verl.single_controller.local_group import LocalWorkerGroup
from verl.trainer.ppo.step_rows import expand
from verl.utils.tokenizer import load_tokenizer
from verl.workers.fsdp_workers import ActorRolloutRefWorker
from verl.workers.group import ActorRolloutRefGroup

Measure = Callable[[str, Callable[[], Any]], Any]
"""Given a phase's name and its work: does the work, and returns its result."""


@dataclass(frozen=True)
class StepSize:
    triplets: int
    n: int
    """Rationales of a triplet's positive."""
    tokens: int
    """New tokens of every row."""


def build_config(
    model: str, size: StepSize, recompute: bool = False, fsdp: dict[str, Any] | None = None,
    rollout: dict[str, Any] | None = None, lora_rank: int = 0,
) -> RunConfig:  # fmt: skip
    """The configuration of such steps.

    Args:
        recompute: activations in the backward pass (gradient checkpointing).
        fsdp, rollout: further settings of actor.fsdp_config and rollout.
        lora_rank: 0 = all weights are trained.
    """
    return RunConfig.model_validate(
        {
            "data": {"train_batch_size": size.triplets, "max_prompt_length": 160, "max_response_length": size.tokens},
            "actor_rollout_ref": {
                "model": {"path": model, "enable_gradient_checkpointing": recompute, "lora_rank": lora_rank},
                "actor": {"ppo_mini_batch_size": size.triplets, "fsdp_config": fsdp or {}},
                "rollout": {"name": "hf", "n": size.n, "ignore_eos": True, **(rollout or {})},
            },
        }
    )


@contextmanager
def workers_of(config: RunConfig, device: str) -> Iterator[ActorRolloutRefGroup]:
    """One worker, whose models are not loaded yet."""
    plan = BatchPlan.from_config(config, num_samples=config.data.train_batch_size, num_anchors=2, world_size=1)
    group = LocalWorkerGroup(ActorRolloutRefWorker, (config, plan), device)
    workers = ActorRolloutRefGroup(group, ranks_per_engine=1)
    try:
        yield workers
    finally:
        workers.shutdown()


def run_step(workers: ActorRolloutRefGroup, prompts: DataProto, step: int, measure: Measure) -> tuple[DataProto, dict]:
    """Sync, generation, scoring and an update by random advantages; the rows of the update, and its metrics."""
    measure("sync", workers.sync_rollout_weights)
    responses = measure("gen", partial(workers.generate, prompts, step, on_progress=lambda count: None))
    rows = prompts.union(responses)
    scored = measure("score", partial(workers.score, rows, log_probs=True, embed=True, for_update=True))
    trained = trained_rows(rows, scored)
    return trained, measure("update", partial(workers.update_actor, trained, 1))


def prompt_rows(config: RunConfig, train_file: Path) -> DataProto:
    """The rows of the first triplets of a training file."""
    model, rollout = config.actor_rollout_ref.model.path, config.actor_rollout_ref.rollout
    assert model is not None
    renderer = PromptRenderer(load_tokenizer(model), config.data.max_prompt_length)
    samples = PromptDataset([str(train_file)], config.data, ("positive", "query", "negative"), renderer)
    settings = EmbedderSettings(max_new_tokens=config.data.max_response_length)
    collate = PromptCollator(renderer, settings, config.data.reward_fn_key)
    return expand(collate([samples[i] for i in range(config.data.train_batch_size)]), rollout)


def trained_rows(rows: DataProto, scored: DataProto) -> DataProto:
    """The positives with random advantages and the other columns of an update."""
    rows = rows.with_tensors(old_log_probs=scored.batch["log_probs"])
    batch = rows[is_trained(rows)]
    advantage = torch.randn(len(batch), 1, generator=torch.Generator().manual_seed(0))
    return batch.with_tensors(
        advantages=advantage.expand(-1, batch.batch["responses"].shape[1]).contiguous(),
        mini_batch=torch.zeros(len(batch), dtype=torch.int64),
    )
