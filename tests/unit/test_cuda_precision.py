"""The precision of CUDA and its moves of sharded weights, on a CPU: bfloat16 forwards over float32 shards."""

import pytest
import torch
from family_models import SETTINGS, tiny
from steps import build_actor, tiny_policy, trained_rows, with_log_probs
from tiny import tiny_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from verl.config import MicroBatchLimit
from verl.embedding.settings import Mix
from verl.models.fsdp import CUDA_PRECISION, full_weights, move_optimizer, shard_over
from verl.models.load import load_causal_lm, round_weights
from verl.models.packing import Row, pack
from verl.models.policy import PolicyModel
from verl.workers import actor as actor_module
from verl.workers.scoring import score

pytestmark = pytest.mark.usefixtures("process_group")

LIMIT = MicroBatchLimit(10_000, None)


def sharded(reshard_after_forward: bool = True) -> PolicyModel:
    policy = tiny_policy()
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("fsdp",))
    shard_over(policy, mesh, CUDA_PRECISION, reshard_after_forward=reshard_after_forward)
    return policy


def weights(policy: PolicyModel) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in full_weights(policy)}


@pytest.mark.parametrize("reshard_after_forward", [True, False])
def test_after_a_forward_without_a_backward_the_weights_are_still_the_float32_ones(reshard_after_forward):
    policy, plain = sharded(reshard_after_forward), dict(tiny_policy().lm.named_parameters())
    score(policy, trained_rows(), LIMIT, 1.0, embed=True, entropy=False)
    assert all(isinstance(weight, DTensor) for weight in policy.parameters())
    policy(*[batch_of(policy)])  # a forward of somebody else
    found = weights(policy)
    assert found.keys() == plain.keys()
    for name, weight in found.items():
        assert weight.dtype == torch.float32 and torch.equal(weight, plain[name]), name


def batch_of(policy: PolicyModel):
    (micro,) = actor_module.micro_batches(trained_rows(), LIMIT, policy)
    return micro.packed


def test_means_are_weighed_in_float32():
    rows = [
        Row(tuple(range(20)), tuple(range(30, 37)), 5, False, Mix(text_share=0.3)),
        Row(tuple(range(3, 40)), tuple(range(50, 60)), 7, False, Mix(no_rationale_weight=0.7)),
    ]
    rounded = tiny_policy()
    for weight in rounded.parameters():
        weight.data = weight.data.bfloat16()
    one, two = (
        policy(pack(rows, share_prompts=True), log_probs=False, embeddings=True).embeddings
        for policy in (sharded(), rounded)
    )
    torch.testing.assert_close(one, two, atol=1e-6, rtol=0)


def test_what_the_encoder_rounds_is_what_training_does():
    """On CUDA; rotary frequencies are a buffer, and FSDP gathers weights alone in bfloat16."""
    plain, rounded = tiny_model(seed=0), tiny_model(seed=0)
    round_weights(rounded, torch.bfloat16)
    for name, weight in plain.named_parameters():
        found = rounded.get_parameter(name)
        assert found.dtype == torch.bfloat16 and torch.equal(found, weight.bfloat16()), name
    buffers = dict(plain.named_buffers())
    assert any(values.is_floating_point() for values in buffers.values())
    for name, values in buffers.items():
        found = rounded.get_buffer(name)
        assert found.dtype == values.dtype and torch.equal(found, values), name


@pytest.mark.parametrize("family", SETTINGS)
def test_the_layers_of_training_get_what_those_of_the_encoder_get(tmp_path, family):
    """OLMo gives its layers cosines and sines in float32, whatever the dtype of the weights; no other family does."""
    folder = tmp_path / "model"
    tiny(folder, family)
    trained, encoded = (PolicyModel(load_causal_lm(str(folder))) for _ in range(2))
    shard_over(trained, init_device_mesh("cpu", (1,)), CUDA_PRECISION)
    round_weights(encoded.lm, torch.bfloat16)
    packed = pack([Row(tuple(range(3, 40)), tuple(range(50, 60)), 7, True)], share_prompts=True)
    one, two = (policy(packed, embeddings=True) for policy in (trained, encoded))
    torch.testing.assert_close(one.embeddings, two.embeddings, atol=1e-6, rtol=0)
    torch.testing.assert_close(one.log_probs, two.log_probs, atol=1e-6, rtol=0)


def test_an_update_in_bfloat16_is_near_the_one_in_float32():
    """Weights move in float32, by the same gradient up to bfloat16's rounding."""
    rows = with_log_probs(trained_rows(), tiny_policy())
    metrics, moved = [], []
    for policy in (sharded(), tiny_policy()):
        before = weights(policy)
        actor = build_actor(policy, optim={"lr": 1e-3})
        metrics.append(actor.update(rows, 1))
        after = weights(policy)
        assert {weight.dtype for weight in after.values()} == {torch.float32}
        moved.append(torch.cat([(after[name] - before[name]).flatten() for name in before]))
    assert metrics[0]["grad_norm"] == pytest.approx(metrics[1]["grad_norm"], rel=0.05)
    assert torch.cosine_similarity(*moved, dim=0) > 0.8


def test_moved_shards_are_the_optimizers_own_and_its_state_moves_with_its_counters_left():
    """The target is a device without data, since a CPU has no other one: what counts is which tensors move."""
    policy = sharded()
    actor = build_actor(policy)
    actor.update(with_log_probs(trained_rows(), tiny_policy()), 2)
    score(policy, trained_rows(), LIMIT, 1.0, embed=True, entropy=False)
    policy.to("meta")
    trained = [weight for group in actor.optimizer.param_groups for weight in group["params"]]
    assert {id(weight) for weight in trained} == {id(weight) for weight in policy.parameters()}
    assert {weight.to_local().device.type for weight in trained} == {"meta"}
    move_optimizer(actor.optimizer, torch.device("meta"))
    places = {(name, value.device.type) for state in actor.optimizer.state.values() for name, value in state.items()}
    assert places == {("exp_avg", "meta"), ("exp_avg_sq", "meta"), ("step", "cpu")}
