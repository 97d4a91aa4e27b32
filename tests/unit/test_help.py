"""A help text, a wrong flag and a wrong override do not wait until packages that take seconds are loaded."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SLOW = {
    "torch",
    "transformers",
    "ray",
    "mteb",
    "vllm",
    "datasets",
    "sentence_transformers",
    "scipy",
    "sklearn",
    "pandas",
}


def command_of(path: Path) -> list[str]:
    """How people start the program in a file."""
    place = path.relative_to(ROOT)
    if place.parts[0] != "verl":
        return [str(place)]
    return ["-m", ".".join(place.with_suffix("").parts).removesuffix(".__main__")]


PROGRAMS = [
    command_of(path)
    for pattern in ("*.py", "scripts/*.py", "verl/**/*.py")
    for path in sorted(ROOT.glob(pattern))
    if re.search(r'^import (argparse|runpy)$.*^if __name__ == "__main__":', path.read_text(), re.MULTILINE | re.DOTALL)
]


def start(*arguments: str) -> tuple[int, str, set[str]]:
    """The exit code, what was printed to stdout, and the packages that were imported."""
    command = [sys.executable, "-X", "importtime", *arguments]
    here = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=here)
    imported = re.findall(r"^import time:.*\| +([\w.]+)$", done.stderr, re.MULTILINE)
    return done.returncode, done.stdout, {name.split(".")[0] for name in imported}


@pytest.mark.parametrize("command", PROGRAMS, ids=" ".join)
def test_a_help_text_loads_nothing_slow(command):
    code, printed, packages = start(*command, "--help")
    assert code == 0 and printed.startswith("usage: ")
    assert "argparse" in packages and not packages & SLOW


def test_every_program_is_found():
    found = {" ".join(command) for command in PROGRAMS}
    assert {"eval_mteb.py", "-m verl.encoder", "-m verl.trainer.main_ppo", "scripts/merge_model.py"} <= found


@pytest.mark.parametrize(
    "command",
    [
        ["eval_mteb.py", "--model_path", "m"],
        ["-m", "verl.encoder", "--model", "m", "--input", "i", "--output", "o.parquet", "--shard_rows", "9"],
        ["-m", "verl.trainer.main_ppo", "trainer.no_such_key=1"],
        ["-m", "verl.trainer.main_ppo", "--config-name", "no_such_yaml"],
        ["-m", "verl.doctor", "trainer.no_such_key=1"],
        ["-m", "verl.plan", "--gpus", "1", "trainer.no_such_key=1"],
        ["-m", "verl.plan", "--gpus", "0"],
    ],
    ids=" ".join,
)
def test_a_wrong_argument_is_told_before_anything_slow_is_loaded(command):
    code, _, packages = start(*command)
    assert code == 2 and not packages & SLOW


def test_the_composed_configuration_is_shown_without_loading_anything_slow():
    code, printed, packages = start("-m", "verl.trainer.main_ppo", "--cfg", "job")
    assert code == 0 and "actor_rollout_ref:" in printed and not packages & SLOW
