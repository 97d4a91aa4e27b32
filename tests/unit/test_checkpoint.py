"""The bookkeeping of a run folder: what is latest, what is kept, what a killed run leaves."""

import json

from verl.utils.checkpoint import empty_temporary_folder, latest_step, publish, saved_steps, step_folder
from verl.utils.tracking import Tracking


def write_step(run_dir, step, keep=None):
    (empty_temporary_folder(run_dir, step) / "weights").write_text(str(step))
    return publish(run_dir, step, {"step": step}, keep)


def test_a_published_step_is_whole_and_the_latest(tmp_path):
    assert latest_step(tmp_path) is None
    write_step(tmp_path, 5)
    folder = write_step(tmp_path, 10)
    assert latest_step(tmp_path) == folder == step_folder(tmp_path, 10)
    assert json.loads((folder / "trainer_state.json").read_text()) == {"step": 10}
    assert (folder / "weights").read_text() == "10"
    assert not list(tmp_path.glob(".*"))


def test_only_the_newest_are_kept(tmp_path):
    for step in (5, 10, 15, 100):
        write_step(tmp_path, step, keep=2)
    assert sorted(saved_steps(tmp_path)) == [15, 100]
    assert latest_step(tmp_path) == step_folder(tmp_path, 100)


def test_a_step_that_is_not_whole_does_not_count(tmp_path):
    write_step(tmp_path, 5)
    (empty_temporary_folder(tmp_path, 10) / "weights").write_text("half")
    assert saved_steps(tmp_path) == [5]
    assert latest_step(tmp_path) == step_folder(tmp_path, 5)
    assert not list(empty_temporary_folder(tmp_path, 10).iterdir())


def test_metrics_after_the_checkpoint_are_forgotten_and_a_new_run_sets_the_old_aside(tmp_path):
    tracking = Tracking(tmp_path, [], "project", "name", {}, {})
    for step in (1, 2, 3, 4):
        tracking.log({"value": step / 2}, step)
    tracking.forget_after(2)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "value": 0.5}, {"step": 2, "value": 1.0}]
    tracking.start_over()
    assert not (tmp_path / "metrics.jsonl").exists()
    assert len((tmp_path / "metrics.previous.jsonl").read_text().splitlines()) == 2


def test_a_value_that_is_not_finite_leaves_the_file_readable(tmp_path):
    tracking = Tracking(tmp_path, ["tensorboard"], "project", "name", {}, {})
    tracking.log({"grad_norm": float("inf"), "loss": 1.0}, 1)
    tracking.finish()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "grad_norm": None, "loss": 1.0}
