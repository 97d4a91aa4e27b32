"""Cutting a rank's rows into micro-batches: packed lines of tokens, each one forward."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from verl.config import MicroBatchLimit
from verl.embedding.settings import NO_MIX, Mix
from verl.models.packing import PackedBatch, Row, pack
from verl.models.policy import PolicyModel
from verl.protocol import DataProto, is_trained, prompt_ids, response_ids
from verl.utils.seqlen_balancing import pack_rows

_DUMMY_ROW = Row(prompt=(0,), response=(), pool_start=0, scored=True)


@dataclass
class MicroBatch:
    rows: list[int]
    """Positions in the rank's rows, in packed order; empty when the micro-batch is a dummy row."""
    packed: PackedBatch


def token_rows(rows: DataProto) -> list[Row]:
    """The unpadded token ids of each row; log-probs are wanted for trained rows."""
    optional = {"score_start": None, **NO_MIX._asdict()}
    given = [
        rows.batch[name].tolist() if name in rows.batch.keys() else [default] * len(rows)
        for name, default in optional.items()
    ]
    return [
        Row(tuple(prompt), tuple(response), start, scored, Mix(*mix), score_start)
        for prompt, response, start, scored, score_start, *mix in zip(
            prompt_ids(rows), response_ids(rows), rows.batch["pool_start"].tolist(), is_trained(rows).tolist(), *given,
            strict=True,
        )
    ]  # fmt: skip


def micro_batches(rows: DataProto, limit: MicroBatchLimit, policy: PolicyModel) -> Iterator[MicroBatch]:
    """Pack a rank's rows into micro-batches: the same number of them on every rank.

    FSDP gathers weights in every forward, and every rank must take part. So a rank that has no rows left runs a dummy
    row of one token, whose result is ignored.
    """
    tokens = token_rows(rows)
    # A prompt that is computed for every row counts for every row.
    prompts = [row.prompt for row in tokens] if policy.shares_prompts else range(len(tokens))
    parts = pack_rows(
        prompts, [len(row.prompt) for row in tokens], [len(row.response) for row in tokens], limit.max_tokens,
        limit.max_rows,
    )  # fmt: skip
    count = torch.tensor(len(parts))
    dist.all_reduce(count, dist.ReduceOp.MAX)
    for i in range(int(count)):
        part = parts[i] if i < len(parts) else []
        packed = pack([tokens[row] for row in part] or [_DUMMY_ROW], policy.shares_prompts)
        yield MicroBatch(part, packed.to(policy.device))


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The sum of a CPU tensor over all ranks; workers have gloo for these beside NCCL."""
    total = values.clone()
    dist.all_reduce(total)
    return total
