"""Linear layers in oneDNN's layout against torch's own product."""

import pytest
import torch
from tiny import tiny_model
from torch import nn

from verl.models.attention import ATTENTION
from verl.models.onednn import PackedLinear, TrainedLinear, pack_linears, replace_linears
from verl.models.policy import build_twin


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 24, 200])
def test_the_product_is_that_of_a_linear_layer(bias, rows):
    torch.manual_seed(0)
    linear = nn.Linear(70, 45, bias=bias).requires_grad_(False)
    x = torch.randn(rows, 2, 70)
    exact = x.double() @ linear.weight.double().T + (linear.bias.double() if bias else 0)
    packed = PackedLinear(linear, keep_weight=False)
    torch.testing.assert_close(packed(x).double(), exact, atol=1e-5, rtol=1e-5)


def test_a_row_does_not_depend_on_the_rows_beside_it():
    torch.manual_seed(0)
    packed = PackedLinear(nn.Linear(64, 96).requires_grad_(False), keep_weight=False)
    x = torch.randn(100, 64)
    for rows in (x[:1], x[:7], x[:64]):
        assert torch.equal(packed(rows), packed(x)[: len(rows)])


def test_a_new_weight_is_multiplied_by_after_it_was_loaded():
    linear, other = (nn.Linear(16, 8, bias=False).requires_grad_(False) for _ in range(2))
    packed = PackedLinear(linear, keep_weight=False)
    packed.load(other.weight)
    x = torch.randn(5, 16)
    torch.testing.assert_close(packed(x), other(x))


def test_a_weight_changed_in_place_afterwards_changes_nothing():
    linear = nn.Linear(16, 16, bias=False).requires_grad_(False)
    packed, x = PackedLinear(linear, keep_weight=True), torch.randn(4, 16)
    before = packed(x)
    linear.weight.zero_()
    assert torch.equal(packed(x), before)


def test_a_gradient_is_refused_and_not_dropped():
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
