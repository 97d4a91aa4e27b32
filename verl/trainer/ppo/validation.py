"""Validation while training: held-out samples and scored pairs, embedded as training embeds, and their figures."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import orjson
import torch
from torch import Tensor

from verl.config import RunConfig
from verl.data.dataset import PromptDataset, Sample, collate
from verl.embedding.metrics import spearman, spread_report, triplet_report
from verl.embedding.prompts import PromptRenderer, rationale_messages, system_prompt_of
from verl.errors import UserError
from verl.protocol import DataProto

# The better, the smaller; everything else that is reported is the better, the larger.
SMALLER_IS_BETTER = {"val/alignment", "val/uniformity", "val/mean_cosine"}

_SAMPLES, _PAIRS = "samples", "pairs"


class Validation:
    """What is embedded, and what is made of it.

    Args:
        samples: held-out samples of the training's kind.
        needs_embeddings: False = the reward does not come from embeddings, and only it is reported.

    Raises:
        UserError: data.val_sts_file is not there, or a line of it is not a scored pair.
    """

    def __init__(
        self, config: RunConfig, samples: PromptDataset, renderer: PromptRenderer, needs_embeddings: bool
    ) -> None:
        self.config = config.data
        self.renderer = renderer
        system = system_prompt_of(samples[0]["chats"]["positive"])
        file = self.config.val_sts_file if needs_embeddings else None
        pairs = read_pairs(Path(file)) if file else []
        self.scores = torch.tensor([pair["score"] for pair in pairs], dtype=torch.float64)
        count = min(len(samples), self.config.val_max_samples)
        if count < 2:
            raise UserError("data.val_files or data.val_max_samples leaves one sample, which compares with nothing.")
        self.parts: dict[str, Sequence[Sample]] = {
            _SAMPLES: [self._used(samples[i]) for i in range(count)],
            _PAIRS: [self._pair_sample(i, pair, system) for i, pair in enumerate(pairs)],
        }

    @property
    def num_texts(self) -> int:
        return sum(len(sample["chats"]) for part in self.parts.values() for sample in part)

    def batches(self) -> Iterator[tuple[str, DataProto]]:
        """Prompt rows with the part they belong to, in a fixed order."""
        size = self.config.val_batch_size or self.config.train_batch_size
        pad_id = self.renderer.tokenizer.pad_token_id
        for name, part in self.parts.items():
            for start in range(0, len(part), size):
                yield name, collate(part[start : start + size], self.renderer, pad_id, self.config)

    def report(self, embedded: Sequence[tuple[str, DataProto]]) -> dict[str, float]:
        """Figures of all batches, each with `embeddings` of its rows."""
        vectors = {role: _vectors(embedded, _SAMPLES, role) for role in ("query", "positive", "negative")}
        found = (
            triplet_report(vectors["query"], vectors["positive"], vectors["negative"])
            if len(vectors["negative"])
            else spread_report(vectors["positive"])
        )
        if len(self.scores):
            first, second = (_vectors(embedded, _PAIRS, role) for role in ("positive", "query"))
            found["sts_spearman"] = spearman((first * second).sum(1), self.scores)
        return {f"val/{name}": value for name, value in found.items()}

    def _used(self, sample: Sample) -> Sample:
        """Without the second role of a plain text, which is the same text."""
        chats = sample["chats"]
        return sample if "negative" in chats else {**sample, "chats": {"positive": chats["positive"]}}

    def _pair_sample(self, index: int, pair: dict[str, Any], system: str | None) -> Sample:
        chats = {
            "positive": rationale_messages(pair["sentence1"], system),
            "query": rationale_messages(pair["sentence2"], system),
        }
        others = {self.config.reward_fn_key: "sts", "reward_model": None, "extra_info": None}
        return {"uid": index, "chats": chats, **others}


def read_pairs(file: Path) -> list[dict[str, Any]]:
    """Pairs of texts with their scores.

    Raises:
        UserError: the file is not there, or a line is not such a pair.
    """
    if not file.is_file():
        raise UserError(f"data.val_sts_file={file} does not exist; give a file of scored pairs, or null for none.")
    pairs = []
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        try:
            pair = orjson.loads(line)
            texts_are_there = all(pair[name].strip() for name in ("sentence1", "sentence2"))
            pairs.append({**pair, "score": float(pair["score"])})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"data.val_sts_file={file} line {number} is not a scored pair ({error!r}); each line is "
                '{"sentence1": "...", "sentence2": "...", "score": 3.5}.'
            ) from error
        if not texts_are_there or not math.isfinite(pairs[-1]["score"]):
            raise UserError(f"data.val_sts_file={file} line {number} has an empty text or a score that is no number.")
    return pairs


def is_better(name: str, value: float, than: float | None) -> bool:
    """Whether a validation's figure is the best so far."""
    if not math.isfinite(value):
        return False
    return than is None or (value < than if name in SMALLER_IS_BETTER else value > than)


def _vectors(embedded: Sequence[tuple[str, DataProto]], part: str, role: str) -> Tensor:
    """[N,H], in the order of the samples."""
    found = [rows[rows.non_tensor_batch["role"] == role].batch["embeddings"] for name, rows in embedded if name == part]
    return torch.cat(found) if found else torch.empty(0, 0)
