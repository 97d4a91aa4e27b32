"""Reward maths at the paper's sizes, and the bytes of a step's embeddings: python3 bench/reward.py [--json FILE]

B = 512 trained rows in 64 groups, H = 1536, with queries and negatives. The whole reward manager call, compared with
the same rewards row by row as the original computes them: rows grouped by comparing prompts, one cosine at a time.
"""

import argparse
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import Comparison, markdown, seconds, write_json
from torch import Tensor

from verl.protocol import DataProto
from verl.workers.reward_manager.hidden import HiddenRewardManager

GROUPS, ROWS_PER_GROUP, HIDDEN = 64, 8, 1536
TEMPERATURE = 0.1


def paper_rows() -> DataProto:
    torch.manual_seed(0)
    roles = (["positive"] * ROWS_PER_GROUP + ["query", "negative"]) * GROUPS
    uids = [group for group in range(GROUPS) for _ in range(ROWS_PER_GROUP + 2)]
    vectors = F.normalize(torch.randn(len(roles), HIDDEN), dim=1)
    columns: dict[str, Sequence[Any]] = {
        "role": roles,
        "uid": uids,
        "text": [f"{role} {uid}" for role, uid in zip(roles, uids, strict=True)],
    }
    tensors = {
        "embeddings": vectors,
        "truncated": torch.zeros(len(roles), dtype=torch.bool),
        "response_length": torch.ones(len(roles), dtype=torch.int64),
        "trained": torch.tensor([role == "positive" for role in roles]),
    }
    return DataProto.from_dict(tensors, columns)


def row_by_row(rows: DataProto) -> Tensor:
    """The rewards of objective=grace [B], one scalar at a time."""
    vectors, roles, uids = rows.batch["embeddings"], rows.non_tensor_batch["role"], rows.non_tensor_batch["uid"]
    trained = [i for i, role in enumerate(roles) if role == "positive"]
    prompts = [torch.full((1024,), int(uids[i])) for i in trained]
    members: list[list[int]] = []
    for place, prompt in enumerate(prompts):
        group = next((g for g in members if torch.equal(prompts[g[0]], prompt)), None)
        if group is None:
            members.append([place])
        else:
            group.append(place)
    m = [vectors[i] for i in trained]
    anchor = {(uids[i], roles[i]): vectors[i] for i in range(len(roles)) if roles[i] != "positive"}

    def cosine(a: Tensor, b: Tensor) -> float:
        return float(F.cosine_similarity(a, b, dim=0))

    rewards = torch.zeros(len(trained))
    for g, group in enumerate(members):
        for i in group:
            uid = uids[trained[i]]
            query, negative = anchor[uid, "query"], anchor[uid, "negative"]
            others = [cosine(m[i], m[j]) for j in group if j != i]
            nearest = [max(cosine(query, m[k]) for k in other) for h, other in enumerate(members) if h != g]
            reward = cosine(query, m[i]) - cosine(query, negative)
            reward += 0.2 * sum(others) / len(others) - 0.2 * sum(nearest) / len(nearest)
            rewards[i] = reward / TEMPERATURE
    return rewards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = paper_rows()
    managers = {name: HiddenRewardManager(objective=name, temperature=TEMPERATURE) for name in ("grace", "infonce")}
    torch.testing.assert_close(managers["grace"](rows).scores, row_by_row(rows), atol=1e-4, rtol=1e-4)
    spent = {name: [seconds(partial(manager, rows)) for _ in range(args.repeats)] for name, manager in managers.items()}
    # Once: it takes seconds, in tens of thousands of equal calls. The check above was its warm-up.
    spent["row by row"] = [seconds(partial(row_by_row, rows))]
    medians = {name: statistics.median(values) for name, values in spent.items()}
    table = [[name, f"{1000 * s:.1f}", f"1/{medians['row by row'] / s:.0f}"] for name, s in medians.items()]
    print(markdown(["rewards of 512 rows, H = 1536", "median ms", "share of row by row"], table))
    # The least arithmetic: each row times every query, and times its group's sum and itself, two FLOP per component.
    flops = 2 * HIDDEN * GROUPS * ROWS_PER_GROUP * (GROUPS + 2)
    embeddings = rows.batch["embeddings"].numel() * 4
    print(f"\nArithmetic of grace: {flops / 1e6:.0f} MFLOP. Embeddings of the step (640 rows, float32): ", end="")
    print(f"{embeddings / 2**20:.2f} MiB.")
    grace = Comparison("rewards of 512 rows", medians["grace"], "row by row", medians["row by row"])
    results = {"median_s": medians, "table": table, "flops": flops, "embedding_bytes": embeddings}
    write_json(args.json, results, [grace])


if __name__ == "__main__":
    main()
