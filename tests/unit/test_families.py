"""Families of models as tiny random ones: equal to transformers' own forward, or refused with a reason."""

from pathlib import Path

import pytest
import torch
from family_models import EXPERTS, SETTINGS, VOCAB, tiny

from verl.errors import UserError
from verl.models import attention
from verl.models.families import FAMILIES
from verl.models.load import build_twin, load_causal_lm
from verl.models.packing import Row, pack
from verl.models.policy import PolicyModel
from verl.models.probe import dropout_of
from verl.workers.rollout.base import finish, row_seeds
from verl.workers.rollout.hf import HFRollout

# What cannot be packed, and the reason given.
REFUSED: dict[str, tuple[dict, str]] = {
    "stablelm": ({}, "its layers do not pass on to the attention what the model is called with"),
    "falcon": ({}, "transformers cannot replace the attention of this type"),
    "gpt_oss": ({**EXPERTS, "head_dim": 8}, "the packed forward differs from the model's own by"),
    "hyperclovax": ({"logits_scaling": 3.0}, "the packed forward differs from the model's own by"),
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, "the packed forward differs from the model's own by"),
    "llama4_text": ({**EXPERTS, "intermediate_size_mlp": 48}, "no part of it that computes hidden states without"),
    "mixtral": ({**EXPERTS, "router_jitter_noise": 0.3}, "in training mode it draws random numbers"),
    "phimoe": (EXPERTS, "in training mode it draws random numbers"),
    "bert": ({}, "the packed forward differs from the model's own by"),
}


def ids(seed: int, count: int) -> tuple[int, ...]:
    return tuple(torch.randint(3, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


def rows() -> list[Row]:
    """Two rows of one prompt, one of another, with a common beginning; up to 41 tokens, beyond every window."""
    system = ids(0, 12)
    return [
        Row(system + ids(1, 9), ids(2, 20), 12, True),
        Row(system + ids(1, 9), ids(3, 3), 12, True),
        Row(system + ids(4, 2), ids(5, 15), 14, True),
    ]


def plain(lm, row: Row):
    """Log-probs of a row's response and the mean of its pooled hidden states, by the plain forward."""
    tokens, start = row.prompt + row.response, len(row.prompt)
    out = lm(input_ids=torch.tensor([tokens]), output_hidden_states=True)
    log_probs = out.logits[0, start - 1 : -1].float().log_softmax(-1)
    targets = torch.tensor(row.response).unsqueeze(1)
    return log_probs.gather(1, targets).squeeze(1), out.hidden_states[-1][0, row.pool_start :].mean(0)


@pytest.mark.parametrize("family", SETTINGS)
def test_a_family_is_packed_trained_and_decoded_as_by_transformers(tmp_path, family):
    reference = tiny(tmp_path, family)
    expected = [plain(reference, row) for row in rows()]
    lm = load_causal_lm(str(tmp_path))
    lm.gradient_checkpointing_enable({"use_reentrant": False})
    policy = PolicyModel(lm).train()
    for share in (True, False):
        out = policy(pack(rows(), share), embeddings=True)
        torch.testing.assert_close(out.log_probs, torch.cat([e[0] for e in expected]), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(out.embeddings, torch.stack([e[1] for e in expected]), atol=1e-4, rtol=1e-4)
    torch.cat([e[0] for e in expected]).sum().backward()
    out.log_probs.sum().backward()
    gradients = {name: weight.grad for name, weight in reference.named_parameters()}
    for name, weight in lm.named_parameters():
        torch.testing.assert_close(weight.grad, gradients[name], atol=1e-3, rtol=1e-3, msg=lambda m, n=name: f"{n} {m}")

    engine = HFRollout(build_twin(lm, torch.float32, lm.device), [], 2)
    engine.update_weights(lm.named_parameters())
    engine.wake_up()
    prompts, starts = [row.prompt for row in rows()], [0, 12, -1]
    responses = finish(engine.generate_and_pool(prompts, [1.0] * 3, 12, row_seeds(0, 3), starts))
    for prompt, start, response in zip(prompts, starts, responses, strict=True):
        decoded, pooled = plain(reference, Row(prompt, tuple(response.ids), start, True))
        torch.testing.assert_close(torch.tensor(response.log_probs), decoded, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(response.pooled, pooled, atol=1e-4, rtol=1e-4)


def test_the_families_named_in_messages_and_docs_are_those_tested():
    assert set(SETTINGS) == set(FAMILIES)
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    rows = [line.split(" | ")[:2] for line in page.splitlines() if line.startswith("| `")]
    assert {kind.strip("| `"): models for kind, models in rows} == FAMILIES


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_cannot_be_packed_is_refused_with_the_reason_and_the_families_that_can(tmp_path, family):
    changes, reason = REFUSED[family]
    tiny(tmp_path, family, **changes)
    with pytest.raises(UserError) as caught:
        load_causal_lm(str(tmp_path))
    message = str(caught.value)
    assert f"(a model of type '{family}') is not supported: " in message and reason in message
    assert "Types that are: qwen2, qwen3" in message and "\n" not in message


def test_a_model_that_is_no_causal_language_model_is_refused_in_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "diary"}')
    with pytest.raises(UserError, match="loads no causal language model from it: .*`diary`") as caught:
        load_causal_lm(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_dropout_stays_in_the_config_for_checkpoints(tmp_path):
    tiny(tmp_path, "gpt2")
    lm = load_causal_lm(str(tmp_path))
    assert dropout_of(lm.config) == {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2}
    assert {module.p for module in lm.modules() if isinstance(module, torch.nn.Dropout)} == {0.0}


def test_a_window_that_is_not_computed_is_found_although_no_row_of_the_proof_is_that_long(tmp_path, monkeypatch):
    tiny(tmp_path, "mistral", sliding_window=100)
    load_causal_lm(str(tmp_path))
    monkeypatch.setattr(attention, "_narrowed", lambda mask, *_: mask)
    with pytest.raises(UserError, match="the packed forward differs from the model's own by"):
        load_causal_lm(str(tmp_path))


def test_windows_are_as_before_the_proof(tmp_path):
    tiny(tmp_path, "gemma2")
    lm = load_causal_lm(str(tmp_path))
    assert lm.config.sliding_window == 6
    assert [layer.self_attn.sliding_window for layer in lm.model.layers] == [6, None]


def test_rows_beyond_the_context_up_to_which_positions_are_fixed_are_an_error(tmp_path):
    tiny(tmp_path, "phi3")
    lm = load_causal_lm(str(tmp_path))
    long = Row(ids(0, 40), ids(1, 25), 0, True)
    reason = r"a row of 65 tokens is longer than the 64 tokens .*longrope.*data\.max_prompt_length"
    with pytest.raises(UserError, match=reason):
        PolicyModel(lm)(pack([long], True))
    with pytest.raises(UserError, match=reason):
        finish(HFRollout(lm, [], 2).generate([long.prompt], [1.0], 25, [0]))
