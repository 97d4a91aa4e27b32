"""Shared by the benchmarks: the description of the machine, results as JSON and markdown, and one training run."""

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from verl.utils.cpus import usable_cpus
from verl.utils.versions import installed_versions

REPO = Path(__file__).parent.parent
MODEL = "models/SmolLM2-135M-Instruct"


def machine() -> dict[str, Any]:
    """The machine and the versions that figures were measured on."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "cores": usable_cpus(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "versions": installed_versions(),
    }


def write_json(path: Path | None, results: dict[str, Any]) -> None:
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"machine": machine(), **results}, indent=1) + "\n")


def markdown(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in GitHub's markdown."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def spread(values: Sequence[float], digits: int = 2) -> str:
    """The median, and the smallest and largest value in brackets."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def get_model() -> None:
    """Download the demo model, unless that is done already."""
    subprocess.run([sys.executable, "-m", "verl.get_demo_model"], check=True, cwd=REPO, stdout=subprocess.DEVNULL)


def prepare_data(folder: Path) -> Path:
    """The demo model, and the example triplets as parquet; returns the training file."""
    get_model()
    prepare = ["process_data.py", "--mode", "supervised", "--input_file", "examples/triplets.jsonl"]
    subprocess.run(
        [sys.executable, *prepare, "--local_dir", str(folder)], check=True, cwd=REPO, stdout=subprocess.DEVNULL
    )
    return folder / "train.parquet"


def train(
    train_file: Path, out: Path, shape: tuple[int, int, int], steps: int, *overrides: str, warm_up: int = 1
) -> list[dict]:
    """Train the demo model on a CPU for `warm_up` + `steps` steps; the metrics of the last `steps`, with `wall_s`.

    Args:
        shape: triplets per step, rationales per triplet, and the number of new tokens that every row gets.
        warm_up: steps that are not counted: in the first two the kernel clears memory pages for the graph and the
            optimizer's state, which later steps reuse.
    """
    triplets, n, tokens = shape
    settings = [
        f"data.train_batch_size={triplets}", f"actor_rollout_ref.actor.ppo_mini_batch_size={triplets}",
        f"actor_rollout_ref.rollout.n={n}", "data.max_prompt_length=160", f"data.max_response_length={tokens}",
        "actor_rollout_ref.rollout.ignore_eos=True", "data.shuffle=False", f"data.train_files={train_file}",
        f"actor_rollout_ref.model.path={MODEL}", "actor_rollout_ref.model.enable_gradient_checkpointing=False",
        f"trainer.default_local_dir={out}", "trainer.save_freq=0", "trainer.device=cpu",
        "+reward_model.reward_kwargs.enable_length_penalty=False", f"trainer.total_training_steps={steps + warm_up}",
    ]  # fmt: skip
    command = [sys.executable, "-m", "verl.trainer.main_ppo", *settings, *overrides]
    subprocess.run(command, check=True, cwd=REPO, stdout=subprocess.DEVNULL)
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    # A step writes its samples last, so the time between the samples of two steps is the time of a whole step.
    ends = [(out / f"samples/step_{record['step']}.jsonl").stat().st_mtime for record in metrics]
    spent = zip(metrics[1:], ends[:-1], ends[1:], strict=True)
    return [{**record, "wall_s": end - previous} for record, previous, end in spent][warm_up - 1 :]
