"""Whether varlen_attn is used, and how: the function is torch's own, its CUDA kernels are replaced by plain ones.

The kernels below know the arguments that torch's wrapper passes on, so the wrapper, its autograd and its shapes are
those of a GPU; what the real kernels compute, only a GPU shows.
"""

import sys

import pytest
import torch
import torch.nn.attention.varlen as torch_varlen
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Qwen2Config

from verl.errors import UserError
from verl.models import attention, varlen
from verl.models.attention import grace_attention, kernel_in_use
from verl.models.packing import Row, pack
from verl.models.varlen import varlen_attention, varlen_problem

CPU = torch.device("cpu")
SHAPE = (4, 2, 16)


def weights_of(query, key, scale, left):
    """The softmax of one row's attention [heads, length, length] in float32, from first principles."""
    scores = scale * query @ key.transpose(1, 2)
    distance = torch.arange(scores.shape[1])[:, None] - torch.arange(scores.shape[1])
    seen = (distance >= 0) & (distance <= left if left >= 0 else True)
    return scores.masked_fill(~seen, -torch.inf).softmax(-1)


def rows_of(bounds, heads, *lines):
    """Each row of lines [K, heads, head size] in float32, as [heads, length, head size]; key heads are repeated."""
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        parts = (line[start:end].transpose(0, 1).float() for line in lines)
        yield [part.repeat_interleave(heads // len(part), dim=0) for part in parts]


def plain(q, k, v, bounds, scale, left):
    rows = rows_of(bounds, q.shape[1], q, k, v)
    return torch.cat([(weights_of(query, key, scale, left) @ value).transpose(0, 1) for query, key, value in rows])


def plain_backward(grad, q, k, v, bounds, scale, left):
    """The gradients by q, k and v; those of query heads that share a key head are added."""
    found = []
    for g, query, key, value in rows_of(bounds, q.shape[1], grad, q, k, v):
        weights = weights_of(query, key, scale, left)
        of_weights = g @ value.transpose(1, 2)
        of_scores = scale * weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True))
        found.append([of_scores @ key, of_scores.transpose(1, 2) @ query, weights.transpose(1, 2) @ g])
    whole = [torch.cat(parts, dim=1).transpose(0, 1) for parts in zip(*found, strict=True)]
    return [x.unflatten(1, (y.shape[1], -1)).sum(2) for x, y in zip(whole, (q, k, v), strict=True)]


class Kernels:
    """Plain attention in place of the two CUDA kernels, and what they were asked for."""

    def __init__(self):
        self.calls, self.forward_factor, self.backward_factor, self.windows = [], 1.0, 1.0, True

    def forward(self, q, k, v, bounds, bounds_k, longest, longest_k, dropout, is_causal, return_debug_mask, *,
                scale=None, window_size_left=None, window_size_right=None, **further):  # fmt: skip
        assert bounds.dtype == bounds_k.dtype == torch.int32 and torch.equal(bounds, bounds_k)
        assert q.dtype in (torch.float16, torch.bfloat16) and dropout == 0 and not any(further.values())
        assert window_size_right == 0 and is_causal == (window_size_left == -1)
        self.calls.append((bounds.tolist(), longest, window_size_left))
        left = window_size_left if self.windows else -1
        out = self.forward_factor * plain(q, k, v, bounds, scale or q.shape[2] ** -0.5, left).to(q.dtype)
        return out, torch.zeros(q.shape[1], len(q)), torch.zeros(2, dtype=torch.uint64), torch.zeros(0), torch.zeros(0)

    def backward(self, grad, q, k, v, out, lse, bounds, bounds_k, longest, longest_k, dropout, is_causal, rng, unused,
                 *, scale=None, window_size_left=None, window_size_right=None):  # fmt: skip
        found = plain_backward(grad, q, k, v, bounds, scale or q.shape[2] ** -0.5, window_size_left)
        return tuple((self.backward_factor * x).to(q.dtype) for x in found)


@pytest.fixture
def kernels():
    found, library = Kernels(), torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", lambda *a, **k: found.forward(*a, **k), "CPU")
    library.impl("_flash_attention_backward", lambda *a, **k: found.backward(*a, **k), "CPU")
    yield found
    library._destroy()


@pytest.fixture(autouse=True)
def judged_anew():
    for remembered in (varlen_problem, varlen._bounds):
        remembered.cache_clear()
    yield
    for remembered in (varlen_problem, varlen._bounds):
        remembered.cache_clear()


def test_one_that_works_is_used(kernels, caplog):
    assert varlen_problem(CPU, torch.bfloat16, *SHAPE) is None
    assert varlen_problem(CPU, torch.bfloat16, *SHAPE, window=500) is None
    assert varlen_problem(CPU, torch.float16, 4, 4, 16) is None
    assert caplog.messages == []
    # The trial has two rows and a window that both feel.
    assert kernels.calls[:2] == [([0, 11, 16], 11, -1), ([0, 11, 16], 11, 3)]


def test_one_that_fails_when_it_runs_is_not_used_and_that_is_said_once(caplog):
    for _ in range(2):
        assert "varlen_attn does not work here (NotImplementedError: " in varlen_problem(CPU, torch.bfloat16, *SHAPE)
    assert len(caplog.messages) == 1 and "does not work here" in caplog.messages[0]


@pytest.mark.parametrize(
    ("fault", "window", "reason"),
    [
        ({"forward_factor": 1.5}, None, "wrong results"),
        ({"backward_factor": 1.5}, None, "wrong gradients"),
        ({"windows": False}, 500, "wrong results"),
    ],
)
def test_wrong_numbers_are_seen(kernels, caplog, fault, window, reason):
    vars(kernels).update(fault)
    assert reason in varlen_problem(CPU, torch.bfloat16, *SHAPE, window)
    assert reason in caplog.messages[0]


def test_what_it_does_not_have_is_said_without_a_warning(kernels, caplog):
    assert varlen_problem(CPU, torch.float32, *SHAPE) == "torch's varlen_attn has no float32"
    assert varlen_problem(CPU, torch.bfloat16, *SHAPE, softcap=50.0) == "torch's varlen_attn has no soft cap"
    assert caplog.messages == [] and kernels.calls == []


def test_a_torch_without_it_is_said_in_words(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    assert varlen_problem(CPU, torch.bfloat16, *SHAPE) == f"torch {torch.__version__} has no varlen_attn"
    assert caplog.messages == []


def test_with_fewer_arguments_it_serves_models_that_do_not_need_them(kernels, monkeypatch):
    """torch 2.11 has no enable_gqa."""
    own = torch_varlen.varlen_attn

    def of_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
                window_size=(-1, -1)):  # fmt: skip
        return own(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)

    monkeypatch.setattr(torch_varlen, "varlen_attn", of_2_11)
    assert varlen_problem(CPU, torch.bfloat16, 4, 4, 16) is None
    assert "unexpected keyword argument 'enable_gqa'" in varlen_problem(CPU, torch.bfloat16, *SHAPE)


@pytest.mark.parametrize("window", [None, 5, 1])
def test_rows_scale_and_windows_reach_it_as_they_are_meant(kernels, window):
    """Values and gradients are those of row by row attention, in float32 of the same numbers."""
    torch.manual_seed(0)
    line = [(3 * torch.randn(1, heads, 23, 16)).bfloat16() for heads in (4, 2, 2)]
    segments = pack([Row(tuple(range(n)), (), 0, False) for n in (9, 14)], share_prompts=False).segments
    narrow, wide = ([x.to(dtype).requires_grad_() for x in line] for dtype in (torch.bfloat16, torch.float32))
    found = varlen_attention(*narrow, [9, 14], 0.3, window)
    expected = attention._segment_attention(*wide, segments, 0.3, window, None)
    torch.testing.assert_close(found.float(), expected, atol=0.02, rtol=0.02)
    weight = torch.randn(expected.shape).bfloat16()
    of_found = torch.autograd.grad((found * weight).sum(), narrow)
    of_expected = torch.autograd.grad((expected * weight).sum(), wide)
    for mine, reference in zip(of_found, of_expected, strict=True):
        torch.testing.assert_close(mine.float(), reference, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("window", [None, 5])
def test_shapes_and_dtypes_are_those_of_torchs_own_rules(window):
    """Forward and backward by torch's rules for tensors without data; no kernel runs, also none of the above."""
    with FakeTensorMode():
        line = [torch.empty(1, n, 23, 16, dtype=torch.bfloat16, requires_grad=True) for n in (4, 2, 2)]
        out = varlen_attention(*line, [9, 14], None, window)
        gradients = torch.autograd.grad(out.sum(), line)
    assert (out.shape, out.dtype) == ((1, 23, 4, 16), torch.bfloat16)
    assert [(g.shape, g.dtype) for g in gradients] == [(x.shape, x.dtype) for x in line]


def off_the_cpu(kernel: str) -> torch.Tensor:
    """The attention of one row on a device that is no CPU."""
    query, key, value = (torch.empty(1, heads, 9, 16, device="meta", dtype=torch.bfloat16) for heads in (4, 2, 2))
    segments = pack([Row(tuple(range(9)), (), 0, False)], share_prompts=False).segments
    return grace_attention(None, query, key, value, None, kernel=kernel, packed_segments=segments)[0]


@pytest.mark.parametrize(
    ("kernel", "problem", "used"),
    [("auto", None, True), ("auto", "it is broken", False), ("sdpa", None, False), ("varlen", None, True)],
)
def test_the_setting_chooses_and_a_broken_one_is_passed_over(monkeypatch, kernel, problem, used):
    calls = []
    monkeypatch.setattr(attention, "varlen_problem", lambda *_: problem)
    monkeypatch.setattr(attention, "varlen_attention", lambda q, *_: calls.append(1) or q.transpose(1, 2))
    assert off_the_cpu(kernel).shape == (1, 9, 4, 16)
    assert bool(calls) == used


def test_one_that_is_asked_for_and_broken_is_an_error_at_start():
    config = Qwen2Config(hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    with pytest.raises(UserError, match=r"model\.attn_implementation=varlen, but .*does not work here"):
        kernel_in_use(config, "varlen", CPU)
    assert kernel_in_use(config, "auto", CPU) == kernel_in_use(config, "sdpa", CPU) == "scaled_dot_product_attention"


def test_one_that_works_is_named_and_soft_caps_go_to_the_other(kernels):
    config = Qwen2Config(hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    assert kernel_in_use(config, "varlen", CPU) == "varlen_attn"
    config.attn_logit_softcapping = 50.0
    with pytest.raises(UserError, match="no soft cap; set auto or sdpa"):
        kernel_in_use(config, "varlen", CPU)


def test_the_stand_in_is_plain_attention():
    torch.manual_seed(0)
    line = [torch.randn(7, heads, 16, requires_grad=True) for heads in (4, 2, 2)]
    grad, bounds = torch.randn(7, 4, 16), torch.tensor([0, 7])
    expected = F.scaled_dot_product_attention(
        *(x.transpose(0, 1) for x in line), is_causal=True, scale=0.25, enable_gqa=True
    ).transpose(0, 1)
    torch.testing.assert_close(plain(*line, bounds, 0.25, -1), expected)
    of_expected = torch.autograd.grad(expected, line, grad)
    for found, reference in zip(plain_backward(grad, *line, bounds, 0.25, -1), of_expected, strict=True):
        torch.testing.assert_close(found, reference)
