"""Whole runs of main_ppo on the tiny model: what they write, that they learn, that they go on."""

import json
import platform
import shutil
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from runs import (
    MEASURED,
    main_ppo,
    message,
    numbers,
    prepare,
    read_metrics,
    read_samples,
    recipe,
    steps_of,
    train_here,
    weights_sha256,
    write_texts,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from verl import GraceEncoder
from verl.algorithm import advantage
from verl.embedding.prompts import rationale_messages
from verl.embedding.settings import EmbedderSettings

GOLDEN = Path(__file__).parent / "golden.json"
# How far a metric may be from its golden value: about ten times what other instruction sets and numbers of threads
# change by rounding, and less than the value itself, so that a wrong sign is found.
GOLDEN_TOLERANCE = {
    "reward/mean": 5e-5,
    "group/std_median": 2e-5,
    "actor/pg_loss": 1e-6,
    "actor/ppo_kl": 5e-6,
    "actor/grad_norm": 1e-4,
    "actor/entropy": 5e-5,
    "embedding/mean_cosine": 5e-6,
    "rationale/trained_tokens_mean": 0,
}
# With the recipe's own learning rate, rounding changes weights within a step, and then the rationales that are drawn.
GOLDEN_LR = "actor_rollout_ref.actor.optim.lr=1e-4"


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, tiny_folder, triplets) -> Path:
    """Five steps with validation, a checkpoint at step 3 and one at the end."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    done = train_here(
        *recipe(tiny_folder, triplets, run_dir), "trainer.total_training_steps=5", "trainer.save_freq=3", GOLDEN_LR,
        "trainer.test_freq=5", "trainer.val_before_train=True", 'trainer.logger=["console","tensorboard"]',
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for line in ("samples per step", "12 trained + 8 anchors", "step 5/5", "step 5 held-out", "saved"):
        assert line in done.stdout, done.stdout
    return run_dir


def test_metrics_of_every_step_are_there_and_consistent(whole_run):
    steps = steps_of(whole_run)
    assert [m["step"] for m in steps] == [1, 2, 3, 4, 5]
    for m in steps:
        assert m["rollout/probs_diff_max"] < 1e-4, "engine and trainer disagree about the weights"
        assert m["rollout/probs_diff_mean"] > 0
        weighted = sum(v for k, v in m.items() if k.startswith("reward/") and k.endswith("/weighted"))
        assert weighted == pytest.approx(m["reward/mean"], abs=1e-3)
        shares = [v for k, v in m.items() if k.endswith("/variance_share")]
        assert sum(shares) == pytest.approx(1, abs=1e-3)
        assert m["reward/negative/variance_share"] == pytest.approx(0, abs=1e-4)
        assert m["actor/skipped_steps"] == 0 and m["actor/grad_norm"] > 0
        # Rows cross process borders, hidden states never do: 20 rows of 64 floats and some ids.
        assert m["perf/ray_mb"] < 0.5
    held_out = [m for m in read_metrics(whole_run) if "val/triplet_accuracy" in m]
    assert [m["step"] for m in held_out] == [0, 5]
    assert list((whole_run / "tensorboard").iterdir())


def test_a_step_is_saved_before_the_untrained_model_is_loaded_for_its_diagnosis(whole_run):
    """What fails there costs no step."""
    lines = [m for m in read_metrics(whole_run) if m["step"] == 5]
    order = [next(i for i, m in enumerate(lines) if name in m) for name in ("time/val_s", "time/save_s", "time/diag_s")]
    assert order == sorted(order) and len(set(order)) == 3


def test_samples_show_texts_rationales_and_rewards(whole_run):
    samples = read_samples(whole_run, 2)
    assert [s["role"] for s in samples].count("positive") == 12
    assert [s["role"] for s in samples].count("query") == 4 == [s["role"] for s in samples].count("negative")
    step = steps_of(whole_run)[1]
    scored = [s for s in samples if s["role"] == "positive"]
    assert np.mean([s["reward"] for s in scored]) == pytest.approx(step["reward/mean"], abs=1e-5)
    for s in scored:
        parts = {k: v for k, v in s["reward_parts"].items() if k != "before_penalty"}
        assert sum(parts.values()) == pytest.approx(s["reward"], abs=1e-4)
        # A rationale of 10 tokens may end with an end token, or be cut.
        assert s["tokens"] == 10 if s["finish_reason"] == "length" else s["finish_reason"] == "stop"
    for uid in {s["uid"] for s in scored}:
        group = [s for s in scored if s["uid"] == uid]
        mean = np.mean([s["reward"] for s in group])
        for s in group:
            assert s["advantage"] == pytest.approx(s["reward"] - mean, abs=1e-4)


def test_the_model_folder_loads_with_transformers_and_has_been_trained(whole_run, tiny_folder):
    folder = whole_run / "global_step_5" / "huggingface"
    trained = AutoModelForCausalLM.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    assert AutoTokenizer.from_pretrained(folder).chat_template
    changes = {n: (p - dict(base.named_parameters())[n]).abs().max() for n, p in trained.named_parameters()}
    assert all(change > 1e-5 for change in changes.values()), changes
    ids = torch.tensor([[5, 6, 7]])
    assert trained(ids).logits.isfinite().all()
    settings = json.loads((folder / "embedder_config.json").read_text())
    assert settings["max_new_tokens"] == 10
    vectors = GraceEncoder(str(folder), device="cpu").encode(["a river", "a stone"])
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([1, 1], abs=1e-5)


def test_a_checkpoint_keeps_the_prompt_it_was_trained_with(tiny_folder, triplets, tmp_path):
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    (model / "chat_template.jinja").write_text(
        "{{ messages[0].role == 'user' or raise_exception('no system turns') }}{{ strftime_now('%d.%m.%Y') }}"
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[A]{% endif %}"
    )
    (tmp_path / "prompt.txt").write_text("Own words.\n")
    run = [
        *recipe(model, triplets, tmp_path / "run"), "trainer.total_training_steps=1", "data.system_prompt_in=user",
        f"data.system_prompt={tmp_path}/prompt.txt",
    ]  # fmt: skip
    done = train_here(*run)
    assert done.returncode == 0, done.stderr
    table = " ".join(done.stdout.split())  # its cells are wrapped
    assert "system prompt 'Own words.' in the user turn (data.system_prompt)" in table
    assert "date in the prompts 2024-07-26 (data.template_date)" in table
    folder = tmp_path / "run" / "global_step_1" / "huggingface"
    settings = json.loads((folder / "embedder_config.json").read_text())
    kept = {name: settings[name] for name in ("system_prompt", "system_prompt_in", "template_date")}
    assert kept == {"system_prompt": "Own words.", "system_prompt_in": "user", "template_date": "2024-07-26"}
    encoder = GraceEncoder(folder, device="cpu")
    (prompt,) = encoder.renderer.render([rationale_messages("a text", encoder.settings.system_prompt)])
    assert encoder.tokenizer.decode(prompt.ids) == "True26.07.2024[user]Own words.\n\na text[A]"
    # With another text in the same file it is another run.
    (tmp_path / "prompt.txt").write_text("Other words.\n")
    done = train_here(*run)
    assert done.returncode == 2 and "data.system_prompt: 'Own words.' before, 'Other words.' now" in done.stderr


def test_a_resumed_run_does_what_the_whole_run_did(whole_run, tiny_folder, triplets, tmp_path):
    run_dir = tmp_path / "resumed"
    base = [*recipe(tiny_folder, triplets, run_dir), "trainer.total_training_steps=5", GOLDEN_LR]
    resume = ["trainer.resume_mode=resume_path", f"trainer.resume_from_path={whole_run}/global_step_3"]
    done = train_here(*base, *resume)
    assert done.returncode == 0, done.stderr
    assert "3 steps done" in done.stdout
    resumed = {m["step"]: m for m in steps_of(run_dir)}
    assert sorted(resumed) == [4, 5]
    for expected in steps_of(whole_run)[3:]:
        for name, value in expected.items():
            if not name.startswith(MEASURED):
                assert resumed[expected["step"]][name] == value, name


def test_the_numbers_are_the_golden_ones(whole_run):
    """A change of maths must change golden.json knowingly: delete it, run this test, explain it in CHANGELOG.md."""
    steps = [{name: m[name] for name in GOLDEN_TOLERANCE} for m in steps_of(whole_run)]
    environment = {
        "torch": version("torch"),
        "transformers": version("transformers"),
        "machine": platform.machine(),
    }
    if not GOLDEN.exists():
        GOLDEN.write_text(json.dumps({"environment": environment, "steps": steps}, indent=1) + "\n")
        pytest.fail(f"wrote {GOLDEN.name}; look at it and commit it")
    golden = json.loads(GOLDEN.read_text())
    for step, (got, expected) in enumerate(zip(steps, golden["steps"], strict=True), start=1):
        for name, tolerance in GOLDEN_TOLERANCE.items():
            message = f"step {step} {name}; golden environment {golden['environment']}, here {environment}"
            assert got[name] == pytest.approx(expected[name], rel=0, abs=tolerance), message


def test_an_unsupervised_run_with_infonce_on_two_workers(tmp_path, tiny_folder):
    # It may take over a minute: two workers need Ray, and each loads torch and the model.
    data = prepare("unsupervised", write_texts(tmp_path / "raw.txt"), tmp_path / "data")
    run_dir = tmp_path / "run"
    done = main_ppo(
        *recipe(tiny_folder, data, run_dir, "unsupervised"), "+reward_model.reward_kwargs.objective=infonce",
        "trainer.n_gpus_per_node=2", "trainer.total_training_steps=2", "trainer.test_freq=2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for m in steps_of(run_dir):
        assert m["rollout/probs_diff_max"] < 1e-4
        assert m["reward/contrast/variance_share"] > 0
    assert {s["role"] for s in read_samples(run_dir, 1)} == {"positive", "query"}
    assert any("val/effective_rank" in m for m in read_metrics(run_dir))
    AutoModelForCausalLM.from_pretrained(run_dir / "global_step_2" / "huggingface")


def test_workers_on_ray_compute_what_one_in_this_process_does(tmp_path, whole_run, tiny_folder, triplets):
    """Data workers too, beside the threads that tokenizers and Ray have in the driver.

    It may take over a minute: the driver, Ray's worker and the data worker load torch one beside the other.
    """
    run_dir = tmp_path / "run"
    done = main_ppo(
        *recipe(tiny_folder, triplets, run_dir), "trainer.total_training_steps=5", "trainer.save_freq=3", GOLDEN_LR,
        "trainer.test_freq=5", "trainer.val_before_train=True", "data.dataloader_num_workers=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert numbers(run_dir) == numbers(whole_run)
    assert weights_sha256(run_dir, 5) == weights_sha256(whole_run, 5)


def test_kl_in_loss_and_reward_start_at_zero(tmp_path, tiny_folder, triplets):
    run_dir = tmp_path / "run"
    done = train_here(
        *recipe(tiny_folder, triplets, run_dir), "trainer.total_training_steps=2", "trainer.save_freq=0",
        "actor_rollout_ref.actor.use_kl_loss=True", "actor_rollout_ref.actor.kl_loss_coef=0.1",
        "actor_rollout_ref.actor.ppo_mini_batch_size=4", "algorithm.use_kl_in_reward=True",
        "actor_rollout_ref.actor.entropy_coeff=0.01", "algorithm.adv_estimator=rloo",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "reference model loaded" in done.stdout
    first, second = steps_of(run_dir)
    assert first["actor/kl_loss"] == pytest.approx(0, abs=1e-6) and first["reward/kl"] == pytest.approx(0, abs=1e-6)
    assert second["actor/kl_loss"] > 1e-6 and second["reward/kl"] != 0
    assert not (run_dir / "global_step_2").exists()


@pytest.mark.parametrize("rank", [0, 4])
def test_in_steps_without_rationales_the_kl_in_the_loss_is_that_of_the_texts(tmp_path, tiny_folder, triplets, rank):
    run_dir = tmp_path / "run"
    done = train_here(
        *recipe(tiny_folder, triplets, run_dir), "trainer.total_training_steps=3", "trainer.save_freq=0", GOLDEN_LR,
        "actor_rollout_ref.actor.use_kl_loss=True", "actor_rollout_ref.actor.ppo_mini_batch_size=4",
        "+reward_model.reward_kwargs.contrastive_weight=1", "trainer.contrastive_warmup_steps=2",
        "actor_rollout_ref.actor.embedding_grad_share=1", f"actor_rollout_ref.model.lora_rank={rank}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second, writes = (step["actor/kl_loss"] for step in steps_of(run_dir))
    assert first == pytest.approx(0, abs=1e-6) and min(second, writes) > 1e-6


def test_a_joint_run_has_steps_without_rationales_and_resumes_bit_for_bit(tmp_path, tiny_folder, triplets):
    kwargs = {"weight": 0.1, "first_weight": 1.0, "first_steps": 2, "anchors": True}
    joint = [
        *(f"+reward_model.reward_kwargs.contrastive_{name}={value}" for name, value in kwargs.items()),
        "actor_rollout_ref.actor.embedding_grad_share=0.4", "actor_rollout_ref.actor.embedding_grad_every=5",
        "trainer.contrastive_warmup_steps=1", "trainer.contrastive_steps_between=1", "trainer.total_training_steps=6",
        "trainer.save_freq=3", GOLDEN_LR, "data.contrastive_batch_size=10",
        "actor_rollout_ref.actor.use_kl_loss=True", "actor_rollout_ref.actor.tis_imp_ratio_cap=2",
        "+reward_model.reward_kwargs.matryoshka_dims=[16,64]",
    ]  # fmt: skip
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    done = train_here(*recipe(tiny_folder, triplets, whole), *joint)
    assert done.returncode == 0, done.stderr
    table = " ".join(done.stdout.split())  # its cells are wrapped
    assert "without rationales 3 of them: the first 1, 1 after each one with them, with 10 samples each" in table
    assert "step 1/6  without rationales  contrastive" in done.stdout
    steps = steps_of(whole)
    assert [m["step"] for m in steps] == [1, 2, 3, 4, 5, 6]
    # Two steps of 10 and 4 of the 20 triplets are a pass: the next 10 are not left.
    assert [m["training/epoch"] for m in steps] == [0, 0, 1, 1, 2, 2]
    assert json.loads((whole / "global_step_6" / "trainer_state.json").read_text())["samples_seen"] == 3 * 10 + 3 * 4
    for alone in steps[::2]:
        assert "reward/mean" not in alone and "time/gen_s" not in alone and alone["actor/grad_norm"] > 0
        assert {name.split("/")[1] for name in alone if name.startswith("reward/")} == {"contrastive"}
        assert alone["perf/generated_tokens"] == 0 and "actor/pg_loss" not in alone and "rollout/kl" not in alone
    assert [m["reward/contrastive/weight"] for m in steps] == [1, 1, 0.1, 0.1, 0.1, 0.1]
    # Two updates a step: the first of step 2, and the second of step 4.
    assert ["actor/policy_grad_norm" in m for m in steps] == [False, True, False, True, False, False]
    assert steps[3]["actor/embedding_grad_share"] == pytest.approx(0.4, abs=1e-9)
    assert EmbedderSettings.read(whole / "global_step_6" / "huggingface").matryoshka_dims == [16, 64]
    resume = ["trainer.resume_mode=resume_path", f"trainer.resume_from_path={whole}/global_step_3"]
    done = train_here(*recipe(tiny_folder, triplets, resumed), *joint, *resume)
    assert done.returncode == 0, done.stderr
    assert [m for m in numbers(resumed) if m["step"] > 3] == [m for m in numbers(whole) if m["step"] > 3]
    assert weights_sha256(resumed, 6) == weights_sha256(whole, 6)


def test_a_run_without_rationales_trains_as_one_of_such_steps_and_its_model_embeds_so(tmp_path, tiny_folder, triplets):
    contrastive = [
        "+reward_model.reward_kwargs.contrastive_weight=1", "+reward_model.reward_kwargs.contrastive_anchors=True",
        "actor_rollout_ref.actor.embedding_grad_share=1", "trainer.total_training_steps=3", "trainer.save_freq=0",
        "trainer.save_best=val/triplet_accuracy", "trainer.test_freq=3", "trainer.diag_freq=-1", GOLDEN_LR,
        "actor_rollout_ref.actor.use_kl_loss=True", "actor_rollout_ref.actor.kl_loss_coef=0.1",
    ]  # fmt: skip
    bare, steps = tmp_path / "bare", tmp_path / "steps"
    # Whether that engine is installed does not matter.
    engine = "actor_rollout_ref.rollout.name=vllm"
    done = train_here(*recipe(tiny_folder, triplets, bare), *contrastive, "data.think=False", engine)
    assert done.returncode == 0, done.stderr
    table = " ".join(done.stdout.split())
    assert "rollout engine none: data.think=False" in table and "all of them (data.think=False)" in table
    done = train_here(*recipe(tiny_folder, triplets, steps), *contrastive, "trainer.contrastive_warmup_steps=3")
    assert done.returncode == 0, done.stderr
    assert weights_sha256(bare, 3) == weights_sha256(steps, 3)
    val = [next(m for m in read_metrics(run) if "val/triplet_accuracy" in m) for run in (bare, steps)]
    assert val[0]["val/alignment"] != val[1]["val/alignment"], "the other run's validation writes rationales"
    encoder = GraceEncoder(bare / "global_step_3" / "huggingface", device="cpu")
    rows = pq.read_table(triplets / "test.parquet").to_pylist()
    query = encoder.encode_query([row["multi_input"]["query"] for row in rows])
    positive = encoder.encode_document([row["prompt"][-1]["content"] for row in rows])
    alignment = float(np.mean(np.sum((query - positive) ** 2, axis=1)))
    assert val[0]["val/alignment"] == pytest.approx(alignment, abs=1e-4)
    card = (bare / "global_step_3" / "huggingface" / "README.md").read_text()
    assert "without rationales" in card and "return_rationales" not in card and "| rationales | none |" in card


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ([], "embedding_grad_share=None: without rationales there is no policy gradient. Set the share to 1."),
        (["trainer.diag_freq=5"], "trainer.diag_freq=5: diagnoses are of rationales. Set trainer.diag_freq=-1."),
        (["actor_rollout_ref.actor.use_kl_loss=True", "actor_rollout_ref.actor.kl_loss_type=k1"],
         "kl_loss_type=k1 with data.think=False: in these steps the term is of given texts"),
        (["actor_rollout_ref.actor.embedding_grad_share=1"],
         "has no effect: it is read with reward_model.reward_kwargs.contrastive_weight above 0"),
    ],
)  # fmt: skip
def test_what_a_run_without_rationales_needs_is_told_at_once(tmp_path, tiny_folder, triplets, overrides, told):
    done = train_here(*recipe(tiny_folder, triplets, tmp_path / "run"), "data.think=False", *overrides)
    assert done.returncode == 2 and told in message(done.stderr)


def test_plain_texts_are_not_trained_without_rationales(tmp_path, tiny_folder, triplets):
    done = train_here(*recipe(tiny_folder, triplets, tmp_path / "run", "unsupervised"), "data.think=False")
    assert done.returncode == 2 and "there is nothing to learn. Train on triplets" in message(done.stderr)


def test_a_run_without_a_policy_gradient_writes_rationales_and_does_no_work_for_it(tmp_path, tiny_folder, triplets):
    run_dir = tmp_path / "run"
    done = train_here(
        *recipe(tiny_folder, triplets, run_dir), "+reward_model.reward_kwargs.contrastive_weight=1",
        "actor_rollout_ref.actor.embedding_grad_share=1", "actor_rollout_ref.rollout.n=1",
        "trainer.total_training_steps=3",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "no effect without a policy gradient" in done.stdout and "loss" not in done.stdout.split("step 1/3")[1]
    steps = steps_of(run_dir)
    losses = [m["reward/contrastive/loss"] for m in steps]
    assert len(losses) == 3 and all(m["actor/grad_norm"] > 0 and m["perf/generated_tokens"] > 0 for m in steps)
    for name in ("rollout/probs_diff_mean", "actor/entropy", "actor/pg_loss", "actor/embedding_grad_norm"):
        assert name not in steps[0]
    trained = [sample for sample in read_samples(run_dir, 1) if sample["role"] == "positive"]
    assert len(trained) == 4 and all(s["rationale"] and "reward" in s and "advantage" not in s for s in trained)


def test_a_loss_on_the_embeddings_weighs_the_same_in_one_mini_batch_and_in_two(tmp_path, tiny_folder, triplets):
    """Each half's gradient stands for the whole, so that the whole is the mean of the two."""
    norms = {}
    for size in (4, 2):
        run_dir = tmp_path / str(size)
        done = train_here(
            *recipe(tiny_folder, triplets, run_dir), "+reward_model.reward_kwargs.contrastive_weight=1",
            "actor_rollout_ref.actor.embedding_grad_share=1", f"actor_rollout_ref.actor.ppo_mini_batch_size={size}",
            "trainer.total_training_steps=1", "trainer.save_freq=0", "trainer.diag_freq=-1",
            # Weights that stay as they are, and gradients that are not clipped before their norm is taken.
            "actor_rollout_ref.actor.optim.lr=1e-12",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        norms[size] = steps_of(run_dir)[0]["actor/grad_norm"]
    assert norms[4] <= norms[2] < 2 * norms[4]


@pytest.mark.parametrize("manager", ["MarginReward", "MarginLoss"])
def test_a_reward_of_the_users_own_gets_the_whole_step(tmp_path, tiny_folder, triplets, repo, manager):
    run_dir = tmp_path / "run"
    overrides = [o for o in recipe(tiny_folder, triplets, run_dir) if "reward_kwargs" not in o]
    example = repo / "examples/custom_reward.py"
    done = train_here(
        *overrides, f"reward_model.reward_manager={example}:{manager}", "+reward_model.reward_kwargs.margin=0.3",
        "trainer.total_training_steps=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (step,) = steps_of(run_dir)
    assert "reward/margin_met" in step
    assert step["reward/mean"] <= 0.3 + 1e-6
    assert ("actor/embedding_grad_norm" in step) == (manager == "MarginLoss")


def test_an_advantage_estimator_of_the_users_own_comes_with_the_file_of_the_reward(
    tmp_path, tiny_folder, triplets, monkeypatch
):
    monkeypatch.setattr(advantage, "_ADVANTAGE_ESTIMATORS", dict(advantage._ADVANTAGE_ESTIMATORS))
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "from verl.trainer.ppo.core_algos import register_adv_est\n"
        "from verl.workers.reward_manager.base import RewardOutput\n"
        "class Mine:\n"
        "    needs_embeddings = False\n"
        "    exclude_system_prompt = True\n"
        "    def __call__(self, rows): return RewardOutput(torch.arange(len(rows)).float())\n"
        "@register_adv_est('scaled')\n"
        "def scaled(rewards, mask, group, norm_by_std, gamma):\n"
        "    return gamma * (rewards * mask).sum(1, keepdim=True) * mask\n"
    )
    run_dir = tmp_path / "run"
    overrides = [o for o in recipe(tiny_folder, triplets, run_dir) if "reward_kwargs" not in o]
    done = train_here(
        *overrides, f"reward_model.reward_manager={tmp_path}/mine.py:Mine", "trainer.total_training_steps=1",
        "algorithm.adv_estimator=scaled", "algorithm.gamma=0.5",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    samples = read_samples(run_dir, 1)
    assert sorted(s["reward"] for s in samples) == list(range(12))
    assert all(s["advantage"] == s["reward"] / 2 for s in samples)


def test_steps_that_train_by_embeddings_alone_need_a_reward_manager_that_asks_for_them(tmp_path, tiny_folder, triplets):
    (tmp_path / "mine.py").write_text(
        "class Mine:\n"
        "    needs_embeddings = trains_anchors = exclude_system_prompt = False\n"
        "    text_share = no_rationale_weight = matryoshka_dims = None\n"
        "    def __init__(self, **kwargs): pass\n"
        "    def __call__(self, rows): raise RuntimeError\n"
    )
    overrides = [o for o in recipe(tiny_folder, triplets, tmp_path / "run") if "reward_kwargs" not in o]
    command = [*overrides, f"reward_model.reward_manager={tmp_path}/mine.py:Mine", "trainer.total_training_steps=1"]
    done = train_here(*command, "trainer.contrastive_warmup_steps=1")
    assert done.returncode == 2
    assert "trainer.contrastive_warmup_steps=1: step 1 follows no policy gradient" in message(done.stderr)


def test_naive_rewards_need_no_anchors(tmp_path, tiny_folder, triplets):
    score = tmp_path / "score.py"
    score.write_text(
        "def vowels(data_source, solution_str, ground_truth, extra_info, weight):\n"
        "    return weight * sum(c in 'aeiou' for c in solution_str)\n"
    )
    run_dir = tmp_path / "run"
    overrides = [o for o in recipe(tiny_folder, triplets, run_dir) if "reward_kwargs" not in o]
    done = train_here(
        *overrides, "reward_model.reward_manager=naive", f"custom_reward_function.path={score}",
        "custom_reward_function.name=vowels", "+custom_reward_function.reward_kwargs.weight=2",
        "trainer.total_training_steps=1", "trainer.test_freq=1", "trainer.save_best=val/reward",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    samples = read_samples(run_dir, 1)
    assert len(samples) == 12 and {s["role"] for s in samples} == {"positive"}
    assert (run_dir / "best_checkpointed_iteration.txt").is_file()
    for s in samples:
        assert s["reward"] == 2 * sum(c in "aeiou" for c in s["rationale"])


def test_an_exception_in_a_reward_ends_the_run_with_its_own_traceback(tmp_path, tiny_folder, triplets):
    reward = tmp_path / "broken.py"
    reward.write_text(
        "class Broken:\n    needs_embeddings = False\n    exclude_system_prompt = True\n"
        "    def __call__(self, rows):\n        raise ZeroDivisionError('the reward is broken')\n"
    )
    overrides = [o for o in recipe(tiny_folder, triplets, tmp_path / "run") if "reward_kwargs" not in o]
    done = train_here(*overrides, f"reward_model.reward_manager={reward}:Broken")
    assert done.returncode == 1
    assert "in __call__\n    raise ZeroDivisionError('the reward is broken')" in done.stderr
    assert "broken.py:Broken failed: the reward is broken" in message(done.stderr)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
