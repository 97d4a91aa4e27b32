"""The curves: which figures share a chart, the points that are drawn, and what a reader who sees no chart is told."""

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from verl.report.facts import duration
from verl.report.read import Run, Series
from verl.report.thin import Curve, thin


@dataclass(frozen=True)
class Panel:
    title: str
    metrics: tuple[str, ...]
    """Names of figures; a * stands for the part of a name that tells one line from another."""
    about: str = ""
    """How to read it, in a sentence."""


GROUPS: dict[str, tuple[Panel, ...]] = {
    "Reward": (
        Panel("Reward", ("reward/mean", "reward/max", "reward/min"), "Of the trained rationales of each step."),
        Panel("Terms of the reward", ("reward/*/weighted",), "With their weights; their sum is the reward."),
        Panel(
            "What the advantage comes from", ("reward/*/variance_share",),
            "Each term's share of the variance inside the groups: only this part of a term teaches anything.",
        ),
        Panel("Contrastive loss", ("reward/contrastive/loss",), "Beside the rewards, where it has weight."),
    ),
    "Held-out texts": (
        Panel(
            "Triplet accuracy", ("val/triplet_accuracy",),
            "Share of triplets whose positive is nearer to the query than their negative.",
        ),
        Panel("Retrieval", ("val/recall_at_1", "val/mrr"), "Of each query's positive among all held-out positives."),
        Panel("Scored pairs", ("val/sts_spearman",), "Rank correlation of the cosines with the scores."),
        Panel("Held-out reward", ("val/reward",)),
        Panel("Held-out alignment", ("val/alignment",), "Distance of a query to its positive; smaller is closer."),
        Panel("Held-out effective rank", ("val/effective_rank",), "How many directions the embeddings use."),
        Panel("Held-out mean cosine", ("val/mean_cosine",), "Of different texts; near 1 all texts look alike."),
        Panel("Held-out uniformity", ("val/uniformity",), "How evenly the vectors spread; smaller is better."),
    ),
    "Diagnostics of the probe texts": (
        Panel(
            "Effective rank", ("diag/effective_rank",),
            "How many directions the embeddings use. A fall to half of the first value is a collapse.",
        ),
        Panel(
            "Sameness", ("diag/mean_cosine", "diag/top1_variance_share"),
            "Mean cosine of different texts, and the share of variance along one direction; at 1 all texts look alike.",
        ),
        Panel(
            "Is the rationale used?", ("diag/cos_without", "diag/cos_other_rationale", "diag/cos_second_rationale"),
            "Cosine of a text's vector to the one without a rationale, with another text's, with a second of its own. "
            "Above 0.98 without one, rationales hardly matter.",
        ),
        Panel(
            "Retrieval by the query", ("diag/mrr_thinking", "diag/mrr_without", "diag/mrr_shuffled"),
            "Mean reciprocal rank of the positive: with rationales, without, and with another query's rationale.",
        ),
        Panel(
            "Readable to the untrained model", ("diag/log_likelihood",),
            "Mean log-likelihood per token of the rationales; gibberish shows here first, as a fall.",
        ),
        Panel("Alignment", ("diag/alignment",), "Mean squared distance of a query to its positive; smaller is closer."),
        Panel("Uniformity", ("diag/uniformity",), "How evenly the vectors spread over the sphere; smaller is better."),
        Panel(
            "Own rationale against another's", ("diag/own_rationale_gain", "diag/own_rationale_gain_error"),
            "By how much a second rationale of a text's own is closer than another text's, and its standard error.",
        ),
        Panel("Length on the probe", ("diag/tokens_mean",), "Mean tokens of a rationale."),
        Panel("Cut on the probe", ("diag/truncated",), "Share of rationales that hit the length limit."),
    ),
    "Groups": (
        Panel(
            "Spread of the rewards in a group", ("group/std_median",),
            "What GRPO learns from. At 0 there is nothing to learn.",
        ),
        Panel(
            "Groups without signal", ("group/flat_share", "group/duplicate_share"),
            "Share of flat groups, and of rationales that occur twice in their group.",
        ),
        Panel(
            "Different words", ("group/distinct_1", "group/distinct_2", "rationale/repetition"),
            "Distinct 1-grams and 2-grams in a group, and repetition inside a rationale.",
        ),
        Panel(
            "Does length pay?", ("group/length_reward_correlation",),
            "Correlation of a rationale's length with its reward inside groups.",
        ),
    ),
    "Rationale lengths": (
        Panel("Mean length by role", ("rationale/*_tokens_mean",), "Tokens of the rationales."),
        Panel(
            "Cut at the limit, by role", ("rationale/*_truncated",),
            "Share of rationales that hit data.max_response_length.",
        ),
    ),
    "Optimisation": (
        Panel("Gradient norm", ("actor/grad_norm",), "Before clipping."),
        Panel("Policy loss", ("actor/pg_loss",), "Near 0 is normal: the first update of a step is on policy."),
        Panel("Entropy", ("actor/entropy",), "Of the tokens of the trained rationales."),
        Panel("Learning rate", ("actor/lr",)),
        Panel(
            "Engine against trainer", ("rollout/probs_diff_mean",),
            "Mean difference of token probabilities; above 0.01 the engine is suspect.",
        ),
    ),
    "Time and memory": (
        Panel(
            "Seconds by phase", ("time/*_s",), "Validation, diagnosis and saving stand at the step that they follow."
        ),
        Panel(
            "Tokens per second", ("perf/tokens_per_s", "perf/generated_tokens_per_s"),
            "Of the whole step, and while generating.",
        ),
        Panel("Memory", ("memory/*_peak_gb",), "Peak in GB."),
        Panel("Free memory", ("memory/free_gb/*",), "Of the GPU after each stage, in GB."),
    ),
}  # fmt: skip

# Counted and not measured, or the same in other words.
_NOT_DRAWN = (
    "reward/*/raw", "training/epoch", "data/*", "sync/*", "perf/generated_tokens", "perf/ray_mb", "diag/texts",
    "diag/samples", "rationale/*_tokens_min", "rationale/*_tokens_max", "time/step_s",
)  # fmt: skip


def curve_groups(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Groups of charts; a figure that no panel names gets a chart of its own in the last group."""
    names = sorted({name for run in runs for name in run.series})
    left = [name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in _NOT_DRAWN)]
    found = []
    for title, panels in GROUPS.items():
        drawn = []
        for panel in panels:
            matched = _matched(panel, left)
            left = [name for name in left if name not in matched]
            if matched:
                drawn.append(chart(panel, matched, runs))
        if drawn:
            found.append({"title": title, "charts": drawn})
    if left:
        found.append({"title": "Other figures", "charts": [chart(Panel(name, (name,)), [name], runs) for name in left]})
    return found


def chart(panel: Panel, names: Sequence[str], runs: Sequence[Run]) -> dict[str, Any]:
    """One chart: the steps, and lines over them, each of one figure and one run.

    Returns:
        `steps` [X], and `lines` with `values`, `low` and `high` [X] each, null where a line has no point.
    """
    drawn = [
        (label(panel, name), number, run.series[name])
        for name in names
        for number, run in enumerate(runs)
        if name in run.series
    ]
    curves = [thin(series.steps, series.values) for _, _, series in drawn]
    steps = sorted({step for curve in curves for step in curve.steps})
    return {
        "title": panel.title,
        "about": panel.about,
        "steps": steps,
        "lines": [
            {"label": text, "run": number, "summary": summary(series), **_on(steps, curve)}
            for (text, number, series), curve in zip(drawn, curves, strict=True)
        ],
    }


def label(panel: Panel, name: str) -> str:
    """What tells a figure from the others of its chart."""
    for pattern in panel.metrics:
        if "*" in pattern and fnmatch.fnmatch(name, pattern):
            before, _, after = pattern.partition("*")
            return name.removeprefix(before).removesuffix(after).replace("_", " ")
    return name.rpartition("/")[2].replace("_", " ")


def summary(series: Series) -> str:
    """A line in words, for those who do not see it."""
    steps, values = series.steps, series.values
    if len(steps) == 1:
        return f"{values[0]:.4g} at step {steps[0]}"
    low, high = int(values.argmin()), int(values.argmax())
    return (
        f"from {values[0]:.4g} at step {steps[0]} to {values[-1]:.4g} at step {steps[-1]}, lowest {values[low]:.4g} at "
        f"step {steps[low]}, highest {values[high]:.4g} at step {steps[high]}"
    )


def time_by_phase(runs: Sequence[Run]) -> list[list[dict[str, Any]]]:
    """Of each run, the seconds of each phase over the whole run, the longest first."""
    found = []
    for run in runs:
        totals = {
            name.removeprefix("time/").removesuffix("_s"): float(series.values.sum())
            for name, series in run.series.items()
            if fnmatch.fnmatch(name, "time/*_s") and name != "time/step_s"
        }
        whole = sum(totals.values()) or 1.0
        found.append(
            [
                {"phase": phase, "share": round(seconds / whole, 4), "text": duration(seconds)}
                for phase, seconds in sorted(totals.items(), key=lambda item: -item[1])
            ]
        )
    return found


def _matched(panel: Panel, names: Sequence[str]) -> list[str]:
    """In the order of the panel's patterns."""
    found = (name for pattern in panel.metrics for name in names if fnmatch.fnmatch(name, pattern))
    return list(dict.fromkeys(found))


def _on(steps: Sequence[int], curve: Curve) -> dict[str, Any]:
    """The curve's columns on a chart's steps."""
    columns = (
        {"values": curve.values}
        if curve.low is None
        else {"values": curve.values, "low": curve.low, "high": curve.high}
    )
    return {name: list(_placed(steps, curve.steps, values or [])) for name, values in columns.items()}


def _placed(steps: Sequence[int], own: Sequence[int], values: Sequence[float]) -> Iterator[float | None]:
    by_step = dict(zip(own, values, strict=True))
    return (by_step.get(step) for step in steps)
