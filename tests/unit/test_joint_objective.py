"""The contrastive loss on the embeddings: its gradient against loops over texts and plain transformers forwards."""

from dataclasses import dataclass

import pytest
import torch
from steps import TEMPERATURE, build_actor, tiny_policy, whole_step, with_log_probs
from tiny import tiny_model
from torch import Tensor

from verl.algorithm.contrastive import Group, symmetric_infonce
from verl.checkpoint.training_state import load_training_state, save_training_state
from verl.config import MicroBatchLimit, RunConfig
from verl.models.attention import ATTENTION
from verl.models.fsdp import full_weights
from verl.models.policy import PolicyModel
from verl.protocol import DataProto, is_trained
from verl.single_controller.dispatch import Dispatch, remote_call
from verl.trainer.ppo.ray_trainer import check_has_embedding_grad
from verl.trainer.ppo.step_rows import add_embedding_grad, without_rationales
from verl.workers.actor import Actor
from verl.workers.fsdp_workers import ActorRolloutRefWorker
from verl.workers.reward_manager.base import RewardOutput
from verl.workers.reward_manager.checked import RewardError
from verl.workers.reward_manager.hidden import HiddenRewardManager
from verl.workers.scoring import score

# The learning rate changes no weight within the tests' tolerance, and the largest norm clips nothing.
STILL = {"optim": {"lr": 1e-12}, "grad_clip": 1e9}
WHOLE = MicroBatchLimit(10_000, None)
FOR_THE_POLICY = ("advantages", "old_log_probs", "ref_log_prob")
# No policy gradient.
ALONE = {"embedding_grad_share": 1, "use_kl_loss": False, "entropy_coeff": 0}


@dataclass(frozen=True, eq=False)
class Text:
    uid: int
    role: str
    text: str
    vector: Tensor


def slow_infonce(step: list[Text], temperature: float) -> Tensor:
    """The loss from its definition, pair by pair."""
    rows = [t for t in step if t.role == "positive"]
    query = {t.uid: t for t in step if t.role == "query"}
    negatives = [t for t in step if t.role == "negative"]
    texts = {row.uid: {row.text, query[row.uid].text} for row in rows}

    def cross_entropy(of: Text, right: Text, wrong: list[Text]) -> Tensor:
        logits = torch.stack([of.vector @ other.vector for other in [right, *wrong]]) / temperature
        return logits.logsumexp(0) - logits[0]

    losses = []
    for row in rows:
        strangers = [uid for uid in query if uid != row.uid and not texts[uid] & texts[row.uid]]
        hard = [t for t in negatives if t.text not in texts[row.uid]]
        own = query[row.uid]
        losses.append(cross_entropy(row, own, [query[uid] for uid in strangers] + hard))
        losses.append(cross_entropy(own, row, [t for t in rows if t.uid in strangers] + hard))
    return torch.stack(losses).mean()


def as_texts(rows: DataProto, vectors: Tensor) -> list[Text]:
    names = (rows.non_tensor_batch[name] for name in ("uid", "role", "text"))
    return [Text(*of_row, vector) for *of_row, vector in zip(*names, vectors, strict=True)]


@pytest.mark.parametrize("negatives", [True, False])
@pytest.mark.parametrize("n", [1, 3])
def test_the_loss_and_its_gradient_are_those_of_the_definition(negatives, n):
    rows = whole_step(n=n, negatives=negatives)
    generator = torch.Generator().manual_seed(2)
    free = torch.randn(len(rows), 8, generator=generator, dtype=torch.float64)
    vectors = torch.nn.functional.normalize(free, dim=1).requires_grad_()
    roles, texts = rows.non_tensor_batch["role"], rows.non_tensor_batch["text"]
    at = {role: torch.tensor([i for i in range(len(rows)) if roles[i] == role]) for role in set(roles)}
    groups = [
        Group(texts[q], (texts[at["positive"][i * n]],), (texts[at["negative"][i]],) if negatives else ())
        for i, q in enumerate(at["query"])
    ]
    g = torch.arange(len(groups)).repeat_interleave(n)
    n_vectors = vectors[at["negative"]] if negatives else None
    loss, _ = symmetric_infonce(vectors[at["positive"]], vectors[at["query"]], n_vectors, g, groups, 0.05)
    expected = slow_infonce(as_texts(rows, vectors), 0.05)
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=1e-12)
    (grad,), (slow,) = (torch.autograd.grad(value, vectors, retain_graph=True) for value in (loss, expected))
    torch.testing.assert_close(grad, slow, atol=1e-12, rtol=1e-12)
    assert slow.norm() > 0.1


@pytest.mark.parametrize(("given", "temperature"), [({}, 0.05), ({"contrastive_temperature": 0.2}, 0.2)])
def test_the_gradient_of_centred_vectors_is_by_the_embeddings_as_they_are(given, temperature):
    rows = whole_step(n=2)
    free = torch.randn(len(rows), 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    embeddings = torch.nn.functional.normalize(free + 2, dim=1).requires_grad_()
    manager = HiddenRewardManager(
        centre=True, contrastive_weight=0.7, contrastive_anchors=True, enable_length_penalty=False, **given
    )
    grad = manager(rows.with_tensors(embeddings=embeddings.detach())).embedding_grad
    mean = embeddings.mean(0) / embeddings.mean(0).norm()
    left = torch.stack([vector - (vector @ mean) * mean for vector in embeddings])
    left = torch.stack([vector / vector.norm() for vector in left])
    (expected,) = torch.autograd.grad(0.7 * slow_infonce(as_texts(rows, left), temperature), embeddings)
    torch.testing.assert_close(grad, expected, atol=1e-10, rtol=1e-10)


def test_a_step_whose_rows_all_find_their_queries_says_so():
    groups = [Group(f"q{i}", (f"p{i}",), ()) for i in range(3)]
    vectors = torch.eye(3)
    loss, found = symmetric_infonce(vectors, vectors, None, torch.arange(3), groups, 0.05)
    assert found == 1 and loss < 1e-6
    loss, found = symmetric_infonce(vectors.roll(1, 0), vectors, None, torch.arange(3), groups, 0.05)
    assert found == 0 and loss == pytest.approx(20, rel=1e-6)
    groups = [Group(f"q{i}", (f"p{i}",), (f"n{i}",)) for i in range(3)]
    _, found = symmetric_infonce(vectors, 0.9 * vectors, vectors, torch.arange(3), groups, 0.05)
    assert found == 0, "a negative was nearer than the query"


def test_a_step_without_any_other_text_has_a_loss_and_a_gradient_of_zero():
    """All candidates are false negatives: nothing to contrast with, and no NaN."""
    rows = whole_step()
    rows.non_tensor_batch["text"][:] = "one text"
    rows = rows.with_tensors(embeddings=torch.nn.functional.normalize(torch.randn(len(rows), 8), dim=1))
    output = HiddenRewardManager(contrastive_weight=1.0, contrastive_anchors=True)(rows)
    assert output.metrics["contrastive/loss"] == 0
    assert torch.equal(output.embedding_grad, torch.zeros(len(rows), 8))


def test_the_weight_follows_the_number_of_the_step():
    rows = whole_step()
    rows = rows.with_tensors(embeddings=torch.nn.functional.normalize(torch.randn(len(rows), 8), dim=1))
    settings = {"contrastive_weight": 0.1, "contrastive_first_weight": 2.0, "contrastive_first_steps": 2}
    plain = HiddenRewardManager(contrastive_weight=1.0)(rows)
    weights = {}
    for step in (1, 2, 3, 500):
        rows.meta_info["step"] = step
        output = HiddenRewardManager(**settings)(rows)
        weights[step] = output.metrics["contrastive/weight"]
        torch.testing.assert_close(output.embedding_grad, weights[step] * plain.embedding_grad)
        assert output.metrics["contrastive/loss"] == plain.metrics["contrastive/loss"], "it is reported without weight"
    assert weights == {1: 2.0, 2: 2.0, 3: 0.1, 500: 0.1}
    rows.meta_info["step"] = 3
    none = HiddenRewardManager(**{**settings, "contrastive_weight": 0.0})
    assert none(rows).embedding_grad is None
    assert torch.equal(none(rows).scores, HiddenRewardManager()(rows).scores)


@pytest.mark.parametrize("trained", [True, False])
def test_anchors_have_a_gradient_only_where_they_are_trained(trained):
    rows = whole_step()
    rows = rows.with_tensors(embeddings=torch.nn.functional.normalize(torch.randn(len(rows), 8), dim=1))
    manager = HiddenRewardManager(contrastive_weight=1.0, contrastive_anchors=trained)
    norms = manager(rows).embedding_grad.norm(dim=1)
    assert manager.trains_anchors is trained
    assert (norms[torch.from_numpy(is_trained(rows))] > 0).all()
    assert (norms[torch.from_numpy(~is_trained(rows))] > 0).all() == trained
    assert not HiddenRewardManager(contrastive_anchors=True).trains_anchors, "there is no loss that would train them"


# ---- through the model ----


def scored_step(negatives: bool = True) -> DataProto:
    rows = with_log_probs(whole_step(negatives=negatives), tiny_policy())
    scored = score(tiny_policy(), rows, WHOLE, TEMPERATURE, embed=True, entropy=False)
    return rows.with_tensors(embeddings=scored.batch["embeddings"])


def with_grad(rows: DataProto, anchors: bool, **settings) -> DataProto:
    """The rows of the update, as the trainer makes them."""
    manager = HiddenRewardManager(contrastive_weight=0.7, contrastive_anchors=anchors, **settings)
    return add_embedding_grad(rows[is_trained(rows)], rows, manager(rows).embedding_grad, anchors, num_mini_batches=1)


def gradients_of(actor: Actor, rows: DataProto, updates: int = 1) -> tuple[list[dict[str, Tensor]], list[dict]]:
    """The gradients at the weights before each update's clipping and step, and each update's metrics."""
    found = []

    def keep(*_):
        names = {p: name.removeprefix("lm.") for name, p in actor.policy.named_parameters()}
        found.append({name: p.grad.clone() for p, name in names.items()})

    with_hook = actor.optimizer.register_step_pre_hook(keep)
    metrics = [actor.update(rows, 1) for _ in range(updates)]
    with_hook.remove()
    return found, metrics


def norm(gradient: dict[str, Tensor]) -> float:
    return float(torch.stack([g.double().norm() for g in gradient.values()]).norm())


def assert_same_gradient(got: dict[str, Tensor], expected: dict[str, Tensor], share: float = 2e-5) -> None:
    """Up to rounding, in proportion to the whole."""
    difference = {name: got[name].double() - expected[name].double() for name in expected}
    assert got.keys() == expected.keys() and norm(difference) < share * norm(expected)


def plain_gradient(rows: DataProto, anchors: bool) -> dict[str, Tensor]:
    """Of the weighted loss over the whole step in float64."""
    lm = tiny_model().double()
    plain_loss(lm, rows, anchors).backward()
    return {name: p.grad for name, p in lm.named_parameters()}


def plain_loss(lm, rows: DataProto, anchors: bool) -> Tensor:
    """The weighted loss over the whole step: one transformers forward a row, unpacked and unpadded."""
    vectors = []
    for i in range(len(rows)):
        prompt = rows.batch["prompts"][i, -int(rows.batch["prompt_length"][i]) :]
        ids = torch.cat([prompt, rows.batch["responses"][i, : int(rows.batch["response_length"][i])]])
        start = int(rows.batch["pool_start"][i])
        states = lm.model(ids.unsqueeze(0)).last_hidden_state[0, start:]
        vector = unit_mean(states)
        if "no_rationale_weight" in rows.batch.keys():
            weight = float(rows.batch["no_rationale_weight"][i])
            vector = weight * unit_mean(states[: len(prompt) - start]) + (1 - weight) * vector
            vector = vector / vector.norm()
        vectors.append(vector if anchors or is_trained(rows)[i] else vector.detach())
    return 0.7 * slow_infonce(as_texts(rows, torch.stack(vectors)), 0.05)


def unit_mean(states: Tensor) -> Tensor:
    return states.mean(0) / states.mean(0).norm()


def bare_step(score_texts: bool = False) -> DataProto:
    """A step without rationales."""
    rows = whole_step(n=1)
    for name in FOR_THE_POLICY:
        del rows.batch[name]
    return without_rationales(rows, score_texts)


def plain_kl(lm, rows: DataProto, starts: list[int]) -> Tensor:
    """Over the trained rows' tokens from these positions of prompt and response on, one by one, the mean of k3."""
    terms = []
    for i in is_trained(rows).nonzero()[0]:
        prompt = rows.batch["prompts"][i, -int(rows.batch["prompt_length"][i]) :]
        ids = torch.cat([prompt, rows.batch["responses"][i, : int(rows.batch["response_length"][i])]])
        distributions = (lm(ids.unsqueeze(0)).logits[0] / TEMPERATURE).log_softmax(-1)
        for column, position in enumerate(range(starts[i], len(ids))):
            above = rows.batch["ref_log_prob"][i, column] - distributions[position - 1, ids[position]]
            terms.append(above.exp() - above - 1)
    return torch.stack(terms).mean()


def count_heads(policy: PolicyModel) -> list[int]:
    """Grows by one with every forward that computes log-probs: only they ask for the LM head."""
    calls: list[int] = []
    head = policy.lm.get_output_embeddings
    policy.lm.get_output_embeddings = lambda: calls.append(1) or head()
    return calls


@pytest.mark.usefixtures("process_group")
class TestTheUpdate:
    @pytest.mark.parametrize("limit", [10_000, 90])
    @pytest.mark.parametrize("anchors", [True, False])
    @pytest.mark.parametrize("negatives", [True, False])
    def test_its_gradient_is_the_policys_and_that_of_the_loss_over_the_whole_step(self, negatives, anchors, limit):
        rows = scored_step(negatives)
        (policy,), _ = gradients_of(build_actor(tiny_policy(), **STILL), rows[is_trained(rows)])
        expected = plain_gradient(rows, anchors)
        actor = build_actor(tiny_policy(), ppo_max_token_len_per_gpu=limit, **STILL)
        heads, forwards = count_heads(actor.policy), []
        actor.policy.register_forward_hook(lambda *_: forwards.append(1))
        found, metrics = gradients_of(actor, with_grad(rows, anchors), updates=2)
        # Two passes for the first, of which the second needs no head, and one for the second.
        assert len(heads) * 3 == len(forwards) * 2
        # In the first the two gradients are measured apart, in the second there is one backward.
        assert ["policy_grad_norm" in m for m in metrics] == [True, False]
        for both in found:
            assert_same_gradient({name: both[name] - policy[name] for name in both}, expected)
        assert metrics[0]["policy_grad_norm"] == pytest.approx(norm(policy), rel=1e-4)
        assert metrics[0]["embedding_grad_norm"] == pytest.approx(norm(expected), rel=1e-4)
        assert metrics[0]["embedding_grad_share"] == pytest.approx(
            norm(expected) / (norm(expected) + norm(policy)), rel=1e-4
        )

    @pytest.mark.parametrize("limit", [10_000, 90])
    def test_its_gradient_goes_through_the_average_with_the_vectors_without_rationales(self, limit):
        weights = torch.linspace(0.1, 0.9, len(whole_step()), dtype=torch.float64)
        rows = whole_step().with_tensors(no_rationale_weight=weights)
        actor = build_actor(tiny_policy(), ppo_max_token_len_per_gpu=limit, **STILL, **ALONE)
        scored = actor.score(rows, WHOLE, embed=True, log_probs=False, train_anchors=True)
        # What the driver sends to the workers.
        remote = remote_call(ActorRolloutRefWorker.update_actor, Dispatch.DP_COMPUTE_PROTO)
        sent = with_grad(rows.union(scored), anchors=True).only((*remote.columns, *remote.optional_columns))
        (found,), _ = gradients_of(actor, sent)
        assert_same_gradient(found, plain_gradient(rows, anchors=True))
        assert norm(found) > 0.1

    def test_anchors_change_nothing_of_the_policys_part(self):
        """Denominators and metrics count trained rows alone."""
        rows = scored_step()
        rows = rows.with_tensors(embedding_grad=torch.zeros(len(rows), 64))
        for mode in ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"):
            settings = {**STILL, "loss_agg_mode": mode}
            (alone,), (expected,) = gradients_of(build_actor(tiny_policy(), **settings), rows[is_trained(rows)])
            (found,), (metrics,) = gradients_of(build_actor(tiny_policy(), **settings), rows)
            assert_same_gradient(found, alone)
            assert metrics == pytest.approx(expected, rel=1e-4, abs=1e-7)

    def test_the_embedding_gradient_gets_its_share_and_keeps_it_when_the_weight_changes(self):
        rows = scored_step()
        (policy,), _ = gradients_of(build_actor(tiny_policy(), **STILL), rows[is_trained(rows)])
        loss = plain_gradient(rows, anchors=False)
        actor = build_actor(tiny_policy(), embedding_grad_share=0.3, embedding_grad_every=4, **STILL)
        batch = with_grad(rows, anchors=False)
        larger = batch.with_tensors(embedding_grad=10 * batch.batch["embedding_grad"])
        scale = 0.3 / 0.7 * norm(policy) / norm(loss)
        expected = {name: policy[name] + scale * loss[name] for name in policy}
        found, metrics = [], []
        for step in (batch, batch, larger, batch, batch):
            (gradient,), (of_step,) = gradients_of(actor, step)
            found, metrics = [*found, gradient], [*metrics, of_step]
        assert ["policy_grad_norm" in m for m in metrics] == [True, False, False, False, True]
        for gradient in found:
            assert_same_gradient(gradient, expected, share=1e-4)
        assert metrics[4]["embedding_grad_share"] == pytest.approx(0.3, abs=1e-9)

    def test_a_step_without_rationales_is_as_strong_as_the_last_measurement_says(self):
        rows = scored_step()
        settings = {**STILL, "use_kl_loss": False}
        (policy,), _ = gradients_of(build_actor(tiny_policy(), **settings), rows[is_trained(rows)])
        actor, batch = build_actor(tiny_policy(), embedding_grad_share=0.3, **settings), with_grad(rows, anchors=False)
        actor.update(batch, 1)
        bare = bare_step()
        bare = bare.union(score(tiny_policy(), bare, WHOLE, TEMPERATURE, embed=True, entropy=False, log_probs=False))
        alone = with_grad(bare, anchors=True)
        (found,), _ = gradients_of(actor, alone)
        # At the parameters it counts in proportion to the gradient by the vectors.
        sizes = [float(of.batch["embedding_grad"].norm()) for of in (batch, alone)]
        norm_of_loss = norm(plain_gradient(rows, anchors=False)) * sizes[1] / sizes[0]
        scale = 0.3 / 0.7 * norm(policy) / norm_of_loss
        expected = {name: scale * gradient for name, gradient in plain_gradient(bare, anchors=True).items()}
        assert_same_gradient(found, expected, share=1e-4)
        assert abs(scale - 1) > 0.1

    @pytest.mark.parametrize(("writes", "share"), [(False, None), (False, 1), (True, 1)])
    @pytest.mark.parametrize(("limit", "keeps"), [(10_000, True), (10_000, False), (90, False)])
    def test_without_a_policy_gradient_a_kl_term_acts_on_rationales_or_on_texts(self, limit, keeps, writes, share):
        rows = scored_step() if writes else bare_step(score_texts=True)
        starts = rows.batch["prompt_length" if writes else "text_start"].tolist()
        settings = {**STILL, "kl_loss_coef": 2.0, "embedding_grad_share": share, "ppo_max_token_len_per_gpu": limit}
        actor = build_actor(tiny_policy(), one_mini_batch=keeps, **settings)
        own = score(tiny_policy(), rows, WHOLE, TEMPERATURE, embed=False, entropy=False).batch["log_probs"]
        reference = own + 0.3 * torch.randn(own.shape, generator=torch.Generator().manual_seed(4))
        scored = actor.score(rows, WHOLE, embed=True, log_probs=False)
        assert set(scored.batch.keys()) == {"embeddings"}
        for name in ("advantages", "embeddings"):
            rows.batch.pop(name, None)
        rows = rows.union(scored).with_tensors(ref_log_prob=reference)
        remote = remote_call(ActorRolloutRefWorker.update_actor, Dispatch.DP_COMPUTE_PROTO)
        batch = with_grad(rows, anchors=False).only((*remote.columns, *remote.optional_columns))
        if keeps:
            actor.policy.forward = None  # the kept one has what the update needs
        (found,), (metrics,) = gradients_of(actor, batch)
        lm = tiny_model().double()
        kl = plain_kl(lm, rows, starts)
        (plain_loss(lm, rows, anchors=False) + 2 * kl).backward()
        assert_same_gradient(found, {name: p.grad for name, p in lm.named_parameters()}, share=1e-4)
        assert metrics["kl_loss"] == pytest.approx(kl.item(), rel=1e-4) and kl > 0.01
        assert "pg_loss" not in metrics

    @pytest.mark.parametrize("others", [{"use_kl_loss": False, "entropy_coeff": 0.0}, {"kl_loss_coef": 1e-3}])
    def test_a_step_without_a_policy_gradient_is_not_taken_for_a_measurement(self, others):
        """Groups of equal rewards: the share of nothing would switch the embedding gradient off for ten updates, and
        so would that of a small KL term."""
        rows = scored_step()
        settings = {**STILL, **others, "embedding_grad_share": 0.3, "embedding_grad_every": 1}
        level = rows.with_tensors(advantages=1e-9 * rows.batch["advantages"])
        batch, flat = with_grad(rows, anchors=False), with_grad(level, anchors=False)
        (rest,), _ = gradients_of(build_actor(tiny_policy(), **settings), level[is_trained(level)])
        actor = build_actor(tiny_policy(), **settings)
        (gradient,), (first,) = gradients_of(actor, flat)
        loss = plain_gradient(rows, anchors=False)
        assert_same_gradient({name: gradient[name] - rest[name] for name in rest}, loss)
        assert "policy_grad_norm" not in first
        measured = actor.update(batch, 1)
        assert measured["embedding_grad_share"] == pytest.approx(0.3, abs=1e-9)
        (gradient,), (third,) = gradients_of(actor, flat)
        scale = 0.3 / 0.7 * measured["policy_grad_norm"] / norm(loss)
        assert_same_gradient({n: gradient[n] - rest[n] for n in rest}, {n: scale * g for n, g in loss.items()}, 1e-4)
        assert "policy_grad_norm" not in third and "policy_grad_norm" in actor.update(batch, 1)

    @pytest.mark.parametrize(("anchors", "tie", "limit"), [(True, True, 90), (False, False, 90), (True, False, 10_000)])
    def test_a_share_of_1_is_plain_descent_of_the_contrastive_loss(self, anchors, tie, limit):
        """By torch's AdamW on plain forwards; without the columns that the policy loss needs, and without the head."""
        rows = whole_step()
        for name in FOR_THE_POLICY:
            del rows.batch[name]
        policy, plain = PolicyModel(tiny_model(tie)), tiny_model(tie)
        policy.lm.set_attn_implementation(ATTENTION)
        before = {name: weight.clone() for name, weight in full_weights(policy)}
        optim = {"lr": 1e-3, "weight_decay": 0.1}
        # A whole step in one micro-batch keeps the forward that scored.
        actor = build_actor(policy, one_mini_batch=True, ppo_max_token_len_per_gpu=limit, optim=optim, **ALONE)
        heads = count_heads(policy)
        optimizer = torch.optim.AdamW(plain.parameters(), **optim)
        manager = HiddenRewardManager(contrastive_weight=0.7, contrastive_anchors=anchors)
        for _ in range(3):
            scored = actor.score(rows, WHOLE, embed=True, log_probs=False, train_anchors=anchors)
            assert set(scored.batch.keys()) == {"embeddings"}
            grad = manager(rows.union(scored)).embedding_grad
            metrics = actor.update(add_embedding_grad(rows[is_trained(rows)], rows, grad, anchors, 1), 1)
            optimizer.zero_grad()
            plain_loss(plain, rows, anchors).backward()
            norm_before = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
            optimizer.step()
            assert metrics == pytest.approx({"grad_norm": float(norm_before), "lr": 1e-3, "skipped_steps": 0}, rel=1e-3)
        weights = {name: p.detach() for name, p in plain.named_parameters()}
        moved, expected = ({n: w[n] - before[n] for n in before} for w in (dict(full_weights(policy)), weights))
        assert_same_gradient(moved, expected, share=1e-2)
        if not tie:
            assert torch.equal(dict(full_weights(policy))["lm_head.weight"], before["lm_head.weight"])
        assert not heads

    def test_a_resumed_run_measures_when_and_scales_as_the_whole_run_did(self, tmp_path):
        batch = with_grad(scored_step(), anchors=False)
        settings = {"embedding_grad_share": 0.3, "embedding_grad_every": 3}
        actor = build_actor(tiny_policy(), **settings)
        for _ in range(2):
            actor.update(batch, 1)
        parts = (actor.policy, actor.optimizer, actor.scheduler)
        save_training_state(tmp_path, *parts, rank=0, balance=actor.balance)
        expected = [actor.update(batch, 1) for _ in range(3)]
        weights = {name: weight.clone() for name, weight in full_weights(actor.policy)}
        resumed = build_actor(tiny_policy(seed=5), **settings)
        parts = (resumed.policy, resumed.optimizer, resumed.scheduler)
        load_training_state(tmp_path, *parts, rank=0, balance=resumed.balance)
        assert [resumed.update(batch, 1) for _ in range(3)] == expected
        assert ["policy_grad_norm" in m for m in expected] == [False, True, False]
        for name, weight in full_weights(resumed.policy):
            assert torch.equal(weight, weights[name]), name

    def test_a_checkpoint_without_a_measurement_loads_and_is_measured_anew(self, tmp_path):
        batch = with_grad(scored_step(), anchors=False)
        actor = build_actor(tiny_policy())
        actor.update(batch, 1)
        save_training_state(tmp_path, actor.policy, actor.optimizer, actor.scheduler, rank=0)
        resumed = build_actor(tiny_policy(seed=5))
        parts = (resumed.policy, resumed.optimizer, resumed.scheduler)
        load_training_state(tmp_path, *parts, rank=0, balance=resumed.balance)
        assert "policy_grad_norm" in resumed.update(batch, 1)


def test_a_mini_batchs_part_of_the_gradient_stands_for_the_whole():
    rows = whole_step()
    grad = torch.randn(len(rows), 8)
    trained = is_trained(rows)
    alone = add_embedding_grad(rows[trained], rows, grad, train_anchors=False, num_mini_batches=2)
    assert torch.equal(alone.batch["embedding_grad"], 2 * grad[torch.from_numpy(trained)])
    whole = add_embedding_grad(rows[trained], rows, grad, train_anchors=True, num_mini_batches=2)
    assert torch.equal(whole.batch["embedding_grad"], 2 * grad)
    assert whole.non_tensor_batch["role"].tolist() == rows.non_tensor_batch["role"].tolist()
    assert torch.equal(whole.batch["advantages"], rows.batch["advantages"])
    assert add_embedding_grad(rows[trained], rows, None, True, 2).batch.keys() == rows.batch.keys()


def test_a_step_that_has_nothing_to_train_by_is_refused():
    reward = RewardOutput(torch.zeros(4))
    for trainer, setting in (({"contrastive_warmup_steps": 3}, "trainer.contrastive_warmup_steps=3"),
                             ({"contrastive_steps_between": 1}, "trainer.contrastive_steps_between=1")):  # fmt: skip
        config = RunConfig.model_validate({"trainer": trainer})
        step = 3 if "warmup" in setting else 4
        with pytest.raises(RewardError, match=f"step {step} trains nothing: with {setting} .* gave no embedding_grad"):
            check_has_embedding_grad(reward, step, config)
    reward.embedding_grad = torch.zeros(8, 2)
    check_has_embedding_grad(reward, step, config)
