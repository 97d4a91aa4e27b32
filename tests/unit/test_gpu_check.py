"""bench/gpu_check.py in its small form on a CPU: its figures, what it keeps, and what it says of what it left out."""

import json
import subprocess
import sys
from pathlib import Path

import gpu_check
import gpu_parts
import pytest
from gpu_parts import FORMS

SMALL = FORMS["small"]


def check(repo: Path, folder: Path, *arguments: str) -> tuple[int, dict, str]:
    command = [sys.executable, str(repo / "bench/gpu_check.py"), "--device", "cpu", "--folder", str(folder)]
    done = subprocess.run([*command, *arguments], cwd=repo, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, json.loads((folder / "gpu_check.json").read_text())["parts"], done.stdout


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> tuple[Path, int, dict, str]:
    folder = tmp_path_factory.mktemp("gpu_check")
    return folder, *check(Path(__file__).parents[2], folder, "--minutes", "9")


def test_every_part_is_done_or_says_why_not(found):
    _, code, parts, printed = found
    states = {name: part["state"] for name, part in parts.items()}
    assert code == 0 and set(states.values()) <= {"done", "skipped"}, parts
    assert states["random step"] == states["packed against padded"] == states["tests"] == "done"
    assert "on a CPU vllm has no sleep mode" in printed or "vllm is not installed" in printed
    assert all(f"| {name} |" in printed for name in gpu_parts.PARTS)


def test_packed_and_padded_rows_are_one_model_and_kernels_are_compared(found):
    parts = found[2]
    packed = parts["packed against padded"]["figures"]
    assert (packed["tokens"], packed["padded_tokens"]) == (sum(SMALL.lengths), 3 * max(SMALL.lengths))
    assert packed["mean_gap"] < 1e-4
    assert "does not work here" in parts["attention"]["figures"]["varlen_problem"]


def test_a_steps_figures_follow_from_its_rows(found):
    figures, offloaded = (found[2][name]["figures"] for name in ("random step", "random step, offload"))
    assert figures["generated_tokens"] == 2 * (2 + 2) * 4
    assert figures["update_tokens_per_s"] * figures["seconds"]["update"] == pytest.approx(figures["update_tokens"])
    # By hand: of the random model, the layers' weights and the head's.
    hidden, wide, kv = 64, 128, 32
    layer = 2 * hidden * hidden + 2 * hidden * kv + hidden + 2 * kv + 3 * hidden * wide + 2 * hidden
    layers, scored = 2 * layer + hidden, 2 * 2 * 4
    assert figures["update_flop"] == 6 * (layers * figures["update_tokens"] + 300 * hidden * scored)
    assert offloaded["grad_norm"] == pytest.approx(figures["grad_norm"], rel=1e-4)


def test_the_plan_of_the_steps_is_that_of_their_weights(found):
    plans = found[2]["plan"]["figures"]
    assert set(plans) == {"random step", "random step, offload"}
    hidden, wide, kv = 64, 128, 32
    layer = 2 * hidden * hidden + hidden + 2 * hidden * kv + 2 * kv + 3 * hidden * wide + 2 * hidden
    weights = 300 * hidden + hidden + 2 * layer
    gib = {name: {phase: size * 2**30 for phase, size in phases.items()} for name, phases in plans.items()}
    # What waits elsewhere: float32 weights while the engine generates, and AdamW's two moments then too.
    kept = gib["random step"]["gen"] - gib["random step, offload"]["gen"]
    assert kept == pytest.approx(3 * 4 * weights, rel=0.02)
    # Weights, gradients and moments are there in the update.
    assert gib["random step"]["update"] > 4 * 4 * weights


def test_what_is_finished_is_kept_and_the_rest_is_said_to_be_left(found, repo):
    folder, _, parts, _ = found
    code, again, _ = check(repo, folder, "--minutes", "0")
    done = {name: part for name, part in parts.items() if part["state"] == "done"}
    assert {name: again[name] for name in done} == done
    assert code == 3 and {again[name]["state"] for name in again.keys() - done.keys()} == {"left"}


def test_mfu_is_the_share_of_the_measured_rate():
    figures = {
        "update_flop": 3e9, "update_tokens_per_s": 10.0, "seconds": {"update": 2.0, "gen": 1.0, "sync": 0.5},
        "generated_tokens": 40, "peak_gib": {"update": 7.5}, "attention": "varlen_attn",
    }  # fmt: skip
    line = gpu_check._line({"state": "done", "seconds": 1, "figures": figures}, 1e10, {"update": 7.25, "sync": 1.0})
    assert "MFU 15 %" in line and "peak of update 7.50 GiB (planned 7.25)" in line and "generation 40 tokens/s" in line
