"""Peak memory by phase of a worker: python3 bench/memory.py [--device cpu] [--model FOLDER] [--json FILE]

One worker in this process runs two steps of 4 triplets x 8 rationales x 96 tokens; the second is reported: the largest
resident memory during each phase (Linux lets a process reset that mark), and on CUDA the most that was allocated.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import MODEL, markdown, prepare_data, write_json

from verl.batch_plan import BatchPlan
from verl.config import DataConfig, RunConfig
from verl.data.dataset import PromptCollator, PromptDataset
from verl.embedding.prompts import PromptRenderer
from verl.embedding.settings import EmbedderSettings
from verl.protocol import DataProto, is_trained
from verl.single_controller.worker import WorkerPlace
from verl.trainer.ppo.step_rows import expand
from verl.workers.fsdp_workers import ActorRolloutRefWorker

TRIPLETS, N, TOKENS = 4, 8, 96


def peak_gib() -> float:
    """Largest resident memory since `forget_peak`, in GiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 2**20


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def build_worker(model: str, device: str) -> ActorRolloutRefWorker:
    rollout = {"name": "hf", "n": N, "ignore_eos": True}
    settings: dict[str, Any] = {
        "data": {"train_batch_size": TRIPLETS, "max_prompt_length": 160, "max_response_length": TOKENS},
        "actor_rollout_ref": {
            "model": {"path": model, "enable_gradient_checkpointing": False},
            "actor": {"ppo_mini_batch_size": TRIPLETS},
            "rollout": rollout,
        },
    }
    place = WorkerPlace(0, 1, device, 1, len(os.sched_getaffinity(0)))
    config = RunConfig.model_validate(settings)
    plan = BatchPlan.from_config(config, num_samples=TRIPLETS, num_anchors=2, world_size=1)
    worker = ActorRolloutRefWorker(place, config, plan)
    worker.join_process_group("127.0.0.1", "127.0.0.1", worker.open_port("127.0.0.1"))
    return worker


def prompt_rows(worker: ActorRolloutRefWorker, train_file: Path) -> DataProto:
    renderer = PromptRenderer(worker.tokenizer, 160)
    samples = PromptDataset([str(train_file)], DataConfig(), ("positive", "query", "negative"), renderer)
    collate = PromptCollator(renderer, EmbedderSettings(), samples.config.reward_fn_key)
    return expand(collate([samples[i] for i in range(TRIPLETS)]), worker.config.rollout)


def generate(worker: ActorRolloutRefWorker, prompts: DataProto, step: int) -> DataProto:
    *_, responses = worker.generate(prompts, step, TOKENS)
    assert isinstance(responses, DataProto)
    return responses


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
        worker = build_worker(args.model, args.device)
        phase("loading", worker.init_model)
        prompts = prompt_rows(worker, train_file)
        for step in range(2):
            phase("sync", worker.sync_rollout_weights)
            responses = phase("gen", partial(generate, worker, prompts, step))
            rows = prompts.union(responses)
            scored = phase("score", partial(worker.compute_log_prob, rows, embed=True, for_update=True))
            phase("update", partial(worker.update_actor, trained_rows(rows, scored), 1))
    columns = list(found["update"])
    table = [[name, *(f"{values[column]:.2f}" for column in columns)] for name, values in found.items()]
    print(markdown(["phase", *columns], table))
    write_json(args.json, {"phases": found, "table": table})


if __name__ == "__main__":
    main()
