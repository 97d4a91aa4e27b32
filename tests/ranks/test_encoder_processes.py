"""An encoder of two processes returns what one process returns, and ends with a clear error when one of them fails."""

import os
import signal
import subprocess
import sys

import numpy as np
import pandas
import pytest

from verl import GraceEncoder
from verl.embedding.prompts import rationale_messages
from verl.embedding.settings import EmbedderSettings
from verl.workers.rollout.base import RolloutError

TEXTS = [f"text number {i} of several" * (1 + i % 3) for i in range(20)]
SETTINGS = EmbedderSettings(text_share=0.3, no_rationale_weight=0.5)
SAMPLED = {"max_new_tokens": 8, "temperature": 1.0, "return_rationales": True}


@pytest.fixture(scope="module")
def spread(tiny_folder, tmp_path_factory):
    store = tmp_path_factory.mktemp("store")
    with GraceEncoder(tiny_folder, device="cpu", num_processes=2, store=store, settings=SETTINGS) as encoder:
        yield encoder


def test_two_processes_give_the_vectors_and_rationales_of_one(spread, tiny_folder):
    alone = GraceEncoder(tiny_folder, device="cpu", settings=SETTINGS)
    expected, rationales = alone.encode(TEXTS, **SAMPLED)
    vectors, same = spread.encode(TEXTS, **SAMPLED)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    assert same == rationales
    assert spread.backend.facts == alone.backend.facts
    for name in ("rationales_made", "vectors_made", "generated_tokens", "forward_tokens", "truncated"):
        assert getattr(spread.usage, name) == getattr(alone.usage, name), name
    # Again from the store, without thinking, and one text alone: fewer texts than processes.
    np.testing.assert_allclose(spread.encode(TEXTS, **SAMPLED)[0], expected, atol=1e-5)
    assert spread.usage.rationales_made == len(TEXTS)
    plain = spread.encode(TEXTS[0], think=False)
    np.testing.assert_allclose(plain, alone.encode(TEXTS[0], think=False), atol=1e-5)


def test_the_program_shares_its_work_too(tiny_folder, tmp_path, repo):
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(TEXTS) + "\n")

    def embed(count: int) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "verl.encoder", "--model", str(tiny_folder), "--input", str(texts), "--output"]
        options = [f"{tmp_path}/{count}.parquet", "--max_new_tokens=4", "--device=cpu", f"--num_processes={count}"]
        return subprocess.run([*command, *options], capture_output=True, text=True, cwd=repo, check=False)

    frames = []
    for count in (1, 2):
        done = embed(count)
        assert done.returncode == 0, done.stderr
        frames.append(pandas.read_parquet(tmp_path / f"{count}.parquet"))
    alone, shared = frames
    assert shared["rationale"].tolist() == alone["rationale"].tolist() and len(shared) == len(TEXTS)
    np.testing.assert_allclose(np.stack(shared["vector"]), np.stack(alone["vector"]), atol=1e-5)
    done = embed(0)
    assert done.returncode == 2 and "num_processes=0 must be 1 or more" in done.stderr


def test_an_error_in_a_process_comes_with_its_traceback_and_ends_all_processes(spread, monkeypatch):
    prompts = spread.renderer.render([rationale_messages("a text")])
    prompts[0].ids[0] = 10**6  # an id that the model does not know
    monkeypatch.setattr(spread.renderer, "render", lambda *_: prompts)
    with pytest.raises(RolloutError, match=r"(?s)process \d of the encoder failed:.*Traceback.*IndexError"):
        spread.encode(["a text"], max_new_tokens=4)
    with pytest.raises(RolloutError, match="processes have ended, after a failure or close"):
        spread.encode(["a text"], max_new_tokens=4)


def test_a_killed_process_is_an_error_that_names_it_and_no_process_stays(tiny_folder):
    with GraceEncoder(tiny_folder, device="cpu", num_processes=2) as encoder:
        os.kill(encoder.backend._processes[1].pid, signal.SIGKILL)
        with pytest.raises(RolloutError, match="process 1 of the encoder ended with exit code -9"):
            encoder.encode(TEXTS, **SAMPLED)
    assert not any(process.is_alive() for process in encoder.backend._processes)


def test_a_tensor_parallel_size_that_does_not_divide_the_processes_is_rejected(tiny_folder):
    with pytest.raises(ValueError, match="tensor_parallel_size=2 does not divide the 3 processes"):
        GraceEncoder(tiny_folder, device="cpu", num_processes=3, tensor_parallel_size=2)
