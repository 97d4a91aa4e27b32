"""Validation while training: held-out samples and scored pairs are embedded as in training, and figures reported."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from verl.config import RunConfig
from verl.data.collator import PromptCollator, Sample, without_repeats
from verl.data.dataset import PromptDataset
from verl.data.rows import read_rows
from verl.embedding.metrics import spearman, spread_report, triplet_report
from verl.errors import UserError, as_user_error
from verl.protocol import DataProto
from verl.workers.reward_manager.base import RewardOutput

# Smaller values of these are better; of all other figures, larger ones.
SMALLER_IS_BETTER = {"val/alignment", "val/uniformity", "val/mean_cosine"}

_SAMPLES, _PAIRS = "samples", "pairs"


class Validation:
    """What is embedded, and what is reported of it.

    Args:
        samples: held-out samples of the training's kind.
        needs_embeddings: False = the reward does not come from embeddings, and the reward alone is reported.

    Raises:
        UserError: data.val_sts_file does not exist, or a line of it is not a scored pair.
    """

    def __init__(
        self, config: RunConfig, samples: PromptDataset, collate: PromptCollator, needs_embeddings: bool
    ) -> None:
        self.config = config
        self.collate = collate
        self.needs_embeddings = needs_embeddings
        file = config.data.sts_path if needs_embeddings else None
        pairs = read_pairs(file) if file else []
        pair_samples = [self._pair_sample(i, pair) for i, pair in enumerate(pairs)]
        if config.data.truncation == "error":  # training's texts are measured too before the run starts
            with as_user_error(ValueError, say=lambda error: f"data.val_sts_file={config.data.val_sts_file}: {error}"):
                for sample in pair_samples:
                    collate([sample])
        self.scores = torch.tensor([pair["score"] for pair in pairs], dtype=torch.float64)
        count = min(len(samples), config.data.val_max_samples)
        if count < 2:
            raise UserError("data.val_files or data.val_max_samples leaves one sample, which compares with nothing.")
        self.parts: dict[str, Sequence[Sample]] = {
            _SAMPLES: [without_repeats(samples[i]) for i in range(count)],
            _PAIRS: pair_samples,
        }

    @property
    def num_texts(self) -> int:
        return sum(len(sample["chats"]) for part in self.parts.values() for sample in part)

    def run(
        self, embed: Callable[[DataProto], DataProto], reward: Callable[[DataProto], RewardOutput], step: int
    ) -> dict[str, float]:
        """The figures, as val/<name>.

        Args:
            embed: gives every prompt row a rationale, and an embedding where the reward comes from these.
            reward: gives every row a score; called where the reward does not come from embeddings.
            step: of the policy, which the reward manager is told as in training.
        """
        embedded = [(part, embed(prompts)) for part, prompts in self.batches()]
        if self.needs_embeddings:
            return self.report(embedded)
        for _, rows in embedded:
            rows.meta_info["step"] = step
        return {"val/reward": float(torch.cat([reward(rows).scores for _, rows in embedded]).mean())}

    def batches(self) -> Iterator[tuple[str, DataProto]]:
        """Prompt rows with the part they belong to, in a fixed order."""
        val = self.config.actor_rollout_ref.rollout.val_kwargs
        size = self.config.data.val_size
        for name, part in self.parts.items():
            for start in range(0, len(part), size):
                prompts = self.collate(part[start : start + size])
                temperature = torch.full((len(prompts),), val.temperature if val.do_sample else 0.0)
                yield name, prompts.with_tensors(temperature=temperature)

    def line(self, step: int, metrics: Mapping[str, float], seconds: float, step_seconds: float | None) -> str:
        """What the display says of a validation.

        Args:
            step_seconds: mean of a training step, for the share of the run that validation takes; None = unknown.
        """
        figures = ", ".join(f"{name.removeprefix('val/')} {value:.3f}" for name, value in metrics.items())
        cost, frequency = f"{self.num_texts} texts in {seconds:.1f} s", self.config.trainer.test_freq
        if step_seconds is not None:
            share = seconds / (seconds + frequency * step_seconds)
            cost += f": {share:.0%} of the run at every {frequency} steps"
        return f"step {step} held-out: {figures}  ({cost})"

    def report(self, embedded: Sequence[tuple[str, DataProto]]) -> dict[str, float]:
        """The figures of all batches, whose rows have `embeddings`."""
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

    def _pair_sample(self, index: int, pair: dict[str, Any]) -> Sample:
        # The two texts of a pair are neither query nor document.
        return self.collate.build_sample(
            index, {"positive": pair["sentence1"], "query": pair["sentence2"]}, "sts", text_roles={}
        )


def read_pairs(file: Path) -> list[dict[str, Any]]:
    """Pairs of texts with their scores, of JSON lines or parquet.

    Raises:
        UserError: the file does not exist, or a row is not such a pair.
    """
    if not file.is_file():
        raise UserError(f"data.val_sts_file={file} does not exist; give a file of scored pairs, or null for none.")
    pairs = []
    for where, row in read_rows(file):
        try:
            texts = [row[name].strip() for name in ("sentence1", "sentence2")]
            score = float(row["score"])
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"data.val_sts_file: {where} is not a scored pair ({error!r}); each row is "
                '{"sentence1": "...", "sentence2": "...", "score": 3.5}.'
            ) from error
        if not all(texts) or not math.isfinite(score):
            raise UserError(f"data.val_sts_file: {where} has an empty text or a score that is not a number.")
        pairs.append({**row, "score": score})
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
