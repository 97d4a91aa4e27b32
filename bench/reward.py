"""Reward maths at the paper's sizes, and the bytes a step's rows are: python bench/reward.py [--json FILE]

B = 512 trained rows in 64 groups, H = 1536, with queries and negatives: the whole reward manager call.
"""

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import torch

from verl.protocol import DataProto
from verl.workers.reward_manager.hidden import HiddenRewardManager


def paper_rows(groups: int, n: int, hidden: int) -> DataProto:
    torch.manual_seed(0)
    roles = (["positive"] * n + ["query", "negative"]) * groups
    uids = [group for group in range(groups) for _ in range(n + 2)]
    vectors = torch.nn.functional.normalize(torch.randn(len(roles), hidden), dim=1)
    columns = {
        "role": roles,
        "uid": uids,
        "text": [f"{role} {uid}" for role, uid in zip(roles, uids, strict=True)],
    }
    return DataProto.from_dict({"embeddings": vectors, "truncated": torch.zeros(len(roles), dtype=torch.bool)}, columns)


def median_ms(call, repeats: int) -> float:
    call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = paper_rows(groups=64, n=8, hidden=1536)
    results = {
        objective: median_ms(lambda o=objective: HiddenRewardManager(objective=o, temperature=0.1)(rows), args.repeats)
        for objective in ("grace", "infonce")
    }
    embeddings = rows.batch["embeddings"].numel() * 4
    print(f"reward of 512 rows, H=1536, median of {args.repeats}, {torch.get_num_threads()} threads:")
    for objective, ms in results.items():
        print(f"  {objective:8} {ms:8.2f} ms")
    print(f"embeddings of the step (640 rows, float32): {embeddings / 2**20:.2f} MiB")
    if args.json:
        machine = {
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
        }
        record = {"machine": machine, "median_ms": results, "embedding_bytes": embeddings}
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
