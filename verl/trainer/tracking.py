"""Where a run's numbers and samples go: always files in the run folder, and the trackers asked for."""

import math
import os
import sys
from pathlib import Path
from typing import Any, Protocol

import orjson

from verl.errors import UserError
from verl.utils.files import replace_file


class Tracker(Protocol):
    @property
    def run_id(self) -> str | None: ...

    def log(self, metrics: dict[str, float], step: int) -> None: ...

    def finish(self) -> None: ...


class WandbTracker:
    """Mirrors metrics to wandb; offline, with a line on how to sync, where there is no key."""

    def __init__(self, run_dir: Path, project: str, name: str, config: dict[str, Any], run_id: str | None) -> None:
        import wandb

        online = bool(os.environ.get("WANDB_API_KEY")) or Path("~/.netrc").expanduser().is_file()
        mode: Any = os.environ.get("WANDB_MODE") or ("online" if online else "offline")
        self._run = wandb.init(
            project=project, name=name, config=config, dir=run_dir, mode=mode, id=run_id, resume="allow",
            settings=wandb.Settings(silent=True, console="off"),
        )  # fmt: skip
        self.run_id = self._run.id
        if mode == "offline":
            sys.stderr.write(
                f"wandb: no API key, writing offline; send it later with: wandb sync {Path(self._run.dir).parent}\n"
            )

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._run.log(metrics, step=step)

    def finish(self) -> None:
        self._run.finish()


class TensorboardTracker:
    run_id = None

    def __init__(self, run_dir: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / "tensorboard"))

    def log(self, metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self._writer.close()


class Tracking:
    """`metrics.jsonl` and `samples/step_N.jsonl` in the run folder, and any tracker of `trainer.logger`.

    Args:
        run_ids: ids of an earlier part of this run, so that a resumed run continues the same curves.

    Raises:
        UserError: a tracker's package is not installed.
    """

    def __init__(
        self, run_dir: Path, backends: list[str], project: str, name: str, config: dict[str, Any],
        run_ids: dict[str, str],
    ) -> None:  # fmt: skip
        (run_dir / "samples").mkdir(parents=True, exist_ok=True)
        self.run_dir = run_dir
        self.trackers: dict[str, Tracker] = {}
        try:
            if "wandb" in backends:
                self.trackers["wandb"] = WandbTracker(run_dir, project, name, config, run_ids.get("wandb"))
            if "tensorboard" in backends:
                self.trackers["tensorboard"] = TensorboardTracker(run_dir)
        except ImportError as error:
            raise UserError(f"trainer.logger={backends} needs a package that is not installed: {error}") from error

    @property
    def run_ids(self) -> dict[str, str]:
        return {name: t.run_id for name, t in self.trackers.items() if t.run_id is not None}

    def log(self, metrics: dict[str, float], step: int) -> None:
        with (self.run_dir / "metrics.jsonl").open("ab") as file:
            file.write(orjson.dumps({"step": step, **metrics}) + b"\n")
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        for tracker in self.trackers.values():
            tracker.log(finite, step)

    def log_samples(self, samples: list[dict[str, Any]], step: int) -> None:
        lines = [orjson.dumps(sample) for sample in samples]
        (self.run_dir / "samples" / f"step_{step}.jsonl").write_bytes(b"\n".join(lines) + b"\n")

    def forget_after(self, step: int) -> None:
        """Drop what an abandoned part of the run logged after the checkpoint it is resumed from."""
        file = self.run_dir / "metrics.jsonl"
        if file.is_file():
            # A run that was killed while it wrote may have left half a last line.
            whole = [line for line in file.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
            replace_file(file, b"".join(line for line in whole if orjson.loads(line)["step"] <= step))

    def start_over(self) -> None:
        """Set the metrics of an earlier run in the same folder aside, so that every step occurs once."""
        file = self.run_dir / "metrics.jsonl"
        if file.is_file():
            file.replace(self.run_dir / "metrics.previous.jsonl")

    def finish(self) -> None:
        for tracker in self.trackers.values():
            tracker.finish()
