"""What can only be tested on a GPU: the packed forward on CUDA, torch's varlen_attn, a run with offload.

Skipped with that reason where there is no CUDA device.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tiny import save_tiny, tiny_model

from verl import GraceEncoder
from verl.errors import UserError
from verl.models.attention import ATTENTION, ATTENTIONS, Kernel
from verl.models.packing import Row, pack
from verl.models.policy import PolicyModel
from verl.models.varlen import varlen_problem

sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))

from runs import main_ppo, prepare, recipe, steps_of, write_triplets

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def rows() -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    sizes = [(30, 12), (25, 40), (30, 1), (60, 25)]
    return [
        Row(*(tuple(torch.randint(0, 250, (n,), generator=generator).tolist()) for n in size), 20, True)
        for size in sizes
    ]


def packed_outputs(device: str, dtype: torch.dtype, share: bool, attention: str = ATTENTION):
    lm = tiny_model().to(device, dtype)
    lm.set_attn_implementation(attention)
    packed = pack(rows(), share).to(torch.device(device))
    return PolicyModel(lm)(packed, 1.0, entropy=True, embeddings=True)


@pytest.mark.parametrize("share", [True, False])
def test_cuda_equals_cpu_in_float32(share):
    cpu, cuda = packed_outputs("cpu", torch.float32, share), packed_outputs("cuda", torch.float32, share)
    torch.testing.assert_close(cuda.log_probs.cpu(), cpu.log_probs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(cuda.embeddings.cpu(), cpu.embeddings, atol=1e-4, rtol=1e-4)


def test_bfloat16_on_cuda_is_near_float32():
    cpu, cuda = packed_outputs("cpu", torch.float32, False), packed_outputs("cuda", torch.bfloat16, False)
    assert torch.cosine_similarity(cuda.embeddings.cpu(), cpu.embeddings).min() > 0.99
    assert (cuda.log_probs.cpu() - cpu.log_probs).abs().mean() < 0.1


@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("window", [None, 8])
def test_varlen_attention_works_here(head_size, window):
    """Its trial compares results and gradients with plain attention in float32."""
    assert varlen_problem(torch.device("cuda", 0), torch.bfloat16, 8, 2, head_size, window) is None


def test_both_kernels_compute_the_same_model():
    kernels: tuple[Kernel, Kernel] = ("varlen", "sdpa")
    varlen, sdpa = (packed_outputs("cuda", torch.bfloat16, False, ATTENTIONS[kernel]) for kernel in kernels)
    assert torch.cosine_similarity(varlen.embeddings, sdpa.embeddings).min() > 0.999
    assert (varlen.log_probs - sdpa.log_probs).abs().mean() < 0.05


@pytest.mark.parametrize("offload", [True, False])
@pytest.mark.parametrize("engine", ["hf", "vllm"])
def test_a_run_on_a_gpu(tmp_path, engine, offload):
    if engine == "vllm" and find_spec("vllm") is None:
        pytest.skip("vllm is not installed (pip install -e '.[vllm]')")
    if find_spec("ray") is None:
        pytest.skip("ray is not installed")
    model = save_tiny(tmp_path / "model", hidden_size=256, llama=True)
    data = prepare("supervised", write_triplets(tmp_path / "raw.jsonl"), tmp_path / "data")
    overrides = [o for o in recipe(model, data, tmp_path / "run") if not o.startswith("trainer.device")]
    done = main_ppo(
        *overrides, "trainer.device=cuda", "trainer.n_gpus_per_node=1", "trainer.total_training_steps=2",
        f"actor_rollout_ref.rollout.name={engine}", "actor_rollout_ref.rollout.check_weight_sync=full",
        "actor_rollout_ref.rollout.gpu_memory_utilization=0.2",
        f"actor_rollout_ref.actor.fsdp_config.param_offload={offload}",
        f"actor_rollout_ref.actor.fsdp_config.optimizer_offload={offload}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for m in steps_of(tmp_path / "run"):
        assert m["rollout/probs_diff_mean"] < 0.02
        assert m["memory/gpu_peak_gb"] > 0
        assert m["memory/free_gb/generating"] > m["memory/free_gb/waking_the_cache"] or engine == "hf"


def test_a_module_of_sentence_transformers_refuses_to_leave_its_gpu(tiny_folder):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from verl.encoder.sentence_transformers import GraceModule

    module = GraceModule(GraceEncoder(tiny_folder, device="cuda", engine="hf"))
    sentence_transformers.SentenceTransformer(modules=[module]).half()
    with pytest.raises(UserError, match=r"device=cpu: this model is on cuda:0; give model_kwargs=\{'device': 'cpu'\}"):
        sentence_transformers.SentenceTransformer(modules=[module], device="cpu")
