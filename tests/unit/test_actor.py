"""Scoring and updating on one rank: against a plain padded computation, and cut up in different ways."""

import math
from collections import Counter

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

from verl.config import ActorConfig, MicroBatchLimit
from verl.models.fsdp import full_weights
from verl.protocol import DataProto
from verl.workers.scoring import score

pytestmark = pytest.mark.usefixtures("process_group")


def rows_to_train() -> DataProto:
    return with_log_probs(trained_rows(), tiny_policy())


def padded_loss(lm, rows: DataProto, config: ActorConfig, taken: Counter) -> torch.Tensor:
    """The loss of one mini-batch from first principles: padded rows, loops over tokens.

    Args:
        taken: counts the tokens, and those on each branch of the clipping.
    """
    batch, mode = rows.batch, config.loss_agg_mode
    low, high = (config.clip_ratio if own is None else own for own in (config.clip_ratio_low, config.clip_ratio_high))
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
            loss = torch.max(-a * ratio, -a * torch.clamp(ratio, 1 - low, 1 + high))
            row_loss.append(torch.min(loss, -a * config.clip_ratio_c) if a < 0 else loss)
            row_entropy.append(-(distribution[t].exp() * distribution[t]).sum())
            d = batch["ref_log_prob"][i, t] - log_prob
            row_kl.append({"low_var_kl": torch.exp(d) - d - 1, "k2": d * d / 2}[config.kl_loss_type])
            taken["tokens"] += 1
            taken["low"] += bool(a < 0 and ratio < 1 - low)
            taken["high"] += bool(a > 0 and ratio > 1 + high)
            taken["dual"] += bool(a < 0 and ratio > config.clip_ratio_c)
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


@pytest.mark.parametrize(
    ("changes", "more_noise"),
    [
        ({"loss_agg_mode": "token-mean"}, 0),
        ({"loss_agg_mode": "seq-mean-token-sum"}, 0),
        ({"loss_agg_mode": "seq-mean-token-mean"}, 0),
        ({"loss_agg_mode": "seq-mean-token-sum-norm"}, 0),
        ({"clip_ratio_low": 0.05, "clip_ratio_high": 0.3, "clip_ratio_c": 1.1}, 0.5),
        ({"kl_loss_type": "k2", "kl_loss_coef": 1.0}, 0.5),
    ],
    ids=str,
)
def test_an_update_is_adamw_on_the_plain_padded_loss(changes, more_noise):
    rows, config = rows_to_train(), actor_config(**changes)
    generator = torch.Generator().manual_seed(4)
    for key in ("old_log_probs", "ref_log_prob"):
        rows.batch[key] += more_noise * torch.randn(rows.batch[key].shape, generator=generator)
    reference = tiny_model()
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-3, weight_decay=0.01)
    norms, taken = [], [Counter(), Counter()]
    for mini_batch in (0, 1):
        optimizer.zero_grad()
        own = rows[rows.batch["mini_batch"].numpy() == mini_batch]
        padded_loss(reference, own, config, taken[mini_batch]).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)))
        optimizer.step()
    if "clip_ratio_c" in changes:
        assert all(sum(counts[branch] for counts in taken) > 1 for branch in ("low", "high", "dual"))
    actor = build_actor(tiny_policy(), **changes)
    metrics = actor.update(rows, num_mini_batches=2)
    assert metrics["grad_norm"] == pytest.approx(sum(norms) / 2, rel=1e-4)
    clipped, bounded = (
        [sum(counts[branch] for branch in branches) / counts["tokens"] for counts in taken]
        for branches in (("low", "high"), ("dual",))
    )
    assert metrics["pg_clipfrac"] == pytest.approx(sum(clipped) / 2, abs=1e-6)
    assert metrics["pg_clipfrac_lower"] == pytest.approx(sum(bounded) / 2, abs=1e-6)
    expected = dict(reference.named_parameters())
    for name, weight in full_weights(actor.policy):
        torch.testing.assert_close(weight, expected[name].detach(), atol=1e-4, rtol=1e-3)


def test_the_learning_rate_moves_once_an_update_and_not_with_every_optimizer_step():
    policy = tiny_policy()
    rows = with_log_probs(trained_rows(groups=2, n=1), policy)
    actor = build_actor(policy, ppo_epochs=2, optim={"lr": 1e-3, "lr_warmup_steps": 4})
    used: list[float] = []
    actor.optimizer.register_step_pre_hook(lambda optimizer, *_: used.append(optimizer.param_groups[0]["lr"]))
    told = [actor.update(rows, num_mini_batches=2)["lr"] for _ in range(5)]
    rates = [0, 0.25e-3, 0.5e-3, 0.75e-3, 1e-3]
    assert told == pytest.approx(rates)
    assert used == pytest.approx([rate for rate in rates for _ in range(4)])


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
