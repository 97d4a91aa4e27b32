"""Distribute rows over ranks and micro-batches by their number of tokens. Pure Python.

Invariants: every row appears exactly once; rows of one group are on one rank when there are at least as many groups as
ranks; a micro-batch has at most its number of tokens, unless a single row has more.
"""

import heapq
from collections.abc import Hashable, Iterable, Sequence


def balanced_partitions(costs: Sequence[int], num_parts: int) -> list[list[int]]:
    """Split positions into `num_parts` lists of nearly equal total cost.

    Greedy: the position of the highest cost goes to the part with the lowest total (Graham 1969, LPT rule).

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
    """Distribute rows over `num_parts` ranks by cost; whole groups where there are enough groups.

    Rows of a group have the same prompt, which is computed once where they are on one rank.
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
    """Split rows into micro-batches; a prompt is counted once per micro-batch.

    Args:
        prompts: identifies each row's prompt; rows with equal ones are put next to each other.
        prompt_tokens, response_tokens: number of tokens of each row.
        max_tokens: most tokens of a micro-batch; None = no limit. A row that has more is a micro-batch of its own.
        max_rows: most rows of a micro-batch; None = no limit.
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
