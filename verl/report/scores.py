"""Evaluation before and after: the scores that `eval_mteb.py` wrote, of the untrained model and of checkpoints."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl.evaluation.report import Summary
from verl.report.facts import all_keys
from verl.report.read import Run

EVALUATION = "evaluation"
"""The subfolder of a run in which its evaluations are looked for."""


@dataclass(frozen=True)
class Scored:
    """One model's scores, as a column."""

    run: int
    step: int | None
    """None for the model that the run began with."""
    thinks: bool
    scores: dict[str, float]
    """In percent, by task and by mean."""

    @property
    def label(self) -> str:
        model = "before training" if self.step is None else f"step {self.step}"
        return model if self.thinks else f"{model}, without rationales"


def score_table(runs: Sequence[Run], folders: Sequence[Path] = ()) -> dict[str, Any]:
    """Tasks by models: before training, then each evaluated step with its change against it.

    Args:
        folders: output folders of `eval_mteb.py` besides the subfolder `evaluation` of each run.
    """
    columns = [column for number, run in enumerate(runs) for column in scored(number, run, folders)]
    tasks = all_keys([column.scores for column in columns])
    return {
        "columns": [{"run": column.run, "label": column.label} for column in columns],
        "rows": [{"task": task, "cells": [_cell(column, columns, task) for column in columns]} for task in tasks],
        "missing": [
            f"{run.name}: no evaluation was found. BASE_MODEL=M RUN={run.folder} OUTPUT_DIR={run.folder / EVALUATION} "
            "bash eval.sh writes one; --evaluation names the output folder of another."
            for number, run in enumerate(runs)
            if not any(column.run == number for column in columns)
        ],
    }


def scored(number: int, run: Run, folders: Sequence[Path]) -> list[Scored]:
    """The evaluations of one run, those of the untrained model first, then by step."""
    own = run.folder / EVALUATION
    found = []
    for folder in dict.fromkeys([own, *folders]):
        for summary in run.evaluations(folder):
            step = step_of(run, summary)
            is_base = str(summary.model["path"]) == run.setting("actor_rollout_ref.model.path")
            if step is not None or is_base or folder == own:
                thinks = bool(summary.settings.get("think", True))
                found.append(Scored(number, step, thinks, summary.scores | summary.means()))
    return sorted(found, key=lambda one: (not one.thinks, -1 if one.step is None else one.step))


def step_of(run: Run, summary: Summary) -> int | None:
    """The step of this run that a summary is about, by the path of its model; None if it is about another model.

    A checkpoint lies in RUN/global_step_N, and one that was merged of shards in such a folder below merge_models. Of a
    path that is not there, as the run was moved or evaluated elsewhere, the names of run and step have to do.
    """
    path = Path(summary.model["path"])
    place = run.folder.resolve().as_posix() if path.exists() else f"/{run.name}"
    text = path.resolve().as_posix() if path.exists() else f"/{path.as_posix()}"
    match = re.search(rf"{re.escape(place)}/global_step_(\d+)(?:/|$)", text)
    return int(match[1]) if match else None


def _cell(column: Scored, columns: Sequence[Scored], task: str) -> dict[str, str]:
    """A score, and its change against the same run's untrained model under the same kind of embedding."""
    value = column.scores.get(task)
    if value is None:
        return {"score": "–"}
    base = next((c for c in columns if c.run == column.run and c.step is None and c.thinks == column.thinks), None)
    if column.step is None or base is None or task not in base.scores:
        return {"score": f"{value:.2f}"}
    return {"score": f"{value:.2f}", "change": f"{value - base.scores[task]:+.2f}"}
