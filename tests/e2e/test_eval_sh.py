"""eval.sh finds the model of a run, merges shards where a checkpoint has nothing else, and names what is wrong."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from eval_files import write_tasks
from tiny import save_tiny, tiny_model

REPO = Path(__file__).parents[2]


@pytest.fixture
def run_dir(tmp_path, tiny_folder):
    """A run of two checkpoints, as training leaves it."""
    run = tmp_path / "my_run"
    for step, seed in ((2, 0), (4, 1)):
        save_tiny(run / f"global_step_{step}" / "huggingface", seed=seed)
        (run / f"global_step_{step}" / "actor").mkdir()
    (run / "latest_checkpointed_iteration.txt").write_text("4\n")
    return run


def evaluate(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {"OUTPUT_DIR": str(tmp_path / "out"), "THINKING_MAX_LENGTH": "4", "INPUT_MAX_LENGTH": "300"}
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **settings, **environment}
    command = ["bash", str(REPO / "eval.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env, timeout=300)


def summary(tmp_path: Path, name: str) -> dict:
    return json.loads((tmp_path / "out" / name / "summary.json").read_text())


def test_the_latest_or_a_chosen_step_of_a_run_is_scored(tmp_path, run_dir):
    tasks = write_tasks(tmp_path / "tasks")
    latest = evaluate(tmp_path, RUN=str(run_dir), TASK_DIR=str(tasks), TASKS="Sts Ranks")
    assert latest.returncode == 0, latest.stderr
    record = summary(tmp_path, "my_run-global_step_4")
    assert record["model"]["path"] == f"{run_dir}/global_step_4/huggingface"
    assert [task["name"] for task in record["tasks"]] == ["Sts", "Ranks"]
    assert record["settings"]["max_new_tokens"] == 4 and record["settings"]["max_prompt_length"] == 300
    (log,) = (tmp_path / "out").glob("timing_results_*.txt")
    assert sorted(line.split()[0] for line in log.read_text().splitlines()) == ["Ranks", "Sts"]
    chosen = evaluate(tmp_path, "--no_thinking", RUN=str(run_dir), STEP="2", TASK_DIR=str(tasks), TASKS="Sts")
    assert chosen.returncode == 0, chosen.stderr
    assert summary(tmp_path, "my_run-global_step_2_no_thinking")["settings"]["think"] is False


@pytest.mark.parametrize(
    ("run", "environment", "told"),
    [
        ("my_run/global_step_4", {"STEP": "2"}, "STEP=2: RUN={run} is a step already; leave STEP out"),
        ("my_run/global_step_4/huggingface", {"STEP": "2"}, "STEP=2: RUN={run} is a model, and has no steps"),
        ("my_run", {"SUITE": "eng-v1", "TASKS": "Sts"}, "SUITE=eng-v1 with TASKS or TASK_DIR: give a suite, or tasks"),
        ("my_run", {"SUITE": "eng-v1", "TASK_DIR": "x"}, "SUITE=eng-v1 with TASKS or TASK_DIR: give a suite, or tasks"),
    ],
)
def test_what_would_be_passed_over_is_refused(tmp_path, run_dir, run, environment, told):
    run = f"{run_dir.parent}/{run}"
    done = evaluate(tmp_path, RUN=run, **environment)
    assert done.returncode == 2 and f"eval.sh: {told.format(run=run)}" in done.stderr


def test_without_a_gpu_and_a_selection_the_local_tasks_are_run_with_a_message(tmp_path, run_dir):
    done = evaluate(tmp_path, "--no_thinking", RUN=str(run_dir))
    assert done.returncode == 0, done.stderr
    assert f"no GPU is visible; evaluating {run_dir} on the local tasks of examples/eval" in done.stdout
    record = summary(tmp_path, "my_run-global_step_4_no_thinking")
    assert record["wanted"] == ["ExampleRetrieval", "ExampleSTS"]


def save_shards(run: Path, tiny_folder: Path, seed: int) -> Path:
    """A run of one checkpoint with shards alone; the folder that holds them."""
    actor = run / "global_step_7" / "actor"
    shutil.copytree(tiny_folder, actor / "huggingface", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(tiny_model(seed=seed).state_dict(), actor / "model_world_size_1_rank_0.pt")
    (run / "latest_checkpointed_iteration.txt").write_text("7")
    return actor


@pytest.fixture
def merged(tmp_path):
    """Where the shards of runs below `tmp_path` are merged; removed at the end."""
    folder = REPO / "merge_models" / tmp_path.resolve().relative_to("/")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def test_shards_alone_are_merged_once_and_again_when_they_change(tmp_path, tiny_folder, merged):
    tasks = write_tasks(tmp_path / "tasks")
    actor = save_shards(tmp_path / "old_run", tiny_folder, seed=0)
    run = {"RUN": str(tmp_path / "old_run"), "TASK_DIR": str(tasks), "TASKS": "Sts"}
    first = evaluate(tmp_path, **run)
    assert first.returncode == 0 and "merge_model: wrote" in first.stdout, first.stderr
    assert (merged / "old_run" / "global_step_7" / "huggingface" / "model.safetensors").is_file()
    # A wrong task ends it after the place where it would have merged, and before a model is loaded.
    second = evaluate(tmp_path, **{**run, "TASKS": "Nonsense77"})
    assert second.returncode == 2 and "there is no task 'Nonsense77'" in second.stderr
    assert "merge_model: " not in second.stdout
    scores = [summary(tmp_path, "old_run-global_step_7")["tasks"][0]["score"]]
    torch.save(tiny_model(seed=1).state_dict(), actor / "model_world_size_1_rank_0.pt")
    os.utime(actor)
    third = evaluate(tmp_path, **run)
    assert third.returncode == 0 and "merge_model: wrote" in third.stdout, third.stderr
    scores.append(summary(tmp_path, "old_run-global_step_7")["tasks"][0]["score"])
    assert scores[0] != scores[1]


def test_shards_of_runs_of_one_name_are_merged_apart(tmp_path, tiny_folder, merged):
    tasks = write_tasks(tmp_path / "tasks")
    scores = []
    for seed, project in enumerate(("first", "second")):
        # Older than what is merged of the other run.
        os.utime(save_shards(tmp_path / project / "old_run", tiny_folder, seed), (1, 1))
        done = evaluate(tmp_path, RUN=str(tmp_path / project / "old_run"), TASK_DIR=str(tasks), TASKS="Sts")
        assert done.returncode == 0, done.stderr
        scores.append(summary(tmp_path, "old_run-global_step_7")["tasks"][0]["score"])
    assert scores[0] != scores[1]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RUN": "checkpoints/nothing"}, "RUN=checkpoints/nothing does not exist; train first"),
        ({"STEP": "9"}, "STEP=9: there is no {run}/global_step_9; there are: global_step_2 global_step_4"),
        ({"RUN": "{tmp}/empty"}, "holds no checkpoint"),
        ({"TASKS": "Nonsense77"}, "there is no task 'Nonsense77'"),
        ({"RUN": "{tmp}/adapter", "TASKS": "Nonsense77"}, "there is no task 'Nonsense77'"),
    ],
)
def test_errors_name_what_is_wrong_and_the_exit_code_is_2(tmp_path, run_dir, environment, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    filled = {name: value.format(tmp=tmp_path) for name, value in environment.items()}
    done = evaluate(tmp_path, **{"RUN": str(run_dir), **filled})
    assert done.returncode == 2
    assert message.format(run=run_dir) in done.stderr
