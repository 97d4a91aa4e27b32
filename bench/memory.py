"""Peak memory by phase of a worker: python bench/memory.py [--device cpu] [--model FOLDER] [--json FILE]

One worker in this process goes through two steps of 4 triplets x 8 rationales x 96 tokens; the second is reported: the
largest resident memory of each phase (Linux resets the mark), and on CUDA the most that was allocated there.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import MODEL, markdown, prepare_data, write_json

from verl.config import DataConfig, RunConfig
from verl.data.dataset import PromptDataset, collate
from verl.embedding.prompts import PromptRenderer
from verl.protocol import DataProto
from verl.single_controller.worker import WorkerPlace
from verl.workers.fsdp_workers import ActorRolloutRefWorker

TRIPLETS, N, TOKENS = 4, 8, 96


def peak_gib() -> float:
    """Most resident memory since `forget_peak`."""
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
    worker = ActorRolloutRefWorker(place, RunConfig.model_validate(settings), total_steps=10)
    worker.join_process_group("127.0.0.1", "127.0.0.1", worker.open_port("127.0.0.1"))
    return worker


def prompt_rows(worker: ActorRolloutRefWorker, train_file: Path) -> DataProto:
    renderer = PromptRenderer(worker.tokenizer, 160)
    samples = PromptDataset([str(train_file)], DataConfig(), ("positive", "query", "negative"), renderer)
    rows = collate([samples[i] for i in range(TRIPLETS)], renderer, worker.tokenizer.pad_token_id, samples.config)
    rows.batch["temperature"] = torch.ones(len(rows))
    return rows.repeat(np.where(rows.non_tensor_batch["role"] == "positive", N, 1).tolist())


def trained_rows(rows: DataProto, scored: DataProto) -> DataProto:
    """The positives with advantages, as the update wants them."""
    rows = rows.union(DataProto.from_dict({"old_log_probs": scored.batch["log_probs"]}))
    batch = rows[rows.non_tensor_batch["role"] == "positive"]
    advantage = torch.randn(len(batch), 1, generator=torch.Generator().manual_seed(0))
    batch.batch["advantages"] = advantage.expand(-1, batch.batch["responses"].shape[1]).contiguous()
    batch.batch["mini_batch"] = torch.zeros(len(batch), dtype=torch.int64)
    return batch


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
            responses = phase("gen", lambda step=step: list(worker.generate(prompts, step, TOKENS))[-1])
            rows = prompts.union(responses)
            scored = phase("score", lambda rows=rows: worker.compute_log_prob(rows, embed=True, for_update=True))
            phase("update", lambda rows=rows, scored=scored: worker.update_actor(trained_rows(rows, scored), 1))
    columns = list(found["update"])
    table = [[name, *(f"{values[column]:.2f}" for column in columns)] for name, values in found.items()]
    print(markdown(["phase", *columns], table))
    write_json(args.json, {"phases": found, "table": table})


if __name__ == "__main__":
    main()
