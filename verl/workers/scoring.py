"""Log-probs, entropies and embeddings of rows by one packed forward; no gradient.

Shapes: N rows, R scored tokens of the longest row (see `protocol.scored_width`), H hidden size.
"""

import torch

from verl.config import MicroBatchLimit
from verl.embedding.pooling import unit
from verl.models.fsdp import reshard
from verl.models.policy import PolicyModel, PolicyOutput
from verl.protocol import DataProto, scored_length, scored_width
from verl.workers.micro_batches import MicroBatch, micro_batches


@torch.no_grad()
def score(
    policy: PolicyModel, rows: DataProto, limit: MicroBatchLimit, temperature: float, embed: bool, entropy: bool,
    log_probs: bool = True,
) -> DataProto:  # fmt: skip
    """One packed forward over a rank's rows.

    Args:
        temperature: divides the logits, as it did when the responses were sampled.
        entropy: needs log_probs.
        log_probs: False = the LM head does not run.

    Returns:
        Rows in the same order with what is asked for: `log_probs` [N,R] float32 (0 outside the scored tokens of
        trained rows), `embeddings` [N,H] float32, and `entropy` [N] float32 (mean over the scored tokens).
    """
    policy.eval()
    columns = ScoreColumns(rows, policy, embed, entropy, log_probs)
    for micro in micro_batches(rows, limit, policy):
        columns.fill(micro, policy(micro.packed, temperature, log_probs, entropy, embed))
    reshard(policy)
    return columns.to_rows()


class ScoreColumns:
    """The columns that scoring returns, filled micro-batch by micro-batch."""

    def __init__(self, rows: DataProto, policy: PolicyModel, embed: bool, entropy: bool, log_probs: bool) -> None:
        num_rows, width = len(rows), scored_width(rows)
        hidden_size = policy.lm.config.get_text_config().hidden_size
        self._length = scored_length(rows).clamp(min=1)
        self._log_probs = torch.zeros(num_rows, width) if log_probs else None
        self._entropies = torch.zeros(num_rows, width) if entropy else None
        self._embeddings = torch.zeros(num_rows, hidden_size) if embed else None

    def fill(self, micro: MicroBatch, out: PolicyOutput) -> None:
        """Take over what the policy returned for a micro-batch of these rows."""
        if not micro.rows:
            return
        position = torch.tensor(micro.rows)
        where = (position[micro.packed.score_row.cpu()], micro.packed.score_column.cpu())
        if self._log_probs is not None and out.log_probs is not None:
            self._log_probs[where] = out.log_probs.detach().cpu()
        if self._entropies is not None and out.entropy is not None:
            self._entropies[where] = out.entropy.detach().cpu()
        if self._embeddings is not None and out.embeddings is not None:
            self._embeddings[position] = unit(out.embeddings.detach()).cpu()

    def to_rows(self) -> DataProto:
        """The columns, in the order of the rows."""
        entropy = None if self._entropies is None else self._entropies.sum(1) / self._length
        columns = {"log_probs": self._log_probs, "entropy": entropy, "embeddings": self._embeddings}
        return DataProto.from_dict({name: column for name, column in columns.items() if column is not None})
