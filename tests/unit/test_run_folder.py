"""The bookkeeping of a run folder: what is latest, what is kept, what a killed run leaves, what is damaged."""

import errno
import json
import os
import random
import subprocess
import sys

import pytest

from verl.checkpoint.model_card import FILE_NAME
from verl.checkpoint.run_folder import BEST, LATEST, STATE, Best, CheckpointError, RunFolder, find_fault, read_state
from verl.errors import UserError
from verl.utils.files import new_folder


def write_step(run: RunFolder, step: int, best_value: float | None = None):
    folder = run.begin(step)
    (folder / "actor").mkdir()
    (folder / "actor" / "weights").write_text(f"weights {step}")
    return run.publish(step, {"step": step}, best_value)


def test_a_published_step_is_whole_and_the_newest(tmp_path):
    run = RunFolder(tmp_path)
    assert run.newest_whole() == (None, [])
    write_step(run, 5)
    folder = write_step(run, 10)
    assert run.newest_whole() == (folder, [])
    assert read_state(folder) == {"step": 10, "best_value": None, "files": {"actor/weights": 10}}
    assert (tmp_path / LATEST).read_text() == "10\n"
    assert not list(tmp_path.glob(".*"))


def test_only_the_newest_are_kept_and_the_best(tmp_path):
    run = RunFolder(tmp_path)
    for step in (5, 10, 15, 100):
        write_step(run, step, 0.75 if step == 5 else None)
        run.keep_newest(2)
    assert run.steps() == [5, 15, 100]
    assert run.best() == Best(5, 0.75)


def test_a_best_step_that_a_run_was_killed_over_is_marked_when_it_goes_on(tmp_path):
    run = RunFolder(tmp_path)
    write_step(run, 5, 0.5)
    write_step(run, 10, 0.75)
    (tmp_path / BEST).write_text('{"step": 5, "value": 0.5}\n')
    run.mark_best(10)
    assert run.best() == Best(10, 0.75)
    write_step(run, 15)
    run.mark_best(15)
    assert run.best() == Best(10, 0.75)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "actor/weights").unlink(), "actor/weights is missing"),
        (lambda folder: os.truncate(folder / "actor/weights", 3), "actor/weights has 3 bytes instead of 10"),
        (lambda folder: (folder / STATE).write_text('{"step": 1'), f"{STATE} is damaged"),
        (lambda folder: (folder / STATE).write_text('{"step": 10}'), f"{STATE} is damaged"),
        (lambda folder: (folder / STATE).unlink(), f"{STATE} is missing"),
    ],
)
def test_a_damaged_step_is_passed_over_and_named(tmp_path, damage, said):
    run = RunFolder(tmp_path)
    older = write_step(run, 5)
    damage(write_step(run, 10))
    folder, skipped = run.newest_whole()
    assert folder == older
    assert len(skipped) == 1 and said in skipped[0]
    assert find_fault(older) is None


def test_a_step_whose_model_card_was_written_in_is_whole(tmp_path):
    run = RunFolder(tmp_path)
    folder = run.begin(5)
    (folder / FILE_NAME).write_text("a model")
    run.publish(5, {"step": 5})
    with (tmp_path / "global_step_5" / FILE_NAME).open("a") as card:
        card.write(", and its scores")
    assert run.newest_whole() == (run.step(5), [])


def test_when_no_step_is_whole_it_is_said_rather_than_started_over(tmp_path):
    run = RunFolder(tmp_path)
    for step in (5, 10):
        (write_step(run, step) / "actor/weights").unlink()
    said = r"no checkpoint of this run is complete(.|\n)*global_step_10(.|\n)*step_5"
    with pytest.raises(CheckpointError, match=said):
        run.newest_whole()


def test_a_newest_step_that_is_gone_is_named(tmp_path):
    run = RunFolder(tmp_path)
    (tmp_path / LATEST).write_text("10\n")
    with pytest.raises(CheckpointError, match=f"global_step_10 is missing, but {LATEST} names it"):
        run.newest_whole()
    older = write_step(run, 5)
    (tmp_path / LATEST).write_text("10\n")
    folder, skipped = run.newest_whole()
    assert folder == older and len(skipped) == 1 and "global_step_10 is missing" in skipped[0]


def test_a_tracker_that_names_no_step_is_refused(tmp_path):
    (tmp_path / LATEST).write_text("ten")
    with pytest.raises(CheckpointError, match=f"{LATEST} says 'ten'"):
        RunFolder(tmp_path).newest_whole()


def test_steps_after_the_one_gone_on_from_are_set_aside_once_each(tmp_path):
    run = RunFolder(tmp_path)
    for step in (5, 10, 15):
        write_step(run, step, step / 15)
    aside = run.set_aside_after(5)
    assert aside == tmp_path / "set_aside_1"
    assert sorted(path.name for path in aside.iterdir()) == ["global_step_10", "global_step_15"]
    assert run.steps() == [5] and run.best() is None and run.newest_whole()[0] == run.step(5)
    write_step(run, 10)
    assert run.set_aside_after(5) == tmp_path / "set_aside_2"
    assert run.set_aside_after(5) is None
    run.set_aside_after(0)
    assert run.newest_whole() == (None, [])


def test_a_step_whose_setting_aside_was_cut_short_is_not_gone_on_from(tmp_path):
    run = RunFolder(tmp_path)
    for step in (5, 10):
        write_step(run, step)
    (tmp_path / LATEST).write_text("5\n")
    assert run.newest_whole()[0] == run.step(5)


def test_what_a_killed_run_left_is_removed(tmp_path):
    run = RunFolder(tmp_path)
    write_step(run, 5)
    (run.begin(10) / "half").write_text("x")
    run.step(5).rename(tmp_path / ".global_step_5.removing")
    assert run.remove_leftovers() == [
        f"removed .global_step_{name}, which a killed run left unfinished" for name in ("10.writing", "5.removing")
    ]
    assert not list(tmp_path.glob(".global*"))


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"trainer\.default_local_dir=.*file/run cannot be written to"):
        RunFolder(tmp_path / "file" / "run")


# Publishes steps 1, 2, ... and keeps two; in every step all files say the step.
_WRITER = """
import sys
from pathlib import Path
from verl.checkpoint.run_folder import RunFolder
run = RunFolder(Path(sys.argv[1]))
run.remove_leftovers()
folder, skipped = run.newest_whole()
assert not skipped, skipped
step = int((folder / "part0").read_text().split()[0]) if folder else 0
run.set_aside_after(step)
print("ready", flush=True)
while True:
    step += 1
    folder = run.begin(step)
    for part in range(4):
        (folder / f"part{part}").write_text(f"{step} " * 2000)
    run.publish(step, {"step": step})
    print(step, flush=True)
    run.keep_newest(2)
"""


def test_killed_at_any_moment_the_newest_step_is_whole(tmp_path):
    """Thirty kills at random moments of writing, naming and removing."""
    draw = random.Random(0)
    reached = seen = 0
    for _ in range(30):
        writer = subprocess.Popen([sys.executable, "-c", _WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout.readline() == "ready\n"
        # So that the steps reached do not depend on the disk.
        for _ in range(draw.randint(0, 3)):
            seen = int(writer.stdout.readline())
        try:
            writer.wait(timeout=draw.uniform(0, 0.05))
        except subprocess.TimeoutExpired:
            writer.kill()
        assert writer.wait() == -9
        run = RunFolder(tmp_path)
        folder, skipped = run.newest_whole()
        assert not skipped
        if folder:
            step = read_state(folder)["step"]
            assert step >= max(reached, seen) and folder == run.step(step)
            reached = step
            for part in range(4):
                assert (folder / f"part{part}").read_text() == f"{step} " * 2000
    assert reached > 10
    assert json.loads((tmp_path / LATEST).read_text()) >= reached - 1


@pytest.fixture
def immovable(monkeypatch):
    """Files with this name cannot be deleted: as one that a reader has open on NFS. (root may delete any other.)"""
    unlink = os.unlink

    def refuse(path, *args, **kwargs):
        if os.fspath(path).endswith("held"):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), path)
        unlink(path, *args, **kwargs)

    monkeypatch.setattr(os, "unlink", refuse)
    return monkeypatch


def test_an_old_step_that_cannot_be_removed_is_told_and_tried_again(tmp_path, immovable):
    run = RunFolder(tmp_path)
    (write_step(run, 5) / "held").touch()
    write_step(run, 10)
    (complaint,) = run.keep_newest(1)
    assert "global_step_5.removing could not be removed (Device or resource busy" in complaint
    assert run.steps() == [10] and run.newest_whole()[1] == []
    # Also when a run starts, and when a step of that number has to go once more.
    assert len(run.remove_leftovers()) == 1
    (write_step(run, 5) / "held").touch()
    assert len(run.keep_newest(1)) == 2
    immovable.undo()
    assert run.keep_newest(1) == []
    assert not list(tmp_path.glob(".global*"))


def test_a_half_written_step_that_cannot_be_removed_does_not_stop_the_next_save(tmp_path, immovable):
    run = RunFolder(tmp_path)
    (run.begin(5) / "held").touch()
    assert "could not be removed" in run.remove_leftovers()[0]
    assert find_fault(write_step(run, 5)) is None


def test_a_step_that_may_not_be_renamed_stays_whole(tmp_path, monkeypatch):
    run = RunFolder(tmp_path)
    write_step(run, 5)
    write_step(run, 10)

    def refuse(self, target):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(self))

    monkeypatch.setattr("pathlib.Path.rename", refuse)
    (complaint,) = run.keep_newest(1)
    assert "global_step_5 could not be removed (Permission denied" in complaint
    assert run.steps() == [5, 10] and find_fault(run.step(5)) is None


def test_a_run_folder_has_one_owner(tmp_path):
    run = RunFolder(tmp_path)
    with run.owned() as warning:
        assert warning is None
        with pytest.raises(UserError, match=rf"in use by another run \(pid {os.getpid()} on .*experiment_name"):
            with RunFolder(tmp_path).owned():
                pass
    with run.owned():
        pass


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    with RunFolder(tmp_path).owned() as warning:
        assert "No locks available): make sure that no other run uses it" in warning


def test_a_new_folder_takes_the_place_of_nothing_that_it_was_not_told_to(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(OSError, match="not empty"), new_folder(target) as making:
        (making / "new").touch()
        target.mkdir()
        (target / "mine").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]
    with new_folder(target, replace=True) as making:
        (making / "new").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "new"]
    with pytest.raises(ValueError, match="broken"), new_folder(target, replace=True):
        raise ValueError("broken")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "new"]
