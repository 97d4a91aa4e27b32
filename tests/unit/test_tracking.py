"""The record of a run and its trackers: what is forgotten when it goes on, and what a failing tracker costs."""

import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from verl.checkpoint.run_folder import RunFolder
from verl.trainer import trackers
from verl.trainer.tracking import LOGGED, METRICS, Tracking
from verl.utils.run_files import files_of_steps

pytestmark = pytest.mark.usefixtures("nobody")


def part_of_run(
    run_dir: Path, after: int, steps: int, *backends: str, run_ids: dict[str, str] | None = None
) -> tuple[Tracking, list[str]]:
    """Log some steps after one that is saved, as a run that starts or goes on does; return what it says, too."""
    said: list[str] = []
    tracking = Tracking(run_dir, backends, "project", "name", {}, said.append)
    tracking.begin(after, run_ids or {})
    for step in range(after + 1, after + steps + 1):
        tracking.log({"value": 100 * after + step}, step)
        tracking.log({"val/value": step / 2}, step)
        tracking.log_samples([{"step": step, "after": after}], step)
    return tracking, said


def record(run_dir: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run_dir / METRICS).read_text().splitlines()]
    return [(line["step"], line["value"]) for line in lines if "value" in line]


def tensorboard_curve(run_dir: Path) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run_dir / "tensorboard"), purge_orphaned_data=False)
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("value")]


def wandb_records(file: Path) -> Iterator[Record]:
    """The file is in LevelDB's log format, after 7 bytes: parts in blocks, each with checksum, length and type."""
    data, place, parts = file.read_bytes(), 7, b""
    while place < len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<xxxxHB", data, place)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(parts)
            parts = b""


def wandb_curve(folder: Path) -> list[tuple[int, float]]:
    """What `wandb sync` would send of one offline run."""
    wandb.teardown()  # returns when its service has written everything
    (file,) = folder.glob("*.wandb")
    curve = []
    for entry in wandb_records(file):
        values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in entry.history.item}
        if "value" in values:
            curve.append((entry.history.step.num, values["value"]))
    return curve


def test_the_record_and_every_tracker_forget_what_the_run_forgets(tmp_path):
    first, _ = part_of_run(tmp_path, 0, 4, "tensorboard", "wandb")
    first.finish()
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step":5,"val')
    second, _ = part_of_run(tmp_path, 2, 1, "tensorboard", "wandb")
    second.finish()
    expected = [(1, 1.0), (2, 2.0), (3, 203.0)]
    assert record(tmp_path) == expected
    assert tensorboard_curve(tmp_path) == expected
    newest = max(
        (folder for folder in (tmp_path / "wandb").glob("offline-run-*")), key=lambda path: path.stat().st_mtime
    )
    assert wandb_curve(newest) == expected
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [f"step_{i}.jsonl" for i in (1, 2, 3)]
    assert json.loads((tmp_path / "samples/step_3.jsonl").read_text()) == {"step": 3, "after": 2}


def test_a_new_run_in_a_folder_joins_no_curve_of_the_old_one(tmp_path):
    part_of_run(tmp_path, 0, 3, "tensorboard")[0].finish()
    aside = RunFolder(tmp_path).set_aside_after(0, also=LOGGED)
    part_of_run(tmp_path, 0, 1, "tensorboard")[0].finish()
    assert record(tmp_path) == tensorboard_curve(tmp_path) == [(1, 1.0)]
    assert record(aside) == tensorboard_curve(aside) == [(1, 1.0), (2, 2.0), (3, 3.0)]
    # Once more: nothing is overwritten.
    assert RunFolder(tmp_path).set_aside_after(0, also=LOGGED) == tmp_path / "set_aside_2"


def test_files_of_steps_are_found_in_the_order_of_their_steps(tmp_path):
    others = ["probe.json", "step_x.jsonl", "step_4_old.jsonl", ".step_11.jsonl.writing"]
    for name in ("step_10.jsonl", "step_9.jsonl", "vectors_step_10.npz", *others):
        (tmp_path / name).touch()
    found = [(step, file.name) for step, file in files_of_steps(tmp_path, "*step_*.*")]
    assert found == [(9, "step_9.jsonl"), (10, "step_10.jsonl"), (10, "vectors_step_10.npz")]
    assert files_of_steps(tmp_path / "none", "*step_*.*") == []


@pytest.mark.parametrize(("saved", "goes_on"), [(3, True), (2, False)])
def test_a_wandb_run_goes_on_only_if_nothing_of_it_is_forgotten(tmp_path, monkeypatch, saved, goes_on):
    ids = []

    class Recording:
        def __init__(self, run, run_id):
            self.run_id = run_id or "new"
            self.steps: list[int] = []
            ids.append(self)

        def log(self, metrics, step):
            self.steps.append(step)

        def finish(self):
            pass

    monkeypatch.setitem(trackers.TRACKERS, "wandb", Recording)
    part_of_run(tmp_path, 0, 3)
    part_of_run(tmp_path, saved, 1, "wandb", run_ids={"wandb": "old"})
    (run,) = ids
    assert run.run_id == ("old" if goes_on else "new")
    assert sorted(set(run.steps)) == ([4] if goes_on else [1, 2, 3])


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({}, "no API key"),
        ({"WANDB_API_KEY": "short"}, "API key must have"),
        ({"WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}, "refused"),
        ({"WANDB_MODE": "offline"}, "WANDB_MODE"),
    ],
)
def test_wandb_without_key_or_network_goes_offline_with_one_line(tmp_path, monkeypatch, environment, reason):
    monkeypatch.setattr(trackers, "_WANDB_START_S", 2)
    # A netrc for other machines is no wandb key.
    netrc = tmp_path / "home" / ".netrc"
    netrc.write_text("machine github.com login me password secret\n")
    netrc.chmod(0o600)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    tracking, said = part_of_run(tmp_path, 0, 1, "wandb")
    tracking.finish()
    (line,) = said
    assert reason in line and "offline" in line
    folder = Path(line.split("wandb sync ")[1])
    assert wandb_curve(folder) == [(1, 1.0)]
    assert tracking.run_ids == {}


def test_a_wandb_that_dies_is_said_once_and_the_record_goes_on(tmp_path):
    script = """
import sys, time
from collections.abc import Iterator
from pathlib import Path
import psutil
from verl.trainer.tracking import Tracking
tracking = Tracking(Path(sys.argv[1]), ["wandb"], "project", "name", {}, print)
tracking.begin(0, {})
for process in psutil.Process().children(recursive=True):
    process.kill()
    process.wait(10)
step, end = 0, time.monotonic() + 30
while tracking.trackers and time.monotonic() < end:
    step += 1
    tracking.log({"value": float(step)}, step)
for step in (step + 1, step + 2):
    tracking.log({"value": float(step)}, step)
tracking.finish()
print(step)
"""
    wandb.teardown()  # else its service, which this process has started, is the other one's too
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    *said, last = done.stdout.splitlines()
    assert [line.split(" (")[0] for line in said] == ["wandb: offline", "wandb failed and gets no more of this run"]
    assert record(tmp_path) == [(step, step) for step in range(1, int(last) + 1)]


def test_a_value_that_is_not_finite_leaves_the_file_readable(tmp_path):
    tracking = Tracking(tmp_path, ["tensorboard"], "project", "name", {}, print)
    tracking.begin(0, {})
    tracking.log({"grad_norm": float("inf"), "loss": 1.0}, 1)
    tracking.finish()
    assert json.loads((tmp_path / METRICS).read_text()) == {"step": 1, "grad_norm": None, "loss": 1.0}
