"""Where a run's numbers and samples go: always files in the run folder, and the trackers asked for.

`metrics.jsonl` is the record; a tracker mirrors it. On resume, lines after the resumed step are deleted, and trackers
that logged them restart from the file. A tracker never ends a run: what fails is said once, and the record goes on.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import orjson

from verl.trainer.ppo.alerts import Alert, AlertWatch
from verl.trainer.trackers import TENSORBOARD, TRACKERS, TrackedRun, Tracker
from verl.utils.files import replace_file
from verl.utils.run_files import DIAGNOSTICS, METRICS, SAMPLES, files_of_steps

LOGGED = (METRICS, SAMPLES, DIAGNOSTICS, TENSORBOARD)
"""What is written into the run folder, except by trackers whose runs have folders of their own."""

# Probe texts and groups in the tables of a diagnosis.
_SHOWN = 4


class Tracking:
    """`metrics.jsonl` and `samples/step_N.jsonl` in the run folder, and any tracker of `trainer.logger`.

    Args:
        run_dir: the run's folder.
        backends: as `trainer.logger`; names that are no tracker's, such as console, are passed over.
        project, name: of the run, in trackers.
        config: the settings, nested, for trackers to show.
        say: prints a line.
    """

    def __init__(
        self, run_dir: Path, backends: Sequence[str], project: str, name: str, config: dict[str, Any],
        say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.run_dir, self._say = run_dir, say
        self._run = TrackedRun(run_dir, project, name, config, say)
        self._backends = [name for name in TRACKERS if name in backends]
        self.trackers: dict[str, Tracker] = {}
        self._samples: list[dict[str, Any]] = []
        """Of the last step that had any."""
        self._alerts = AlertWatch()

    def begin(self, step: int, run_ids: dict[str, str]) -> set[str]:
        """Start the trackers, once the record has forgotten what was logged after `step`.

        Args:
            step: that the run goes on from; 0 for a new one, whose folder has no record yet.
            run_ids: as `run_ids` was when that step was saved.

        Returns:
            The figures that the record has of `step`.
        """
        kept, forgot = self._forget_after(step)
        self._alerts.replay(kept)
        for name in self._backends:
            # Services refuse steps before a run's last one, or show both: with something to forget it is a new run.
            run_id = None if forgot else run_ids.get(name)
            try:
                tracker = self.trackers[name] = TRACKERS[name](self._run, run_id)
            except OSError as error:
                self._give_up(name, error)
                continue
            if run_id is None or tracker.run_id != run_id:
                self._mirror(name, kept)
        return {name for line in kept if line["step"] == step for name in line}

    @property
    def run_ids(self) -> dict[str, str]:
        return {name: t.run_id for name, t in self.trackers.items() if t.run_id is not None}

    def log(self, metrics: dict[str, float], step: int) -> None:
        line = {"step": step, **metrics}
        self._alerts.add(line)
        self._log(line)

    def log_new_alerts(self, step: int) -> list[Alert]:
        """Log the alerts that have begun since the last call, and return them."""
        begun = self._alerts.take()
        if begun:
            self._log({"step": step, "alerts": [asdict(alert) for alert in begun]})
        return begun

    def log_diagnosis(self, texts: Sequence[dict[str, Any]], step: int) -> None:
        """Tables for the trackers: a few probe texts, and a few groups of the last step.

        Args:
            texts: of the probe, with their rationales, see `Diagnosis`.
        """
        tables = {"samples/probe": list(texts[:_SHOWN]), "samples/groups": _group_rows(self._samples)}
        for name in list(self.trackers):
            with self._guarded(name):
                for table, rows in tables.items():
                    if rows:
                        self.trackers[name].log_table(table, rows, step)

    def log_samples(self, samples: list[dict[str, Any]], step: int) -> None:
        self._samples = samples
        lines = [orjson.dumps(sample) for sample in samples]
        folder = self.run_dir / SAMPLES
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"step_{step}.jsonl").write_bytes(b"\n".join(lines) + b"\n")

    def finish(self) -> None:
        for name in list(self.trackers):
            with self._guarded(name):
                self.trackers[name].finish()

    def _log(self, line: dict[str, Any]) -> None:
        with (self.run_dir / METRICS).open("ab") as file:
            file.write(orjson.dumps(line) + b"\n")
        for name in list(self.trackers):
            self._mirror(name, [line])

    def _forget_after(self, step: int) -> tuple[list[dict[str, Any]], bool]:
        """Drop what was logged after a step; return the lines that are left, and whether any was dropped."""
        for folder in (SAMPLES, DIAGNOSTICS):
            for number, file in files_of_steps(self.run_dir / folder, "*step_*.*"):
                if number > step:
                    file.unlink()
        record = self.run_dir / METRICS
        if not record.is_file():
            return [], False
        lines = record.read_bytes().splitlines(keepends=True)
        # A run that was killed while it wrote may have left half a last line.
        whole = [(line, orjson.loads(line)) for line in lines if line.endswith(b"\n")]
        kept = [(line, values) for line, values in whole if values["step"] <= step]
        replace_file(record, b"".join(line for line, _ in kept))
        return [values for _, values in kept], len(kept) < len(lines)

    def _mirror(self, name: str, lines: Sequence[dict[str, Any]]) -> None:
        with self._guarded(name):
            for line in lines:
                _log_line(self.trackers[name], line)

    @contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        """What goes wrong with a tracker's disk, network or service is said once, and the tracker not used again."""
        try:
            yield
        except self.trackers[name].failures as error:
            del self.trackers[name]
            self._give_up(name, error)

    def _give_up(self, name: str, error: Exception) -> None:
        self._say(f"{name} failed and gets no more of this run ({error!r}); {self.run_dir / METRICS} goes on")


def _log_line(tracker: Tracker, line: dict[str, Any]) -> None:
    """A line of the record: figures, or alerts."""
    step = line["step"]
    for alert in line.get("alerts", ()):
        tracker.log_alert(Alert(**alert), step)
    figures = {name: value for name, value in line.items() if name not in ("step", "alerts") and value is not None}
    if finite := {name: value for name, value in figures.items() if math.isfinite(value)}:
        tracker.log(finite, step)


def _group_rows(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The trained rows of a step's first groups, as a table."""
    shown = list(dict.fromkeys(sample["uid"] for sample in samples))[:_SHOWN]
    return [
        {
            "sample": sample["uid"], "text": sample["text"], "rationale": sample["rationale"],
            "reward": sample["reward"], "advantage": sample.get("advantage"), "tokens": sample["tokens"],
            "finish_reason": sample["finish_reason"],
            **{f"reward/{name}": value for name, value in sample["reward_parts"].items()},
        }
        for sample in samples
        if sample["uid"] in shown and "reward" in sample
    ]  # fmt: skip
