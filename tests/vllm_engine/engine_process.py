"""What the engine tests run in processes of their own: vllm changes the process that imports it."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from steps import build_actor, trained_rows, with_log_probs

from verl.config import FsdpConfig, ModelConfig, RolloutConfig
from verl.models.fsdp import full_weights, shard
from verl.models.load import load_causal_lm
from verl.models.policy import PolicyModel
from verl.workers.device_stages import DeviceStages
from verl.workers.rollout.base import RolloutError, finish, row_seeds
from verl.workers.rollout.choose import load_vllm_adapter
from verl.workers.weight_sync import WeightSync, WeightSyncError

PROMPTS = [[5, 6, 7, 8], list(range(40, 75)), [9] * 20, list(range(100, 117))]
CANARY = [list(range(60, 90)), [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]]
NEW_TOKENS = 24
# More tokens than one engine step takes.
CROWD = [[(7 * row + place) % 200 for place in range(60)] for row in range(12)]


@dataclass(frozen=True)
class Job:
    """Something that is done with an engine of its own."""

    work: "Callable[[Path], tuple[Engine, dict[str, Any]]]"
    """From the model's folder to the engine and the results."""
    model: Path
    out: Path
    """Folder for `rank_N.pt`, the results of each rank."""


def do_jobs(rank: int, world_size: int, meeting: dict[str, str], jobs: Sequence[Job]) -> None:
    """Do the jobs in turn, in one process per rank: importing vllm takes longer than all of them."""
    join(rank, world_size, meeting)
    engines = []  # vllm's process groups end with the first engine that is freed
    for job in jobs:
        engine, results = job.work(job.model)
        engines.append(engine)
        job.out.mkdir(exist_ok=True)
        torch.save(results, job.out / f"rank_{rank}.pt")
    dist.destroy_process_group()


def join(rank: int, world_size: int, meeting: dict[str, str]) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(world_size), OMP_NUM_THREADS="1", **meeting)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)


class Engine:
    """A policy, sharded when there are several ranks, and the vLLM engine that follows it."""

    def __init__(self, folder: Path, check: str = "full", **rollout) -> None:
        lm = load_causal_lm(str(folder))
        stop_ids = [lm.config.eos_token_id]
        self.policy = PolicyModel(lm)
        self.rollout = load_vllm_adapter().VLLMRollout(
            ModelConfig(path=str(folder)),
            RolloutConfig.model_validate({"max_num_batched_tokens": 512, "enable_chunked_prefill": True, **rollout}),
            torch.device("cpu"), stop_ids, [name for name, _ in lm.named_parameters()],
            max_model_len=96, max_num_seqs=16, engines_per_node=1,
        )  # fmt: skip
        shard(self.policy, torch.device("cpu"), FsdpConfig(), offload_policy=False)
        self.weight_sync = WeightSync(
            self.policy, self.rollout, torch.float32, check, CANARY, DeviceStages(torch.device("cpu"))
        )

    def sync(self) -> dict[str, float]:
        found = self.weight_sync.send()
        return {**found, **self.weight_sync.wake_engine()}

    def responses(self, temperature: float = 0.0, prompts=PROMPTS, seed: int = 0):
        count = len(prompts)
        return finish(self.rollout.generate(prompts, [temperature] * count, NEW_TOKENS, row_seeds(seed, count)))

    def train(self, rows, steps: int) -> None:
        actor = build_actor(self.policy)
        part = list(
            range(dist.get_rank() * 12 // dist.get_world_size(), (dist.get_rank() + 1) * 12 // dist.get_world_size())
        )
        for _ in range(steps):
            actor.update(rows[part], 2)
        self.rollout.mark_stale()

    def snapshot(self) -> dict:
        weights = {name: weight.clone() for name, weight in full_weights(self.policy)}
        return {"weights": weights, "greedy": self.responses(), "sampled": self.responses(temperature=0.7)}


def error_of(action) -> str:
    """The message of the error that `action` ends with; empty when it does not."""
    try:
        action()
    except (RolloutError, WeightSyncError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def follow_training(folder: Path) -> tuple[Engine, dict[str, Any]]:
    """Generate with the first weights, train three steps, generate again; both with the weights."""
    threads = torch.get_num_threads()
    engine = Engine(folder, tensor_model_parallel_size=dist.get_world_size())
    results = {"threads": (threads, torch.get_num_threads()), "before_sync": error_of(engine.responses)}
    torch.set_num_threads(2)
    results["threads_can_be_set"] = torch.get_num_threads()
    torch.set_num_threads(1)
    results["found"] = engine.sync()
    results["first"] = engine.snapshot()
    results["crowded"] = engine.responses(1.0, CROWD)
    rows = with_log_probs(trained_rows(), engine.policy)
    engine.train(rows, steps=3)
    results["when_stale"] = error_of(engine.responses)
    engine.sync()
    results["trained"] = engine.snapshot()
    return engine, results


def sample(folder: Path) -> tuple[Engine, dict[str, Any]]:
    """Seeds, end tokens, progress, prompts that do not fit, and the settings that reach vLLM."""
    engine = Engine(
        folder, max_num_batched_tokens=640, enable_chunked_prefill=False, load_format="auto",
        engine_kwargs={"vllm": {"block_size": 64}},
    )  # fmt: skip
    vllm_config = engine.rollout._llm.llm_engine.vllm_config
    engine.sync()
    group = [PROMPTS[1]] * 6
    results = {
        "settings": {
            "max_num_batched_tokens": vllm_config.scheduler_config.max_num_batched_tokens,
            "max_num_seqs": vllm_config.scheduler_config.max_num_seqs,
            "enable_chunked_prefill": vllm_config.scheduler_config.enable_chunked_prefill,
            "max_model_len": vllm_config.model_config.max_model_len,
            "enforce_eager": vllm_config.model_config.enforce_eager,
            "load_format": vllm_config.load_config.load_format,
            "block_size": vllm_config.cache_config.block_size,
        },
        "seeds": [[r.ids for r in engine.responses(1.0, group, seed)] for seed in (3, 3, 4)],
        "alone": [r.ids for r in engine.responses(1.0, group[:1], 3)],
        "given": [row for part in engine.rollout.generate(PROMPTS, [1.0] * 4, NEW_TOKENS, [0] * 4) for row in part],
        "greedy": engine.responses(),
        "too_long": error_of(lambda: engine.responses(prompts=[PROMPTS[0], [5] * 200])),
    }
    results["after_refusal"] = engine.responses()
    return engine, results


def break_syncs(folder: Path) -> tuple[Engine, dict[str, Any]]:
    """Syncs that go wrong in the ways they do in practice; the message of each one."""
    engine = Engine(folder, check="full")
    engine.sync()
    results = {}

    def change_policy() -> None:
        with torch.no_grad():
            for parameter in engine.policy.parameters():
                parameter.mul_(1.01)

    def attempt(name: str, check: str, owner, attribute: str, replacement) -> None:
        change_policy()
        engine.weight_sync._check = check
        original = getattr(owner, attribute)
        setattr(owner, attribute, replacement(original))
        results[name] = error_of(engine.sync), error_of(engine.responses)
        setattr(owner, attribute, original)
        engine.weight_sync._check = "full"
        engine.sync()

    victim = "model.layers.1.mlp.down_proj.weight"

    def without_victim(original):
        return lambda weights: original((n, w) for n, w in weights if n != victim)

    def with_old_victim(original):
        old = dict(full_weights(engine.policy))[victim] / 1.01
        return lambda weights: original((n, old if n == victim else w) for n, w in weights)

    model = engine.rollout._model
    attempt("not sent", "off", engine.rollout, "update_weights", without_victim)
    attempt("not loaded", "full", model, "load_weights", with_old_victim)
    attempt("not loaded, sampled", "sample", model, "load_weights", with_old_victim)
    attempt("stale head", "full", engine.rollout, "_repack_head", lambda original: lambda: None)
    attempt("stale head, sampled", "sample", engine.rollout, "_repack_head", lambda original: lambda: None)
    impl = model.model.layers[0].self_attn.attn.impl
    attempt("other model", "full", impl, "scale", lambda original: original * 1.5)
    attempt("caches kept", "off", engine.rollout._llm.llm_engine, "reset_prefix_cache", lambda original: lambda: False)
    results["healthy"] = engine.sync(), error_of(engine.responses)
    return engine, results
