"""The forward that scored the rows of the update, kept with its graph for the update that follows.

Where a training step is one optimizer step on one micro-batch, the weights do not change between scoring and update,
so the update's forward would repeat the scoring's. That holds on a CPU with one process only: on a GPU the weights may
move to host memory in between, and with several ranks the update may spread the rows differently.
"""

from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist

from verl.config import MicroBatchLimit
from verl.models.packing import PackedBatch
from verl.models.policy import PolicyModel, PolicyOutput
from verl.protocol import DataProto, is_trained
from verl.workers.micro_batches import MicroBatch, micro_batches
from verl.workers.scoring import ScoreColumns

# Two packed lines that agree in these are the same rows.
_SAME_LINE = ("input_ids", "position_ids", "score_token", "score_target", "score_row")


class KeptForward:
    """At most one forward: the packed line it was computed on, and what the policy returned.

    Args:
        temperature: divides the logits.
        needs_log_probs: every update needs log-probs, also one after a scoring that returns none.
    """

    def __init__(self, policy: PolicyModel, temperature: float, needs_log_probs: bool) -> None:
        self._policy, self._temperature, self._needs_log_probs = policy, temperature, needs_log_probs
        self._kept: tuple[PackedBatch, PolicyOutput] | None = None

    def score(
        self, rows: DataProto, updated: MicroBatch, limit: MicroBatchLimit, embed: bool, log_probs: bool
    ) -> DataProto:
        """As `scoring.score`, with the entropies of log-probs; the forward over the rows of the update is kept.

        Args:
            updated: all rows of the update in one micro-batch, see `only_micro_batch`.
            limit: of the other rows' micro-batches.
        """
        policy = self._policy
        columns = ScoreColumns(rows, policy, embed, log_probs, log_probs)
        policy.eval()
        for micro in _others(policy, rows, updated, limit) if embed else ():
            with torch.no_grad():
                columns.fill(micro, policy(micro.packed, log_probs=False, embeddings=True))
        policy.train()
        out = policy(updated.packed, self._temperature, log_probs or self._needs_log_probs, log_probs, embed)
        columns.fill(updated, out)
        self.keep(updated.packed, out)
        return columns.to_rows()

    def keep(self, packed: PackedBatch, out: PolicyOutput) -> None:
        self._kept = packed, out

    def take(self, packed: PackedBatch) -> PolicyOutput | None:
        """What was kept, if it was computed on the same line; it is forgotten either way, as its graph serves once."""
        kept, self._kept = self._kept, None
        if kept and all(torch.equal(getattr(kept[0], name), getattr(packed, name)) for name in _SAME_LINE):
            return kept[1]
        return None


def only_micro_batch(
    policy: PolicyModel, rows: DataProto, limit: MicroBatchLimit, train_anchors: bool
) -> MicroBatch | None:
    """The rows of the update as its one micro-batch, or None where a forward cannot be kept.

    Args:
        limit: of the update's micro-batches.
        train_anchors: anchors are in the update too.
    """
    positions = np.flatnonzero(is_trained(rows) | train_anchors).tolist()
    if not positions or policy.device.type != "cpu" or dist.get_world_size() > 1:
        return None
    micros = list(micro_batches(rows[positions], limit, policy))
    return _moved(micros[0], positions) if len(micros) == 1 else None


def _others(policy: PolicyModel, rows: DataProto, updated: MicroBatch, limit: MicroBatchLimit) -> Iterator[MicroBatch]:
    positions = np.setdiff1d(np.arange(len(rows)), updated.rows).tolist()
    if positions:
        yield from (_moved(micro, positions) for micro in micro_batches(rows[positions], limit, policy))


def _moved(micro: MicroBatch, positions: list[int]) -> MicroBatch:
    """A micro-batch of some of the rows, with its positions in all of them."""
    return MicroBatch([positions[i] for i in micro.rows], micro.packed)
