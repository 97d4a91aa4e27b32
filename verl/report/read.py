"""What a run folder holds, read with tolerance: a run in progress writes while this reads, and files may be missing.

What is missing or broken becomes a line of `Run.problems` and an empty part, never an error: a report of what is there
is worth more than none.
"""

import json
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from verl.checkpoint.run_folder import STATE, saved_steps, step_folder
from verl.errors import UserError
from verl.evaluation.report import Summary
from verl.utils.run_files import DIAGNOSTICS, METRICS, PROBE, RECORD, SAMPLES, files_of_steps

WITHOUT_RATIONALES = "data.think=False: this run writes no rationales."
Json = Mapping[str, Any]


@dataclass(frozen=True)
class Series:
    """One metric over the steps."""

    steps: np.ndarray
    """[N] int64, ascending."""
    values: np.ndarray
    """[N] float64, finite."""


@dataclass(frozen=True)
class Alert:
    name: str
    text: str
    """What was said last."""
    first: int
    """Step of the first time."""
    last: int
    """Step of the last time."""


@dataclass
class Run:
    """A run folder; large files are read when they are asked for."""

    folder: Path
    name: str
    record: Json = field(default_factory=dict)
    """What was started: `command`, `config`, `versions`, and `total_steps` where known."""
    series: dict[str, Series] = field(default_factory=dict)
    alerts: list[Alert] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def config(self) -> Json:
        return self.record.get("config") or {}

    def setting(self, key: str) -> Any:
        """The value of a dotted key; None where the run has no configuration."""
        value: Any = self.config
        for name in key.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        return value

    @property
    def last_step(self) -> int:
        """The newest step that was trained; 0 before the first one is."""
        series = self.series.get("time/step_s")
        return int(series.steps[-1]) if series else 0

    def sampled_steps(self) -> list[int]:
        """Steps whose samples are kept."""
        return [step for step, _ in files_of_steps(self.folder / SAMPLES, "step_*.jsonl")]

    def samples(self, step: int) -> list[Json]:
        """The rows of samples/step_N.jsonl."""
        return [row for row in self.lines(self.folder / SAMPLES / f"step_{step}.jsonl") if has(row, SAMPLE_COLUMNS)]

    def probe(self) -> list[Json]:
        """The probe texts; empty where the run has none."""
        file = self.folder / DIAGNOSTICS / PROBE
        if not file.is_file():
            return []
        content = self.guarded(file, _read_json)
        texts = content.get("texts") if isinstance(content, Mapping) else None
        if not isinstance(texts, list) or not all(has(text, PROBE_COLUMNS) for text in texts):
            self.problem(f"{file.name} holds no probe texts")
            return []
        return texts

    def diagnosed_steps(self) -> list[int]:
        return [step for step, _ in files_of_steps(self.folder / DIAGNOSTICS, "step_*.jsonl")]

    def diagnosis(self, step: int) -> dict[int, Json]:
        """By text, the rows of diagnostics/step_N.jsonl."""
        rows = self.lines(self.folder / DIAGNOSTICS / f"step_{step}.jsonl")
        return {row["id"]: row for row in rows if has(row, ("id", "rationale"))}

    def vector_steps(self) -> list[int]:
        return [step for step, _ in files_of_steps(self.folder / DIAGNOSTICS, "vectors_step_*.npz")]

    def vectors(self, step: int, count: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Vectors [count,H] float32 of the probe texts with rationales and without; None where they cannot be read."""
        file = self.folder / DIAGNOSTICS / f"vectors_step_{step}.npz"
        found = self.guarded(file, _read_vectors)
        if found is None:
            return None
        if any(a.ndim != 2 or len(a) != count or not np.isfinite(a).all() for a in found):
            self.problem(f"{file.name} does not hold finite vectors of the {count} probe texts")
            return None
        return found

    def evaluations(self, folder: Path) -> list[Summary]:
        """The evaluations in an output folder of `eval_mteb.py`."""
        found = [self.guarded(file, _read_summary) for file in sorted(folder.glob("*/summary.json"))]
        return [summary for summary in found if summary is not None]

    def problem(self, text: str) -> None:
        if text not in self.problems:
            self.problems.append(text)

    def lines(self, file: Path) -> list[Json]:
        """The rows of a file of JSON lines."""
        rows, broken = read_lines(file)
        if broken:
            self.problem(f"{broken} line(s) of {file.relative_to(self.folder)} could not be read")
        return rows

    def guarded(self, file: Path, read: Callable[[Path], Any]) -> Any:
        """What `read` returns, or None and a problem if the file is broken or vanishes."""
        try:
            return read(file)
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            self.problem(f"{file} could not be read ({type(error).__name__})")
            return None


SAMPLE_COLUMNS = ("uid", "role", "text", "rationale")
PROBE_COLUMNS = ("id", "sample", "role", "text")


def has(row: Any, columns: Iterable[str]) -> bool:
    return isinstance(row, Mapping) and all(name in row for name in columns)


def read_run(folder: Path) -> Run:
    """Read what every report needs of a run.

    Raises:
        UserError: it is not the folder of a run.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give the folder of a run, which holds {METRICS}")
    if not any((folder / name).exists() for name in (METRICS, RECORD, SAMPLES, DIAGNOSTICS)):
        raise UserError(f"{folder} is not the folder of a run: it holds neither {METRICS} nor {RECORD}")
    run = Run(folder, folder.resolve().name)
    run.record = _read_record(run)
    if (folder / METRICS).is_file():
        rows = run.lines(folder / METRICS)
        run.series, run.alerts = merge_lines(rows), merge_alerts(rows)
    else:
        run.problem(f"{METRICS} is missing, which every run writes: there are no curves")
    return run


def read_lines(file: Path) -> tuple[list[Json], int]:
    """The objects of a file of JSON lines, and the number of lines that are none.

    A last line without an end is being written, and is neither. A file that is not there has no lines.
    """
    try:
        lines = file.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return [], 0
    rows, broken = [], 0
    for line in lines:
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError:
            row = None
        if isinstance(row, Mapping):
            rows.append(row)
        else:
            broken += 1
    return rows, broken


def merge_lines(rows: Sequence[Json]) -> dict[str, Series]:
    """Each metric over the steps. A step may have several lines; of a figure that comes twice the later one counts."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        step = row.get("step")
        if not isinstance(step, int):
            continue
        for name, value in row.items():
            if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool):
                found.setdefault(name, {})[step] = value
    return {name: _series(by_step) for name, by_step in found.items()}


def _series(by_step: Mapping[int, float]) -> Series:
    steps = np.array(sorted(by_step), dtype=np.int64)
    return Series(steps, np.array([by_step[step] for step in steps.tolist()], dtype=np.float64))


def merge_alerts(rows: Sequence[Json]) -> list[Alert]:
    """One alert for each name, with the steps of its first and its last time; the newest first."""
    found: dict[str, Alert] = {}
    for row in rows:
        for alert in (alert for alert in row.get("alerts") or [] if has(alert, ("name", "text"))):
            name, step = alert["name"], row["step"]
            found[name] = Alert(name, alert["text"], found[name].first if name in found else step, step)
    return sorted(found.values(), key=lambda alert: -alert.last)


def _read_record(run: Run) -> Json:
    """What was started, from the run's own record; for runs without one, from the newest checkpoint."""
    states = [step_folder(run.folder, step) / STATE for step in saved_steps(run.folder)]
    for file in (run.folder / RECORD, *states[::-1]):
        if file.is_file():
            content = run.guarded(file, _read_json)
            if isinstance(content, Mapping):
                return content
    run.problem(f"{RECORD} is missing, which a run writes when it starts: settings, versions and command are not known")
    return {}


def _read_json(file: Path) -> Any:
    """JSON as Python writes it, which may hold Infinity."""
    return json.loads(file.read_bytes())


def _read_summary(file: Path) -> Summary | None:
    return Summary.read(file.parent)


def _read_vectors(file: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(file, allow_pickle=False) as arrays:
        return arrays["with"].astype(np.float32), arrays["without"].astype(np.float32)
