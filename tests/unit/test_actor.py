"""Scoring and updating on one rank: against a plain padded computation, and cut up in different ways."""

import math

import pytest
import torch
from steps import (
    MAX_RESPONSE,
    TEMPERATURE,
    actor_config,
    build_actor,
    tiny_policy,
    trained_rows,
    with_log_probs,
)
from tiny import tiny_model

from verl.models.fsdp import full_weights
from verl.protocol import DataProto
from verl.workers.micro_batches import MicroBatchLimit
from verl.workers.scoring import score

pytestmark = pytest.mark.usefixtures("process_group")


def rows_to_train() -> DataProto:
    return with_log_probs(trained_rows(), tiny_policy())


def padded_loss(lm, rows: DataProto, mode: str) -> torch.Tensor:
    """The loss of one mini-batch from first principles: padded rows, loops over tokens."""
    config, batch = actor_config(), rows.batch
    per_row, entropies, kls = [], [], []
    for i in range(len(rows)):
        prompt = batch["prompts"][i, -int(batch["prompt_length"][i]) :]
        length = int(batch["response_length"][i])
        response = batch["responses"][i, :length]
        logits = lm(torch.cat([prompt, response]).unsqueeze(0)).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
        distribution = logits.log_softmax(-1)
        row_loss, row_entropy, row_kl = [], [], []
        for t in range(length):
            log_prob = distribution[t, response[t]]
            ratio = torch.exp(log_prob - batch["old_log_probs"][i, t])
            a = batch["advantages"][i, t]
            loss = torch.max(-a * ratio, -a * torch.clamp(ratio, 1 - config.clip_ratio, 1 + config.clip_ratio))
            row_loss.append(torch.min(loss, -a * config.clip_ratio_c) if a < 0 else loss)
            row_entropy.append(-(distribution[t].exp() * distribution[t]).sum())
            d = batch["ref_log_prob"][i, t] - log_prob
            row_kl.append(torch.exp(d) - d - 1)
        per_row.append(row_loss)
        entropies.append(row_entropy)
        kls.append(row_kl)

    def aggregate(values):
        if mode == "token-mean":
            return sum(v for row in values for v in row) / sum(len(row) for row in values)
        if mode == "seq-mean-token-sum":
            return sum(sum(row) for row in values) / len(values)
        if mode == "seq-mean-token-mean":
            return sum(sum(row) / len(row) for row in values) / len(values)
        return sum(v for row in values for v in row) / MAX_RESPONSE

    return aggregate(per_row) + config.kl_loss_coef * aggregate(kls) - config.entropy_coeff * aggregate(entropies)


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
def test_an_update_is_adamw_on_the_plain_padded_loss(mode):
    rows = rows_to_train()
    reference = tiny_model()
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-3, weight_decay=0.01)
    norms = []
    for mini_batch in (0, 1):
        optimizer.zero_grad()
        padded_loss(reference, rows[rows.batch["mini_batch"].numpy() == mini_batch], mode).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)))
        optimizer.step()
    actor = build_actor(tiny_policy(), loss_agg_mode=mode)
    metrics = actor.update(rows, num_mini_batches=2)
    assert metrics["grad_norm"] == pytest.approx(sum(norms) / 2, rel=1e-4)
    expected = dict(reference.named_parameters())
    for name, weight in full_weights(actor.policy):
        torch.testing.assert_close(weight, expected[name].detach(), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "limit",
    [{"ppo_max_token_len_per_gpu": 60}, {"use_dynamic_bsz": False, "ppo_micro_batch_size_per_gpu": 1}],
)
def test_cutting_a_mini_batch_into_micro_batches_changes_nothing(limit):
    rows = rows_to_train()
    whole = build_actor(tiny_policy())
    cut = build_actor(tiny_policy(), **limit)
    expected, metrics = whole.update(rows, 2), cut.update(rows, 2)
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    other = dict(full_weights(cut.policy))
    for name, weight in full_weights(whole.policy):
        torch.testing.assert_close(other[name], weight, atol=1e-5, rtol=1e-4)


def test_first_update_from_its_own_log_probs_has_ratio_one():
    policy = tiny_policy()
    rows = trained_rows()
    limit = MicroBatchLimit(10_000, None)
    rows.batch["old_log_probs"] = score(policy, rows, limit, TEMPERATURE, False, False).batch["log_probs"]
    metrics = build_actor(policy, use_kl_loss=False, entropy_coeff=0.0).update(rows, 1)
    assert metrics["ppo_kl"] == pytest.approx(0, abs=1e-6)
    assert metrics["pg_clipfrac"] == 0 and math.isfinite(metrics["grad_norm"])


@pytest.mark.parametrize("max_tokens", [50, 10_000])
def test_scores_do_not_depend_on_micro_batches_and_come_back_in_order(max_tokens):
    rows, policy = trained_rows(), tiny_policy()
    shuffled = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1)).tolist()
    limit = MicroBatchLimit(max_tokens, None)
    expected = score(policy, rows, MicroBatchLimit(None, 1), TEMPERATURE, embed=True, entropy=True)
    scored = score(policy, rows[shuffled], limit, TEMPERATURE, embed=True, entropy=True)
    for key in ("log_probs", "embeddings", "entropy"):
        torch.testing.assert_close(scored.batch[key], expected.batch[key][shuffled], atol=1e-5, rtol=1e-5)
    past_the_end = torch.arange(MAX_RESPONSE) >= rows.batch["response_length"].unsqueeze(1)
    assert (expected.batch["log_probs"][past_the_end] == 0).all()
    assert (expected.batch["log_probs"][~past_the_end] < 0).all()


def test_a_gradient_that_is_not_finite_skips_the_step_and_stops_after_three():
    rows = rows_to_train()
    actor = build_actor(tiny_policy())
    before = {name: weight.clone() for name, weight in full_weights(actor.policy)}
    rows.batch["advantages"][0, 0] = float("inf")
    one = rows[rows.batch["mini_batch"].numpy() == 0]
    for _ in range(2):
        assert actor.update(one, 1)["skipped_steps"] == 1
    for name, weight in full_weights(actor.policy):
        assert torch.equal(weight, before[name])
    with pytest.raises(FloatingPointError, match="3 optimizer steps in a row"):
        actor.update(one, 1)
