"""An estimate of what an evaluation costs: texts from the tasks' statistics, seconds from a measured sample."""

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from verl.encoder.grace_encoder import GraceEncoder
from verl.evaluation.local_tasks import LocalTask

# The sample: most texts, and at most one in so many of all texts. Its rationales and vectors go to the store, where the
# tasks find them.
_SAMPLE = 64
_SAMPLE_SHARE = 8


@dataclass(frozen=True)
class TextCount:
    """How much text the evaluation splits and English subsets of a task hold."""

    texts: int
    unique: int
    chars: int

    def __add__(self, other: "TextCount") -> "TextCount":
        return TextCount(self.texts + other.texts, self.unique + other.unique, self.chars + other.chars)


@dataclass(frozen=True)
class Rate:
    """Means over the texts of the sample."""

    rationale_tokens: float
    seconds: float
    """Wall-clock seconds per text, for rationale and vector, with all processes at work."""
    chars: float


@dataclass(frozen=True)
class TaskCost:
    name: str
    count: TextCount | None
    """None = the task's size is known only after its data is loaded."""
    rationale_tokens: float
    hours: float


def count_texts(task: Any) -> TextCount | None:
    """The texts of a task, or None where they are not known.

    Those of a local task are counted. Those of others come from mteb's published statistics: an upper bound for a task
    that samples from its data.
    """
    if isinstance(task, LocalTask):
        return TextCount(len(task.texts), len(set(task.texts)), sum(len(text) for text in task.texts))
    subtasks = getattr(task.metadata, "tasks", None)
    if subtasks:
        counts = [count_texts(subtask) for subtask in subtasks]
        return sum((c for c in counts if c), TextCount(0, 0, 0)) if all(counts) else None
    statistics = task.metadata.descriptive_stats
    if not statistics or any(split not in statistics for split in task.eval_splits):
        return None
    total = TextCount(0, 0, 0)
    for split in task.eval_splits:
        subsets = statistics[split].get("hf_subset_descriptive_stats") or {}
        chosen = [subsets[name] for name in task.hf_subsets if name in subsets] or [statistics[split]]
        for statistic in chosen:
            total = sum(_text_columns(statistic), total)
    return total


def _text_columns(statistics: Mapping[str, Any]) -> Iterator[TextCount]:
    """The text columns in the nested statistics of a split."""
    for name, value in statistics.items():
        if not isinstance(value, Mapping) or name == "hf_subset_descriptive_stats":
            continue
        if value.get("average_text_length"):
            chars = value["total_text_length"]
            yield TextCount(round(chars / value["average_text_length"]), value["unique_texts"], chars)
        else:
            yield from _text_columns(value)


def sample_texts(tasks: Sequence[Any], sample_file: Path) -> list[str]:
    """Texts to measure the rate on: those of local tasks, else lines of `sample_file`; other data is not loaded yet."""
    local = {text for task in tasks if isinstance(task, LocalTask) for text in task.texts}
    pool = sorted(local) if local else sample_file.read_text().splitlines()
    return random.Random(0).sample(pool, min(_SAMPLE, -(-len(pool) // _SAMPLE_SHARE)))


def measure_rate(
    encoder: GraceEncoder, texts: Sequence[str], options: Mapping[str, Any], batch_size: int | None
) -> Rate | None:
    """The rate of embedding `texts`, after a warm-up with two others; None when all were in the store."""
    encoder.encode([f"{text} " * 2 for text in texts[:2]], batch_size=batch_size, show_progress_bar=False, **options)
    before, start = replace(encoder.usage), time.perf_counter()
    encoder.encode(texts, batch_size=batch_size, **options)
    seconds, spent = time.perf_counter() - start, encoder.usage - before
    made = spent.rationales_made if has_rationales(encoder, options) else spent.vectors_made
    if made == 0:
        return None
    return Rate(
        rationale_tokens=spent.generated_tokens / made,
        seconds=seconds / made,
        chars=sum(map(len, texts)) / len(texts),
    )


def has_rationales(encoder: GraceEncoder, options: Mapping[str, Any]) -> bool:
    """Whether `encode` writes rationales with these options, for texts without a role."""
    think = options.get("think")
    return encoder.settings.think if think is None else think


def plan_costs(tasks: Sequence[Any], rate: Rate, thinks: bool) -> list[TaskCost]:
    """The cost of each task at the sample's rate."""
    costs = []
    for task in tasks:
        count = count_texts(task)
        if count is None:
            costs.append(TaskCost(task.metadata.name, None, 0.0, 0.0))
            continue
        # With rationales the seconds hardly depend on the text's length; without, they are proportional to it.
        size = 1.0 if thinks else (count.chars / max(count.texts, 1)) / max(rate.chars, 1.0)
        costs.append(
            TaskCost(task.metadata.name, count, count.unique * rate.rationale_tokens,
                     count.unique * rate.seconds * size / 3600)
        )  # fmt: skip
    return costs


def plan_table(costs: Sequence[TaskCost], rate: Rate) -> Table:
    title = f"plan, at {rate.seconds:.3g} s and {rate.rationale_tokens:.0f} rationale tokens a text (measured)"
    table = Table(title=title, title_justify="left")
    for column in ("task", "texts", "unique", "rationale tokens", "hours"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for cost in costs:
        if cost.count is None:
            table.add_row(cost.name, "?", "?", "?", "?")
        else:
            table.add_row(
                cost.name, f"{cost.count.texts:,}", f"{cost.count.unique:,}", f"{cost.rationale_tokens:,.0f}",
                f"{cost.hours:.2f}",
            )  # fmt: skip
    known = [cost.count for cost in costs if cost.count]
    table.add_section()
    table.add_row(
        "all", f"{sum(c.texts for c in known):,}", f"{sum(c.unique for c in known):,}",
        f"{sum(c.rationale_tokens for c in costs):,.0f}", f"{sum(c.hours for c in costs):.2f}",
    )  # fmt: skip
    return table
