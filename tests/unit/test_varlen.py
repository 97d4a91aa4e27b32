"""Whether varlen_attn is used: judged by a call, here of stand-ins of every kind; and what it is called with."""

import pytest
import torch
import torch.nn.attention.varlen as torch_varlen
import torch.nn.functional as F
from transformers import Qwen2Config

from verl.errors import UserError
from verl.models import attention
from verl.models.attention import grace_attention, kernel_in_use
from verl.models.packing import Row, pack
from verl.models.varlen import varlen_attention, varlen_problem

CPU = torch.device("cpu")
SHAPE = (4, 2, 16)


def working(q, k, v, bounds, _bounds, _longest, _same, *, scale=None, window_size=(-1, -1), enable_gqa=False):
    """varlen_attn from first principles, for causal windows."""
    assert window_size[1] == 0 and enable_gqa == (q.shape[1] != k.shape[1])
    outputs = []
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        rows = (x[start:end].transpose(0, 1).float() for x in (q, k, v))
        query, key, value = rows
        key, value = (x.repeat_interleave(len(query) // len(key), dim=0) for x in (key, value))
        scores = query @ key.transpose(1, 2) * (q.shape[2] ** -0.5 if scale is None else scale)
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
        seen = (distance >= 0) & (distance <= window_size[0] if window_size[0] >= 0 else True)
        outputs.append((scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value).transpose(0, 1))
    return torch.cat(outputs).to(q.dtype)


def no_kernel(*_, **__):
    raise RuntimeError("CUDA error: no kernel image is available for execution on the device")


def wrong(q, *_, **__):
    return torch.zeros_like(q)


def of_an_older_torch(q, k, v, b, _b, _l, _s, is_causal=False):
    raise AssertionError("must not be reached")


@pytest.fixture(autouse=True)
def judged_anew():
    varlen_problem.cache_clear()
    yield
    varlen_problem.cache_clear()


def install(monkeypatch, function) -> None:
    monkeypatch.setattr(torch_varlen, "varlen_attn", function)


def test_one_that_works_is_used(monkeypatch, caplog):
    install(monkeypatch, working)
    assert varlen_problem(CPU, torch.bfloat16, *SHAPE) is None
    assert varlen_problem(CPU, torch.bfloat16, *SHAPE, window=5) is None
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (no_kernel, "RuntimeError: CUDA error: no kernel image"),
        (wrong, "results are wrong here"),
        (of_an_older_torch, "unexpected keyword argument 'scale'"),
    ],
)
def test_one_that_fails_when_it_runs_is_not_used_and_that_is_said_once(monkeypatch, caplog, function, reason):
    install(monkeypatch, function)
    for _ in range(2):
        assert reason in varlen_problem(CPU, torch.bfloat16, *SHAPE, window=5)
    assert len(caplog.messages) == 1 and reason in caplog.messages[0]


def test_a_torch_without_it_is_said_in_words(monkeypatch):
    monkeypatch.delattr(torch_varlen, "varlen_attn")
    assert "ImportError: cannot import name 'varlen_attn'" in varlen_problem(CPU, torch.bfloat16, *SHAPE)


def test_what_it_cannot_do_is_known_without_a_call(monkeypatch, caplog):
    install(monkeypatch, no_kernel)
    assert varlen_problem(CPU, torch.float32, *SHAPE) == "varlen_attn has no float32"
    assert varlen_problem(CPU, torch.float16, *SHAPE, softcap=50.0) == "varlen_attn has no soft cap"
    assert caplog.messages == []


def test_windows_and_scales_reach_it_as_they_are_meant(monkeypatch):
    install(monkeypatch, working)
    torch.manual_seed(0)
    query, key, value = (3 * torch.randn(1, heads, 23, 16) for heads in (4, 2, 2))
    rows = [Row(tuple(range(n)), (), 0, False) for n in (9, 14)]
    segments = pack(rows, share_prompts=False).segments
    for window in (None, 5):
        found = varlen_attention(query, key, value, [9, 14], 0.3, window)
        own = attention._segment_attention(query, key, value, segments, 0.3, window, None)
        torch.testing.assert_close(found, own, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("heads", [(4, 2), (4, 4)])
def test_torchs_own_function_takes_the_call_and_has_a_gradient(window, heads):
    """On the meta device, by which torch checks arguments and shapes without a kernel."""
    query, key, value = (
        torch.empty(1, n, 23, 16, device="meta", dtype=torch.bfloat16, requires_grad=True)
        for n in (heads[0], heads[1], heads[1])
    )
    out = varlen_attention(query, key, value, [9, 14], 0.3, window)
    assert out.shape == (1, 23, 4, 16) and out.dtype == torch.bfloat16
    grads = torch.autograd.grad(out.sum(), (query, key, value))
    assert [grad.shape for grad in grads] == [query.shape, key.shape, value.shape]


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


def test_one_that_is_asked_for_and_broken_is_an_error_at_start(monkeypatch):
    config = Qwen2Config(hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    install(monkeypatch, no_kernel)
    with pytest.raises(UserError, match=r"model\.attn_implementation=varlen, but .*no kernel image"):
        kernel_in_use(config, "varlen", CPU)
    assert kernel_in_use(config, "auto", CPU) == kernel_in_use(config, "sdpa", CPU) == "attention row by row"
    varlen_problem.cache_clear()
    install(monkeypatch, working)
    assert kernel_in_use(config, "varlen", CPU) == "attention of all rows at once (varlen_attn)"


def test_the_stand_in_is_plain_attention():
    torch.manual_seed(0)
    q, k, v = (torch.randn(7, heads, 16) for heads in (4, 4, 4))
    found = working(q, k, v, torch.tensor([0, 7]), None, 7, 7, window_size=(-1, 0))
    expected = F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v)), is_causal=True)
    torch.testing.assert_close(found, expected.transpose(0, 1))
