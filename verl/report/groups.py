"""The best and the worst groups of the newest steps, with every part of their rewards."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from verl.report.read import WITHOUT_RATIONALES, Json, Run
from verl.report.thin import fit_texts

STEPS = 10
"""Newest sampled steps that are looked through."""
SHOWN = 3
"""Groups from each end."""
TEXT_BYTES = 150_000
"""Of all texts of the section together."""


def best_and_worst(run: Run, share: float = 1.0) -> dict[str, Any]:
    """The groups with the highest and lowest mean reward among the samples of the newest steps.

    Args:
        share: of the section's bytes that this run's texts may take.
    """
    steps = run.sampled_steps()[-STEPS:]
    groups = [group for step in steps for group in step_groups(run.samples(step), step)]
    if not groups:
        return {"groups": [], "missing": _why_none(run, steps)}
    groups.sort(key=lambda group: -group["mean"])
    worst = groups[SHOWN:][-SHOWN:][::-1]
    chosen = [{**g, "rank": "best"} for g in groups[:SHOWN]] + [{**g, "rank": "worst"} for g in worst]
    _fit(chosen, int(TEXT_BYTES * share))
    return {"groups": chosen, "steps": [steps[0], steps[-1]], "of": len(groups)}


def step_groups(rows: Sequence[Json], step: int) -> list[dict[str, Any]]:
    """The groups of a step: the trained text with its rationales, the best first, and the texts it is compared with."""
    by_uid: dict[Any, list[Json]] = {}
    for row in rows:
        by_uid.setdefault(row["uid"], []).append(row)
    groups = []
    for members in by_uid.values():
        trained = sorted((row for row in members if row.get("reward") is not None), key=lambda row: -row["reward"])
        if trained:
            groups.append(
                {
                    "step": step,
                    "mean": fmean(row["reward"] for row in trained),
                    "text": trained[0]["text"],
                    "role": trained[0]["role"],
                    "anchors": [_texts(row) for row in members if "reward" not in row],
                    "parts": list(dict.fromkeys(part for row in trained for part in row.get("reward_parts") or {})),
                    "rationales": [_rationale(row) for row in trained],
                }
            )
    return groups


def _texts(row: Json) -> dict[str, Any]:
    return {name: row[name] for name in ("role", "text", "rationale")}


def _rationale(row: Json) -> dict[str, Any]:
    return {
        "rationale": row["rationale"],
        "reward": row["reward"],
        "parts": row.get("reward_parts") or {},
        "advantage": row.get("advantage"),
        "tokens": row.get("tokens"),
        "cut": row.get("finish_reason") == "length",
    }


def _fit(groups: Sequence[dict[str, Any]], budget: int) -> None:
    """Cut the longest texts of the groups, in place."""
    places = [
        (holder, name)
        for group in groups
        for holder, names in (
            (group, ("text",)),
            *((anchor, ("text", "rationale")) for anchor in group["anchors"]),
            *((row, ("rationale",)) for row in group["rationales"]),
        )
        for name in names
    ]
    fitted = fit_texts([holder[name] for holder, name in places], budget)
    for (holder, name), text in zip(places, fitted, strict=True):
        holder[name] = text


def _why_none(run: Run, steps: Sequence[int]) -> str:
    if run.setting("data.think") is False:
        return WITHOUT_RATIONALES
    if run.setting("trainer.samples_per_step") == 0:
        return "trainer.samples_per_step=0 keeps no samples; 8, the default, keeps those of 8 samples of each step."
    if not steps:
        return "samples/ has no step_N.jsonl; trainer.samples_per_step (8 by default) writes them while training."
    return "samples/ holds no rewarded rationale."
