"""What verl.merge_model writes, uploads, compares and prints."""

import subprocess
import sys

import pytest
import torch
from hub_stand_in import TOKEN, running_hub, use_hub
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from sharded_checkpoints import assert_is_tiny, compare, error_line, merge
from tiny import save_tiny, tiny_model

from verl import merge_model as program
from verl.checkpoint import merge as merge_work

# ---- Writing and uploading


def test_an_earlier_result_is_replaced_and_anything_else_is_kept(checkpoints, tmp_path, capsys):
    target = tmp_path / "some" / "merged"
    assert merge(checkpoints / "dcp_1_untied", target) == 0
    (target / "stale").write_text("")
    assert merge(checkpoints / "dcp_1_tied", target) == 0
    assert_is_tiny(target, tie=True)
    assert not (target / "stale").exists() and [path.name for path in target.parent.iterdir()] == ["merged"]
    own = tmp_path / "own"
    own.mkdir()
    assert merge(checkpoints / "dcp_1_tied", own) == 0
    (own / "merge_model.json").unlink()
    assert f"--target_dir={own} exists" in error_line(capsys, merge(checkpoints / "dcp_1_tied", own))
    file = tmp_path / "file"
    file.write_text("kept")
    assert f"--target_dir={file} exists" in error_line(capsys, merge(checkpoints / "dcp_1_tied", file))
    assert file.read_text() == "kept"


def test_a_folder_that_reads_back_differently_is_not_published(checkpoints, tmp_path, capsys, monkeypatch):
    assert merge(checkpoints / "dcp_1_untied", tmp_path / "merged") == 0

    def broken_disk(weights, folder):
        save_torch_state_dict(weights | {"model.norm.weight": weights["model.norm.weight"] + 1e-6}, folder)

    monkeypatch.setattr(merge_work, "save_torch_state_dict", broken_disk)
    line = error_line(capsys, merge(checkpoints / "dcp_1_tied", tmp_path / "merged"))
    assert "model.norm.weight read back differently from what was written" in line
    assert_is_tiny(tmp_path / "merged", tie=False)
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_the_hub_is_used_only_when_asked(checkpoints, tmp_path, capsys, monkeypatch):
    run, target = checkpoints / "dcp_1_tied", tmp_path / "merged"
    with running_hub() as hub:
        use_hub(monkeypatch, hub.url, tmp_path / "home")
        assert merge(run, target) == 0
        assert "--private" in error_line(capsys, merge(run, target, "--private"))
        assert "--hf_upload_path=a/b/c" in error_line(capsys, merge(run, target, "--hf_upload_path", "a/b/c"))
        assert not hub.requests
        assert merge(run, target, "--hf_upload_path", "me/it", "--private") == 0
        files = hub.repos["me/it"]["main"]
        assert hub.private["me/it"] and "merge_model.json" not in files and len(hub.commits) == 1
        assert {name: (target / name).read_bytes() for name in files} == files and "model.safetensors" in files
        hub.private["me/it"] = False
        assert "me/it exists and is public" in error_line(
            capsys, merge(run, target, "--hf_upload_path", "me/it", "--private")
        )
        assert len(hub.commits) == 1
        hub.refusals["/api/models/me/it/preupload"] = 403
        line = error_line(capsys, merge(run, target, "--hf_upload_path", "me/it"))
        assert "give its token the right to write there" in line and f"hf upload me/it {target}" in line
        assert TOKEN not in line


# ---- The test sub-command


def test_a_folder_that_is_the_merged_model_passes(checkpoints, tmp_path, capsys):
    for name in ("dcp_2_tied", "mixed_4_untied"):
        assert merge(checkpoints / name, tmp_path / name) == 0
        assert compare(checkpoints / name, tmp_path / name) == 0
        assert "is the merged model: " in capsys.readouterr().out
    # Also in several files, with the tied head, and rounded as the reference is.
    weights = load_file(tmp_path / "dcp_2_tied" / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    parts = tmp_path / "parts"
    parts.mkdir()
    save_torch_state_dict({k: w.bfloat16() for k, w in weights.items()}, parts, max_shard_size=100_000)
    assert len(list(parts.glob("*.safetensors"))) > 1
    assert compare(checkpoints / "dcp_2_tied", parts, "--dtype", "bfloat16") == 0
    weights["model.norm.weight"] += 1e-7
    save_file(weights, tmp_path / "dcp_2_tied" / "model.safetensors")
    assert compare(checkpoints / "dcp_2_tied", tmp_path / "dcp_2_tied") == 0


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("merged", ["float32", "bfloat16", "float16"])
def test_of_two_dtypes_values_are_compared_in_the_coarser_one(checkpoints, tmp_path, capsys, stored, merged):
    run = checkpoints / "dcp_1_untied"
    weights = {key: weight.to(stored) for key, weight in tiny_model(False).state_dict().items()}
    save_file(weights, tmp_path / "model.safetensors")
    assert compare(run, tmp_path, "--dtype", merged) == 0
    other = str(stored).removeprefix("torch.")
    said = capsys.readouterr().out
    assert (f"compared in the coarser dtype: {merged} merged, {other} there" in said) == (merged != other)
    norm = weights["model.norm.weight"]
    norm[5] = torch.nextafter(norm[5].bfloat16(), torch.tensor(9.0).bfloat16()).to(stored)
    save_file(weights, tmp_path / "model.safetensors")
    assert compare(run, tmp_path, "--dtype", merged) == 1
    assert "model.norm.weight  1 of 64 values differ, by up to 0.00781" in capsys.readouterr().out


def test_a_float32_reference_is_rounded_to_the_merged_dtype(checkpoints, tmp_path, capsys):
    run = checkpoints / "dcp_1_untied"
    save_tiny(tmp_path / "float32", tie=False)
    assert compare(run, tmp_path / "float32", "--dtype", "bfloat16") == 0
    assert "compared in the coarser dtype: bfloat16 merged, float32 there" in capsys.readouterr().out


def test_every_difference_is_shown(checkpoints, tmp_path, capsys):
    assert merge(checkpoints / "dcp_1_tied", tmp_path / "merged") == 0
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    del weights["model.layers.0.input_layernorm.weight"]
    weights["model.extra"] = torch.zeros(3)
    weights["model.norm.weight"][5] += 1e-3
    weights["model.layers.1.input_layernorm.weight"] = torch.ones(63)
    weights["model.layers.2.input_layernorm.weight"] = torch.ones(64).int()
    weights["model.layers.2.self_attn.q_proj.bias"][0] = float("nan")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
    save_file(weights, tmp_path / "merged" / "model.safetensors")
    capsys.readouterr()
    assert compare(checkpoints / "dcp_1_tied", tmp_path / "merged") == 1
    out = capsys.readouterr().out
    assert "7 tensors differ" in out
    rows = dict(line.split(maxsplit=1) for line in out.splitlines() if line.startswith("  "))
    assert rows == {
        "model.layers.0.input_layernorm.weight": "not in --test_hf_dir",
        "model.extra": "only in --test_hf_dir",
        "model.norm.weight": "1 of 64 values differ, by up to 0.001",
        "model.layers.1.input_layernorm.weight": "[64] float32, in --test_hf_dir [63] float32",
        "model.layers.2.input_layernorm.weight": "[64] float32, in --test_hf_dir [64] int32",
        "model.layers.2.self_attn.q_proj.bias": "1 of 64 values differ, by up to nan",
        "lm_head.weight": "16576 of 16576 values differ, by up to 1",
    }
    wide = save_tiny(tmp_path / "wide", tie=False, hidden_size=128)
    assert compare(checkpoints / "dcp_1_untied", wide) == 1
    out = capsys.readouterr().out
    assert "... and 19 more" in out and "39 tensors differ" in out


def test_a_reference_that_cannot_be_read_is_an_error(checkpoints, tmp_path, capsys):
    run = checkpoints / "dcp_1_tied"
    assert f"--test_hf_dir={tmp_path / 'none'} is not a folder" in error_line(capsys, compare(run, tmp_path / "none"))
    assert "has no model.safetensors" in error_line(capsys, compare(run, tmp_path))
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "lost.safetensors"}}')
    assert "cannot be read" in error_line(capsys, compare(run, tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"123")
    assert "cannot be read" in error_line(capsys, compare(run, tmp_path))


# ---- The command line


def test_the_program_says_what_it_wrote(checkpoints, tmp_path):
    command = [
        sys.executable,
        "-m",
        "verl.merge_model",
        "merge",
        "--backend",
        "fsdp",
        "--local_dir",
        str(checkpoints / "ddp_fsdp_4_tied"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "wrote tmp: Qwen2ForCausalLM, 38 tensors, float32" in done.stdout.splitlines()[-1]
    assert all(line.startswith("reading") for line in done.stderr.splitlines())
    assert_is_tiny(tmp_path / "tmp", tie=True)


def test_another_backend_is_rejected(tmp_path, capsys):
    code = program.main(["merge", "--backend", "megatron", "--local_dir", str(tmp_path)])
    assert "--backend=megatron: only fsdp checkpoints exist here" in error_line(capsys, code)
