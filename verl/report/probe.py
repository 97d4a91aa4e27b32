"""The probe texts: a map of their vectors before and after, their neighbours, and how their rationales changed.

P texts, H the size of a vector.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.linalg import eigh

from verl.report.read import WITHOUT_RATIONALES, Json, Run
from verl.report.thin import fit_texts, rounded, spread_choice

NEIGHBOURS = 5
MOST_STEPS = 8
"""At which a text's rationales are shown."""
FOLLOWED = 24
"""Texts whose rationales are shown at all of these steps; of all others, those of the first and the newest step."""
TEXT_BYTES, FOLLOWED_BYTES = 1_400_000, 200_000
"""Of all texts of the map, and of the rationales that are followed over the steps."""


def probe_map(run: Run, share: float = 1.0) -> dict[str, Any]:
    """The probe texts of a run, with positions, neighbours and rationales at the first and the newest kept step.

    Args:
        share: of the page's bytes that this run's texts may take.

    Returns:
        Columns over the P texts: `samples`, `roles`, `texts`; and `moments`, first and newest, each with `step`,
        columns `x`, `y`, `rationales`, and `neighbours` [P][K] as (text, cosine, cosine without rationales).
        `missing` instead, where there is nothing to show.
    """
    texts = run.probe()
    steps = run.vector_steps()
    kept = [(step, run.vectors(step, len(texts))) for step in dict.fromkeys([*steps[:1], *steps[-1:]])]
    found = [(step, vectors) for step, vectors in kept if vectors is not None]
    if not texts or not found:
        return {"missing": why_no_probe(run)}
    positions, explained = project([thinking for _, (thinking, _) in found])
    rationales = [_rationales(run, step, texts) for step, _ in found]
    fitted = iter(fit_texts([*(t["text"] for t in texts), *(r for column in rationales for r in column)],
                            int(TEXT_BYTES * share)))  # fmt: skip
    columns = {"samples": [t["sample"] for t in texts], "roles": [t["role"] for t in texts],
               "texts": [next(fitted) for _ in texts]}  # fmt: skip
    moments = [
        {
            "step": step,
            "x": rounded(place[:, 0], 4),
            "y": rounded(place[:, 1], 4),
            "rationales": [next(fitted) for _ in texts],
            "neighbours": neighbours(*vectors),
        }
        for (step, vectors), place in zip(found, positions, strict=True)
    ]
    return {**columns, "moments": moments, "explained": round(explained, 4)}


def project(sets: Sequence[np.ndarray]) -> tuple[list[np.ndarray], float]:
    """Principal component analysis of several sets of vectors [P,H] in one common projection.

    Returns:
        For each set its positions [P,2], and the share of all variance that the two directions show.
    """
    rows = np.concatenate(sets).astype(np.float64)
    rows -= rows.mean(0)
    axes, explained = _two_axes(rows)
    # The sign of a principal axis is arbitrary; this one makes the same data the same picture.
    axes *= np.where(axes[np.abs(axes).argmax(0), [0, 1]] < 0, -1.0, 1.0)
    return np.split(rows @ axes, len(sets)), explained


def _two_axes(centred: np.ndarray) -> tuple[np.ndarray, float]:
    """The two directions [H,2] of the largest variance of rows [N,H], by the smaller of the two Gram matrices."""
    count, size = centred.shape
    by_rows = count < size
    gram = centred @ centred.T if by_rows else centred.T @ centred
    total = float(np.trace(gram))
    # Vectors that are all equal have no directions; rounding must not show as one.
    if min(count, size) < 2 or total <= 1e-12 * count:
        return np.zeros((size, 2)), 0.0
    values, vectors = eigh(gram, subset_by_index=[len(gram) - 2, len(gram) - 1])
    values, vectors = values[::-1], vectors[:, ::-1]
    if by_rows:
        vectors = centred.T @ (vectors / np.sqrt(np.maximum(values, 1e-12 * total)))
    return vectors, float(values.clip(min=0).sum()) / total


def neighbours(thinking: np.ndarray, without: np.ndarray, count: int = NEIGHBOURS) -> list[list[list[float]]]:
    """The nearest other texts of each by the cosine of unit vectors [P,H] with rationales.

    Returns:
        [P][K] of (text, cosine with rationales, cosine without).
    """
    similar, plain = thinking @ thinking.T, without @ without.T
    np.fill_diagonal(similar, -np.inf)
    count = min(count, len(similar) - 1)
    nearest = np.argpartition(-similar, count - 1, axis=1)[:, :count] if count else np.empty((len(similar), 0), int)
    nearest = np.take_along_axis(
        nearest, np.argsort(-np.take_along_axis(similar, nearest, 1), axis=1, kind="stable"), 1
    )
    return [
        [[int(j), round(float(similar[i, j]), 3), round(float(plain[i, j]), 3)] for j in row]
        for i, row in enumerate(nearest)
    ]


def followed_rationales(runs: Sequence[Run]) -> dict[str, Any]:
    """How the rationales of some probe texts changed over the steps, in all runs that have the text."""
    probes = [run.probe() for run in runs]
    chosen = [spread_choice(run.diagnosed_steps(), MOST_STEPS) for run in runs]
    diagnoses = [{step: run.diagnosis(step) for step in steps} for run, steps in zip(runs, chosen, strict=True)]
    first = next((probe for probe in probes if probe), [])
    followed = [first[i] for i in spread_choice(list(range(len(first))), FOLLOWED)]
    steps = sorted({step for own in chosen for step in own})
    texts = [{"role": text["role"], "text": text["text"], "steps": []} for text in followed]
    for text in texts:
        for step in steps:
            cells = [_found(text, probe, d.get(step)) for probe, d in zip(probes, diagnoses, strict=True)]
            text["steps"].append({"step": step, "cells": cells})
    _fit_followed(texts)
    missing = [
        f"{run.name}: {why_no_probe(run)}"
        for run, probe, d in zip(runs, probes, diagnoses, strict=True)
        if not (probe and d)
    ]
    return {"texts": texts if any(diagnoses) else [], "missing": missing}


def why_no_probe(run: Run) -> str:
    """Which setting writes what is missing."""
    if run.setting("data.think") is False:
        return WITHOUT_RATIONALES
    if run.setting("trainer.diag_freq") in (-1, 0):
        return f"trainer.diag_freq={run.setting('trainer.diag_freq')} diagnoses no texts; trainer.diag_freq=50 does."
    return "diagnostics/ holds no texts with vectors yet; trainer.diag_freq (steps between diagnoses) writes them."


def _rationales(run: Run, step: int, texts: Sequence[Json]) -> list[str]:
    rows = run.diagnosis(step)
    return [rows[text["id"]]["rationale"] if text["id"] in rows else "" for text in texts]


def _found(text: Json, probe: Sequence[Json], rows: Mapping[int, Json] | None) -> dict[str, Any] | None:
    """What a run made of a text at a step; its probe may give the text another number, or not have it."""
    own = next((t for t in probe if t["text"] == text["text"] and t["role"] == text["role"]), None)
    row = rows.get(own["id"]) if rows and own else None
    if row is None:
        return None
    likelihood, cosine = row.get("log_likelihood"), row.get("cos_without")
    return {
        "rationale": row["rationale"],
        "tokens": row.get("tokens"),
        "cut": row.get("finish_reason") == "length",
        "log_likelihood": None if likelihood is None else round(likelihood, 3),
        "cos_without": None if cosine is None else round(cosine, 3),
    }


def _fit_followed(texts: Sequence[dict[str, Any]]) -> None:
    cells = [cell for text in texts for step in text["steps"] for cell in step["cells"] if cell]
    for cell, rationale in zip(cells, fit_texts([cell["rationale"] for cell in cells], FOLLOWED_BYTES), strict=True):
        cell["rationale"] = rationale
