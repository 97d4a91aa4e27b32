"""Running the programs as a user does, on the tiny model: in processes of their own, or faster in this one."""

import hashlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import verl.trainer.main_ppo

REPO = Path(__file__).parents[2]
PAIRS = "pairs.jsonl"
WORDS = "river stone paper cloud engine garden winter bottle window copper violin market island shadow".split()


def write_triplets(file: Path, count: int = 24) -> Path:
    lines = []
    for i in range(count):
        first, second, third = (WORDS[(i * k + k) % len(WORDS)] for k in (1, 3, 5))
        triplet = {
            "query": f"{first} {second}?",
            "positive": f"the {second} of a {first} {i}",
            "negative": f"no {third} {i}",
        }
        lines.append(json.dumps(triplet))
    file.write_text("\n".join(lines) + "\n")
    return file


def write_texts(file: Path, count: int = 24) -> Path:
    file.write_text("".join(f"{WORDS[i % 14]} and {WORDS[(3 * i + 1) % 14]} number {i}\n" for i in range(count)))
    return file


def write_pairs(file: Path, count: int = 8) -> None:
    """Scored pairs for validation, far fewer than those that the default names."""
    pairs = [
        {"sentence1": f"{WORDS[i]} here", "sentence2": f"{WORDS[(i * i) % 14]} there", "score": i % 6}
        for i in range(count)
    ]
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))


def program(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPO / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def prepare(mode: str, input_file: Path, folder: Path) -> Path:
    done = program("process_data.py", "--mode", mode, "--input_file", str(input_file), "--local_dir", str(folder),
                   "--test_ratio", "0.25")  # fmt: skip
    assert done.returncode == 0, done.stderr
    write_pairs(folder / PAIRS)
    return folder


@dataclass
class Ended:
    """What a program left behind, as `subprocess.CompletedProcess` has it."""

    returncode: int
    stdout: str
    stderr: str


def train_here(*overrides: str) -> Ended:
    """Train without Ray, in this process: for tests whose subject is neither Ray nor processes."""
    return main_here(*overrides, "trainer.use_ray=False")


def main_here(*overrides: str) -> Ended:
    """Run the training program in this process: for what ends before anything is started."""
    out, errors = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(errors):
        code = verl.trainer.main_ppo.main(list(overrides))
    return Ended(code, out.getvalue(), errors.getvalue())


def main_ppo(
    *overrides: str, program: Sequence[str] = ("-m", "verl.trainer.main_ppo"), cwd: Path = REPO, **environment: str
):
    """Run the training program in a process of its own, on Ray; or a script that stands in for it."""
    env = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "CUDA_VISIBLE_DEVICES")}
    env |= {"PYTHONPATH": str(REPO), **environment}
    command = [sys.executable, *program, *overrides]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env, cwd=cwd, timeout=400)


def recipe(model: Path, data: Path, run_dir: Path, mode: str = "supervised") -> list[str]:
    """A run of a few seconds: 4 samples a step, groups of 3, 10 new tokens."""
    return [
        f"+data.train_mode={mode}",
        f"data.train_files={data}/train.parquet",
        f"data.val_files={data}/test.parquet",
        f"data.val_sts_file={data / PAIRS}",
        "data.train_batch_size=4",
        "data.max_prompt_length=220",
        "data.max_response_length=10",
        f"actor_rollout_ref.model.path={model}",
        "actor_rollout_ref.actor.ppo_mini_batch_size=2",
        "actor_rollout_ref.actor.optim.lr=1e-3",
        "actor_rollout_ref.rollout.n=3",
        "actor_rollout_ref.rollout.name=hf",
        "algorithm.norm_adv_by_std_in_grpo=False",
        "+reward_model.reward_kwargs.temperature=0.1",
        "+reward_model.reward_kwargs.enable_length_penalty=False",
        "trainer.device=cpu",
        f"trainer.default_local_dir={run_dir}",
    ]


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def steps_of(run_dir: Path) -> list[dict[str, Any]]:
    """The training steps' own lines; validations, diagnoses, alerts and saves have lines of theirs."""
    return [m for m in read_metrics(run_dir) if "training/epoch" in m]


def read_samples(run_dir: Path, step: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "samples" / f"step_{step}.jsonl").read_text().splitlines()]


# What differs between two runs that do the same.
MEASURED = ("time/", "perf/", "memory/", "sync/")


def start_main_ppo(
    *overrides: str, launcher: Sequence[str] = (), cwd: Path = REPO, **environment: str
) -> "subprocess.Popen[str]":
    """The training program in a process group of its own, not waited for; as the child of `launcher` if given."""
    env = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "CUDA_VISIBLE_DEVICES")}
    env |= {"PYTHONPATH": str(REPO), **environment}
    command = [*launcher, sys.executable, "-m", "verl.trainer.main_ppo", *overrides]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, cwd=cwd, start_new_session=True
    )


def numbers(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what is measured: the lines that two equal runs have in common."""
    lines = [{k: v for k, v in m.items() if not k.startswith(MEASURED)} for m in read_metrics(run_dir)]
    return [line for line in lines if len(line) > 1]


def weights_sha256(run_dir: Path, step: int) -> str:
    """Of the model folder's weights."""
    file = run_dir / f"global_step_{step}" / "huggingface" / "model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest()


def message(stderr: str) -> str:
    """What the program says last."""
    return stderr[stderr.rindex("main_ppo: ") :]
