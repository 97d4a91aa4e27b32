"""What the driver is told of workers on Ray that fail: by an error, by a signal, in native code, by hanging."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest


@pytest.fixture(scope="module")
def both(tmp_path_factory, repo) -> list[dict[str, Any]]:
    """Of two groups of two workers each; see failing_workers.py."""
    folder = tmp_path_factory.mktemp("workers")
    command = [sys.executable, str(Path(__file__).with_name("failing_workers.py")), str(folder)]
    here = {**os.environ, "PYTHONPATH": str(repo)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=here, cwd=folder, timeout=400)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "said.json").read_text())


@pytest.fixture
def first(both) -> dict[str, Any]:
    return both[0]


@pytest.fixture
def second(both) -> dict[str, Any]:
    return both[1]


def name(said: dict[str, Any], rank: int) -> str:
    """As a pattern."""
    return rf"rank {rank} \(pid {said['pids'][rank]} on \S+\)"


def test_an_error_is_told_with_rank_phase_and_traceback_and_costs_no_worker(first):
    text = first["fail"]
    assert re.match(rf"WorkerError: {name(first, 1)} failed in phase score\.\n", text), text
    assert re.search(r'failing_workers\.py", line \d+, in fail\n', text), text
    assert text.rstrip().endswith("ZeroDivisionError: on rank 1 alone")
    assert first["well"] == 2


def test_what_the_user_can_put_right_is_told_without_a_traceback(first):
    assert first["refuse"] == "UserError: data.train_files=x is not there; give another file"


def test_an_error_in_the_middle_of_a_stream_is_told_after_its_progress(first):
    assert 5 in first["progress"] and set(first["progress"]) <= {3, 5}
    assert re.match(rf"WorkerError: {name(first, 1)} failed in phase gen\.\n", first["count"]), first["count"]
    assert re.search(r"line \d+, in count\n", first["count"])
    assert first["count"].rstrip().endswith("ZeroDivisionError: in the middle")


def test_a_rank_waits_for_another_one_longer_than_torch_lets_it(first):
    assert first["late"] == "nothing failed"


def test_a_killed_worker_is_told_with_its_memory_and_not_the_one_that_failed_because_of_it(first):
    text = first["killed"]
    found = re.match(
        rf"WorkerError: {name(first, 1)} died in phase update; its memory peaked at (\S+) GiB, "
        r"the machine had (\S+) of (\S+) GiB left at its worst\.\n"
        "It had no time to say why, as with SIGKILL: from the kernel's out-of-memory killer ",
        text,
    )
    assert found, text
    peak, least, total = map(float, found.groups())
    assert found[3] == f"{psutil.virtual_memory().total / 2**30:.1f}"
    # torch alone takes as much.
    assert 0.1 <= peak < total and least < total
    assert "If it was memory: lower actor_rollout_ref.actor.ppo_max_token_len_per_gpu" in text
    assert "rank 0" not in text


def test_a_death_is_told_where_the_file_of_stacks_is_gone(first):
    assert re.match(rf"WorkerError: {name(first, 1)} died in phase gen; its memory peaked at ", first["gone"])
    assert "It had no time to say why, as with SIGKILL" in first["gone"]


def test_a_hanging_worker_is_told_with_its_stacks_and_is_ended_with_the_group(second):
    text = second["hang"]
    found = re.match(
        r"WorkerError: no worker returned or made progress for (\d+) s in phase ref "
        r"\(trainer\.phase_timeout_s=2; raise it if the phase takes so long\)\.\n"
        rf"{name(second, 0)}: finished\n"
        rf"{name(second, 1)}: still running; its stacks:\nTimeout \(0:00:02\)!\n",
        text,
    )
    assert found, text
    assert int(found[1]) >= 2
    assert re.search(r'failing_workers\.py", line \d+ in hang\n', text), text
    assert second["left"] == []


def test_a_crash_in_native_code_is_told_with_the_stack_that_led_there(second):
    text = second["crash"]
    found = re.match(
        rf"WorkerError: {name(second, 0)} died in phase sync; its memory peaked at \S+ GiB, .* left at its worst\.\n"
        r"It crashed in native code \((.*)\):\nFatal Python error: Segmentation fault\n",
        text,
    )
    assert found, text
    file = Path(found[1])
    assert file.name == "rank_0.txt" and file.read_text().startswith("Fatal Python error: Segmentation fault\n")
    assert re.search(r'failing_workers\.py", line \d+ in crash\n', text), text
    assert "Extension modules" not in text
