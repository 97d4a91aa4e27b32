"""Weight sync of the transformers engine: what arrives, what is read back, and what a wrong engine is caught by."""

import math
import re

import pytest
import torch
from tiny import tiny_model
from transformers import GPT2Config, GPT2LMHeadModel

from verl.config import ModelConfig
from verl.models import fsdp
from verl.models.attention import ATTENTION
from verl.models.load import build_twin
from verl.models.lora import adapters_off, add_adapter
from verl.models.packing import Row, pack
from verl.models.policy import PolicyModel
from verl.workers.device_stages import DeviceStages
from verl.workers.rollout.base import EngineState, finish, row_seeds
from verl.workers.rollout.hf import HFRollout
from verl.workers.weight_sync import WeightSync, WeightSyncError

CANARY = [list(range(10, 60)), list(range(250, 130, -7))]
CPU = torch.device("cpu")
FEW = "model.layers.1.post_attention_layernorm.weight"
EMBEDDING = "model.embed_tokens.weight"


pytestmark = pytest.mark.usefixtures("process_group")


class WatchedRollout(HFRollout):
    """Records what it is sent, what is read back and how much is scored."""

    spoiled: str | None = None
    """A weight of which one number is loaded a rounding off."""

    def __init__(self, policy: PolicyModel, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(build_twin(policy.lm, dtype, CPU), [], 100)
        self.read_back: list[tuple[str, int | None]] = []
        self.num_scored = 0
        self.dtypes: set[torch.dtype] = set()

    def held(self, name, tensor, most_columns):
        self.read_back.append((name, most_columns))
        return super().held(name, tensor, most_columns)

    def _load(self, weights):
        weights = list(weights)
        self.dtypes |= {tensor.dtype for _, tensor in weights}
        super()._load([(name, a_rounding_off(tensor) if name == self.spoiled else tensor) for name, tensor in weights])

    def _score(self, prompts):
        self.num_scored += len(prompts)
        return super()._score(prompts)


def a_rounding_off(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with its last number changed to the next larger one."""
    spoiled = tensor.clone()
    spoiled.view(-1)[-1] = torch.nextafter(spoiled.view(-1)[-1], torch.tensor(math.inf))
    return spoiled


def build(check: str, tie: bool = True, dtype: torch.dtype = torch.float32, adapted: float | None = None):
    """A policy, an engine with weights of its own, and their sync.

    Args:
        adapted: size of the numbers of the policy's adapters; None = it has none.
    """
    lm = tiny_model(tie)
    lm.set_attn_implementation(ATTENTION)
    policy = PolicyModel(lm)
    rollout = WatchedRollout(policy, dtype)
    if adapted is not None:
        add_adapter(lm, ModelConfig(path="tiny", lora_rank=4, lora_alpha=4), 0)
        for weight in lm.parameters():
            if weight.requires_grad:
                weight.data = adapted * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    return policy, rollout, WeightSync(policy, rollout, dtype, check, CANARY, DeviceStages(CPU))


def weight_names(policy: PolicyModel) -> list[str]:
    return sorted(name for name, _ in policy.lm.named_parameters())


def plain_scores(lm) -> list[float]:
    """Log-probs of the canary's tokens, by the plain forward of transformers."""
    scores = []
    for ids in CANARY:
        log_probs = lm(torch.tensor([ids])).logits[0].detach().log_softmax(-1)
        scores += [float(log_probs[place, token]) for place, token in enumerate(ids[1:])]
    return scores


def test_a_sync_is_due_at_first_and_whenever_the_engine_is_stale():
    _, rollout, sync = build("full")
    assert sync.is_due()
    sync.send()
    sync.wake_engine()
    assert not sync.is_due()
    rollout.mark_stale()
    assert sync.is_due()


def test_after_a_sync_the_engine_holds_the_policys_weights_and_generates_with_them():
    policy, rollout, sync = build("full")
    plain = tiny_model(seed=5)
    with torch.no_grad():
        for weight in policy.parameters():
            weight += 0.01 * torch.randn(weight.shape)
    plain.load_state_dict(policy.lm.state_dict())
    assert not torch.equal(rollout.lm.get_parameter(EMBEDDING), plain.get_parameter(EMBEDDING))
    sync.send()
    sync.wake_engine()
    for name, weight in plain.named_parameters():
        for part in rollout.held(name, weight, None):
            assert torch.equal(part.held, weight), part.place
    responses = finish(rollout.generate(CANARY, [0.0] * len(CANARY), 16, row_seeds(0, len(CANARY))))
    for prompt, response in zip(CANARY, responses, strict=True):
        ids = torch.tensor([prompt])
        out = plain.generate(ids, do_sample=False, max_new_tokens=16, eos_token_id=None, pad_token_id=0)
        assert response.ids == out[0, len(prompt) :].tolist()


def test_an_engine_of_another_dtype_gets_the_weights_rounded_to_it():
    policy, rollout, sync = build("full", dtype=torch.bfloat16)
    assert sync.send()["weights_compared"] == len(weight_names(policy))
    assert rollout.dtypes == {torch.bfloat16}
    for name, weight in policy.lm.named_parameters():
        assert torch.equal(rollout.lm.get_parameter(name), weight.bfloat16()), name


@pytest.mark.parametrize("spoiled", [FEW, EMBEDDING])
def test_a_full_check_catches_one_number_that_is_a_rounding_off(spoiled):
    _, rollout, sync = build("full")
    rollout.spoiled = spoiled
    with pytest.raises(WeightSyncError, match=f"{re.escape(spoiled)} differs.*Stopping") as caught:
        sync.send()
    trainer, engine = re.search("trainer ([0-9a-f]{8}), engine ([0-9a-f]{8}),", str(caught.value)).groups()
    assert trainer != engine
    assert rollout.state is EngineState.STALE and sync.is_due()


def test_a_packed_head_that_keeps_its_old_weights_beside_a_new_embedding_is_caught():
    policy, rollout, sync = build("sample", tie=True)
    sync.send()
    rollout.lm.lm_head.load = lambda weight: None
    with torch.no_grad():
        policy.lm.get_parameter(EMBEDDING).mul_(1.5)
    with pytest.raises(WeightSyncError, match=f"{re.escape(EMBEDDING)} differs in the engine's lm_head "):
        sync.send()


def test_a_full_check_reads_every_weight_back_whole():
    policy, rollout, sync = build("full")
    found = sync.send()
    assert sorted(rollout.read_back) == [(name, None) for name in weight_names(policy)]
    assert found["weights_compared"] == len(rollout.read_back)


@pytest.mark.parametrize("tie", [True, False])
def test_a_sampled_check_comes_round_to_every_weight_and_always_reads_the_vocabularys(tie):
    policy, rollout, sync = build("sample", tie)
    names = weight_names(policy)
    always = {EMBEDDING} if tie else {EMBEDDING, "lm_head.weight"}
    seen = set()
    for _ in range(math.ceil(len(names) / 8)):
        rollout.read_back.clear()
        compared = sync.send()["weights_compared"]
        read = {name for name, _ in rollout.read_back}
        assert always <= read and compared == len(read) == len(rollout.read_back) <= 8 + len(always)
        assert {columns for _, columns in rollout.read_back} == {64}
        seen |= read
    assert seen == set(names)


def test_the_vocabulary_is_read_in_every_sync_whatever_its_weight_is_called():
    lm = GPT2LMHeadModel(GPT2Config(vocab_size=260, n_embd=64, n_layer=2, n_head=4, n_positions=128)).eval()
    lm.set_attn_implementation(ATTENTION)
    policy = PolicyModel(lm)
    rollout = WatchedRollout(policy)
    sync = WeightSync(policy, rollout, torch.float32, "sample", CANARY, DeviceStages(CPU))
    for _ in range(2):
        rollout.read_back.clear()
        sync.send()
        assert "transformer.wte.weight" in {name for name, _ in rollout.read_back}


def test_a_sampled_check_catches_a_wrong_weight_before_it_begins_again():
    policy, rollout, sync = build("sample")
    rollout.spoiled = weight_names(policy)[-2]
    with pytest.raises(WeightSyncError, match=f"weight sync 5: {re.escape(rollout.spoiled)} differs"):
        for _ in range(math.ceil(len(weight_names(policy)) / 8)):
            sync.send()


def test_without_a_check_nothing_is_read_back_and_nothing_scored():
    policy, rollout, sync = build("off")
    forwards = []
    policy.register_forward_hook(lambda *_: forwards.append(1))
    rollout.spoiled = FEW
    assert sync.send()["weights_compared"] == 0
    assert sync.wake_engine() == {}
    assert (rollout.read_back, rollout.num_scored, forwards) == ([], 0, [])
    assert rollout.state is EngineState.AWAKE


@pytest.mark.parametrize("check", ["full", "sample"])
def test_the_canary_catches_an_engine_that_computes_another_model_with_the_same_weights(check):
    _, rollout, sync = build(check)
    rollout.lm.model.norm.register_forward_hook(lambda module, args, out: out * 1.05)
    sync.send()
    with pytest.raises(WeightSyncError, match="weight sync 1:.*do not compute the same model"):
        sync.wake_engine()
    assert rollout.state is EngineState.STALE and sync.is_due()


def test_a_sync_reports_its_seconds_the_weights_compared_and_the_canarys_difference():
    policy, _, sync = build("full")
    found, proven = sync.send(), sync.wake_engine()
    assert set(found) == {"weights_s", "proof_s", "weights_compared"}
    assert set(proven) == {"proof_s", "canary_log_prob_diff"}
    assert found["weights_compared"] == len(weight_names(policy))
    assert found["weights_s"] > 0 and found["proof_s"] > 0 and proven["proof_s"] > 0
    assert proven["canary_log_prob_diff"] < 1e-3


@pytest.mark.parametrize("factor", [0.99995, 1.00005])
def test_the_canarys_difference_is_that_of_its_worst_token_relative_to_large_log_probs(factor):
    policy, rollout, sync = build("full")
    rollout.lm.model.norm.register_forward_hook(lambda module, args, out: out * factor)
    sync.send()
    found = sync.wake_engine()["canary_log_prob_diff"]
    engine = [log_prob for scores in rollout.score(CANARY) for log_prob in scores]
    plain = tiny_model(seed=5)
    plain.load_state_dict(policy.lm.state_dict())
    gaps = [abs(a - b) / max(1, abs(a)) for a, b in zip(plain_scores(plain), engine, strict=True)]
    assert 1e-5 < max(gaps) < 1e-3
    assert found == pytest.approx(max(gaps), rel=0.1)


def test_an_engine_that_only_slept_has_nothing_to_prove():
    _, rollout, sync = build("full")
    sync.send()
    sync.wake_engine()
    rollout.read_back.clear()
    rollout.num_scored = 0
    assert sync.wake_engine() == {}
    assert (rollout.read_back, rollout.num_scored) == ([], 0)


def test_the_engine_of_an_adapted_policy_generates_with_the_sums():
    policy, rollout, sync = build("full", adapted=0.3)
    found = sync.send()
    assert found["adapter_arrived"] == pytest.approx(1, abs=1e-4)
    assert sync.wake_engine()["canary_log_prob_diff"] < 1e-3
    with adapters_off(policy):
        without = policy(canary_line()).log_probs
    engine = torch.tensor([log_prob for scores in rollout.score(CANARY) for log_prob in scores])
    assert (engine - without).abs().max() > 0.1


def canary_line():
    return pack([Row(tuple(ids[:1]), tuple(ids[1:]), 0, scored=True) for ids in CANARY], share_prompts=False)


def test_an_adapter_that_adds_nothing_yet_is_not_measured():
    _, _, sync = build("full", adapted=0.0)
    assert "adapter_arrived" not in sync.send()


@pytest.mark.parametrize("check", ["full", "sample"])
def test_an_adapter_that_never_reaches_the_engine_ends_the_run_though_it_is_too_small_for_the_canary(
    monkeypatch, check
):
    """The weights are sent without it, and read back equal to what was sent."""
    _, rollout, sync = build(check, adapted=0.003)
    whole = fsdp.full_weights

    def without_adapters(policy, names=None, dtype=None):
        with monkeypatch.context() as patched:
            patched.setattr(fsdp, "_product", lambda policy, adapter: torch.zeros(()))
            yield from whole(policy, names, dtype)

    monkeypatch.setattr("verl.workers.weight_sync.full_weights", without_adapters)
    with pytest.raises(WeightSyncError, match="holds 0.0% of what the adapters add .* should hold 100.0%.*Stopping"):
        sync.send()
    assert rollout.state is EngineState.STALE and sync.is_due()
    monkeypatch.setattr(sync, "_compare_adapters", lambda names: {})
    sync.send()
    assert sync.wake_engine()["canary_log_prob_diff"] < 1e-3


def test_an_engine_that_keeps_the_weights_of_an_earlier_adapter_is_caught():
    policy, rollout, sync = build("sample", adapted=0.003)
    sync.send()
    rollout._load = lambda weights: list(weights)
    for weight in policy.parameters():
        if weight.requires_grad:
            weight.data *= 1.5
    with pytest.raises(WeightSyncError, match="differs in the engine's"):
        sync.send()


def test_the_share_that_a_coarser_engine_holds_of_an_adapter_is_told():
    """Rounding to bfloat16 loses a small step; what is left is what the weights moved by, along the adapters' sum."""
    policy, rollout, sync = build("full", dtype=torch.bfloat16, adapted=0.02)
    for name, weight in policy.named_parameters():
        if ".base_layer." in name:
            weight.data = weight.bfloat16().float()
    found = sync.send()["adapter_arrived"]
    moved = added = 0.0
    for name, weight, product in fsdp.adapted_weights(policy, adapted_names(policy)):
        step = rollout.lm.get_parameter(name).double() - weight.double()
        moved += float((step * product).sum())
        added += float((product.double() ** 2).sum())
    assert found == pytest.approx(moved / added, abs=0.02)
    assert found < 0.97


def adapted_names(policy: PolicyModel) -> set[str]:
    return {name.replace(".base_layer.", ".") for name in weight_names(policy) if ".base_layer." in name}
