"""Whether flash-attn is used: judged by a call of what is installed, here stand-ins of every kind."""

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from transformers import Qwen2Config

from verl.errors import UserError
from verl.models import attention
from verl.models.attention import grace_attention, kernel_in_use
from verl.models.flash import flash_attention, flash_problem
from verl.models.packing import Row, pack

CPU = torch.device("cpu")
SHAPE = (4, 2, 16)


def working(q, k, v, bounds, _bounds, _longest, _same, *, softmax_scale, causal, window_size=(-1, -1), softcap=0.0):
    """flash_attn_varlen_func from first principles."""
    assert causal
    outputs = []
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        rows = (x[start:end].transpose(0, 1).float() for x in (q, k, v))
        query, key, value = rows
        key, value = (x.repeat_interleave(len(query) // len(key), dim=0) for x in (key, value))
        scores = query @ key.transpose(1, 2) * (q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale)
        scores = (scores / softcap).tanh() * softcap if softcap else scores
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
        seen = (distance >= 0) & (distance <= window_size[0] if window_size[0] >= 0 else True)
        outputs.append((scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value).transpose(0, 1))
    return torch.cat(outputs).to(q.dtype)


def no_kernel(*_, **__):
    raise RuntimeError("CUDA error: no kernel image is available for execution on the device")


def wrong(q, *_, **__):
    return torch.zeros_like(q)


def without_windows(q, k, v, b, _b, _l, _s, *, softmax_scale, causal):
    return working(q, k, v, b, _b, _l, _s, softmax_scale=softmax_scale, causal=causal)


@pytest.fixture(autouse=True)
def judged_anew():
    flash_problem.cache_clear()
    yield
    flash_problem.cache_clear()


def install(monkeypatch, function) -> None:
    module = ModuleType("flash_attn")
    module.flash_attn_varlen_func = function
    monkeypatch.setitem(sys.modules, "flash_attn", module)


def test_one_that_works_is_used(monkeypatch, caplog):
    install(monkeypatch, working)
    assert flash_problem(CPU, torch.bfloat16, *SHAPE) is None
    assert flash_problem(CPU, torch.bfloat16, *SHAPE, window=5, softcap=50.0) is None
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (no_kernel, "RuntimeError: CUDA error: no kernel image"),
        (wrong, "results are wrong here"),
        (without_windows, "unexpected keyword argument 'window_size'"),
    ],
)
def test_one_that_fails_when_it_runs_is_not_used_and_that_is_said_once(monkeypatch, caplog, function, reason):
    install(monkeypatch, function)
    for _ in range(2):
        assert reason in flash_problem(CPU, torch.bfloat16, *SHAPE, window=5)
    assert len(caplog.messages) == 1 and reason in caplog.messages[0]


def test_a_folder_of_that_name_is_not_taken_for_the_package(monkeypatch, tmp_path):
    (tmp_path / "flash_attn").mkdir()
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert "ImportError: cannot import name 'flash_attn_varlen_func'" in flash_problem(CPU, torch.bfloat16, *SHAPE)


def test_a_missing_package_is_said_in_words(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert flash_problem(CPU, torch.float16, *SHAPE) == "flash-attn is not installed"
    assert flash_problem(CPU, torch.float32, *SHAPE) == "flash-attn has no float32"
    assert caplog.messages == []


def test_windows_and_caps_reach_it_as_they_are_meant(monkeypatch):
    install(monkeypatch, working)
    torch.manual_seed(0)
    query, key, value = (3 * torch.randn(1, heads, 23, 16) for heads in (4, 2, 2))
    rows = [Row(tuple(range(n)), (), 0, False) for n in (9, 14)]
    segments = pack(rows, share_prompts=False).segments
    for window, softcap in [(None, None), (5, None), (None, 2.0), (5, 2.0)]:
        found = flash_attention(query, key, value, [9, 14], 0.3, window, softcap)
        own = attention._segment_attention(query, key, value, segments, 0.3, window, softcap)
        torch.testing.assert_close(found, own, atol=1e-5, rtol=1e-5)


def off_the_cpu(kernel: str) -> torch.Tensor:
    """The attention of one row on a device that is no CPU."""
    query, key, value = (torch.empty(1, heads, 9, 16, device="meta", dtype=torch.bfloat16) for heads in (4, 2, 2))
    segments = pack([Row(tuple(range(9)), (), 0, False)], share_prompts=False).segments
    return grace_attention(None, query, key, value, None, kernel=kernel, packed_segments=segments)[0]


@pytest.mark.parametrize(
    ("kernel", "problem", "used"),
    [("auto", None, True), ("auto", "it is broken", False), ("sdpa", None, False), ("flash_attention_2", None, True)],
)
def test_the_setting_chooses_and_a_broken_one_is_passed_over(monkeypatch, kernel, problem, used):
    calls = []
    monkeypatch.setattr(attention, "flash_problem", lambda *_: problem)
    monkeypatch.setattr(attention, "flash_attention", lambda q, *_: calls.append(1) or q.transpose(1, 2))
    assert off_the_cpu(kernel).shape == (1, 9, 4, 16)
    assert bool(calls) == used


def test_one_that_is_asked_for_and_broken_is_an_error_at_start(monkeypatch):
    config = Qwen2Config(hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    install(monkeypatch, no_kernel)
    with pytest.raises(UserError, match=r"model\.attn_implementation=flash_attention_2, but .*no kernel image"):
        kernel_in_use(config, "flash_attention_2", CPU)
    assert kernel_in_use(config, "auto", CPU) == kernel_in_use(config, "sdpa", CPU) == "torch's own attention"
    flash_problem.cache_clear()
    install(monkeypatch, working)
    assert kernel_in_use(config, "flash_attention_2", CPU) == "flash-attn"


def test_the_stand_in_is_plain_attention():
    torch.manual_seed(0)
    q, k, v = (torch.randn(7, heads, 16) for heads in (4, 4, 4))
    found = working(q, k, v, torch.tensor([0, 7]), None, 7, 7, softmax_scale=None, causal=True)
    expected = F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v)), is_causal=True)
    torch.testing.assert_close(found, expected.transpose(0, 1))
