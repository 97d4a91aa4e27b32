"""Where a run's numbers and samples go: always files in the run folder, and the trackers asked for.

`metrics.jsonl` is the record; a tracker mirrors it. What the run forgets when it resumes, the record forgets, and a
tracker that has logged it is started anew from the record. A tracker never ends a run: what fails is said once, and the
record goes on.
"""

import importlib
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import orjson

from verl.errors import UserError
from verl.utils.files import replace_file
from verl.utils.run_files import METRICS, SAMPLES

TENSORBOARD = "tensorboard"
LOGGED = (METRICS, SAMPLES, TENSORBOARD)
"""What is written into the run folder, except by wandb, whose runs have folders of their own."""

_PACKAGES = {"wandb": "wandb", "tensorboard": "torch.utils.tensorboard"}
# Seconds that wandb may take to reach its server at the start, and to send what is left at the end.
_WANDB_START_S, _WANDB_FINISH_S = 20, 60


def check_packages(backends: Iterable[str]) -> None:
    """Raise UserError if the package of a tracker cannot be imported."""
    for backend in backends:
        try:
            importlib.import_module(_PACKAGES.get(backend, __name__))
        except ImportError as error:
            raise UserError(f"trainer.logger={backend} needs a package that is not installed: {error}") from error


class Tracker(Protocol):
    run_id: str | None
    """By which the tracker goes on with a run, if it can."""

    def log(self, metrics: dict[str, float], step: int) -> None: ...

    def finish(self) -> None: ...


class WandbTracker:
    """A wandb run; offline where there is no key or no answer.

    Args:
        run_id: of a run to go on with; None = a new one.
        say: prints a line.
    """

    def __init__(
        self, run_dir: Path, project: str, name: str, config: dict[str, Any], run_id: str | None,
        say: Callable[[str], None],
    ) -> None:  # fmt: skip
        import wandb

        self._say = say

        def start(mode: Any) -> Any:
            return wandb.init(
                project=project, name=name, config=config, dir=run_dir, mode=mode, id=run_id,
                resume="allow" if run_id else None,
                settings=wandb.Settings(
                    silent=True, console="off", init_timeout=_WANDB_START_S, finish_timeout=_WANDB_FINISH_S,
                    finish_timeout_raises=False,
                ),
            )  # fmt: skip

        mode, reason = os.environ.get("WANDB_MODE"), "WANDB_MODE"
        try:
            if mode is None:
                mode, reason = ("online", "") if wandb.login(prompt=False, verify=False) else ("offline", "no API key")
            self._run = start(mode)
        except wandb.Error as error:
            mode, reason = "offline", " ".join(str(error).splitlines()[:2])
            self._run = start(mode)
        self.run_id = None if mode == "offline" else self._run.id
        self._sync = f"wandb sync {Path(self._run.dir).parent}"
        if mode == "offline":
            say(f"wandb: offline ({reason}); send the run later with: {self._sync}")

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._run.log(metrics, step=step)

    def finish(self) -> None:
        start = time.monotonic()
        self._run.finish()
        if time.monotonic() - start >= _WANDB_FINISH_S:
            self._say(f"wandb: not everything was sent in {_WANDB_FINISH_S} s; send the run with: {self._sync}")


class TensorboardTracker:
    run_id: str | None = None

    def __init__(self, run_dir: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        shutil.rmtree(run_dir / TENSORBOARD, ignore_errors=True)
        self._writer = SummaryWriter(str(run_dir / TENSORBOARD))

    def log(self, metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self._writer.close()


class Tracking:
    """`metrics.jsonl` and `samples/step_N.jsonl` in the run folder, and any tracker of `trainer.logger`.

    Args:
        say: prints a line.
    """

    def __init__(
        self, run_dir: Path, backends: Sequence[str], project: str, name: str, config: dict[str, Any],
        say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.run_dir, self.backends, self._say = run_dir, backends, say
        self._wandb = (project, name, config)
        self.trackers: dict[str, Tracker] = {}

    def begin(self, step: int, run_ids: dict[str, str]) -> None:
        """Start the trackers, once the record has forgotten what was logged after `step`.

        Args:
            step: that the run goes on from; 0 for a new one, whose folder has no record yet.
            run_ids: as `run_ids` was when that step was saved.
        """
        kept, forgot = self._forget_after(step)
        if "tensorboard" in self.backends:
            self._start("tensorboard", TensorboardTracker(self.run_dir), kept)
        if "wandb" in self.backends:
            # A wandb run refuses steps before its last one: with something to forget it is a new run.
            run_id = None if forgot else run_ids.get("wandb")
            tracker = WandbTracker(self.run_dir, *self._wandb, run_id, self._say)
            self._start("wandb", tracker, [] if run_id and tracker.run_id else kept)

    @property
    def run_ids(self) -> dict[str, str]:
        return {name: t.run_id for name, t in self.trackers.items() if t.run_id is not None}

    def log(self, metrics: dict[str, float], step: int) -> None:
        line = {"step": step, **metrics}
        with (self.run_dir / METRICS).open("ab") as file:
            file.write(orjson.dumps(line) + b"\n")
        for name in list(self.trackers):
            self._mirror(name, [line])

    def log_samples(self, samples: list[dict[str, Any]], step: int) -> None:
        lines = [orjson.dumps(sample) for sample in samples]
        folder = self.run_dir / SAMPLES
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"step_{step}.jsonl").write_bytes(b"\n".join(lines) + b"\n")

    def finish(self) -> None:
        for name in list(self.trackers):
            with self._guarded(name):
                self.trackers[name].finish()

    def _forget_after(self, step: int) -> tuple[list[dict[str, Any]], bool]:
        """Drop what was logged after a step; return the lines that are left, and whether any was dropped."""
        for file in (self.run_dir / SAMPLES).glob("step_*.jsonl"):
            number = file.stem.removeprefix("step_")
            if number.isdecimal() and int(number) > step:
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

    def _start(self, name: str, tracker: Tracker, history: Sequence[dict[str, Any]]) -> None:
        self.trackers[name] = tracker
        self._mirror(name, history)

    def _mirror(self, name: str, lines: Sequence[dict[str, Any]]) -> None:
        with self._guarded(name):
            for line in lines:
                _log_line(self.trackers[name], line)

    @contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        """What goes wrong with a tracker's disk, network or service is said once, and the tracker not used again."""
        try:
            yield
        except _failures(name) as error:
            del self.trackers[name]
            self._say(f"{name} failed and gets no more of this run ({error!r}); {self.run_dir / METRICS} goes on")


def _log_line(tracker: Tracker, line: dict[str, Any]) -> None:
    finite = {name: value for name, value in line.items() if name != "step" and value is not None}
    tracker.log({name: value for name, value in finite.items() if math.isfinite(value)}, line["step"])


def _failures(name: str) -> tuple[type[Exception], ...]:
    """What a tracker raises when its disk, network or service fails."""
    if name == "wandb":
        import wandb

        return OSError, wandb.Error
    return (OSError,)
