"""Training a row of the comparison for so many seconds, `train.sh` stopped by SIGTERM and resumed, or steps."""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common import REPO

from comparison.kept import clear
from verl.checkpoint.run_folder import MODEL, RunFolder, read_state, saved_steps, step_folder
from verl.utils.files import replace_file
from verl.utils.run_files import METRICS

# More than any run here makes; it is stopped.
_STEPS = 1_000_000
_POLL_SECONDS = 0.2
_STOPPED = 128 + signal.SIGTERM
_LOG, _MODEL = "log.txt", "model"


class TrainingError(RuntimeError):
    """A training run ended by itself; the message has the end of its output."""


@dataclass(frozen=True)
class Cost:
    """What a model has been trained with."""

    seconds: float
    """Of the steps: without start-up, saving and scoring."""
    steps: int
    samples: int
    """Triplets, or texts, each as often as it was seen."""
    tokens: int
    """Tokens generated."""
    step_seconds: float
    """The median over the steps."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Run:
    """A training run in a folder of its own."""

    folder: Path
    model: str
    train_file: Path
    mode: str
    """supervised or unsupervised."""
    overrides: Sequence[str]

    def train_until(self, seconds: float) -> Cost:
        """Train on until its steps have taken about this long in sum, and save.

        It ends at the end of the step that is nearest to `seconds`. What an earlier call did is not done again.

        Raises:
            TrainingError: the run ended otherwise.
        """
        if self._saved_step() == 0 or self.cost().seconds + self.cost().step_seconds / 2 < seconds:
            resumed_from = self._saved_step()
            self._run(_STEPS, lambda: _is_due(_steps_of(self.folder), resumed_from, seconds))
        return self.cost()

    def train_steps(self, steps: int) -> Cost:
        """Train until this many steps are done, and save. What an earlier call did is not done again.

        Raises:
            TrainingError: the run ended otherwise.
        """
        if self._saved_step() < steps:
            self._run(steps, lambda: False)
        if (saved := self._saved_step()) < steps:
            raise TrainingError(f"{self.folder}: stopped after {saved} of {steps} steps; the same command goes on")
        return self.cost()

    @property
    def is_finished(self) -> bool:
        """Whether `finish` has left the model alone."""
        return (self.folder / _MODEL).is_dir()

    @property
    def trained_model(self) -> Path:
        """The model folder of the newest saved step."""
        if self.is_finished:
            return self.folder / _MODEL
        return step_folder(self.folder, self._saved_step()) / MODEL

    def finish(self) -> None:
        """Keep the model alone: what resuming needs is four times as large, and `train_until` cannot go on then.

        A folder that was removed since is no error: whether its model is asked for again is not known here.
        """
        if not self.is_finished and self._saved_step():
            self.trained_model.rename(self.folder / _MODEL)
        for step in saved_steps(self.folder):
            clear(step_folder(self.folder, step))

    def cost(self) -> Cost:
        """Up to the newest saved step."""
        step = self._saved_step()
        done = [record for record in _steps_of(self.folder) if record["step"] <= step]
        seconds = [record["time/step_s"] for record in done]
        return Cost(
            sum(seconds), step, read_state(step_folder(self.folder, step))["samples_seen"],
            int(sum(record.get("perf/generated_tokens", 0) for record in done)), statistics.median(seconds),
        )  # fmt: skip

    def _saved_step(self) -> int:
        newest, _ = RunFolder(self.folder).newest_whole() if self.folder.is_dir() else (None, [])
        return int(newest.name.rsplit("_", 1)[1]) if newest else 0

    def _run(self, steps: int, is_due: Callable[[], bool]) -> None:
        """Train to the end of these steps, or until it is due to stop."""
        self.folder.mkdir(parents=True, exist_ok=True)
        _forget_after(self.folder, self._saved_step())
        command = [
            "bash", "train.sh", *self.overrides, f"trainer.total_training_steps={steps}",
            f"trainer.default_local_dir={self.folder.absolute()}", "trainer.use_ray=False", "trainer.save_freq=-1",
            "trainer.max_actor_ckpt_to_keep=1", "trainer.samples_per_step=0",
        ]  # fmt: skip
        environment = {
            **os.environ, "PYTHON": sys.executable, "MODE": self.mode, "RECIPE": "paper", "MODEL": self.model,
            "VAL_FILE": "null", "TRAIN_FILE": str(self.train_file.absolute()),
            "CUDA_VISIBLE_DEVICES": "",
        }  # fmt: skip
        with (self.folder / _LOG).open("a") as log:
            # In a session of its own, so that Ctrl-C here is one signal there: a second one ends a run without saving.
            process = subprocess.Popen(
                command, cwd=REPO, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                while process.poll() is None and not is_due():
                    time.sleep(_POLL_SECONDS)
            finally:
                process.terminate()
                process.wait()
        if process.returncode not in (0, _STOPPED):
            end = "\n".join((self.folder / _LOG).read_text().splitlines()[-20:])
            raise TrainingError(f"{' '.join(command)}\nended with exit code {process.returncode}:\n{end}")


def _is_due(steps: list[dict[str, Any]], resumed_from: int, seconds: float) -> bool:
    """Whether the last finished step is the one that ends nearest to `seconds`."""
    own = [record for record in steps if record["step"] > resumed_from]
    spent = sum(record["time/step_s"] for record in steps)
    return bool(own) and spent + own[-1]["time/step_s"] / 2 >= seconds


def _forget_after(folder: Path, step: int) -> None:
    """Drop what was logged after a step that is done again, as the run itself does a little later."""
    if lines := [json.dumps(record) + "\n" for record in _steps_of(folder) if record["step"] <= step]:
        replace_file(folder / METRICS, "".join(lines))
    else:
        (folder / METRICS).unlink(missing_ok=True)


def _steps_of(folder: Path) -> list[dict[str, Any]]:
    """The metrics of the finished steps; a line that is being written is left for the next time."""
    file = folder / METRICS
    if not file.is_file():
        return []
    whole = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
    # A save writes a line of its own.
    return [record for record in map(json.loads, whole) if "time/step_s" in record]
