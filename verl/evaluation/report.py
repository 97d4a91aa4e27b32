"""The summary of an evaluation: summary.json, summary.md, and the same table on the terminal."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from rich.table import Table

from verl.utils.files import replace_file

_FILE = "summary.json"


@dataclass
class TaskReport:
    """The result of one task. Scores are in percent: mteb's times 100."""

    name: str
    type: str
    metric: str
    score: float | None = None
    """Mean of the main score over the task's splits and subsets; None when the task failed."""
    error: str | None = None
    seconds: float | None = None
    """Seconds of the run that computed the score."""
    usage: dict[str, float] | None = None
    """The encoder's `Usage` of that run; None when the score is an earlier run's whose usage is not known."""


@dataclass
class Summary:
    """Everything that is reported about one model."""

    title: str
    comparable: bool
    """Whether the mean is that of a published benchmark."""
    wanted: list[str]
    """Names of all tasks of the selection."""
    model: dict[str, Any]
    """Path, name, revision."""
    settings: dict[str, Any]
    versions: dict[str, str]
    command: str
    tasks: list[TaskReport] = field(default_factory=list)
    sample_usage: dict[str, float] | None = None
    """The encoder's `Usage` for the sample of the plan, whose texts the tasks then find in the store."""

    @property
    def scores(self) -> dict[str, float]:
        return {task.name: task.score for task in self.tasks if task.score is not None}

    @property
    def missing(self) -> list[str]:
        return [name for name in self.wanted if name not in self.scores]

    def type_means(self) -> dict[str, float]:
        """Mean score of each type whose tasks are all finished."""
        by_type: dict[str, list[float | None]] = {}
        for task in self.tasks:
            by_type.setdefault(task.type, []).append(task.score)
        open_types = {task.type for task in self.tasks if task.score is None}
        return {t: mean(s for s in scores if s is not None) for t, scores in by_type.items() if t not in open_types}

    def means(self) -> dict[str, float]:
        """Mean(Task) and Mean(TaskType); empty unless every task is finished."""
        if self.missing:
            return {}
        return {"Mean(Task)": mean(self.scores.values()), "Mean(TaskType)": mean(self.type_means().values())}

    def notes(self) -> list[str]:
        notes = []
        if self.missing:
            names = ", ".join(self.missing)
            notes.append(f"No mean: {len(self.scores)} of {len(self.wanted)} tasks are finished (missing: {names}).")
        if not self.comparable:
            notes.append(f"These are {self.title}: their mean is not comparable with that of an MTEB benchmark.")
        return notes + [f"{task.name} failed: {task.error}" for task in self.tasks if task.error]

    def write(self, folder: Path, base: "Summary | None" = None) -> None:
        """Write summary.json and summary.md."""
        folder.mkdir(parents=True, exist_ok=True)
        record = asdict(self) | {"type_means": self.type_means(), "means": self.means(), "missing": self.missing}
        if base:
            record["base"] = {"model": base.model, "scores": base.scores, "means": base.means()}
        replace_file(folder / _FILE, json.dumps(record, indent=1) + "\n")
        replace_file(folder / "summary.md", self.markdown(base))

    @classmethod
    def read(cls, folder: Path) -> "Summary | None":
        """The summary that `write` wrote, or None."""
        file = folder / _FILE
        if not file.is_file():
            return None
        record = json.loads(file.read_text())
        names = ("title", "comparable", "wanted", "model", "settings", "versions", "command", "sample_usage")
        return cls(**{n: record[n] for n in names}, tasks=[TaskReport(**task) for task in record["tasks"]])

    @staticmethod
    def written_at(folder: Path) -> int | None:
        """When `write` wrote there last, in nanoseconds; None = never."""
        file = folder / _FILE
        return file.stat().st_mtime_ns if file.is_file() else None

    def rows(self, base: "Summary | None") -> list[list[str]]:
        """The table's cells: a row per task, then per type, then per mean."""
        rows = [
            [task.name, task.type, task.metric, _score(task.score),
             *_delta(task.score, base.scores if base else None, task.name), *_cost(task)]
            for task in self.tasks
        ]  # fmt: skip
        for title, own, others in (
            ("type", self.type_means(), base.type_means() if base else {}),
            ("", self.means(), base.means() if base else {}),
        ):
            rows += [
                [name, title, "mean", _score(value), *_delta(value, others if base else None, name), "", "", "", ""]
                for name, value in own.items()
            ]
        return rows

    def header(self, base: "Summary | None") -> list[str]:
        deltas = ["base", "delta"] if base else []
        return ["task", "type", "metric", "score", *deltas, "texts", "rationale tokens", "cut", "seconds"]

    def table(self, base: "Summary | None" = None) -> Table:
        table = Table(title=f"{self.model['name']} on {self.title}", title_justify="left")
        for number, column in enumerate(self.header(base)):
            table.add_column(column, justify="left" if number < 3 else "right")
        for row in self.rows(base):
            table.add_row(*row)
        return table

    def markdown(self, base: "Summary | None" = None) -> str:
        lines = [f"# {self.model['name']} on {self.title}", "", *self.score_lines(base), ""]
        lines += [*(f"- {note}" for note in self.notes()), ""] if self.notes() else []
        lines += ["| setting | value |", "|---|---|"]
        lines += [f"| {name} | {value} |" for name, value in {**self.model, **_flat(self.settings)}.items()]
        if base:
            lines.append(f"| base model | {base.model['path']} |")
        lines += [f"| {name} | {value} |" for name, value in self.versions.items()]
        return "\n".join([*lines, "", "```", self.command, "```", ""])

    def score_lines(self, base: "Summary | None" = None) -> list[str]:
        """The table in markdown."""
        header = self.header(base)
        return [
            f"| {' | '.join(header)} |",
            f"|{'---|' * len(header)}",
            *(f"| {' | '.join(row)} |" for row in self.rows(base)),
        ]


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings for a table, in which a text is one line: of a role, as query.think, those that are its own."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        parts = value if isinstance(value, Mapping) else {}
        flat |= {f"{name}.{key}": own for key, own in parts.items() if key not in settings or own != settings[key]}
        flat |= {} if parts else {name: value}
    return {name: " ".join(value.split()) if isinstance(value, str) else value for name, value in flat.items()}


def _score(value: float | None) -> str:
    return "failed" if value is None else f"{value:.2f}"


def _delta(value: float | None, others: Mapping[str, float] | None, name: str) -> list[str]:
    if others is None:
        return []
    if value is None or name not in others:
        return ["-", "-"]
    return [f"{others[name]:.2f}", f"{value - others[name]:+.2f}"]


def _cost(task: TaskReport) -> list[str]:
    seconds = "-" if task.seconds is None else f"{task.seconds:,.1f}"
    if task.usage is None:
        return ["-", "-", "-", seconds]
    usage = task.usage
    made = usage["rationales_made"] + usage["rationales_stored"]
    cut = f"{usage['truncated'] / made:.0%}" if made else "-"
    return [f"{usage['unique_texts']:,.0f}", f"{usage['generated_tokens']:,.0f}", cut, seconds]


def timing_lines(summary: Summary) -> Sequence[str]:
    """Seconds of each task, the longest first."""
    timed = sorted((t for t in summary.tasks if t.seconds is not None), key=lambda t: -(t.seconds or 0.0))
    return [f"{task.name:40} {task.seconds:12.1f} s" for task in timed]
