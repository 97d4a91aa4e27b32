"""The metrics of a run: what is forgotten when it goes on, and what stays readable."""

import json

from verl.trainer.tracking import Tracking


def test_metrics_after_the_checkpoint_are_forgotten_and_a_new_run_sets_the_old_aside(tmp_path):
    tracking = Tracking(tmp_path, [], "project", "name", {}, {})
    for step in (1, 2, 3, 4):
        tracking.log({"value": step / 2}, step)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step":5,"val')
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
