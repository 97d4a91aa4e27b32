"""Saving a step: room for it at the start, and what a save that fails says, leaves and removes."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from verl.checkpoint.run_folder import CheckpointError, RunFolder
from verl.checkpoint.saver import CheckpointSaver
from verl.config import RunConfig
from verl.errors import WorkerError
from verl.trainer.ppo.ray_trainer import RayPPOTrainer

GIB = 2**30
AUTO = "the same command with trainer.resume_mode=auto"
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def whole(step: int, text: str = "weights") -> Callable[[Path], dict[str, Any]]:
    def write(folder: Path) -> dict[str, Any]:
        (folder / "weights").write_text(f"{text} {step}")
        return {"step": step}

    return write


def half(error: Exception) -> Callable[[Path], dict[str, Any]]:
    def write(folder: Path) -> dict[str, Any]:
        (folder / "actor").mkdir()
        (folder / "actor" / "weights").write_text("half of th")
        raise error

    return write


@pytest.fixture(autouse=True)
def disk(monkeypatch) -> SimpleNamespace:
    """What is free of it."""
    disk = SimpleNamespace(free=3 * GIB // 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk)
    return disk


def test_a_disk_without_room_for_one_checkpoint_is_told_at_the_start(tmp_path, disk):
    saver = CheckpointSaver(RunFolder(tmp_path), 0, None)
    saver.check_room(disk.free)
    said = rf"takes about 2\.5 GiB and {tmp_path} has 1\.5 GiB free; .* trainer\.default_local_dir to a larger disk"
    with pytest.raises(CheckpointError, match=said):
        saver.check_room(5 * GIB // 2)
    with pytest.raises(CheckpointError):
        saver.check_room(disk.free + 1)


@pytest.mark.parametrize("error", [FULL, WorkerError("rank 1 failed in phase save.\nNo space left on device")])
def test_a_save_that_fails_leaves_the_earlier_steps_and_nothing_half_written(tmp_path, error):
    run = RunFolder(tmp_path)
    saver = CheckpointSaver(run, 0, 2)
    for step in (5, 10):
        assert saver.save(step, whole(step)) == (run.step(step), [])
    with pytest.raises(CheckpointError) as failed:
        saver.save(15, half(error))
    said = str(failed.value)
    assert said.startswith(f"{error}\nstep 15 could not be saved in {tmp_path} (1.50 GiB free). Free some space")
    assert said.endswith("without trainer.resume_from_path, it resumes from step 10.")
    assert saver.saved_step == 10 and run.steps() == [5, 10] and run.newest_whole() == (run.step(10), [])
    assert not list(tmp_path.glob(".global*"))
    # The run may save again, and old steps go only then.
    assert saver.save(20, whole(20)) == (run.step(20), [])
    assert saver.saved_step == 20 and run.steps() == [10, 20]


def test_a_first_save_that_fails_says_that_there_is_no_checkpoint(tmp_path):
    saver = CheckpointSaver(RunFolder(tmp_path), 0, None)
    with pytest.raises(CheckpointError, match="resumes from the beginning, as there is no checkpoint yet"):
        saver.save(5, half(FULL))
    assert saver.saved_step == 0 and list(tmp_path.iterdir()) == []


def test_a_step_that_cannot_be_saved_once_more_stays_as_it_was(tmp_path):
    run = RunFolder(tmp_path)
    saver = CheckpointSaver(run, 0, None)
    saver.save(5, whole(5, "first"))
    with pytest.raises(CheckpointError, match=r"it resumes from step 5\."):
        saver.save(5, half(FULL), best_value=0.5)
    assert (run.step(5) / "weights").read_text() == "first 5"
    assert run.newest_whole() == (run.step(5), []) and run.best() is None


def test_a_fault_of_the_program_is_no_matter_of_the_disk(tmp_path):
    with pytest.raises(ZeroDivisionError):
        CheckpointSaver(RunFolder(tmp_path), 0, None).save(5, half(ZeroDivisionError()))


def test_a_run_folder_that_is_gone_is_told_too(tmp_path, monkeypatch):
    monkeypatch.undo()
    saver = CheckpointSaver(RunFolder(tmp_path / "run"), 0, None)

    def write(folder: Path) -> dict[str, Any]:
        shutil.rmtree(tmp_path / "run")
        return {}

    with pytest.raises(CheckpointError, match=r"(?s)step 5 could not be saved in .*No such file .* the beginning"):
        saver.save(5, write)


@pytest.mark.parametrize(
    ("mode", "first", "saved", "continues", "told"),
    [
        ("auto", 0, 3, False, "the same command resumes from step 3"),
        ("disable", 0, 3, False, "the same command with trainer.resume_mode=auto resumes from step 3"),
        # From another run's step 4, with and without a step of its own.
        ("resume_path", 4, 4, False, "the same command resumes from step 4"),
        ("resume_path", 4, 6, False, f"{AUTO} and without trainer.resume_from_path resumes from step 6"),
        ("resume_path", 4, 4, True, f"{AUTO} and without trainer.resume_from_path resumes from step 4"),
    ],
)
def test_a_stopped_run_names_a_command_that_goes_on(mode, first, saved, continues, told):
    run = SimpleNamespace(
        config=RunConfig.model_validate({"trainer": {"resume_mode": mode}}), first_step=first,
        saver=SimpleNamespace(saved_step=saved), continues_own_folder=continues,
        run=SimpleNamespace(resume=first > 0),
    )  # fmt: skip
    assert RayPPOTrainer.how_to_go_on(run) == told
