"""Rollout engines compared: python3 bench/engines.py [--rounds 3] [--json FILE]

Each engine in a process of its own, in turn, on SmolLM2-135M: tokens per second at 36 and 128 rationales of 48 new
tokens (9 and 32 prompts, four rationales each), seconds of a weight sync and of its check, memory over 20 syncs, and
the seconds of an update with all torch threads and with one, which is what vLLM would set. Prints medians over the
rounds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import common
from common import REPO, example_texts, get_model, installed_engines, markdown, seconds, write_json

from verl.utils.cpus import usable_cpus

MODEL = str(REPO / common.MODEL)
NEW_TOKENS = 48


def measure(name: str) -> dict[str, float]:
    """Figures of one engine, in this process."""
    import torch
    import torch.distributed as dist

    from verl.config import ActorConfig
    from verl.embedding.prompts import PromptRenderer, rationale_messages
    from verl.models.load import load_causal_lm
    from verl.models.policy import PolicyModel
    from verl.utils.tokenizer import load_tokenizer
    from verl.workers.actor import Actor
    from verl.workers.device_stages import DeviceStages
    from verl.workers.rollout.base import finish, row_seeds
    from verl.workers.weight_sync import CANARY, WeightSync

    dist.init_process_group("gloo", rank=0, world_size=1)
    tokenizer = load_tokenizer(MODEL)
    chats = [rationale_messages(text) for text in example_texts(32)]
    prompts = [p.ids for p in PromptRenderer(tokenizer).render(chats)]
    policy = PolicyModel(load_causal_lm(MODEL))
    actor = Actor(policy, ActorConfig.model_validate({"ppo_max_token_len_per_gpu": 16384}), 1.0, NEW_TOKENS, 10)
    engine = build_engine(name, policy.lm)
    figures = {}
    canary = [tokenizer(text)["input_ids"] for text in CANARY]
    # The first sync is warm-up: its figures are overwritten by the second.
    for mode in ("sample", "sample", "full"):
        sync = WeightSync(policy, engine, torch.float32, mode, canary, DeviceStages(policy.device))
        found = sync.send()
        figures["weight sync s"] = found["weights_s"]
        figures[f"proof s, {mode}"] = found["proof_s"] + sync.wake_engine()["proof_s"]
    for turn in range(20):
        engine.mark_stale()
        sync.send()
        sync.wake_engine()
        finish(engine.generate(prompts[:8], [1.0] * 8, 8, row_seeds(turn, 8)))
        if turn in (0, 19):
            figures[f"resident GiB after {turn + 1} syncs"] = resident_gib()
    rows = trained_rows(prompts, finish(engine.generate(prompts[:4] * 4, [1.0] * 16, NEW_TOKENS, row_seeds(0, 16))))
    actor.update(rows, 1)  # makes the optimizer's state
    threads = torch.get_num_threads()
    for label, number in ((f"{threads} threads", threads), ("1 thread", 1)):
        torch.set_num_threads(number)
        updates = [seconds(lambda: actor.update(rows, 1)) for _ in range(3)]
        figures[f"update of 16 rows s, {label}"] = statistics.median(updates)
        for count in (36, 128) if number == threads else (36,):
            chosen = [prompts[i // 4] for i in range(count)]
            spent = seconds(
                lambda rows=chosen: finish(
                    engine.generate(rows, [1.0] * len(rows), NEW_TOKENS, row_seeds(1, len(rows)))
                )
            )
            figures[f"tokens/s at {count}, {label}"] = count * NEW_TOKENS / spent
    return figures


def build_engine(name: str, lm: Any) -> Any:
    import torch

    from verl.config import ModelConfig, RolloutConfig
    from verl.models.load import build_twin
    from verl.workers.rollout.choose import load_vllm_adapter
    from verl.workers.rollout.hf import HFRollout

    cpu = torch.device("cpu")
    if name == "hf":
        return HFRollout(build_twin(lm, torch.float32, cpu), [2], 1024, ignore_eos=True)
    names = [weight for weight, _ in lm.named_parameters()]
    rollout = RolloutConfig(ignore_eos=True)
    return load_vllm_adapter().VLLMRollout(ModelConfig(path=MODEL), rollout, cpu, [2], names, 256, 128, 1)


def trained_rows(prompts: list[list[int]], responses: list[Any]) -> Any:
    """Four prompts with four responses each, and the columns of an update."""
    import torch

    from verl.protocol import DataProto, left_padded

    return DataProto.from_dict(
        {
            "prompts": left_padded(prompts[:4] * 4, 0),
            "prompt_length": torch.tensor([len(p) for p in prompts[:4] * 4]),
            "pool_start": torch.zeros(16, dtype=torch.int64),
            "responses": torch.tensor([r.ids for r in responses]),
            "response_length": torch.full((16,), NEW_TOKENS),
            "advantages": torch.randn(16, 1).expand(16, NEW_TOKENS).clone(),
            "old_log_probs": torch.tensor([r.log_probs for r in responses]),
            "mini_batch": torch.zeros(16, dtype=torch.int64),
            "trained": torch.ones(16, dtype=torch.bool),
        }
    )


def resident_gib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.engine:
        print("figures " + json.dumps(measure(args.engine)))
        return
    get_model()
    engines = installed_engines()
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29631"}
    env = {"OMP_NUM_THREADS": str(usable_cpus()), **os.environ, **place}
    found: dict[str, list[dict[str, float]]] = {engine: [] for engine in engines}
    for turn in range(args.rounds):
        for engine in engines:
            print(f"round {turn + 1} of {args.rounds}: {engine}", flush=True)
            command = [sys.executable, __file__, "--engine", engine]
            out = subprocess.run(command, capture_output=True, text=True, check=True, env=env, cwd=REPO)
            line = next(line for line in out.stdout.splitlines() if line.startswith("figures "))
            found[engine].append(json.loads(line.removeprefix("figures ")))
    medians = {e: {k: statistics.median(r[k] for r in rounds) for k in rounds[0]} for e, rounds in found.items()}
    table = [[key, *(f"{medians[engine][key]:.2f}" for engine in engines)] for key in medians["hf"]]
    print(markdown([f"median of {args.rounds}", *engines], table))
    write_json(args.json, {"medians": medians, "rounds": found, "table": table})


if __name__ == "__main__":
    main()
