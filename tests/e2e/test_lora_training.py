"""LoRA from training to the programs that read a checkpoint."""

import json

import numpy as np
import pytest
import torch
from peft import PeftModel
from runs import message, numbers, recipe, steps_of, train_here
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForCausalLM

from verl import GraceEncoder
from verl import export_sentence_transformer as export
from verl import merge_model as merge
from verl import push_to_hub as push
from verl.models import fsdp
from verl.models.fsdp import full_weights
from verl.workers import weight_sync
from verl.workers.weight_sync import WeightSyncError

LORA = ["actor_rollout_ref.model.lora_rank=4", "actor_rollout_ref.model.lora_alpha=8"]
# One update a step.
KL = [
    "actor_rollout_ref.actor.ppo_mini_batch_size=4",
    "actor_rollout_ref.actor.use_kl_loss=True",
    "actor_rollout_ref.actor.kl_loss_coef=0.01",
]
QUIET = ["trainer.diag_freq=-1", "trainer.save_freq=2"]
TEXTS = ["a river", "stone and paper, both of them", ""]


def train(model, data, run_dir, *overrides, steps: int = 2):
    return train_here(
        *recipe(model, data, run_dir), *LORA, *KL, *QUIET, f"trainer.total_training_steps={steps}", *overrides
    )


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, tiny_folder, triplets):
    run_dir = tmp_path_factory.mktemp("runs") / "lora"
    done = train(tiny_folder, triplets, run_dir, "trainer.diag_freq=2", "trainer.diag_texts=6")
    assert done.returncode == 0, done.stderr
    assert "LoRA of rank 4, alpha 8, in 21 layers (down_proj, gate_proj" in done.stdout
    assert "reference model this one without its adapter" in " ".join(done.stdout.split())
    return run_dir


def model_of(run_dir, step: int = 2):
    return run_dir / f"global_step_{step}" / "huggingface"


def test_adapters_learn_reach_the_engine_and_are_what_the_reference_lacks(run_dir):
    first, second = steps_of(run_dir)
    assert first["actor/grad_norm"] > 0 and second["actor/grad_norm"] > 0
    assert "sync/adapter_arrived" not in first and second["sync/adapter_arrived"] == pytest.approx(1, abs=1e-3)
    # Before the first update policy and reference are one model.
    assert first["actor/kl_loss"] < 1e-6 < second["actor/kl_loss"]
    assert max(step["rollout/probs_diff_max"] for step in (first, second)) < 1e-4


def test_a_checkpoint_holds_the_adapter_and_no_other_weights(run_dir, tiny_folder):
    folder = model_of(run_dir)
    weights = load_file(folder / "adapter_model.safetensors")
    assert len(weights) == 2 * 21 and {weight.dtype for weight in weights.values()} == {torch.float32}
    assert any(weight.abs().max() > 0 for name, weight in weights.items() if "lora_B" in name)
    assert not (folder / "config.json").exists() and not list(folder.glob("model*"))
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tiny_folder)
    stored = FileSystemReader(folder.parent / "actor").read_metadata().state_dict_metadata
    assert len([name for name in stored if name.startswith("model.")]) == len(weights)
    assert all(".lora_" in name for name in stored if name.startswith(("model.", "optimizer.state.")))


def test_the_run_resumes_as_if_it_had_not_stopped(run_dir, tiny_folder, triplets, tmp_path):
    straight = tmp_path / "straight"
    done = train(tiny_folder, triplets, straight, "trainer.save_freq=3", steps=3)
    assert done.returncode == 0, done.stderr
    resumed = tmp_path / "resumed"
    assert train(tiny_folder, triplets, resumed).returncode == 0
    done = train(tiny_folder, triplets, resumed, "trainer.save_freq=3", steps=3)
    assert done.returncode == 0, done.stderr
    assert [m for m in numbers(resumed) if m.get("step") == 3] == [m for m in numbers(straight) if m.get("step") == 3]
    one, two = (load_file(model_of(place, 3) / "adapter_model.safetensors") for place in (straight, resumed))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    done = train(tiny_folder, triplets, resumed, "actor_rollout_ref.model.lora_rank=8", steps=4)
    assert done.returncode == 2 and "model.lora_rank: 4 before, 8 now" in message(done.stderr)


def test_an_adapter_that_was_trained_before_is_judged_by_the_model_without_it(run_dir, tiny_folder, triplets, tmp_path):
    """At the first diagnosis too, so that the later ones can be compared with it."""
    continued = tmp_path / "continued"
    done = train_here(
        *recipe(tiny_folder, triplets, continued), f"actor_rollout_ref.model.lora_adapter_path={model_of(run_dir)}",
        "trainer.diag_freq=1", "trainer.diag_texts=6", "actor_rollout_ref.actor.optim.lr=1e-12",
        "trainer.total_training_steps=1", "trainer.save_freq=0",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    before, after = (m["diag/log_likelihood"] for m in numbers(continued) if "diag/log_likelihood" in m)
    assert before == pytest.approx(after, abs=1e-7)


def test_the_merged_model_is_the_adapter_on_its_model_for_every_program(run_dir, tiny_folder, tmp_path, capsys):
    merged = tmp_path / "merged"
    arguments = ["--backend", "fsdp", "--local_dir"]
    assert merge.main(["merge", *arguments, str(run_dir), "--target_dir", str(merged)]) == 0
    assert "a LoRA adapter of" in capsys.readouterr().out
    plain = AutoModelForCausalLM.from_pretrained(tiny_folder)
    by_peft = PeftModel.from_pretrained(plain, model_of(run_dir)).merge_and_unload()
    weights = load_file(merged / "model.safetensors")
    for name, weight in by_peft.named_parameters():
        assert torch.equal(weights[name], weight), name
    # An adapter's own folder, and the comparison with a merged one.
    assert merge.main(["test", *arguments, str(model_of(run_dir)), "--test_hf_dir", str(merged)]) == 0
    assert merge.main(["test", *arguments, str(run_dir), "--test_hf_dir", str(tiny_folder)]) == 1
    options = {"device": "cpu", "engine": "hf"}
    with GraceEncoder(model_of(run_dir), **options) as adapted, GraceEncoder(merged, **options) as whole:
        for think in (True, False):
            found, expected = (e.encode(TEXTS, think=think, max_new_tokens=6) for e in (adapted, whole))
            np.testing.assert_array_equal(found, expected)
        assert adapted.revision != whole.revision
    with GraceEncoder(tiny_folder, settings=adapted.settings, **options) as untrained:
        assert np.abs(untrained.encode(TEXTS, think=False) - expected).max() > 1e-4


@pytest.mark.parametrize("flags", [[], ["--rationales"]])
def test_an_adapter_is_exported_to_sentence_transformers(run_dir, tmp_path, flags, capsys):
    arguments = ["--model_path", str(model_of(run_dir)), "--output", str(tmp_path / "out"), *flags]
    assert export.main(arguments) == 0, capsys.readouterr().err
    assert (tmp_path / "out" / "modules.json").is_file()


def test_an_adapter_of_a_folder_of_this_machine_is_not_uploaded(run_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = push.main(["--model", str(run_dir / "global_step_2"), "--repo", "me/it", "--dry_run", "--license", "mit"])
    assert code == 2 and "a folder of this machine; upload the whole model" in capsys.readouterr().err


def test_a_run_may_save_the_whole_model(tiny_folder, triplets, tmp_path):
    for name, extra in {"whole": ["trainer.merge_lora=True"], "alone": []}.items():
        assert train(tiny_folder, triplets, tmp_path / name, *extra).returncode == 0
    assert not (model_of(tmp_path / "whole") / "adapter_config.json").exists()
    whole = AutoModelForCausalLM.from_pretrained(model_of(tmp_path / "whole"))
    plain = AutoModelForCausalLM.from_pretrained(tiny_folder)
    by_peft = PeftModel.from_pretrained(plain, model_of(tmp_path / "alone")).merge_and_unload()
    for (name, one), (_, two) in zip(whole.named_parameters(), by_peft.named_parameters(), strict=True):
        assert torch.equal(one, two), name


def test_training_goes_on_with_a_saved_adapter(run_dir, tiny_folder, triplets, tmp_path):
    adapter = f"actor_rollout_ref.model.lora_adapter_path={model_of(run_dir)}"
    overrides = [*recipe(tiny_folder, triplets, tmp_path / "run"), *QUIET, "trainer.total_training_steps=1", adapter]
    done = train_here(*overrides)
    assert done.returncode == 0, done.stderr
    assert steps_of(tmp_path / "run")[0]["sync/adapter_arrived"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("actor_rollout_ref.model.target_modules=[q_proj,lm_head]", "the LM head"),
        ("actor_rollout_ref.model.target_modules=[nothing]", "peft cannot adapt these layers"),
        ("actor_rollout_ref.model.lora_adapter_path=/nowhere", "lora_adapter_path=/nowhere: there is no adapter"),
    ],
)
def test_adapters_that_cannot_be_built_end_the_run_before_it_starts(tiny_folder, triplets, tmp_path, override, said):
    done = train(tiny_folder, triplets, tmp_path / "run", override)
    assert done.returncode == 2 and said in message(done.stderr)
    assert "parameters, cpu" not in done.stdout


def test_a_sync_that_loses_the_adapters_ends_the_run(tiny_folder, triplets, tmp_path, monkeypatch):
    def without_adapters(policy, names=None, dtype=None):
        with monkeypatch.context() as patched:
            patched.setattr(fsdp, "_product", lambda policy, adapter: torch.zeros(()))
            yield from full_weights(policy, names, dtype)

    monkeypatch.setattr(weight_sync, "full_weights", without_adapters)
    # Too slow a rate for fixed sentences to show it.
    with pytest.raises(WeightSyncError, match="holds 0.0% of what the adapters add"):
        train(tiny_folder, triplets, tmp_path / "run", "actor_rollout_ref.actor.optim.lr=1e-5")
    assert [m["step"] for m in steps_of(tmp_path / "run")] == [1]


def test_an_adapter_is_no_model_to_start_from(run_dir, triplets, tmp_path):
    done = train(model_of(run_dir), triplets, tmp_path / "run")
    assert done.returncode == 2
    assert "is a LoRA adapter. To go on training it, set model.path=" in message(done.stderr)
