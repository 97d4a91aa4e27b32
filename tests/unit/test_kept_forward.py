"""The forward that is kept from scoring to the update: the same numbers as two forwards, and never for other rows."""

import pytest
import torch
from steps import build_actor, tiny_policy, trained_rows, with_log_probs

from verl.config import MicroBatchLimit
from verl.models.fsdp import full_weights
from verl.models.packing import Row, pack
from verl.models.policy import PolicyOutput
from verl.protocol import DataProto, is_trained
from verl.workers.kept_forward import KeptForward

pytestmark = pytest.mark.usefixtures("process_group")


def line_of(response: tuple[int, ...]):
    return pack([Row((1, 2, 3), response, 0, True)], share_prompts=True)


def test_a_kept_forward_is_given_once_and_for_its_own_line_alone():
    out = PolicyOutput(torch.zeros(2), None, None)
    kept = KeptForward(tiny_policy(), temperature=1.0, needs_log_probs=False)
    assert kept.take(line_of((4, 5))) is None
    kept.keep(line_of((4, 5)), out)
    assert kept.take(line_of((4, 5))) is out
    assert kept.take(line_of((4, 5))) is None
    kept.keep(line_of((4, 5)), out)
    assert kept.take(line_of((4, 6))) is None
    assert kept.take(line_of((4, 5))) is None, "it must be forgotten once it did not fit"


def rows_to_train() -> DataProto:
    return with_log_probs(trained_rows(), tiny_policy())


def with_anchors(rows: DataProto) -> DataProto:
    """The trained rows with every third one an anchor."""
    tensors = {**{k: rows.batch[k] for k in rows.batch.keys()}, "trained": torch.arange(len(rows)) % 3 != 1}
    return DataProto.from_dict(tensors, {"uid": range(len(rows))})


def step_of(one_mini_batch: bool, limit: int, loss: str) -> tuple[DataProto, dict, dict, int]:
    """Score rows and update on them; also the weights after it, and how often the model ran.

    Args:
        loss: "policy" alone, or with a loss on the embeddings: of the "rationales", or of the "anchors" too.
    """
    policy = tiny_policy()
    actor = build_actor(policy, one_mini_batch, ppo_max_token_len_per_gpu=limit)
    # A measurement would run the model once more.
    actor.balance.measure(1.0, 1.0, 1.0)
    calls = []
    policy.register_forward_hook(lambda *_: calls.append(1))
    rows = with_anchors(rows_to_train())
    scored = actor.score(rows, MicroBatchLimit(limit, None), embed=True, train_anchors=loss == "anchors")
    rows.batch["old_log_probs"] = scored.batch["log_probs"]
    rows.batch["mini_batch"].zero_()
    if loss != "policy":
        generator = torch.Generator().manual_seed(3)
        rows = rows.with_tensors(embedding_grad=torch.randn(scored.batch["embeddings"].shape, generator=generator))
    metrics = actor.update(rows if loss == "anchors" else rows[is_trained(rows)], 1)
    return scored, metrics, dict(full_weights(policy)), len(calls)


@pytest.mark.parametrize("loss", ["policy", "rationales", "anchors"])
@pytest.mark.parametrize("limit", [10_000, 90])
def test_a_forward_kept_from_scoring_gives_the_scores_and_the_update_of_two_forwards(limit, loss):
    scored, metrics, weights, calls = step_of(True, limit, loss)
    expected, plain_metrics, plain_weights, plain_calls = step_of(False, limit, loss)
    for name in ("log_probs", "entropy", "embeddings"):
        torch.testing.assert_close(scored.batch[name], expected.batch[name], atol=1e-5, rtol=1e-5)
        assert not scored.batch[name].requires_grad
    for name, weight in weights.items():
        torch.testing.assert_close(weight, plain_weights[name], atol=2e-5, rtol=1e-4)
    assert metrics == pytest.approx(plain_metrics, abs=1e-5, rel=1e-3)
    # One for the anchors and one for the trained rows, or one for all; a step of several micro-batches keeps nothing.
    kept = (1 if loss == "anchors" else 2, 2)
    assert (calls, plain_calls) == kept if limit == 10_000 else calls == plain_calls > 2


def test_a_forward_that_was_kept_for_other_rows_is_not_used():
    policy = tiny_policy()
    actor, plain = build_actor(policy, one_mini_batch=True), build_actor(tiny_policy())
    other, rows = with_anchors(rows_to_train()), with_log_probs(trained_rows(seed=4), tiny_policy())
    rows.batch["mini_batch"].zero_()
    actor.score(other, MicroBatchLimit(10_000, None), embed=True)
    assert actor.update(rows, 1) == plain.update(rows, 1)


def test_a_second_pass_over_the_rows_is_a_forward_of_its_own():
    actor = build_actor(tiny_policy(), one_mini_batch=True, ppo_epochs=2, optim={"lr": 1e-2})
    rows = rows_to_train()
    rows.batch["old_log_probs"] = actor.score(rows, MicroBatchLimit(10_000, None), embed=False).batch["log_probs"]
    rows.batch["mini_batch"].zero_()
    # Were the kept forward used twice, its graph would be gone; were it new weights' values, the ratio would be 1.
    assert abs(actor.update(rows, 1)["ppo_kl"]) > 1e-4
