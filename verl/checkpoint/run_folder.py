"""The step folders of a run: written under a temporary name, made durable, renamed, checked, removed.

    <run>/latest_checkpointed_iteration.txt      the newest step
    <run>/best_checkpointed_iteration.txt        the best step and its value, with trainer.save_best
    <run>/global_step_N/                         a complete step; trainer_state.json lists its files
    <run>/.global_step_N.writing                 a step that is being written
    <run>/.global_step_N.removing                one that is being removed
    <run>/.lock                                  held by the run, and gone with it; names its process
    <run>/set_aside_K/                           steps after the one that a run resumed from; where a run started
                                                 over, all steps and logs of the run before it

A process may be killed, or a machine lose power, between any two lines here: a folder that has a step's name is
complete, and on the disk.
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl.checkpoint import model_card
from verl.embedding import settings
from verl.errors import UserError
from verl.utils.files import flush_to_disk, replace_file
from verl.utils.locks import HeldError, NoLocksError, hold

LOCK = ".lock"
LATEST = "latest_checkpointed_iteration.txt"
BEST = "best_checkpointed_iteration.txt"
STATE = "trainer_state.json"
STEP_PREFIX = "global_step_"
MODEL, SHARDS = "huggingface", "actor"
"""In a step: the folder that transformers loads, and the training state."""
# People edit these, and evaluations and `verl.centre` do; a run resumes without them.
_EDITED = (model_card.FILE_NAME, settings.FILE_NAME)


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message names the file and a way out."""


@dataclass(frozen=True)
class Best:
    step: int
    value: float


class RunFolder:
    """The checkpoints in a run's folder.

    Args:
        path: made when it is not there.

    Raises:
        CheckpointError: it cannot be written to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        probe = path / ".write_test"
        try:
            path.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"x")
            probe.unlink()
        except OSError as error:
            raise CheckpointError(
                f"trainer.default_local_dir={path} cannot be written to: {error.strerror}. Make it writable, free some "
                "space, or give another folder."
            ) from error

    def step(self, step: int) -> Path:
        return step_folder(self.path, step)

    def steps(self) -> list[int]:
        return saved_steps(self.path)

    @contextmanager
    def owned(self) -> Iterator[str | None]:
        """Own the folder: two runs in it would move each other's steps aside. Yields a warning, or None.

        Raises:
            UserError: another run owns it.
        """
        with ExitStack() as stack:
            warning = None
            try:
                stack.enter_context(hold(self.path / LOCK))
            except HeldError as error:
                raise UserError(
                    f"{self.path} is in use by another run ({error}). Wait until it has ended, or give this one "
                    "another trainer.experiment_name or trainer.default_local_dir."
                ) from None
            except NoLocksError as error:
                warning = f"cannot be locked ({error}): make sure that no other run uses it"
            yield warning

    def remove_leftovers(self) -> list[str]:
        """Remove what a killed run left half written or half removed; return a line for each, for the log."""
        found = sorted((*unfinished_steps(self.path), *self._half_removed()))
        return [_delete(folder) or f"removed {folder.name}, which a killed run left unfinished" for folder in found]

    def begin(self, step: int) -> Path:
        """An empty folder to write a step in, under a temporary name."""
        folder = self._writing(step)
        if folder.exists():
            self._retire(folder, step)
        folder.mkdir(parents=True)
        return folder

    def abandon(self, step: int) -> None:
        """Delete the partial files of a failed save."""
        shutil.rmtree(self._writing(step), ignore_errors=True)

    def publish(self, step: int, state: dict[str, Any], best_value: float | None = None) -> Path:
        """Rename a written step to its final name and make it the latest, once it is on the disk.

        Args:
            state: of the trainer; `files` and `best_value` are added to it.
            best_value: its figure by trainer.save_best, if that is the best so far.
        """
        written, final = self._writing(step), self.step(step)
        files = {str(file.relative_to(written)): file.stat().st_size for file in _files(written)}
        (written / STATE).write_text(json.dumps({**state, "best_value": best_value, "files": files}, indent=1) + "\n")
        for path in (*_files(written), *_folders(written)):
            flush_to_disk(path)
        if final.exists():
            self._retire(final, step)
        written.rename(final)
        flush_to_disk(self.path)
        replace_file(self.path / LATEST, f"{step}\n", durable=True)
        self.mark_best(step)
        return final

    def mark_best(self, step: int) -> None:
        """Mark a published step as the best if its state says so: after a save, and when a run resumes from it."""
        value = read_state(self.step(step)).get("best_value")
        if value is not None:
            replace_file(self.path / BEST, json.dumps({"step": step, "value": value}) + "\n", durable=True)

    def best(self) -> Best | None:
        file = self.path / BEST
        return Best(**json.loads(file.read_text())) if file.is_file() else None

    def keep_newest(self, count: int) -> list[str]:
        """Remove steps, the oldest first, until `count` are left; never the best one.

        Returns:
            A line for each that could not be removed, because of a permission or a file that NFS holds open; the next
            call tries again.
        """
        best = self.best()
        kept = [step for step in self.steps() if best is None or step != best.step]
        complaints = [_delete(folder) for folder in self._half_removed()]
        for step in kept[:-count]:
            try:
                complaints.append(self._retire(self.step(step), step))
            except OSError as error:
                complaints.append(_not_removed(self.step(step), error))
        return [complaint for complaint in complaints if complaint]

    def set_aside_after(self, step: int, also: Iterable[str] = ()) -> Path | None:
        """Move the steps after the one that the run goes on from to another folder; return it, if there is anything.

        Args:
            also: names in the run's folder that are moved with them, where they exist.
        """
        if (best := self.best()) and best.step > step:
            (self.path / BEST).unlink()
        later = [self.step(found) for found in self.steps() if found > step]
        moved = later + [self.path / name for name in also if (self.path / name).exists()]
        if not moved:
            return None
        if later:
            # First: a run that is killed now resumes from the same step again.
            replace_file(self.path / LATEST, f"{step}\n", durable=True)
        number = 1 + max((int(p.name.rsplit("_", 1)[1]) for p in self.path.glob("set_aside_*")), default=0)
        aside = self.path / f"set_aside_{number}"
        aside.mkdir()
        for path in moved:
            path.rename(aside / path.name)
        return aside

    def newest_whole(self) -> tuple[Path | None, list[str]]:
        """The newest step that can be resumed from, and for each newer one why it cannot.

        Raises:
            CheckpointError: there are steps, or there were, and none is complete.
        """
        steps, latest, skipped = self.steps(), self._latest(), list[str]()
        if latest is not None:
            # A later step was about to be set aside, or the run was killed before the tracker was written.
            steps = [step for step in steps if step <= latest]
            if latest > 0 and latest not in steps:
                skipped.append(f"{self.step(latest)} is missing, but {LATEST} names it")
        for step in reversed(steps):
            if (reason := find_fault(self.step(step))) is None:
                return self.step(step), skipped
            skipped.append(reason)
        if skipped:
            raise CheckpointError(
                "no checkpoint of this run is complete:\n  "
                + "\n  ".join(skipped)
                + "\nSet trainer.resume_mode=disable to start over, or put the files back."
            )
        return None, []

    def _latest(self) -> int | None:
        """The step that the tracker names; 0 where all were set aside."""
        tracker = self.path / LATEST
        if not tracker.is_file():
            return None
        text = tracker.read_text().strip()
        if not text.isdecimal():
            raise CheckpointError(f"{tracker} says {text!r}, which is no step; write the newest step's number into it.")
        return int(text)

    def _writing(self, step: int) -> Path:
        return self.path / f".{STEP_PREFIX}{step}.writing"

    def _half_removed(self) -> list[Path]:
        return sorted(self.path.glob(f".{STEP_PREFIX}*.removing*"))

    def _retire(self, folder: Path, step: int) -> str | None:
        """Remove a step's folder; return why some of its files are still there, under a name that is no step's.

        It is renamed first: half a step must not have the name of a complete one.

        Raises:
            OSError: it could not be renamed.
        """
        names = (f".{STEP_PREFIX}{step}.removing{number}" for number in ("", *range(2, 1000)))
        doomed = next(self.path / name for name in names if not (self.path / name).exists())
        folder.rename(doomed)
        return _delete(doomed)


def step_folder(run_dir: Path, step: int) -> Path:
    return run_dir / f"{STEP_PREFIX}{step}"


def unfinished_steps(run_dir: Path) -> list[Path]:
    """Folders of steps that are being written, or that a killed run left so."""
    return sorted(run_dir.glob(f".{STEP_PREFIX}*.writing"))


def saved_steps(run_dir: Path) -> list[int]:
    """Steps of a run that have a folder, oldest first."""
    names = (path.name.removeprefix(STEP_PREFIX) for path in run_dir.glob(f"{STEP_PREFIX}*"))
    return sorted(int(name) for name in names if name.isdigit())


def read_state(folder: Path) -> dict[str, Any]:
    """What `RunFolder.publish` was given, with `best_value` and `files`."""
    return json.loads((folder / STATE).read_text())


def find_fault(folder: Path) -> str | None:
    """Why a step's folder cannot be resumed from, or None."""
    if not folder.is_dir():
        return f"{folder} is not a folder"
    try:
        files = read_state(folder)["files"]
    except FileNotFoundError:
        return f"{folder / STATE} is missing"
    except (ValueError, KeyError) as error:
        return f"{folder / STATE} is damaged ({error!r})"
    for name, size in files.items():
        file = folder / name
        if file.name in _EDITED:
            continue
        if not file.is_file():
            return f"{file} is missing"
        if (found := file.stat().st_size) != size:
            return f"{file} has {found} bytes instead of {size}"
    return None


def _delete(folder: Path) -> str | None:
    """Delete a folder; return a line that says why it could not be."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        return _not_removed(folder, error)
    return None


def _not_removed(folder: Path, error: OSError) -> str:
    return f"{folder} could not be removed ({error.strerror}: {error.filename}); the next save tries again"


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _folders(folder: Path) -> Iterable[Path]:
    """Subfolders before the folders they are in."""
    return (*sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True), folder)
