"""Services that mirror a run's record: wandb, tensorboard, mlflow, swanlab and trackio.

A package is imported when its tracker is asked for. Where a tracker writes, and how it reaches its server, is what its
own environment variables say.
"""

import contextlib
import importlib
import io
import os
import shutil
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl.errors import UserError
from verl.trainer.ppo.alerts import Alert
from verl.verl_keys import leaves

TENSORBOARD = "tensorboard"

Row = Mapping[str, Any]
"""Of a table: values by column."""

# Seconds that wandb may take to reach its server at the start, and to send what is left at the end.
_WANDB_START_S, _WANDB_FINISH_S = 20, 60
# mlflow takes no more parameters in one call.
_MLFLOW_BATCH = 100
_NO_KEY = "no API key"


@dataclass(frozen=True)
class TrackedRun:
    run_dir: Path
    project: str
    name: str
    config: dict[str, Any]
    """The settings, nested."""
    say: Callable[[str], None]
    """Prints a line."""


class Tracker(ABC):
    """One service. Its constructor takes a `TrackedRun`, and the id of a run to go on with or None for a new run; it
    raises OSError where there is no answer."""

    run_id: str | None = None
    """By which the tracker can go on with this run; None if it cannot."""
    failures: tuple[type[Exception], ...] = (OSError,)
    """What is raised when its disk, network or service fails."""

    @abstractmethod
    def log(self, metrics: dict[str, float], step: int) -> None:
        """Log finite figures."""

    @abstractmethod
    def log_table(self, name: str, rows: Sequence[Row], step: int) -> None:
        """Add a few rows, which have the same columns in every call, to a table."""

    @abstractmethod
    def log_alert(self, alert: Alert, step: int) -> None: ...

    @abstractmethod
    def finish(self) -> None: ...


class WandbTracker(Tracker):
    """A wandb run; offline where there is no key or no answer."""

    def __init__(self, run: TrackedRun, run_id: str | None) -> None:
        import wandb

        self.failures = (OSError, wandb.Error)
        # Tables are staged there before they are sent; by default that is the home folder, which may not be writable.
        os.environ.setdefault("WANDB_DATA_DIR", str(run.run_dir.absolute() / "wandb"))
        self._say, self._tables = run.say, dict[str, Any]()

        def start(mode: Any) -> Any:
            return wandb.init(
                project=run.project, name=run.name, config=run.config, dir=run.run_dir, mode=mode, id=run_id,
                resume="allow" if run_id else None,
                settings=wandb.Settings(
                    silent=True, console="off", init_timeout=_WANDB_START_S, finish_timeout=_WANDB_FINISH_S,
                    finish_timeout_raises=False,
                ),
            )  # fmt: skip

        mode, reason = os.environ.get("WANDB_MODE"), "WANDB_MODE"
        try:
            if mode is None:
                mode, reason = ("online", "") if wandb.login(prompt=False, verify=False) else ("offline", _NO_KEY)
            self._run = start(mode)
        except wandb.Error as error:
            mode, reason = "offline", " ".join(str(error).splitlines()[:2])
            self._run = start(mode)
        self.run_id = None if mode == "offline" else self._run.id
        self._sync = f"wandb sync {Path(self._run.dir).parent}"
        if mode == "offline":
            run.say(f"wandb: offline ({reason}); send the run later with: {self._sync}")

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._run.log(metrics, step=step)

    def log_table(self, name: str, rows: Sequence[Row], step: int) -> None:
        import wandb

        if name not in self._tables:
            # Only what is new is sent, instead of the whole table each time.
            self._tables[name] = wandb.Table(columns=["step", *rows[0]], log_mode="INCREMENTAL")
        for row in rows:
            self._tables[name].add_data(step, *row.values())
        self._run.log({name: self._tables[name]}, step=step)

    def log_alert(self, alert: Alert, step: int) -> None:
        self._run.alert(title=f"{alert.name} at step {step}", text=alert.text, level="WARN")

    def finish(self) -> None:
        start = time.monotonic()
        self._run.finish()
        if time.monotonic() - start >= _WANDB_FINISH_S:
            self._say(f"wandb: not everything was sent in {_WANDB_FINISH_S} s; send the run with: {self._sync}")


class TensorboardTracker(Tracker):
    """Event files in the run folder, written anew when a run goes on."""

    def __init__(self, run: TrackedRun, run_id: str | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        shutil.rmtree(run.run_dir / TENSORBOARD, ignore_errors=True)
        self._writer = SummaryWriter(str(run.run_dir / TENSORBOARD))

    def log(self, metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def log_table(self, name: str, rows: Sequence[Row], step: int) -> None:
        # Its text panel shows Markdown; indented lines are shown as they are.
        text = "\n\n".join("\n".join(f"    {key}: {value}" for key, value in row.items()) for row in rows)
        self._writer.add_text(name, text, step)

    def log_alert(self, alert: Alert, step: int) -> None:
        self._writer.add_text(f"alerts/{alert.name}", alert.text, step)

    def finish(self) -> None:
        self._writer.close()


class MlflowTracker(Tracker):
    """A run at MLFLOW_TRACKING_URI; without that in mlflow.db of the run folder."""

    def __init__(self, run: TrackedRun, run_id: str | None) -> None:
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        self.failures = (OSError, MlflowException)
        # A bar for every row of a table.
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        local = "MLFLOW_TRACKING_URI" not in os.environ
        self._client = MlflowClient(f"sqlite:///{run.run_dir.absolute()}/mlflow.db" if local else None)
        try:
            self.run_id = self._reopened(run_id) or self._started(run, local)
        except MlflowException as error:
            raise ConnectionError(str(error)) from error

    def log(self, metrics: dict[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._id, [Metric(name, value, now, step) for name, value in metrics.items()])

    def log_table(self, name: str, rows: Sequence[Row], step: int) -> None:
        columns = {"step": [step] * len(rows)} | {key: [row[key] for row in rows] for key in rows[0]}
        self._client.log_table(self._id, columns, f"{name}.json")

    def log_alert(self, alert: Alert, step: int) -> None:
        self._client.set_tag(self._id, f"alert.{alert.name}", f"step {step}: {alert.text}")

    def finish(self) -> None:
        self._client.set_terminated(self._id)

    @property
    def _id(self) -> str:
        assert self.run_id is not None
        return self.run_id

    def _reopened(self, run_id: str | None) -> str | None:
        from mlflow.exceptions import MlflowException

        if run_id is not None:
            try:
                self._client.update_run(run_id, status="RUNNING")
            except MlflowException:
                return None  # it is not in this store; a new one gets the whole record
        return run_id

    def _started(self, run: TrackedRun, local: bool) -> str:
        from mlflow.entities import Param

        experiment = self._client.get_experiment_by_name(run.project)
        folder = (run.run_dir / "mlflow").absolute().as_uri() if local else None
        number = experiment.experiment_id if experiment else self._client.create_experiment(run.project, folder)
        run_id: str = self._client.create_run(number, run_name=run.name).info.run_id
        settings = [Param(key, str(value)) for key, value in leaves(run.config)]
        for start in range(0, len(settings), _MLFLOW_BATCH):
            self._client.log_batch(run_id, params=settings[start : start + _MLFLOW_BATCH])
        return run_id


class SwanlabTracker(Tracker):
    """A SwanLab run; offline where there is no key, unless SWANLAB_MODE says something else."""

    def __init__(self, run: TrackedRun, run_id: str | None) -> None:
        import swanlab

        has_key = "SWANLAB_API_KEY" in os.environ or (Path.home() / ".swanlab" / ".netrc").is_file()
        mode: Any = os.environ.get("SWANLAB_MODE", "online" if has_key else "offline")
        with contextlib.redirect_stdout(io.StringIO()):
            self._run = swanlab.init(
                project=run.project, name=run.name, config=run.config, log_dir=str(run.run_dir / "swanlab"), mode=mode,
                id=run_id if mode == "online" else None, resume="allow" if run_id and mode == "online" else None,
            )  # fmt: skip
        self.run_id = self._run.id if mode == "online" else None
        if mode == "offline":
            folder = f"{run.run_dir / 'swanlab'}/run-*-{self._run.id}"
            reason = "SWANLAB_MODE" if "SWANLAB_MODE" in os.environ else _NO_KEY
            run.say(f"swanlab: offline ({reason}); send the run later with: swanlab sync {folder}")

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._run.log(metrics, step=step)

    def log_table(self, name: str, rows: Sequence[Row], step: int) -> None:
        import swanlab

        texts = ["\n".join(f"{key}: {value}" for key, value in row.items()) for row in rows]
        self._run.log({name: [swanlab.Text(text) for text in texts]}, step=step)

    def log_alert(self, alert: Alert, step: int) -> None:
        import swanlab

        self._run.log({f"alerts/{alert.name}": swanlab.Text(alert.text)}, step=step)

    def finish(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self._run.finish()


class TrackioTracker(Tracker):
    """A trackio run in TRACKIO_DIR, or on the Space of TRACKIO_SPACE_ID."""

    def __init__(self, run: TrackedRun, run_id: str | None) -> None:
        import trackio

        # It goes on with runs by name, so that a name must be that of one run.
        self.run_id = run_id or f"{run.name}-{uuid.uuid4().hex[:6]}"
        with contextlib.redirect_stdout(io.StringIO()):
            self._run = trackio.init(
                project=run.project, name=self.run_id, config=dict(leaves(run.config)),
                resume="allow" if run_id else "never", embed=False, auto_log_cpu=False, auto_log_gpu=False,
            )  # fmt: skip

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def log_table(self, name: str, rows: Sequence[Row], step: int) -> None:
        import pandas as pd
        import trackio

        self._run.log({name: trackio.Table(dataframe=pd.DataFrame([dict(row) for row in rows]))}, step=step)

    def log_alert(self, alert: Alert, step: int) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self._run.alert(title=f"{alert.name} at step {step}", text=alert.text)

    def finish(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self._run.finish()


TRACKERS: dict[str, Callable[[TrackedRun, str | None], Tracker]] = {
    "wandb": WandbTracker,
    "tensorboard": TensorboardTracker,
    "mlflow": MlflowTracker,
    "swanlab": SwanlabTracker,
    "trackio": TrackioTracker,
}
"""By their names in trainer.logger."""

_MODULES = {"tensorboard": ("torch.utils.tensorboard",), "mlflow": ("mlflow", "sqlalchemy")}
# With a server mlflow keeps nothing itself.
_MODULES_WITH_SERVER = {"mlflow": ("mlflow",)}


def check_packages(backends: Iterable[str]) -> None:
    """Raise UserError if the package of a tracker cannot be imported."""
    for backend in TRACKERS.keys() & set(backends):
        modules = _MODULES.get(backend, (backend,))
        if "MLFLOW_TRACKING_URI" in os.environ:
            modules = _MODULES_WITH_SERVER.get(backend, modules)
        try:
            for module in modules:
                importlib.import_module(module)
        except ImportError as error:
            raise UserError(
                f"trainer.logger={backend} needs a package that is not installed ({error}); install it with "
                f"pip install {backend}, or leave {backend} out."
            ) from error
