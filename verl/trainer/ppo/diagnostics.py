"""Diagnoses of a run: the probe's texts are embedded with and without rationales, and figures and files are written.

    <run>/diagnostics/probe.json              the texts
    <run>/diagnostics/step_N.jsonl            each text's rationale, and what it does to the vector
    <run>/diagnostics/vectors_step_N.npz      `with` and `without` rationales, [P,H] float16: of the first diagnosed
                                              step and of the newest

Nothing here changes training: rationales are drawn by seeds of their own, which are the same in every diagnosis, and
the policy is only asked.

Shapes: P texts, H hidden size.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
from torch import Tensor

from verl.embedding.rationale_use import ProbeVectors, probe_report
from verl.protocol import DataProto, response_mask
from verl.trainer.ppo.probe import RATIONALES_PER_TEXT, Probe, diagnosed_steps
from verl.trainer.run import TrainingRun
from verl.utils.files import replace_file
from verl.utils.run_files import DIAGNOSTICS, files_of_steps
from verl.workers.group import ActorRolloutRefGroup

_RESPONSE = ("responses", "response_length")


@dataclass(frozen=True)
class Diagnosis:
    figures: dict[str, float]
    """As diag/<name>."""
    texts: list[dict[str, Any]]
    """Each text of the probe, with what step_N.jsonl says of it."""


class Diagnostics:
    """Diagnoses one run.

    Args:
        chosen: the probe of a new run; one that the run's folder has already is kept.
        write: gives prompt rows a rationale each, by seeds that are the same in every call.

    Raises:
        UserError: the folder's probe is damaged.
    """

    def __init__(
        self, run: TrainingRun, chosen: Probe, workers: ActorRolloutRefGroup, write: Callable[[DataProto], DataProto]
    ) -> None:
        self._folder, self._config, self._workers, self._write = (
            run.folder.path / DIAGNOSTICS, run.config, workers, write,
        )  # fmt: skip
        self._steps = set(diagnosed_steps(run.config, run.plan))
        kept = Probe.read(self._folder)
        self.probe = kept or chosen
        if kept is None:
            chosen.write(self._folder)
        self._prompts = self.probe.prompts(run.collate)

    def is_due(self, step: int) -> bool:
        return step in self._steps

    @property
    def has_begun(self) -> bool:
        """Whether there is a diagnosis that later ones can be compared with."""
        return bool(self._vector_files())

    def run(self, step: int) -> Diagnosis:
        """Diagnose the policy as it is after a step, and write the files."""
        temperature = self._config.actor_rollout_ref.rollout.temperature
        prompts = self._prompts.with_tensors(temperature=torch.full((len(self._prompts),), temperature))
        written = self._write(prompts.repeat([RATIONALES_PER_TEXT] * len(prompts)))
        first, second = written[0::RATIONALES_PER_TEXT], written[1::RATIONALES_PER_TEXT]
        wants_likelihood = self._config.trainer.diag_log_likelihood
        # Before the first step the policy is the untrained model, unless it has an adapter that was trained before.
        is_untrained = step == 0 and self._config.actor_rollout_ref.model.lora_adapter_path is None
        vectors, log_probs = self._embed(first, second, log_probs=wants_likelihood and is_untrained)
        if wants_likelihood and log_probs is None:
            log_probs = self._by_untrained(first)
        likelihood = None if log_probs is None else token_mean(first, log_probs)
        # Texts whose role writes no rationale have none to judge; of the trained role all have one.
        thinks = first.batch["response_length"] > 0
        lines = self._lines(first, vectors, likelihood, thinks)
        self._save(step, lines, vectors)
        found = {
            "texts": float(len(first)),
            "samples": float(len(first) // self.probe.texts_per_sample),
            **probe_report(vectors, self.probe.roles, thinks),
            "tokens_mean": float(first.batch["response_length"][thinks].float().mean()),
            "truncated": float(first.batch["truncated"][thinks].float().mean()),
        }
        if likelihood is not None:
            found["log_likelihood"] = float(likelihood[thinks].mean())
        return Diagnosis(
            {f"diag/{name}": value for name, value in found.items()},
            [{"text": text.text, **line} for text, line in zip(self.probe.texts, lines, strict=True)],
        )

    def _embed(self, first: DataProto, second: DataProto, log_probs: bool) -> tuple[ProbeVectors, Tensor | None]:
        """The vectors, and log-probs [P,R] of the first rationales by the policy where wanted: one forward."""
        other = first[self.probe.other_texts()].batch
        variants = [
            _scored(first, True),
            _scored(second, False),
            _scored(first.with_tensors(**{name: other[name] for name in _RESPONSE}), False),
            _scored(first.with_tensors(response_length=torch.zeros(len(first), dtype=torch.int64)), False),
        ]
        rows = DataProto.concat(variants)
        scored = self._workers.score(rows, log_probs=log_probs, embed=True, for_update=False).batch
        vectors = ProbeVectors(*scored["embeddings"].chunk(len(variants)))
        return vectors, scored["log_probs"][: len(first)] if log_probs else None

    def _by_untrained(self, first: DataProto) -> Tensor:
        """[P,R] log-probs of the first rationales by the model that the run started from."""
        return self._workers.compute_untrained_log_prob(_scored(first, True)).batch["log_probs"]

    def _lines(
        self, first: DataProto, vectors: ProbeVectors, likelihood: Tensor | None, thinks: Tensor
    ) -> list[dict[str, Any]]:
        """What step_N.jsonl says of each text."""
        cosines = {name: values.tolist() for name, values in vectors.cosines().items()}
        return [
            {
                "id": text.id,
                "rationale": first.non_tensor_batch["rationale"][i],
                "tokens": int(first.batch["response_length"][i]),
                "finish_reason": "length" if first.batch["truncated"][i] else "stop",
                "log_likelihood": None if likelihood is None or not thinks[i] else float(likelihood[i]),
                **{name: values[i] for name, values in cosines.items()},
            }
            for i, text in enumerate(self.probe.texts)
        ]

    def _save(self, step: int, lines: list[dict[str, Any]], vectors: ProbeVectors) -> None:
        replace_file(self._folder / f"step_{step}.jsonl", b"".join(orjson.dumps(line) + b"\n" for line in lines))
        arrays: dict[str, Any] = {"with": _half(vectors.own), "without": _half(vectors.without)}
        with io.BytesIO() as file:
            np.savez(file, **arrays)
            replace_file(self._folder / f"vectors_step_{step}.npz", file.getvalue())
        for between in self._vector_files()[1:-1]:
            between.unlink()

    def _vector_files(self) -> list[Path]:
        """In the order of their steps."""
        return [file for _, file in files_of_steps(self._folder, "vectors_step_*.npz")]


def _scored(rows: DataProto, wanted: bool) -> DataProto:
    """Sets `trained`, which the workers read as "compute log-probs"."""
    return rows.with_tensors(trained=torch.full((len(rows),), wanted))


def token_mean(rows: DataProto, log_probs: Tensor) -> Tensor:
    """[P]: the mean log-prob of each row's tokens."""
    return (log_probs * response_mask(rows)).sum(1) / rows.batch["response_length"]


def _half(vectors: Tensor) -> np.ndarray:
    return vectors.numpy().astype(np.float16)
