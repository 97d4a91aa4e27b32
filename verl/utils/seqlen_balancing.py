"""Spreading rows over ranks and into micro-batches by their number of tokens. Pure Python.

Invariants: every row appears exactly once; rows of one group stay together on a rank when there are
at least as many groups as ranks; a micro-batch stays within its token budget unless one row alone is
over it.
"""

import heapq
from collections.abc import Hashable, Iterable, Sequence


def balanced_partitions(costs: Sequence[int], num_parts: int) -> list[list[int]]:
    """Split positions into `num_parts` lists of nearly equal total cost (longest first to the lightest part).

    Args:
        costs: cost of each position, such as its number of tokens.
    """
    heap = [(0, part) for part in range(num_parts)]
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    for position in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, part = heapq.heappop(heap)
        parts[part].append(position)
        heapq.heappush(heap, (load + costs[position], part))
    return [sorted(part) for part in parts]


def partition_rows(groups: Iterable[Hashable], costs: Sequence[int], num_parts: int) -> list[list[int]]:
    """Split rows over ranks by cost, whole groups at a time where there are enough groups.

    Rows of a group share their prompt, so a group that stays together is computed with one prompt.
    """
    members: dict[Hashable, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    units = list(members.values()) if len(members) >= num_parts else [[row] for row in range(len(costs))]
    parts = balanced_partitions([sum(costs[row] for row in unit) for unit in units], num_parts)
    return [[row for unit in part for row in units[unit]] for part in parts]


def pack_rows(
    prompts: Sequence[Hashable],
    prompt_tokens: Sequence[int],
    response_tokens: Sequence[int],
    max_tokens: int | None,
    max_rows: int | None = None,
) -> list[list[int]]:
    """Cut rows into micro-batches; a prompt is counted once per micro-batch.

    Args:
        prompts: what identifies each row's prompt; rows of one prompt are put side by side.
        max_tokens: token budget, or None.
        max_rows: most rows, or None.
    """
    first_seen = {prompt: i for i, prompt in reversed(list(enumerate(prompts)))}
    order = sorted(range(len(prompts)), key=lambda i: (first_seen[prompts[i]], i))
    batches: list[list[int]] = []
    tokens = 0
    for row in order:
        shares = bool(batches) and prompts[batches[-1][-1]] == prompts[row]
        cost = response_tokens[row] + (0 if shares else prompt_tokens[row])
        full = not batches or (max_tokens is not None and tokens + cost > max_tokens)
        full = full or (max_rows is not None and len(batches[-1]) >= max_rows)
        if full:
            batches.append([])
            tokens, cost = 0, prompt_tokens[row] + response_tokens[row]
        batches[-1].append(row)
        tokens += cost
    return batches
