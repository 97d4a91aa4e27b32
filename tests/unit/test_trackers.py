"""The trackers with their real packages, offline: figures, tables and alerts arrive, and runs go on by their ids."""

import json
import sqlite3
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from verl.errors import UserError
from verl.trainer import trackers
from verl.trainer.tracking import Tracking

pytestmark = pytest.mark.usefixtures("nobody")

COLLAPSED = [{"diag/effective_rank": 8.0}, {"diag/effective_rank": 3.0}]
TEXT = {"text": "a | text", "id": 0, "rationale": "its <b>rationale</b>", "log_likelihood": -1.5}
SAMPLE = {
    "uid": 7, "role": "positive", "text": "t", "rationale": "r", "tokens": 3, "finish_reason": "stop", "reward": 0.5,
    "reward_parts": {"clustering": 0.1}, "advantage": 0.2,
}  # fmt: skip


def part_of_run(
    run_dir: Path, backend: str, first: int, figures: list[dict], ids: dict[str, str] | None = None
) -> tuple[Tracking, list[str]]:
    """Some steps with a diagnosis each, as the trainer logs them, after step `first`."""
    said: list[str] = []
    tracking = Tracking(run_dir, [backend], "project", "name", {"trainer": {"total_epochs": 2}}, said.append)
    tracking.begin(first, ids or {})
    for step, found in enumerate(figures, start=first + 1):
        tracking.log_samples([SAMPLE, {**SAMPLE, "role": "query"} | {"uid": 9}], step)
        tracking.log(found, step)
        tracking.log_diagnosis([TEXT] * 6, step)
        tracking.log_new_alerts(step)
    return tracking, said


def test_tensorboard_gets_texts_and_alerts(tmp_path):
    part_of_run(tmp_path, "tensorboard", 0, COLLAPSED)[0].finish()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("diag/effective_rank")] == [(1, 8.0), (2, 3.0)]
    tags = events.Tags()["tensors"]
    assert {"samples/probe/text_summary", "samples/groups/text_summary", "alerts/collapse/text_summary"} <= set(tags)
    (alert,) = events.Tensors("alerts/collapse/text_summary")
    assert alert.step == 2 and b"is 3.0, and was 8.0" in alert.tensor_proto.string_val[0]
    shown = events.Tensors("samples/probe/text_summary")[0].tensor_proto.string_val[0].decode()
    assert shown.count("rationale: its <b>rationale</b>") == 4


def test_wandb_gets_tables_that_grow(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracking, _ = part_of_run(tmp_path, "wandb", 0, COLLAPSED)
    assert "wandb" in tracking.trackers, "it failed"
    tables = tracking.trackers["wandb"]._tables
    assert {name: len(table.data) for name, table in tables.items()} == {"samples/probe": 8, "samples/groups": 4}
    assert tables["samples/probe"].log_mode == "INCREMENTAL"
    assert [row[0] for row in tables["samples/groups"].data] == [1, 1, 2, 2]
    tracking.finish()
    written = sorted((tmp_path / "wandb").rglob("*.table.json"))
    # Each file has what is new since the one before.
    assert sorted(len(json.loads(file.read_text())["data"]) for file in written) == [2, 2, 4, 4]


def test_mlflow_goes_on_with_its_run_in_the_run_folder(tmp_path):
    pytest.importorskip("mlflow", reason="the optional tracker mlflow is not installed")
    pytest.importorskip("sqlalchemy", reason="without a server mlflow needs sqlalchemy")
    from mlflow.tracking import MlflowClient

    first, _ = part_of_run(tmp_path, "mlflow", 0, COLLAPSED)
    first.finish()
    ids = first.run_ids
    second, _ = part_of_run(tmp_path, "mlflow", 2, [{"diag/effective_rank": 2.0}], ids)
    assert second.run_ids == ids and set(ids) == {"mlflow"}
    second.finish()
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    run = client.get_run(ids["mlflow"])
    history = client.get_metric_history(ids["mlflow"], "diag/effective_rank")
    assert sorted((m.step, m.value) for m in history) == [(1, 8.0), (2, 3.0), (3, 2.0)]
    assert run.data.params["trainer.total_epochs"] == "2" and run.info.status == "FINISHED"
    assert run.data.tags["alert.collapse"].startswith("step 2: embeddings collapse")
    table = json.loads(Path(client.download_artifacts(ids["mlflow"], "samples/probe.json")).read_text())
    assert [row[table["columns"].index("step")] for row in table["data"]] == [1] * 4 + [2] * 4 + [3] * 4
    # A run that forgets steps is a new one, and one whose store is gone too; both get the whole record.
    for run_ids in (ids, {"mlflow": "0" * 32}):
        third, _ = part_of_run(tmp_path, "mlflow", 1, [{"diag/effective_rank": 4.0}], run_ids)
        assert third.run_ids["mlflow"] not in (ids["mlflow"], "0" * 32)
        history = client.get_metric_history(third.run_ids["mlflow"], "diag/effective_rank")
        assert sorted((m.step, m.value) for m in history) == [(1, 8.0), (2, 4.0)]
        third.finish()


def test_an_mlflow_that_does_not_answer_ends_no_run(tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="the optional tracker mlflow is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracking, said = part_of_run(tmp_path, "mlflow", 0, COLLAPSED)
    (line,) = said
    assert line.startswith("mlflow failed and gets no more of this run") and tracking.trackers == {}
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_trackio_goes_on_with_its_run(tmp_path, monkeypatch):
    trackio = pytest.importorskip("trackio", reason="the optional tracker trackio is not installed")
    folder = tmp_path / "trackio"
    for module in [m for name, m in sys.modules.items() if name.startswith("trackio")]:
        if hasattr(module, "TRACKIO_DIR"):
            monkeypatch.setattr(module, "TRACKIO_DIR", folder)
    first, _ = part_of_run(tmp_path, "trackio", 0, COLLAPSED)
    first.finish()
    second, _ = part_of_run(tmp_path, "trackio", 2, [{"diag/effective_rank": 2.0}], first.run_ids)
    assert second.run_ids == first.run_ids and first.run_ids["trackio"].startswith("name-")
    second.finish()
    (run,) = trackio.Api().runs("project")
    assert run.name == first.run_ids["trackio"]
    with sqlite3.connect(folder / "project.db") as database:
        logged = [
            json.loads(row[0]) | {"step": row[1]} for row in database.execute("select metrics, step from metrics")
        ]
        titles = [row[0] for row in database.execute("select title from alerts")]
    ranks = sorted((m["step"], m["diag/effective_rank"]) for m in logged if "diag/effective_rank" in m)
    assert ranks == [(1, 8.0), (2, 3.0), (3, 2.0)]
    assert titles == ["collapse at step 2"]


def test_swanlab_without_a_key_writes_for_a_later_sync(tmp_path):
    pytest.importorskip("swanlab", reason="the optional tracker swanlab is not installed")
    tracking, said = part_of_run(tmp_path, "swanlab", 0, COLLAPSED)
    tracking.finish()
    (line,) = said
    assert line.startswith("swanlab: offline (no API key)") and tracking.run_ids == {}
    (folder,) = Path(line.split("swanlab sync ")[1]).parent.glob(Path(line.split("swanlab sync ")[1]).name)
    written = b"".join(file.read_bytes() for file in folder.rglob("*") if file.is_file())
    for part in (b"diag/effective_rank", b"samples/probe", b"samples/groups", b"alerts/collapse"):
        assert part in written, part


@pytest.mark.parametrize("name", ["wandb", "mlflow", "swanlab", "trackio"])
def test_a_missing_package_is_named_with_the_way_to_install_it(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    trackers.check_packages(["console", "tensorboard"])
    with pytest.raises(UserError, match=f"trainer.logger={name} needs a package.*pip install {name}"):
        trackers.check_packages(["console", name])
