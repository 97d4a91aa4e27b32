"""Peak memory by phase of a worker: python3 bench/memory.py [--device cpu] [--model FOLDER] [--lora_rank N]

One worker in this process runs two steps of 4 triplets x 8 rationales x 96 tokens; the second is reported: the largest
resident memory during each phase (Linux lets a process reset that mark), and on CUDA the most that was allocated.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import MODEL, markdown, prepare_data, write_json

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

TRIPLETS, N, TOKENS = 4, 8, 96


def peak_gib() -> float:
    """Largest resident memory since `forget_peak`, in GiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 2**20


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def build_config(model: str, lora_rank: int) -> RunConfig:
    return RunConfig.model_validate(
        {
            "data": {"train_batch_size": TRIPLETS, "max_prompt_length": 160, "max_response_length": TOKENS},
            "actor_rollout_ref": {
                "model": {"path": model, "enable_gradient_checkpointing": False, "lora_rank": lora_rank},
                "actor": {"ppo_mini_batch_size": TRIPLETS},
                "rollout": {"name": "hf", "n": N, "ignore_eos": True},
            },
        }
    )


def start_workers(config: RunConfig, device: str) -> ActorRolloutRefGroup:
    plan = BatchPlan.from_config(config, num_samples=TRIPLETS, num_anchors=2, world_size=1)
    return ActorRolloutRefGroup(LocalWorkerGroup(ActorRolloutRefWorker, (config, plan), device), ranks_per_engine=1)


def prompt_rows(config: RunConfig, model: str, train_file: Path) -> DataProto:
    renderer = PromptRenderer(load_tokenizer(model), config.data.max_prompt_length)
    samples = PromptDataset([str(train_file)], config.data, ("positive", "query", "negative"), renderer)
    collate = PromptCollator(renderer, EmbedderSettings(max_new_tokens=TOKENS), config.data.reward_fn_key)
    return expand(collate([samples[i] for i in range(TRIPLETS)]), config.actor_rollout_ref.rollout)


def trained_rows(rows: DataProto, scored: DataProto) -> DataProto:
    """The positives with random advantages and the other columns of an update."""
    rows = rows.with_tensors(old_log_probs=scored.batch["log_probs"])
    batch = rows[is_trained(rows)]
    advantage = torch.randn(len(batch), 1, generator=torch.Generator().manual_seed(0))
    return batch.with_tensors(
        advantages=advantage.expand(-1, batch.batch["responses"].shape[1]).contiguous(),
        mini_batch=torch.zeros(len(batch), dtype=torch.int64),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--lora_rank", type=int, default=0, help="0 = all weights are trained")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found: dict[str, dict[str, float]] = {}

    def phase(name: str, work: Callable[[], Any]) -> Any:
        forget_peak()
        start = time.perf_counter()
        result = work()
        found[name] = {"seconds": time.perf_counter() - start, "resident_gib": peak_gib()}
        if args.device == "cuda":
            found[name]["allocated_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return result

    with tempfile.TemporaryDirectory() as folder:
        train_file = prepare_data(Path(folder))
        config = build_config(args.model, args.lora_rank)
        workers = start_workers(config, args.device)
        phase("loading", workers.init_model)
        prompts = prompt_rows(config, args.model, train_file)
        for step in range(2):
            phase("sync", workers.sync_rollout_weights)
            responses = phase("gen", partial(workers.generate, prompts, step, on_progress=lambda count: None))
            rows = prompts.union(responses)
            scored = phase("score", partial(workers.score, rows, log_probs=True, embed=True, for_update=True))
            phase("update", partial(workers.update_actor, trained_rows(rows, scored), 1))
        workers.shutdown()
    columns = list(found["update"])
    table = [[name, *(f"{values[column]:.2f}" for column in columns)] for name, values in found.items()]
    print(markdown(["phase", *columns], table))
    write_json(args.json, {"phases": found, "table": table})


if __name__ == "__main__":
    main()
