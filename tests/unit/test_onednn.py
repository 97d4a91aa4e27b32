"""Linear layers that multiply by oneDNN against torch's own product, and without oneDNN's operations."""

import logging

import pytest
import torch
from tiny import save_tiny, tiny_model
from torch import nn

from verl.models import onednn
from verl.models.attention import ATTENTION
from verl.models.load import build_twin, load_causal_lm
from verl.models.log_probs import token_log_probs
from verl.models.logits import LogitForm
from verl.models.onednn import PackedLinear, TrainedLinear, pack_linears, replace_linears
from verl.models.policy import PolicyModel


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 24, 200])
def test_the_product_is_that_of_a_linear_layer(bias, rows):
    torch.manual_seed(0)
    linear = nn.Linear(70, 45, bias=bias).requires_grad_(False)
    x = torch.randn(rows, 2, 70)
    exact = x.double() @ linear.weight.double().T + (linear.bias.double() if bias else 0)
    packed = PackedLinear(linear, keep_weight=False)
    torch.testing.assert_close(packed(x).double(), exact, atol=1e-5, rtol=1e-5)


def test_a_row_does_not_depend_on_the_other_rows():
    torch.manual_seed(0)
    packed = PackedLinear(nn.Linear(64, 96).requires_grad_(False), keep_weight=False)
    x = torch.randn(100, 64)
    for rows in (x[:1], x[:7], x[:64]):
        assert torch.equal(packed(rows), packed(x)[: len(rows)])


def test_a_loaded_weight_replaces_the_former_one():
    linear, other = (nn.Linear(16, 8, bias=False).requires_grad_(False) for _ in range(2))
    packed = PackedLinear(linear, keep_weight=False)
    packed.load(other.weight)
    x = torch.randn(5, 16)
    torch.testing.assert_close(packed(x), other(x))


def test_the_packed_weight_is_a_copy():
    linear = nn.Linear(16, 16, bias=False).requires_grad_(False)
    packed, x = PackedLinear(linear, keep_weight=True), torch.randn(4, 16)
    before = packed(x)
    linear.weight.zero_()
    assert torch.equal(packed(x), before)


def test_a_packed_layer_rejects_a_gradient():
    packed = PackedLinear(nn.Linear(4, 4), keep_weight=False)
    with pytest.raises(RuntimeError, match="no gradient"):
        packed(torch.randn(2, 4, requires_grad=True))


@pytest.mark.parametrize("tie", [True, False])
def test_a_model_with_packed_layers_computes_as_before_and_keeps_the_names_of_its_weights(tie):
    plain, packed = tiny_model(tie), tiny_model(tie)
    packed.requires_grad_(False)
    pack_linears(packed)
    assert sum(isinstance(module, PackedLinear) for module in packed.modules()) > 10
    assert not any(type(module) is nn.Linear for module in packed.modules())
    assert [name for name, _ in packed.named_parameters()] == [name for name, _ in plain.named_parameters()]
    ids = torch.arange(20, 60).view(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(packed(ids).logits, plain(ids).logits, atol=1e-5, rtol=1e-4)


def test_only_a_float32_model_is_packed():
    lm = tiny_model()
    lm.set_attn_implementation(ATTENTION)
    twins = {dtype: build_twin(lm, dtype, torch.device("cpu")) for dtype in (torch.float32, torch.bfloat16)}
    found = {d: any(isinstance(m, PackedLinear) for m in twin.modules()) for d, twin in twins.items()}
    assert found == {torch.float32: True, torch.bfloat16: False}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", [(), ("x",), ("weight",)])
def test_a_trained_layer_and_its_gradients_are_those_of_a_linear_layer(bias, frozen):
    torch.manual_seed(0)
    linear = nn.Linear(70, 45, bias=bias)
    x, factor = torch.randn(3, 50, 70), torch.randn(3, 50, 45)

    def gradients(layer: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        leaves = {"x": x.to(dtype, copy=True), **dict(layer.named_parameters())}
        for name, leaf in leaves.items():
            leaf.requires_grad_(name not in frozen)
            leaf.grad = None
        y = layer(leaves["x"])
        (y * factor.to(dtype)).sum().backward()
        return {"y": y.detach(), **{name: leaf.grad for name, leaf in leaves.items() if name not in frozen}}

    trained = gradients(TrainedLinear(linear), torch.float32)
    exact = gradients(linear.double(), torch.float64)
    assert trained.keys() == exact.keys()
    for name, value in trained.items():
        torch.testing.assert_close(value.double(), exact[name], atol=1e-4, rtol=1e-5)


def test_a_trained_layer_of_another_dtype_is_torchs_own():
    linear = nn.Linear(16, 8).bfloat16()
    x = torch.randn(5, 16, dtype=torch.bfloat16)
    assert torch.equal(TrainedLinear(linear)(x), linear(x))


def test_replaced_layers_hold_the_same_parameters_and_can_be_packed():
    lm = tiny_model()
    before = dict(lm.named_parameters())
    replace_linears(lm)
    assert not any(type(module) is nn.Linear for module in lm.modules())
    after = dict(lm.named_parameters())
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    pack_linears(lm.requires_grad_(False))
    assert not any(type(module) is TrainedLinear for module in lm.modules())


ROWS = torch.arange(20, 60).view(2, 20)


def head_log_probs(lm, hidden: torch.Tensor) -> torch.Tensor:
    target = torch.arange(hidden.shape[1])
    return token_log_probs(lm.get_output_embeddings(), hidden[0], target, LogitForm(), entropy=False)[0]


def outputs_and_gradients(folder: str) -> dict[str, torch.Tensor]:
    """Log-probs, and weight gradients, of a loaded policy and of its packed twin."""
    policy = PolicyModel(load_causal_lm(folder))
    hidden = torch.linspace(-1, 1, 20 * 64).view(1, 20, 64)
    layer = policy.lm.model.layers[0].mlp.up_proj
    scored = head_log_probs(policy.lm, layer(hidden)[..., :64])
    scored.sum().backward()
    gradients = {name: p.grad for name, p in policy.lm.named_parameters() if p.grad is not None}
    assert {"model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"} <= gradients.keys()
    twin = build_twin(policy.lm, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        twin_layer = twin.model.layers[0].mlp.up_proj
        (twin_layer.load if isinstance(twin_layer, PackedLinear) else twin_layer.weight.copy_)(layer.weight)
        product = twin_layer(hidden)
    return {"log_probs": scored.detach(), "twin": product, **gradients}


def absent(*_):
    raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_linear_pointwise'")


def wrong(rows, weight):
    return torch.ones(len(rows), 8)


@pytest.mark.parametrize(("broken", "reason"), [(absent, "no attribute '_linear_pointwise'"), (wrong, "are wrong")])
def test_without_the_operations_layers_are_torchs_own_and_one_warning_says_so(
    tmp_path, monkeypatch, caplog, broken, reason
):
    folder = str(save_tiny(tmp_path / "model"))
    onednn._works.cache_clear()
    with caplog.at_level(logging.WARNING):
        expected = outputs_and_gradients(folder)
        assert not caplog.records and onednn._works()
        monkeypatch.setattr(onednn, "_multiply", broken)
        monkeypatch.setattr(onednn, "_works", onednn.cache(onednn._works.__wrapped__))
        found = outputs_and_gradients(folder)
    (record,) = caplog.records
    assert reason in record.getMessage() and "torch's own linear layers are used" in record.getMessage()
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], atol=1e-4, rtol=1e-4)


def test_loading_a_model_calls_none_of_the_operations(tmp_path, monkeypatch):
    """A GPU worker loads on the CPU too; where it runs, `TrainedLinear` is torch's own."""
    monkeypatch.setattr(onednn, "_multiply", absent)
    monkeypatch.setattr(onednn, "_pack", absent)
    lm = load_causal_lm(str(save_tiny(tmp_path / "model")))
    assert type(lm.get_output_embeddings()) is TrainedLinear
