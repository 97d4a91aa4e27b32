"""The model folder of a checkpoint has the dtype, and about the size, of the one that training started from."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import save_tiny, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from verl.checkpoint.training_state import checkpoint_size, save_transformers_folder
from verl.config import RunConfig
from verl.embedding.settings import EmbedderSettings
from verl.models.load import load_causal_lm


def write_base(folder: Path, dtype: torch.dtype) -> Path:
    save_tiny(folder)
    tiny_model().to(dtype).save_pretrained(folder)
    return folder


def save(lm, folder: Path) -> Path:
    weights = [(name, weight) for name, weight in lm.named_parameters()]
    save_transformers_folder(folder, weights, lm, tiny_tokenizer(), EmbedderSettings(), rank=0)
    return folder


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_saved_model_has_the_dtype_of_its_base(tmp_path, dtype):
    base = write_base(tmp_path / "base", dtype)
    lm = load_causal_lm(str(base))
    assert {weight.dtype for weight in lm.parameters()} == {torch.float32}
    with torch.no_grad():
        lm.model.norm.weight += 1e-4
    saved = save(lm, tmp_path / "saved")
    files = (base / "model.safetensors", saved / "model.safetensors")
    before, after = (load_file(file) for file in files)
    assert {weight.dtype for weight in after.values()} == {dtype}
    assert torch.equal(after["model.norm.weight"], (before["model.norm.weight"].float() + 1e-4).to(dtype))
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    sizes = [file.stat().st_size for file in files]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01)
    name = str(dtype).removeprefix("torch.")
    assert json.loads((saved / "config.json").read_text())["dtype"] == name
    assert AutoModelForCausalLM.from_pretrained(saved, dtype="auto").dtype == dtype


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0.9, "top_p": 0.6}, {"early_stopping": True, "num_beams": 1}], ids=str
)
def test_a_generation_config_that_transformers_loads_with_a_warning_is_kept(tmp_path, sampling):
    base = write_base(tmp_path / "base", torch.float32)
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 5, **sampling}))
    saved = save(load_causal_lm(str(base)), tmp_path / "saved")
    kept = json.loads((saved / "generation_config.json").read_text())
    assert kept["eos_token_id"] == 5 and {**kept, **sampling} == kept
    assert AutoModelForCausalLM.from_pretrained(saved).generation_config.eos_token_id == 5


def test_a_config_with_the_old_name_of_the_dtype_counts(tmp_path):
    base = write_base(tmp_path / "base", torch.bfloat16)
    config = json.loads((base / "config.json").read_text())
    del config["dtype"]
    (base / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))
    saved = save(load_causal_lm(str(base)), tmp_path / "saved")
    assert {weight.dtype for weight in load_file(saved / "model.safetensors").values()} == {torch.bfloat16}


def test_the_estimate_of_the_room_is_that_of_the_files(tmp_path):
    base = write_base(tmp_path / "base", torch.bfloat16)
    lm = load_causal_lm(str(base))
    count = sum(weight.numel() for weight in lm.parameters())
    # Three times float32, and the folder in bfloat16.
    assert checkpoint_size(RunConfig(), count, count, lm.config.dtype) == 14 * count
    lora = RunConfig.model_validate({"actor_rollout_ref": {"model": {"lora_rank": 4}}})
    assert checkpoint_size(lora, 100, count, lm.config.dtype) == 16 * 100
    assert 2 * count == pytest.approx((base / "model.safetensors").stat().st_size, rel=0.05)
