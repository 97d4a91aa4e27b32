"""DataProto, the batch of rows that travels between driver and workers, and the table of its keys.

A step is one flat batch: each row is one text with a `role` and the `uid` of its sample.
Shape letters, here and everywhere: N rows, P longest prompt, R longest response, H hidden size.

| key | shape, dtype | written by | read by |
|---|---|---|---|
| prompts | [N,P] int64, left-padded | data.collator | engine, actor |
| prompt_length | [N] int64 | data.collator | engine, actor, metrics |
| text_start | [N] int64, position in the prompt of the first token of the user's text | data.collator | step_rows |
| pool_start | [N] int64, first pooled position of prompt and response | data.collator | actor |
| text_share | [N] float64, of the mean; no column where every token counts the same | data.collator | actor |
| no_rationale_weight | [N] float64, of the prompt's own vector; no column without an average | data.collator | actor |
| trained | [N] bool, rewarded and trained; the others are anchors | data.collator | everyone |
| max_new_tokens | [N] int64, most tokens of the response; 0 = no rationale is written | data.collator | engine |
| temperature | [N] float32, of sampling | step_rows.expand | engine |
| responses | [N,R] int64, right-padded | engine | actor, metrics |
| response_length | [N] int64, end token included | engine | actor, rewards, metrics |
| rollout_log_probs | [N,R] float32, 0 past the end | engine | importance weights, metrics |
| truncated | [N] bool, hit the length limit | engine | rewards, metrics |
| embeddings | [N,H] float32, unit length | scoring | rewards |
| score_start | [N] int64, first scored position; no column where that is the response's | step_rows | actor |
| old_log_probs | [N,R] float32, trained rows only | scoring | update, metrics |
| entropy | [N] float32, mean over the response | scoring | metrics |
| ref_log_prob | [N,R], with score_start [N,P+R] float32, trained rows only | reference | update, KL in the reward |
| advantages | [N,R] float32 | step_rows.add_advantages | update |
| embedding_grad | [N,H] float32, of a loss by `embeddings` | step_rows.add_embedding_grad | update |
| mini_batch | [N] int64 | step_rows.assign_mini_batches | update |

Object columns: `uid`, `role` (positive, query or negative), `text` (the user's text), `rationale`
(decoded response), `data_source`, `reward_model`, `extra_info`, `other_positives` (texts of the sample's other known
positives, which have no rows; a contrast never counts them as negatives). A sample has up to `data.negatives_per_query`
rows of the role negative. A step that trains no policy has no `old_log_probs`, `entropy` and `advantages`. Padding is
never recognised by its token id: lengths say where a row ends.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict

Index = slice | Sequence[int] | np.ndarray | torch.Tensor


@dataclass
class DataProto:
    """N rows: tensors, object columns, and a few facts about the whole batch.

    Example:
        >>> rows = DataProto.from_dict({"responses": torch.zeros(2, 3)}, {"role": ["positive", "query"]})
        >>> len(rows[rows.non_tensor_batch["role"] == "query"])
        1
    """

    batch: TensorDict
    """Tensors, each [N, ...]."""
    non_tensor_batch: dict[str, np.ndarray] = field(default_factory=dict)
    """Object arrays, each [N]."""
    meta_info: dict[str, Any] = field(default_factory=dict)
    """Small facts about the whole batch (step, seed, limits); never metrics."""

    def __post_init__(self) -> None:
        for name, column in self.non_tensor_batch.items():
            if len(column) != len(self):
                raise ValueError(f"column {name!r} has {len(column)} rows, the tensors have {len(self)}")

    @classmethod
    def from_dict(
        cls,
        tensors: Mapping[str, torch.Tensor],
        non_tensors: Mapping[str, Sequence[Any]] | None = None,
        meta_info: dict[str, Any] | None = None,
    ) -> "DataProto":
        """Build from columns of one length.

        Raises:
            ValueError: no tensors, or columns of different lengths.
        """
        sizes = {name: tensor.shape[0] for name, tensor in tensors.items()}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"tensors need one common number of rows, got {sizes}")
        columns = {name: object_array(values) for name, values in (non_tensors or {}).items()}
        return cls(TensorDict(dict(tensors), batch_size=[next(iter(sizes.values()))]), columns, meta_info or {})

    def __len__(self) -> int:
        return int(self.batch.batch_size[0])

    def __getitem__(self, index: Index) -> "DataProto":
        """The rows of a slice, a list of positions, or a mask; meta_info is shared."""
        if isinstance(index, slice):
            index = np.arange(len(self))[index]
        positions = np.asarray(index)
        if positions.dtype == bool:
            positions = np.flatnonzero(positions)
        positions = positions.astype(np.int64)
        columns = {name: column[positions] for name, column in self.non_tensor_batch.items()}
        return DataProto(self.batch[torch.from_numpy(positions)], columns, self.meta_info)

    def select(self, batch_keys: Sequence[str], non_tensor_batch_keys: Sequence[str] = ()) -> "DataProto":
        """Only the named columns, without copying."""
        columns = {name: self.non_tensor_batch[name] for name in non_tensor_batch_keys}
        return DataProto(self.batch.select(*batch_keys), columns, self.meta_info)

    def only(self, names: Iterable[str]) -> "DataProto":
        """Those of the named columns that the rows have, tensors and objects alike, without copying."""
        wanted = set(names)
        return self.select(
            [name for name in self.batch.keys() if name in wanted],
            [name for name in self.non_tensor_batch if name in wanted],
        )

    def with_tensors(self, **tensors: torch.Tensor) -> "DataProto":
        """The same rows with these tensor columns, added or in place of those of the same name."""
        columns = TensorDict({**dict(self.batch.items()), **tensors}, batch_size=[len(self)])
        return DataProto(columns, self.non_tensor_batch, self.meta_info)

    def renamed(self, old: str, new: str) -> "DataProto":
        """The same rows with the tensor column `old` called `new`."""
        tensors = {new if name == old else name: tensor for name, tensor in self.batch.items()}
        return DataProto(TensorDict(tensors, batch_size=[len(self)]), self.non_tensor_batch, self.meta_info)

    def union(self, other: "DataProto") -> "DataProto":
        """A batch with the columns of both.

        Raises:
            ValueError: different numbers of rows, or a column that both have.
        """
        if len(self) != len(other):
            raise ValueError(f"cannot join {len(self)} rows with {len(other)} rows")
        shared = (set(self.batch.keys()) & set(other.batch.keys())) | (
            set(self.non_tensor_batch) & set(other.non_tensor_batch)
        )
        if shared:
            raise ValueError(f"both batches have the columns {sorted(shared)}")
        tensors = TensorDict({**dict(self.batch.items()), **dict(other.batch.items())}, batch_size=[len(self)])
        columns = {**self.non_tensor_batch, **other.non_tensor_batch}
        return DataProto(tensors, columns, {**self.meta_info, **other.meta_info})

    def repeat(self, counts: Sequence[int]) -> "DataProto":
        """Row i repeated counts[i] times, copies side by side."""
        return self[np.repeat(np.arange(len(self)), counts)]

    @staticmethod
    def concat(parts: Sequence["DataProto"]) -> "DataProto":
        """The rows of all parts in order; meta_info is the first part's."""
        columns = {
            name: np.concatenate([p.non_tensor_batch[name] for p in parts]) for name in parts[0].non_tensor_batch
        }
        tensors = {name: torch.cat([p.batch[name] for p in parts]) for name in parts[0].batch.keys()}
        size = sum(len(p) for p in parts)
        return DataProto(TensorDict(tensors, batch_size=[size]), columns, parts[0].meta_info)

    def to(self, device: str | torch.device) -> "DataProto":
        """The same rows with tensors on `device`."""
        return DataProto(self.batch.to(device), self.non_tensor_batch, self.meta_info)

    def require(self, *keys: str) -> None:
        """Raise `KeyError` naming the columns of `keys` that are missing."""
        missing = [k for k in keys if k not in self.batch.keys() and k not in self.non_tensor_batch]
        if missing:
            raise KeyError(
                f"rows lack {missing}; they have {sorted(self.batch.keys())} {sorted(self.non_tensor_batch)}"
            )

    def num_bytes(self) -> int:
        """Bytes of the tensors: what the batch costs to send."""
        tensors = [self.batch[name] for name in self.batch.keys()]
        return sum(t.numel() * t.element_size() for t in tensors)


def object_array(values: Sequence[Any]) -> np.ndarray:
    """A 1-D object array, also when the values are lists of one length."""
    array = np.empty(len(values), dtype=object)
    array[:] = list(values)
    return array


def response_mask(rows: DataProto) -> torch.Tensor:
    """[N,R] bool: True on the tokens of each response, its end token included."""
    width = rows.batch["responses"].shape[1]
    return torch.arange(width) < rows.batch["response_length"].unsqueeze(1)


def is_trained(rows: DataProto) -> np.ndarray:
    """[N] bool: the rows that are rewarded and trained; the others are anchors."""
    return rows.batch["trained"].numpy()


def left_padded(ids: Sequence[Sequence[int]], pad_id: int) -> torch.Tensor:
    """[N,P] int64, as wide as the longest row."""
    width = max(len(row) for row in ids)
    padded = torch.full((len(ids), width), pad_id)
    for i, row in enumerate(ids):
        padded[i, width - len(row) :] = torch.tensor(row)
    return padded


def prompt_ids(rows: DataProto) -> list[list[int]]:
    """The token ids of each prompt, without padding."""
    prompts, lengths = rows.batch["prompts"].tolist(), rows.batch["prompt_length"].tolist()
    return [prompt[len(prompt) - length :] for prompt, length in zip(prompts, lengths, strict=True)]


def scored_length(rows: DataProto) -> torch.Tensor:
    """[N] int64: tokens of a row that are scored if it is trained: those of its response, or from score_start on."""
    if "score_start" not in rows.batch.keys():
        return rows.batch["response_length"]
    return rows.batch["prompt_length"] + rows.batch["response_length"] - rows.batch["score_start"]


def scored_width(rows: DataProto) -> int:
    """Columns that log-probs have: of the longest response or, with score_start, as many as any row could need."""
    width = rows.batch["responses"].shape[1]
    return width + rows.batch["prompts"].shape[1] if "score_start" in rows.batch.keys() else width


def response_ids(rows: DataProto) -> list[list[int]]:
    """The token ids of each response, without padding."""
    responses, lengths = rows.batch["responses"].tolist(), rows.batch["response_length"].tolist()
    return [response[:length] for response, length in zip(responses, lengths, strict=True)]
