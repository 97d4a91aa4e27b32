"""Checkpoints of an optimizer that has not stepped yet, or not on every weight: they load, and training goes on."""

import resource
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp
from steps import build_actor, tiny_policy, trained_rows, with_log_probs
from tiny import tiny_tokenizer
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from verl.checkpoint.disk_errors import disk_errors
from verl.checkpoint.training_state import load_training_state, save_training_state, save_transformers_folder
from verl.embedding.settings import EmbedderSettings
from verl.errors import UserError
from verl.models.fsdp import full_weights
from verl.workers.actor import Actor

UNUSED = "model.layers.1.mlp.up_proj.weight"


pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture
def rows():
    return with_log_probs(trained_rows(), tiny_policy())


def save(actor: Actor, folder) -> None:
    save_training_state(folder, actor.policy, actor.optimizer, actor.scheduler, rank=0)


def resumed(folder, unused: str | None = None) -> Actor:
    """An actor of other weights that loads a checkpoint."""
    actor = new_actor(seed=5, unused=unused)
    load_training_state(folder, actor.policy, actor.optimizer, actor.scheduler, rank=0)
    return actor


def new_actor(seed: int = 0, unused: str | None = None) -> Actor:
    """An actor; the weight `unused` gets no gradient, as one that no forward reaches."""
    policy = tiny_policy(seed)
    if unused:
        policy.lm.get_parameter(unused).register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    return build_actor(policy, optim={"lr": 1e-3, "lr_warmup_steps": 4})


def skipped(rows):
    """The rows with an advantage that makes the gradient infinite."""
    bad = rows[list(range(len(rows)))]
    bad.batch["advantages"] = bad.batch["advantages"].clone()
    bad.batch["advantages"][:, 0] = float("inf")
    return bad


def assert_same_after_an_update(first: Actor, second: Actor, rows) -> None:
    assert first.update(rows, 2) == pytest.approx(second.update(rows, 2), rel=1e-6)
    expected = dict(full_weights(second.policy))
    for name, weight in full_weights(first.policy):
        assert torch.equal(weight, expected[name]), name


def test_a_checkpoint_whose_updates_were_all_skipped_resumes(rows, tmp_path):
    actor = new_actor()
    assert actor.update(skipped(rows), 1)["skipped_steps"] == 1
    save(actor, tmp_path / "actor")
    assert_same_after_an_update(resumed(tmp_path / "actor"), actor, rows)


def test_saving_before_the_first_step_does_not_count_as_a_step(rows, tmp_path):
    actor, plain = new_actor(), new_actor()
    for one in (actor, plain):
        one.scheduler.step()
    save(actor, tmp_path / "actor")
    assert not actor.optimizer.state
    assert_same_after_an_update(actor, plain, rows)


def test_an_old_checkpoint_without_any_optimizer_state_resumes(rows, tmp_path):
    """Earlier versions wrote the settings of such an optimizer, and no state."""
    actor = new_actor()
    actor.scheduler.step()
    settings = {**actor.optimizer.state_dict()["param_groups"][0]}
    settings["params"] = [name for name, _ in actor.policy.named_parameters()]
    state = {"model": get_model_state_dict(actor.policy), "optimizer": {"state": {}, "param_groups": [settings]}}
    dcp.save(state, checkpoint_id=tmp_path / "actor")
    torch.save(
        {"scheduler": actor.scheduler.state_dict(), "rng": torch.get_rng_state()}, tmp_path / "actor/extra_rank_0.pt"
    )
    assert_same_after_an_update(resumed(tmp_path / "actor"), actor, rows)


def test_a_weight_that_never_had_a_gradient_begins_anew_and_the_others_go_on(rows, tmp_path):
    actor = new_actor(unused=UNUSED)
    actor.update(rows, 2)
    assert actor.policy.lm.get_parameter(UNUSED) not in actor.optimizer.state
    save(actor, tmp_path / "actor")
    assert_same_after_an_update(resumed(tmp_path / "actor", unused=UNUSED), actor, rows)
    # From now on with a gradient: its first step must be a first one.
    later = resumed(tmp_path / "actor")
    moments = later.optimizer.state[later.policy.lm.get_parameter(UNUSED)]
    assert {name: float(value.abs().max()) for name, value in moments.items()} == {
        "step": 0, "exp_avg": 0, "exp_avg_sq": 0
    }  # fmt: skip


@pytest.fixture
def largest_file():
    """A function that forbids this process files of more bytes than it is given, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("what", ["state", "folder"])
def test_a_write_that_fails_anywhere_raises_the_disks_error(what, rows, tmp_path, largest_file):
    """torch, safetensors and tokenizers each raise something else, which depends on where the disk is full."""
    actor = new_actor()
    actor.update(rows, 1)

    def write() -> None:
        if what == "state":
            save(actor, tmp_path / "it")
        else:
            settings, policy = EmbedderSettings(), actor.policy
            save_transformers_folder(tmp_path / "it", full_weights(policy), policy.lm, tiny_tokenizer(), settings, 0)

    write()
    whole = max(file.stat().st_size for file in (tmp_path / "it").rglob("*"))
    for size in {*range(0, 1500, 61), *range(0, whole, whole // 30)}:
        shutil.rmtree(tmp_path / "it")
        largest_file(size)
        with pytest.raises(OSError, match="File too large"):
            write()


def test_an_error_that_says_more_than_the_disks_is_left_as_it_is():
    with pytest.raises(UserError, match="add its files"), disk_errors():
        try:
            raise FileNotFoundError(2, "No such file or directory")
        except OSError as error:
            raise UserError("no tokenizer: No such file (os error 2); add its files") from error


def test_a_tokenizer_that_cannot_be_written_raises_the_disks_error(tmp_path, largest_file):
    """Its file is written after the weights, which are larger; here there are none."""
    largest_file(3000)
    with pytest.raises(OSError, match="File too large"):
        policy = tiny_policy()
        save_transformers_folder(tmp_path / "it", [], policy.lm, tiny_tokenizer(), EmbedderSettings(), 0)
