"""LoRA: what adapters compute, what they add to plain weights, and which ones are refused."""

import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from steps import TEMPERATURE, build_actor, trained_rows, with_log_probs
from tiny import save_tiny, tiny_model, tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

from verl.checkpoint.training_state import save_adapter_folder
from verl.config import MicroBatchLimit, ModelConfig
from verl.embedding.settings import EmbedderSettings
from verl.errors import UserError
from verl.models.fsdp import adapter_weights, full_weights
from verl.models.load import load_causal_lm
from verl.models.lora import (
    WEIGHTS_NAME,
    adapter_line,
    adapters_off,
    add_adapter,
    base_of_adapter,
    write_adapter_config,
)
from verl.models.policy import PolicyModel
from verl.workers.scoring import score

pytestmark = pytest.mark.usefixtures("process_group")

RANK, ALPHA = 4, 12.0
# Of the tiny model: 3 layers with 7 linear layers each.
LINEAR = 21


def adapted_policy(folder, seed: int = 0, random: bool = True, **settings) -> PolicyModel:
    """A policy with adapters; random ones add something, new ones nothing."""
    lm = load_causal_lm(str(folder))
    model = ModelConfig.model_validate({"path": str(folder), "lora_rank": RANK, "lora_alpha": ALPHA, **settings})
    add_adapter(lm, model, seed)
    if random:
        generator = torch.Generator().manual_seed(5)
        for weight in lm.parameters():
            if weight.requires_grad:
                weight.data = 0.1 * torch.randn(weight.shape, generator=generator)
    return PolicyModel(lm)


@pytest.fixture
def folder(tmp_path):
    return save_tiny(tmp_path / "base")


def merged_by_hand(policy: PolicyModel, folder) -> dict[str, Tensor]:
    """The weights of the base model, each plus alpha / rank times the product of its adapter, number by number."""
    own = dict(policy.lm.named_parameters())
    weights = {name: value.clone() for name, value in AutoModelForCausalLM.from_pretrained(folder).named_parameters()}
    for name, weight in weights.items():
        place = name.removesuffix(".weight")
        if f"{place}.lora_A.default.weight" not in own:
            continue
        a, b = (own[f"{place}.lora_{part}.default.weight"].detach().double() for part in "AB")
        for i in range(len(b)):
            weight.data[i] += (ALPHA / RANK * sum(b[i, r] * a[r] for r in range(RANK))).float()
    return weights


def plain_log_probs(lm, rows) -> Tensor:
    """[N,R], by transformers' own forward, row by row."""
    found = torch.zeros(rows.batch["responses"].shape)
    for row in range(len(rows)):
        length, prompt = (int(rows.batch[name][row]) for name in ("response_length", "prompt_length"))
        ids = torch.cat([rows.batch["prompts"][row, -prompt:], rows.batch["responses"][row, :length]])
        with torch.no_grad():
            logits = lm(ids[None]).logits[0] / TEMPERATURE
        picked = logits[prompt - 1 : -1].log_softmax(-1).gather(1, ids[prompt:, None])[:, 0]
        found[row, :length] = picked
    return found


def log_probs(policy: PolicyModel, rows) -> Tensor:
    limit = MicroBatchLimit(10_000, None)
    return score(policy, rows, limit, TEMPERATURE, embed=False, entropy=False).batch["log_probs"]


def test_new_adapters_change_nothing_and_are_equal_on_every_rank(folder):
    policy, rows = adapted_policy(folder, random=False), trained_rows()
    expected = plain_log_probs(AutoModelForCausalLM.from_pretrained(folder), rows)
    torch.testing.assert_close(log_probs(policy, rows), expected, atol=2e-5, rtol=0)
    torch.manual_seed(123)
    for one, two in zip(policy.parameters(), adapted_policy(folder, random=False).parameters(), strict=True):
        assert torch.equal(one, two)
    other = adapted_policy(folder, seed=1, random=False)
    assert any(not torch.equal(*pair) for pair in zip(policy.parameters(), other.parameters(), strict=True))


def test_adapting_a_model_leaves_the_callers_random_numbers_alone(folder):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    lm = load_causal_lm(str(folder))
    torch.set_rng_state(before)
    add_adapter(lm, ModelConfig(path=str(folder), lora_rank=2), 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_policy_computes_what_the_plain_model_of_its_full_weights_does(folder):
    policy, rows = adapted_policy(folder), trained_rows()
    by_hand = merged_by_hand(policy, folder)
    full = dict(full_weights(policy))
    assert full.keys() == by_hand.keys()
    for name, weight in by_hand.items():
        torch.testing.assert_close(full[name], weight, atol=1e-6, rtol=1e-6)
    plain = tiny_model()
    plain.load_state_dict(by_hand, strict=False)
    expected = plain_log_probs(plain, rows)
    torch.testing.assert_close(log_probs(policy, rows), expected, atol=1e-4, rtol=1e-4)
    assert (expected - plain_log_probs(AutoModelForCausalLM.from_pretrained(folder), rows)).abs().max() > 0.1


def test_full_weights_are_added_before_they_are_rounded(folder):
    policy = adapted_policy(folder)
    for name, weight in full_weights(policy, dtype=torch.bfloat16):
        assert torch.equal(weight, dict(full_weights(policy, {name}))[name].bfloat16()), name


def test_without_its_adapters_a_policy_is_the_model_it_started_from(folder):
    policy, rows = adapted_policy(folder), trained_rows()
    expected = plain_log_probs(AutoModelForCausalLM.from_pretrained(folder), rows)
    with adapters_off(policy):
        torch.testing.assert_close(log_probs(policy, rows), expected, atol=2e-5, rtol=0)
    assert (log_probs(policy, rows) - expected).abs().max() > 0.1
    assert sum(weight.requires_grad for weight in policy.parameters()) == 2 * LINEAR


def test_only_adapters_are_trained_and_by_the_gradient_of_the_full_weights(folder):
    """For W + s B A the chain rule gives dL/dB = s dL/dW A^T and dL/dA = s B^T dL/dW."""
    adapted = adapted_policy(folder)
    whole = load_causal_lm(str(folder))
    whole.load_state_dict(dict(full_weights(adapted)), strict=False)
    rows = with_log_probs(trained_rows(), adapted)
    before = {name: weight.detach().clone() for name, weight in adapted.named_parameters()}
    taken = {}
    for name, policy in (("adapted", adapted), ("whole", PolicyModel(whole))):
        actor = build_actor(policy, grad_clip=float("inf"))
        actor._apply = lambda norm: None
        actor._step(rows[rows.batch["mini_batch"].numpy() == 0])
        taken[name] = {key: weight.grad for key, weight in policy.named_parameters() if weight.grad is not None}
    assert len(taken["adapted"]) == 2 * LINEAR
    for key, gradient in taken["adapted"].items():
        place, part = re.fullmatch(r"(.*)\.lora_([AB])\.default\.weight", key).groups()
        of_weight = taken["whole"][f"{place}.weight"]
        a, b = (before[f"{place}.lora_{name}.default.weight"] for name in "AB")
        expected = ALPHA / RANK * (of_weight @ a.T if part == "B" else b.T @ of_weight)
        torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-3)
    actor = build_actor(adapted)
    actor.update(rows, num_mini_batches=2)
    for name, weight in adapted.named_parameters():
        assert torch.equal(weight, before[name]) != (".lora_" in name), name


def test_a_saved_adapter_is_loaded_by_transformers_by_peft_and_merged_by_the_encoders_loader(folder, tmp_path):
    policy = adapted_policy(folder)
    saved = save_adapter(policy, folder, tmp_path / "adapter")
    full = dict(full_weights(policy))
    loaded = load_causal_lm(str(saved))
    for name, weight in loaded.named_parameters():
        assert torch.equal(weight, full[name]), name
    plain = tiny_model()
    plain.load_state_dict(full, strict=False)
    ids = torch.arange(30)[None]
    by_transformers = AutoModelForCausalLM.from_pretrained(saved)
    torch.testing.assert_close(by_transformers(ids).logits, plain(ids).logits, atol=1e-4, rtol=1e-4)


def save_adapter(policy: PolicyModel, base, target):
    save_adapter_folder(
        target, adapter_weights(policy), policy.lm, str(base), tiny_tokenizer(), EmbedderSettings(), rank=0
    )
    return target


def test_training_goes_on_with_a_given_adapter(folder, tmp_path):
    policy = adapted_policy(folder)
    saved = save_adapter(policy, folder, tmp_path / "adapter")
    again = adapted_policy(folder, random=False, lora_rank=0, lora_adapter_path=str(saved))
    assert sum(weight.requires_grad for weight in again.parameters()) == 2 * LINEAR
    for (name, one), (_, two) in zip(policy.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(one, two), name
    assert adapter_line(again.lm) == adapter_line(policy.lm)
    with pytest.raises(UserError, match=f"lora_rank=2, but the adapter .* has rank {RANK}; leave lora_rank out"):
        adapted_policy(folder, lora_rank=2, lora_adapter_path=str(saved))


def test_an_adapter_that_peft_has_saved_for_inference_is_trained_all_the_same(folder, tmp_path):
    get_peft_model(tiny_model(), LoraConfig(r=RANK, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    policy = adapted_policy(folder, random=False, lora_rank=0, lora_adapter_path=str(tmp_path / "adapter"))
    trained = {name for name, weight in policy.lm.named_parameters() if weight.requires_grad}
    assert len(trained) == 2 * 3 and all(".q_proj.lora_" in name for name in trained)


def test_an_adapter_that_was_trained_with_dropout_is_trained_without(folder, tmp_path):
    given = LoraConfig(r=RANK, target_modules=["q_proj"], lora_dropout=0.5)
    get_peft_model(tiny_model(), given).save_pretrained(tmp_path / "adapter")
    lm = adapted_policy(folder, lora_rank=0, lora_adapter_path=str(tmp_path / "adapter")).lm
    layer, inputs = lm.model.layers[0].self_attn.q_proj, torch.randn(5, 64)
    assert layer.lora_A and torch.equal(layer.train()(inputs), layer.eval()(inputs))


def test_an_adapter_finds_the_folder_of_its_model_from_everywhere(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder.parent)
    saved = save_adapter(adapted_policy(folder.name), folder.name, tmp_path / "adapter")
    monkeypatch.chdir("/")
    assert base_of_adapter(str(saved)) == str(folder)
    load_causal_lm(str(saved))


def test_an_adapter_that_does_not_fit_is_refused(folder, tmp_path):
    saved = save_adapter(adapted_policy(folder), folder, tmp_path / "adapter")
    wider = save_tiny(tmp_path / "wider", hidden_size=128)
    with pytest.raises(UserError, match="lora_adapter_path=.* does not fit the model: .*size mismatch"):
        adapted_policy(wider, lora_rank=0, lora_adapter_path=str(saved))
    write_adapter_config(adapted_policy(wider).lm, saved, str(wider))
    with pytest.raises(UserError, match="does not fit its model .*size mismatch"):
        load_causal_lm(str(saved))
    write_adapter_config(adapted_policy(folder).lm, saved, str(folder))
    folder.rename(tmp_path / "moved")
    with pytest.raises(UserError, match="there is no such folder; bring it there, or write where it is"):
        load_causal_lm(str(saved))
    with pytest.raises(UserError, match="lora_adapter_path=.* there is no adapter of peft"):
        adapted_policy(wider, lora_rank=0, lora_adapter_path=str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_proj", "lm_head"], "has lm_head, the LM head: .* an adapter there would have no effect; leave it out"),
        ("lm_head", "lm_head, the LM head"),
        (["embed_tokens"], "model.embed_tokens, a Embedding: only linear layers are supported"),
        (["no_such"], r"target_modules=\['no_such'\]: peft cannot adapt these layers"),
    ],
)
@pytest.mark.parametrize("tie", [True, False])
def test_layers_whose_adapter_would_be_left_out_are_refused(tmp_path, targets, message, tie):
    folder = save_tiny(tmp_path / "base", tie=tie)
    with pytest.raises(UserError, match=message):
        adapted_policy(folder, target_modules=targets)


def test_an_adapter_of_another_kind_is_refused(folder, tmp_path):
    for name, settings in {"dora": {"use_dora": True}, "bias": {"bias": "all"}}.items():
        get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"], **settings)).save_pretrained(tmp_path / name)
        with pytest.raises(UserError, match="only plain LoRA is supported"):
            adapted_policy(folder, lora_rank=0, lora_adapter_path=str(tmp_path / name))


def test_all_linear_layers_but_the_head_have_an_adapter(tmp_path):
    for tie in (True, False):
        policy = adapted_policy(save_tiny(tmp_path / f"base{tie}", tie=tie))
        names = {name.split(".lora_")[0] for name, weight in policy.lm.named_parameters() if weight.requires_grad}
        assert len(names) == LINEAR and not any("head" in name or "embed" in name for name in names)
        assert adapter_line(policy.lm).startswith(
            f"LoRA of rank {RANK}, alpha {ALPHA:g}, in {LINEAR} layers (down_proj"
        )
    assert adapter_line(tiny_model()) is None


def test_a_folder_with_a_model_of_its_own_belongs_to_no_other(folder, tmp_path):
    assert base_of_adapter(str(folder)) is None
    saved = save_adapter(adapted_policy(folder), folder, tmp_path / "adapter")
    assert base_of_adapter(str(saved)) == str(folder)
    assert (saved / WEIGHTS_NAME).stat().st_size < (folder / "model.safetensors").stat().st_size
