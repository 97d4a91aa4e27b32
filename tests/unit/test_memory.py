"""The memory a process may use, and how many rows are decoded at once for it."""

from types import SimpleNamespace

import psutil
import pytest
import torch
from tiny import tiny_model

from verl.models.attention import ATTENTION
from verl.utils import memory
from verl.workers.rollout.base import row_seeds
from verl.workers.rollout.decoding import Decoding, Forward, rows_that_fit

# Without a common beginning, which buffers would hold once.
PROMPTS = [[5, 6, 7, 8], [9], [10, 11, 12, 13, 14, 15, 16]]


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"memory.max": "1048576\n"}, 1048576),
        ({"memory/memory.limit_in_bytes": "2097152\n"}, 2097152),
        ({"memory.max": "max\n"}, None),
        ({"memory/memory.limit_in_bytes": "9223372036854771712\n"}, None),
        ({}, None),
    ],
    ids=["version 2", "version 1", "version 2 without a limit", "version 1 without a limit", "no control groups"],
)
def test_a_containers_limit_is_the_memory_that_a_process_may_use(tmp_path, monkeypatch, files, limit):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(memory, "_CONTROL_GROUPS", tmp_path)
    assert memory.usable_memory() == (limit or psutil.virtual_memory().total)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_fit_a_quarter_of_the_memory_by_what_their_buffers_really_take(dtype):
    lm = tiny_model().to(dtype)
    lm.set_attn_implementation(ATTENTION)
    decoding = Decoding(Forward(lm), PROMPTS, [0.0] * 3, [4] * 3, row_seeds(0, 3), (), 3, None)
    list(decoding.run())
    buffers = [cached.rows for caches in (decoding.cache._keys, decoding.cache._values) for cached in caches.values()]
    a_row = sum(buffer.nbytes for buffer in buffers) // 3
    logits = 3 * 4 * lm.config.vocab_size
    for rows in (1, 7, 511):
        exactly = 4 * rows * (a_row + logits)
        assert rows_that_fit(lm, 7 + 4, exactly) == rows
        assert rows_that_fit(lm, 7 + 4, exactly - 4) == max(1, rows - 1)


def test_at_least_one_row_is_decoded_and_never_more_than_gain_anything():
    lm = SimpleNamespace(config=tiny_model().config, dtype=torch.float32)
    assert [rows_that_fit(lm, 100, memory) for memory in (0, 10**15)] == [1, 512]
