"""Scores of a model on a part of the data, by every variant of its vectors, as JSON."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from comparison import baseline
from comparison.measured import Measured
from comparison.states import WITHOUT, States, Variant, lookup, read_states, vectors_of
from comparison.tasks import MAIN, Task
from verl import GraceEncoder
from verl.embedding.settings import Mix

# Most tokens of a prompt or, of the baseline, of a text; XQuAD has the longest.
MAX_LENGTH = 512
WITH, SHUFFLED = "with", "shuffled"
SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Of the text: the points of the curve over w."""
_CHOICES = (0.3, 0.5, 0.7)

TaskScores = dict[str, dict[str, Measured]]
"""Of one vector, by task and metric."""
Scores = dict[str, TaskScores]
"""By variant."""


def variants(own: Mix, answers: Sequence[str]) -> dict[str, Variant]:
    """The variants of a model's vectors by name; `with` and `shuffled` are mixed by the model's own settings.

    Args:
        own: of the model's settings.
        answers: names of what can stand after a prompt, see `States`.
    """
    found = {WITHOUT.name: WITHOUT}
    if "echo" in answers:
        found |= {variant.name: variant for variant in (Variant("echo"), Variant("echo", Mix(text_share=0.0)))}
    for name, answer in ((WITH, "rationale"), (SHUFFLED, "shuffled")):
        if answer in answers:
            mixes = [Mix(no_rationale_weight=weight) for weight in _CHOICES] + [Mix(share) for share in SHARES]
            found |= {name: Variant(answer, own), **{Variant(answer, mix).name: Variant(answer, mix) for mix in mixes}}
    return found | {f"{name} + centre": variant._replace(centre=True) for name, variant in found.items()}


def choices() -> dict[str, str]:
    """The vectors that a model may be served with, by name, each with the name of the same with shuffled rationales."""
    mixes = [*(Mix(no_rationale_weight=weight) for weight in _CHOICES), *(Mix(share) for share in _CHOICES)]
    pairs = {WITHOUT.name: WITHOUT.name, WITH: SHUFFLED}
    pairs |= {Variant("rationale", mix).name: Variant("shuffled", mix).name for mix in mixes}
    return pairs | {f"{name} + centre": f"{other} + centre" for name, other in pairs.items()}


def score_encoder(
    folder: Path | str, tasks: Sequence[Task], centre: Sequence[str], tokens: int | None, echo: bool = False
) -> dict[str, Any]:
    """The scores of a model that writes rationales, and `generated`, the tokens that it took.

    Args:
        centre: the texts whose mean vector is taken out in the variants with a centre.
        tokens: most tokens of a rationale; None = those of the model's settings.
        echo: also put the text in place of the rationale.
    """
    answers = ("rationale", "shuffled", *(("echo",) if echo else ()))
    with GraceEncoder(
        folder, engine="hf", device="cpu", max_new_tokens=tokens, max_prompt_length=MAX_LENGTH
    ) as encoder:  # fmt: skip
        own = encoder.settings.mix
        # By task, so that a rationale is shuffled to a text of its own task.
        *states, middle = read_states(encoder, [*(_different(task.texts) for task in tasks), centre], answers)
    scores = _score(tasks, states, middle, variants(own, answers))
    return {"scores": to_json(scores), "generated": sum(found.generated for found in states)}


def score_baseline(folder: Path, tasks: Sequence[Task], centre: Sequence[str]) -> dict[str, Any]:
    """The scores of a model of `baseline`, which embeds bare texts."""
    model = baseline.load(folder, MAX_LENGTH)
    states = [baseline.read_states(model, _different(task.texts)) for task in tasks]
    scores = _score(tasks, states, baseline.read_states(model, centre), variants(Mix(), ()))
    return {"scores": to_json(scores), "generated": 0}


def mean_of_main(scores: Sequence[Scores], variant: str) -> float:
    """The mean of the main metrics of all tasks, of several runs: what choices on dev are made by."""
    figures = [
        measured.figure
        for run in scores
        for task in run[variant].values()
        for metric, measured in task.items()
        if metric in MAIN
    ]
    return sum(figures) / len(figures)


def to_json(scores: Scores) -> dict[str, Any]:
    return {
        variant: {task: {metric: found.as_json() for metric, found in metrics.items()} for task, metrics in by.items()}
        for variant, by in scores.items()
    }


def from_json(found: Mapping[str, Any]) -> Scores:
    return {
        variant: {
            task: {metric: Measured.from_json(m) for metric, m in metrics.items()} for task, metrics in by.items()
        }
        for variant, by in found.items()
    }


def hash_of(tasks: Sequence[Task], centre: Sequence[str]) -> str:
    """A hash of everything that is scored."""
    described = [[type(task).__name__, asdict(task)] for task in tasks]  # type: ignore[call-overload]
    return hashlib.sha256(json.dumps([described, list(centre)]).encode()).hexdigest()[:16]


def _score(tasks: Sequence[Task], states: Sequence[States], middle: States, named: Mapping[str, Variant]) -> Scores:
    return {
        name: {
            task.name: task.measure(lookup(found.texts, vectors_of(found, variant, middle).numpy()))
            for task, found in zip(tasks, states, strict=True)
        }
        for name, variant in named.items()
    }


def _different(texts: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(texts))
