"""Runs that are killed, interrupted, starved of disk or lose a worker: what they leave, what they say, how they end."""

import json
import os
import random
import re
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from kills import command_line, left_after, pids_with, run_with_kills
from runs import (
    REPO,
    main_here,
    main_ppo,
    message,
    numbers,
    prepare,
    read_metrics,
    recipe,
    start_main_ppo,
    steps_of,
    train_here,
    weights_sha256,
    write_triplets,
)

from verl.trainer.tracking import Tracking


@pytest.fixture(scope="module")
def short_run(tmp_path_factory, tiny_folder, triplets) -> Path:
    """Four steps, a checkpoint at each second one."""
    run_dir = tmp_path_factory.mktemp("runs") / "short"
    done = train_here(*recipe(tiny_folder, triplets, run_dir), "trainer.total_training_steps=4", "trainer.save_freq=2")
    assert done.returncode == 0, done.stderr
    return run_dir


@pytest.fixture
def copied_run(short_run, tmp_path) -> Path:
    return Path(shutil.copytree(short_run, tmp_path / "run"))


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """For Ray's sessions; a short path, as that of a socket may have 107 characters."""
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:
        yield Path(folder)


def wait_for(process: "subprocess.Popen[str]", text: str) -> None:
    """Read the run's output up to a line that holds `text`."""
    assert process.stdout is not None
    assert any(text in line for line in iter(process.stdout.readline, "")), process.communicate()[1]


def test_a_run_that_is_killed_again_and_again_is_the_run_that_is_not(tmp_path, tiny_folder, triplets):
    """Once its driver and once its worker; KILLS=30 in the environment for the long form, whose draws have both too.

    It may take over a minute: it is Ray that a kill might leave behind, so the killed run starts it every time.
    """
    kills = int(os.environ.get("KILLS", "2"))
    steps = max(60, 12 * kills)
    more = [
        f"trainer.total_training_steps={steps}", "trainer.save_freq=2", "trainer.max_actor_ckpt_to_keep=2",
        "trainer.test_freq=9", "data.val_sts_file=null",
    ]  # fmt: skip
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = train_here(*recipe(tiny_folder, triplets, whole), *more)
    assert done.returncode == 0, done.stderr
    found = run_with_kills([*recipe(tiny_folder, triplets, killed), *more], kills, random.Random(kills), longest_s=4)
    assert {kill["killed"] for kill in found} == {"driver", "worker"}, "the draw of so few kills has one kind alone"
    for kill in found:
        assert kill["left"] == []
        if kill["killed"] == "worker":
            assert re.search(r"rank 0 \(pid \d+ on .*\) died in phase \w+; its memory peaked", message(kill["errors"]))
    assert numbers(whole) == numbers(killed)
    hashes = [weights_sha256(run, steps) for run in (whole, killed)]
    assert hashes[0] == hashes[1]
    print(f"{len(found)} kills, of the worker {sum(k['killed'] == 'worker' for k in found)}; sha256 {hashes}")
    assert not list(killed.glob(".global_step_*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_last_whole_step_and_the_run_goes_on_as_if_nothing_had_been(
    number, tmp_path, tiny_folder, triplets, short_run
):
    # It may take over a minute, twice: Ray's processes get the signal too, so they must be there.
    run_dir = tmp_path / "run"
    more = ["trainer.total_training_steps=4", "trainer.save_freq=-1"]
    mark = f"GRACE_SIGNAL_{number}"
    process = start_main_ppo(*recipe(tiny_folder, triplets, run_dir), *more, **{mark: "1"})
    wait_for(process, "step 1/4")
    # As a terminal does: to every process of the group.
    os.killpg(process.pid, number)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 128 + number, errors
    assert f"stopped by {signal.Signals(number).name}" in message(errors)
    assert re.search(r"the same command resumes from step [1-3]\b", output)
    assert left_after(mark) == []
    done = train_here(*recipe(tiny_folder, triplets, run_dir), *more)
    assert done.returncode == 0, done.stderr
    assert re.search(r"resumed from .* in [\d.]+ s: [1-3] steps done", done.stdout)
    assert numbers(run_dir) == numbers(short_run)
    assert weights_sha256(run_dir, 4) == weights_sha256(short_run, 4)


def test_a_second_signal_ends_at_once_and_saves_nothing(tmp_path, tiny_folder, triplets):
    """It may come in the middle of an update, whose weights belong to no step.

    Beside other programs over a minute: Ray is started, and a step must be long enough to be interrupted.
    """
    mark, run_dir = "GRACE_TWO_SIGNALS", tmp_path / "run"
    process = start_main_ppo(
        *recipe(tiny_folder, triplets, run_dir), "data.max_response_length=400",
        "actor_rollout_ref.rollout.ignore_eos=True", "trainer.total_training_steps=9", **{mark: "1"},
    )  # fmt: skip
    wait_for(process, "step 1/9")
    beside = main_here(*recipe(tiny_folder, triplets, run_dir))
    assert beside.returncode == 2
    assert f"{run_dir} is in use by another run (pid {process.pid} on " in beside.stderr
    # Two kinds, since two of one kind at the same moment are one. No phase can begin, and save, between them.
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 143, errors
    assert not list(run_dir.glob("global_step_*"))
    assert left_after(mark) == []


def test_a_reward_that_is_no_number_ends_the_run_and_loses_no_step(tmp_path, tiny_folder, triplets):
    function = tmp_path / "scores.py"
    function.write_text(
        "calls = []\n"
        "def compute_score(solution_str, **rest):\n"
        "    calls.append(1)\n"
        "    return float('nan') if len(calls) == 30 else float(len(solution_str))\n"
    )
    run_dir = tmp_path / "run"
    done = train_here(
        *recipe(tiny_folder, triplets, run_dir), "reward_model.reward_manager=naive", "~reward_model.reward_kwargs",
        f"custom_reward_function.path={function}", "trainer.total_training_steps=5",
    )  # fmt: skip
    assert done.returncode == 1
    assert re.search("the score function compute_score returned nan for sample .* rationale '", message(done.stderr))
    # Four samples with three rationales a step: the 30th is one of step 3.
    assert "the same command resumes from step 2" in done.stdout
    assert (run_dir / "latest_checkpointed_iteration.txt").read_text() == "2\n"


def test_a_run_that_is_stopped_between_a_step_and_its_validation_makes_up_for_it(tmp_path, tiny_folder, triplets):
    manager, stopped_once = tmp_path / "stopped.py", tmp_path / "stopped_once"
    manager.write_text(
        "import os, signal\nfrom pathlib import Path\n"
        "from verl.workers.reward_manager.hidden import HiddenRewardManager\n"
        "class Stopped(HiddenRewardManager):\n"
        "    def __call__(self, rows):\n"
        f"        once = Path({str(stopped_once)!r})\n"
        "        if rows.meta_info['step'] == 2 and not once.exists():\n"
        "            once.touch()\n"
        "            os.kill(os.getpid(), signal.SIGTERM)\n"
        "        return super().__call__(rows)\n"
    )
    more = [
        f"reward_model.reward_manager={manager}:Stopped", "trainer.total_training_steps=2", "trainer.test_freq=2",
        "trainer.save_best=val/mrr",
    ]  # fmt: skip
    run_dir, whole = tmp_path / "run", tmp_path / "whole"

    def of_step_2(run: Path) -> dict:
        return {name: value for line in numbers(run) if line["step"] == 2 for name, value in line.items()}

    stopped = train_here(*recipe(tiny_folder, triplets, run_dir), *more)
    assert stopped.returncode == 128 + signal.SIGTERM and "the same command resumes from step 2" in stopped.stdout
    assert not {"val/mrr", "diag/texts"} & of_step_2(run_dir).keys()
    for run in (run_dir, whole):
        done = train_here(*recipe(tiny_folder, triplets, run), *more)
        assert done.returncode == 0, done.stderr
    assert of_step_2(run_dir) == of_step_2(whole)
    assert of_step_2(whole).keys() >= {"val/mrr", "diag/texts"}
    best = [json.loads((run / "best_checkpointed_iteration.txt").read_text()) for run in (run_dir, whole)]
    assert best[0] == best[1] == {"step": 2, "value": of_step_2(whole)["val/mrr"]}
    # It is not done a second time.
    lines = len(read_metrics(run_dir))
    assert train_here(*recipe(tiny_folder, triplets, run_dir), *more).returncode == 0
    assert len(read_metrics(run_dir)) == lines


def test_a_best_step_by_a_figure_that_the_reward_manager_does_not_have_is_refused(tmp_path, tiny_folder, triplets):
    manager = tmp_path / "mine.py"
    manager.write_text("class Mine:\n    needs_embeddings = False\n    exclude_system_prompt = True\n")
    overrides = [o for o in recipe(tiny_folder, triplets, tmp_path / "run") if "reward_kwargs" not in o]
    done = main_here(
        *overrides, f"reward_model.reward_manager={manager}:Mine", "trainer.test_freq=1", "trainer.save_best=val/mrr"
    )
    assert done.returncode == 2
    assert "trainer.save_best=val/mrr is not a metric" in message(done.stderr)
    assert "it reports val/reward alone" in message(done.stderr)


def test_a_step_of_another_run_does_not_bring_that_runs_place_in_a_tracker(
    copied_run, tiny_folder, triplets, tmp_path, monkeypatch
):
    begin, given = Tracking.begin, []

    def told(tracking: Tracking, step: int, run_ids: dict[str, str]) -> set[str]:
        given.append((step, run_ids))
        return begin(tracking, step, run_ids)

    monkeypatch.setattr(Tracking, "begin", told)
    state = copied_run / "global_step_4" / "trainer_state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "run_ids": {"wandb": "theirs"}}))
    for run_dir in (tmp_path / "other", copied_run):
        done = train_here(
            *recipe(tiny_folder, triplets, run_dir), "trainer.total_training_steps=4", "trainer.save_freq=0",
            "trainer.resume_mode=resume_path", f"trainer.resume_from_path={copied_run}/global_step_4",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert given == [(4, {}), (4, {"wandb": "theirs"})]


def test_a_run_from_another_ones_step_keeps_nothing_of_what_was_in_its_folder(
    tmp_path, tiny_folder, triplets, copied_run
):
    used = tmp_path / "used"
    done = train_here(
        *recipe(tiny_folder, triplets, used), "trainer.total_training_steps=2", "trainer.save_freq=1",
        "trainer.test_freq=1", "trainer.save_best=val/mrr",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = train_here(
        *recipe(tiny_folder, triplets, used), "trainer.total_training_steps=5", "trainer.save_freq=5",
        "trainer.resume_mode=resume_path", f"trainer.resume_from_path={copied_run}/global_step_4",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "what an earlier run left after step 0 was moved to" in done.stdout
    assert {m["step"] for m in numbers(used)} == {4, 5}
    assert not (used / "best_checkpointed_iteration.txt").exists()
    assert sorted(path.name for path in used.glob("global_step_*")) == ["global_step_5"]
    assert (used / "set_aside_1" / "metrics.jsonl").is_file()


def test_a_worker_that_hangs_is_named_with_the_phase_and_the_stacks_of_those_that_wait(tmp_path, tiny_folder, triplets):
    # It takes about a minute, the limit that it waits for: loading two models beside other programs must fit into it.
    mark = "GRACE_HANG"
    process = start_main_ppo(
        *recipe(tiny_folder, triplets, tmp_path / "run"), "trainer.n_gpus_per_node=2", "trainer.phase_timeout_s=60",
        "trainer.total_training_steps=500", "trainer.save_freq=0", **{mark: "1"},
    )  # fmt: skip
    wait_for(process, "step 2/500")
    workers = [pid for pid in pids_with(mark) if "ActorRolloutRefWorker" in command_line(pid)]
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGSTOP)
    _, errors = process.communicate(timeout=300)
    said = message(errors)
    assert process.returncode == 1, errors
    assert re.search(
        r"no worker returned or made progress for \d+ s in phase \w+ \(trainer.phase_timeout_s=60", said
    ), said
    assert re.search(rf"rank \d \(pid {workers[1]} on .*\): no answer and no stacks; it is stopped", said), said
    assert re.search(rf"rank \d \(pid {workers[0]} on .*\): (finished|still running; its stacks:\nT)", said), said
    assert left_after(mark) == []


def test_a_full_disk_is_said_with_what_to_do_and_costs_no_earlier_checkpoint(copied_run, tiny_folder, triplets):
    """The folder's quota is a small file system of its own."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    small = copied_run.parent / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(small)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"mounting is not permitted here: {mounted.stderr}")
    try:
        done = train_here(
            *recipe(tiny_folder, triplets, small / "run"), "trainer.total_training_steps=20", "trainer.save_freq=1"
        )
        said = message(done.stderr)
        assert done.returncode == 1, done.stderr
        assert "could not be saved in" in said and "No space left on device" in said, said
        last = re.search(r"it resumes from step (\d+)\.", said)
        assert last, said
        assert (small / "run" / f"global_step_{last[1]}" / "trainer_state.json").is_file()
        assert not list((small / "run").glob(".global_step_*"))
        for step in sorted((small / "run").glob("global_step_*"))[:-1]:
            shutil.rmtree(step)
        again = train_here(
            *recipe(tiny_folder, triplets, small / "run"), "trainer.save_freq=0",
            f"trainer.total_training_steps={int(last[1]) + 1}",
        )  # fmt: skip
        assert again.returncode == 0 and f"{last[1]} steps done" in again.stdout, again.stderr
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_truncated_shard_is_passed_over_and_named(copied_run, tiny_folder, triplets, short_run):
    shard = next((copied_run / "global_step_4/actor").glob("*.distcp"))
    os.truncate(shard, shard.stat().st_size // 2)
    run = [*recipe(tiny_folder, triplets, copied_run), "trainer.total_training_steps=4", "trainer.save_freq=2"]
    given = train_here(*run, "trainer.resume_mode=resume_path", f"trainer.resume_from_path={copied_run}/global_step_4")
    assert given.returncode == 2
    assert f"{shard} has" in message(given.stderr) and "give a complete global_step_N folder" in message(given.stderr)
    done = train_here(*run)
    assert done.returncode == 0, done.stderr
    assert re.search(rf"skipped: {shard} has \d+ bytes instead of \d+", done.stdout)
    assert "2 steps done" in done.stdout and "set_aside_1" in done.stdout
    assert numbers(copied_run) == numbers(short_run)


def test_a_run_goes_on_with_another_number_of_workers_and_the_same_samples(
    copied_run, tiny_folder, triplets, short_run
):
    def texts(run_dir: Path, step: int) -> list[str]:
        lines = (run_dir / f"samples/step_{step}.jsonl").read_text().splitlines()
        return sorted({json.loads(line)["text"] for line in lines})

    # It may take over a minute: two workers need Ray, and share the CPUs of one while they load.
    run = [*recipe(tiny_folder, triplets, copied_run), "trainer.save_freq=-1"]
    (copied_run / "latest_checkpointed_iteration.txt").write_text("2\n")
    for start, steps, workers, said in ((main_ppo, 3, 2, "2 steps done"), (train_here, 4, 1, "3 steps done")):
        done = start(*run, f"trainer.total_training_steps={steps}", f"trainer.n_gpus_per_node={workers}")
        assert done.returncode == 0, done.stderr
        assert said in done.stdout and "changed: trainer.n_gpus_per_node" in done.stdout, done.stdout
        assert texts(copied_run, steps) == texts(short_run, steps)
    assert [line["step"] for line in steps_of(copied_run)] == [1, 2, 3, 4]


def test_another_model_batch_or_data_is_refused_unless_forced(copied_run, tiny_folder, triplets, tmp_path):
    run = [*recipe(tiny_folder, triplets, copied_run), "trainer.total_training_steps=5", "trainer.save_freq=0"]
    other = prepare("supervised", write_triplets(tmp_path / "raw.jsonl", 30), tmp_path / "data")
    changes = ["actor_rollout_ref.rollout.n=2", "actor_rollout_ref.actor.optim.lr=1e-4"]
    changes.append(f"data.train_files={other}/train.parquet")
    refused = train_here(*run, *changes)
    said = message(refused.stderr)
    assert refused.returncode == 2
    assert "actor_rollout_ref.rollout.n: 3 before, 2 now" in said
    assert "data.train_files: other contents" in said and "trainer.resume_force=True" in said and "optim.lr" not in said
    assert "another trainer.default_local_dir to start a new run" in said
    forced = train_here(*run, *changes, "trainer.resume_force=True")
    assert forced.returncode == 0, forced.stderr
    for line in ("FORCED: actor_rollout_ref.rollout.n", "changed: actor_rollout_ref.actor.optim.lr: 0.001 before"):
        assert line in forced.stdout


def test_the_best_step_by_a_validations_figure_is_kept(tmp_path, tiny_folder, triplets):
    run_dir = tmp_path / "run"
    done = train_here(
        *recipe(tiny_folder, triplets, run_dir), "trainer.total_training_steps=6", "trainer.save_freq=1",
        "trainer.test_freq=1", "trainer.save_best=val/sts_spearman", "trainer.max_actor_ckpt_to_keep=1",
        "actor_rollout_ref.actor.optim.lr=1e-2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = {m["step"]: m["val/sts_spearman"] for m in numbers(run_dir) if "val/sts_spearman" in m}
    assert sorted(found) == [1, 2, 3, 4, 5, 6] and len(set(found.values())) > 1
    best = json.loads((run_dir / "best_checkpointed_iteration.txt").read_text())
    assert best == {"step": max(found, key=lambda step: (found[step], -step)), "value": max(found.values())}
    kept = sorted(int(path.name.rsplit("_", 1)[1]) for path in run_dir.glob("global_step_*"))
    newest = max(step for step in found if step != best["step"])
    assert kept == sorted({best["step"], newest}), "the newest one is kept besides the best one"
    for name in ("triplet_accuracy", "mrr", "alignment", "uniformity", "effective_rank"):
        assert all(f"val/{name}" in m for m in numbers(run_dir) if "val/sts_spearman" in m)
    said = [int(share) for share in re.findall(r"texts in [\d.]+ s: (\d+)% of the run at every 1 steps", done.stdout)]
    metrics = read_metrics(run_dir)
    spent = [m["time/step_s"] for m in metrics if "time/step_s" in m]
    held_out = [m["time/val_s"] for m in metrics if "time/val_s" in m and m["step"] > 0]
    # Beside the mean step until then.
    means = [sum(spent[: step + 1]) / (step + 1) for step in range(6)]
    assert said == [round(100 * val / (val + mean)) for val, mean in zip(held_out, means, strict=True)]


def test_a_run_on_one_machine_listens_on_loopback_alone(tmp_path, tiny_folder, triplets, ray_folder):
    """Also beside another cluster's leftovers, and under `uv run`, of both of which Ray makes something else.

    Beside other programs over a minute: only two workers listen for each other, and they have to load first.
    """
    (ray_folder / "ray").mkdir()
    (ray_folder / "ray" / "ray_current_cluster").write_text("10.255.255.1:6379")
    uv = tmp_path / "uv"
    uv.symlink_to("/bin/sh")
    (tmp_path / "run").write_text('"$@"\nexit $?\n')
    process = start_main_ppo(
        *recipe(tiny_folder, triplets, tmp_path / "steps"), "trainer.total_training_steps=500", "trainer.save_freq=0",
        "trainer.n_gpus_per_node=2", launcher=(str(uv), "run"), cwd=tmp_path, RAY_TMPDIR=str(ray_folder),
    )  # fmt: skip
    wait_for(process, "step 2/500")
    (driver,) = psutil.Process(process.pid).children()
    processes = (driver, *driver.children(recursive=True))
    # Ray's workers have a low priority by themselves, and hardly run beside any other program.
    assert {one.nice() for one in processes} == {psutil.Process().nice()}
    heard = [
        (one.name(), place.laddr.ip)
        for one in processes
        for place in one.net_connections("inet")
        if place.status == psutil.CONN_LISTEN
    ]
    driver.terminate()
    process.communicate(timeout=300)
    assert {name for name, _ in heard} >= {"raylet", "gcs_server"}
    assert {ip.removeprefix("::ffff:") for _, ip in heard} == {"127.0.0.1"}, heard


def files_in(folder: Path) -> set[Path]:
    """Every file under a folder, but what Python keeps there."""
    walk = ((place, names) for place, _, names in os.walk(folder) if "__pycache__" not in place)
    return {Path(place, name) for place, names in walk for name in names}


def test_a_run_tells_no_secret_and_writes_into_its_folder_alone(tmp_path, tiny_folder, triplets, ray_folder):
    # It may take over a minute: what Ray's processes write is read too, and wandb starts a process of its own.
    names = ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY")
    secret = {name: secrets.token_hex(20) for name in names}
    home, run_dir, here = (tmp_path / name for name in ("home", "run", "here"))
    home.mkdir()
    here.mkdir()
    package = files_in(REPO / "verl")
    done = main_ppo(
        *recipe(tiny_folder, triplets, run_dir), "trainer.total_training_steps=2", "trainer.test_freq=1",
        "trainer.logger=[console,wandb,tensorboard]", WANDB_MODE="offline", HOME=str(home),
        RAY_TMPDIR=str(ray_folder), cwd=here, **secret,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert list(here.iterdir()) == [] and files_in(REPO / "verl") == package
    # What libraries keep for a user, whatever they run.
    assert {file.relative_to(home).parts[:2] for file in files_in(home)} <= {
        (".cache", "wandb"),
        (".ray", "auth_token"),
    }
    written = [*files_in(run_dir), *files_in(home), *files_in(ray_folder)]
    assert any(file.suffix == ".wandb" for file in written) and any(file.name == "raylet.out" for file in written)
    said = {"output": done.stdout.encode() + done.stderr.encode()}
    said |= {str(file): file.read_bytes() for file in written if file.is_file()}
    told = [(name, place) for name, value in secret.items() for place, text in said.items() if value.encode() in text]
    assert not told


def test_a_long_run_keeps_its_memory_and_its_files(tmp_path, tiny_folder, triplets):
    """LONG_RUN=300 in the environment for the long form; prints the slopes.

    It takes over a minute: what a step leaves behind is seen above the noise after some dozens of steps only.
    """
    steps = int(os.environ.get("LONG_RUN", "60"))
    mark, run_dir = "GRACE_LONG_RUN", tmp_path / "run"
    process = start_main_ppo(
        *recipe(tiny_folder, triplets, run_dir), f"trainer.total_training_steps={steps}", "trainer.save_freq=20",
        "trainer.max_actor_ckpt_to_keep=1", "trainer.test_freq=20", "trainer.total_epochs=99", **{mark: "1"},
    )  # fmt: skip
    assert process.stdout is not None
    seen: dict[str, list[tuple[int, float, int]]] = {"driver": [], "worker": []}
    for line in iter(process.stdout.readline, ""):
        if not (found := re.match(r"step (\d+)/", line)) or int(found[1]) % (steps // 20):
            continue
        # Readable at any moment.
        assert steps_of(run_dir)[0]["step"] == 1
        worker = next(pid for pid in pids_with(mark) if "ActorRolloutRefWorker" in command_line(pid))
        for name, pid in (("driver", process.pid), ("worker", worker)):
            one = psutil.Process(pid)
            seen[name].append((int(found[1]), one.memory_info().rss / 2**20, one.num_fds()))
    assert process.wait() == 0, process.communicate()[1]
    for name, samples in seen.items():
        # The first third warms up: caches, threads, the first checkpoint and validation.
        late = samples[len(samples) // 3 :]
        at, memory, files = (np.array(column) for column in zip(*late, strict=True))
        slope = float(np.polyfit(at, memory, 1)[0])
        print(
            f"{name}: {memory[0]:.0f} to {memory[-1]:.0f} MiB, {slope:+.3f} MiB a step; files {files[0]} to {files[-1]}"
        )
        assert memory[-1] - memory[0] < 40, (name, samples)
        assert files[-1] <= files[0] + 2, (name, samples)
