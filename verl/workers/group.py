"""The driver's handle on the workers: their methods by name, with rows spread over ranks by cost."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from verl.embedding.settings import EmbedderSettings
from verl.protocol import DataProto
from verl.single_controller.worker_group import WorkerGroup, restore_order
from verl.utils.seqlen_balancing import partition_rows
from verl.workers.fsdp_workers import ActorRolloutRefWorker


class ActorRolloutRefGroup:
    """`ActorRolloutRefWorker` on every rank; see there for what each method does.

    Args:
        ranks_per_engine: neighbouring ranks that share one rollout engine.
    """

    def __init__(self, group: WorkerGroup, ranks_per_engine: int) -> None:
        self._group = group
        self._ranks_per_engine = ranks_per_engine

    @property
    def world_size(self) -> int:
        return self._group.world_size

    def enter_phase(self, name: str) -> None:
        """Name what the run does next, for messages about workers that fail or hang."""
        self._group.phase = name

    def take_bytes_moved(self) -> int:
        """Bytes of rows sent to and from workers since the last call."""
        moved, self._group.bytes_moved = self._group.bytes_moved, 0
        return moved

    def init_model(self) -> dict[str, Any]:
        return self._group.call(ActorRolloutRefWorker.init_model)

    def generate(self, rows: DataProto, step: int, on_progress: Callable[[int], None]) -> DataProto:
        """Responses for every row. A row's cost is its prompt and a full-length response."""
        costs = (rows.batch["prompt_length"] + rows.batch["max_new_tokens"]).tolist()
        size = self._ranks_per_engine
        parts = partition_rows(rows.non_tensor_batch["uid"], costs, self.world_size // size)
        results = self._group.stream_rows(
            ActorRolloutRefWorker.generate,
            rows,
            [parts[rank // size] for rank in range(self.world_size)],
            on_progress,
            step,
        )
        return restore_order(results[::size], parts)

    def score(
        self, rows: DataProto, *, log_probs: bool, embed: bool, for_update: bool, train_anchors: bool = False
    ) -> DataProto:
        return self._by_tokens(ActorRolloutRefWorker.score, rows, log_probs, embed, for_update, train_anchors)

    def compute_ref_log_prob(self, rows: DataProto) -> DataProto:
        return self._by_tokens(ActorRolloutRefWorker.compute_ref_log_prob, rows)

    def compute_untrained_log_prob(self, rows: DataProto) -> DataProto:
        return self._by_tokens(ActorRolloutRefWorker.compute_untrained_log_prob, rows)

    def update_actor(self, rows: DataProto, num_mini_batches: int) -> dict[str, float]:
        """Each mini-batch (column `mini_batch`) is spread over all ranks by its tokens."""
        parts: list[list[int]] = [[] for _ in range(self.world_size)]
        for mini_batch in range(num_mini_batches):
            members = (rows.batch["mini_batch"] == mini_batch).nonzero().flatten().tolist()
            for rank, part in enumerate(self._partition(rows[members])):
                parts[rank] += [members[i] for i in part]
        return self._group.map_rows(ActorRolloutRefWorker.update_actor, rows, parts, num_mini_batches)[0]

    def memory(self) -> dict[str, float]:
        return self._group.call(ActorRolloutRefWorker.memory)

    def sync_rollout_weights(self) -> dict[str, float]:
        return self._group.call(ActorRolloutRefWorker.sync_rollout_weights)

    def save_checkpoint(self, folder: Path, embedder: EmbedderSettings) -> None:
        self._group.call(ActorRolloutRefWorker.save_checkpoint, folder, embedder)

    def load_checkpoint(self, folder: Path) -> None:
        self._group.call(ActorRolloutRefWorker.load_checkpoint, folder)

    def shutdown(self) -> None:
        self._group.shutdown()

    def _by_tokens(self, method: Callable[..., Any], rows: DataProto, *args: Any) -> DataProto:
        parts = self._partition(rows)
        return restore_order(self._group.map_rows(method, rows, parts, *args), parts)

    def _partition(self, rows: DataProto) -> list[list[int]]:
        costs = (rows.batch["prompt_length"] + rows.batch["response_length"]).tolist()
        return partition_rows(rows.non_tensor_batch["uid"], costs, self.world_size)
