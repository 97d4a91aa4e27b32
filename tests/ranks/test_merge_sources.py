"""Where verl.merge_model finds a checkpoint and its config, and what it rejects because parts do not fit."""

import os
import pickle
import shutil

import pytest
import torch
from sharded_checkpoints import assert_is_tiny, error_line, merge, save_rank
from tiny import save_tiny, tiny_model


def test_run_step_and_shard_folders_are_the_same_checkpoint(checkpoints, tmp_path, capsys):
    for name in ("dcp_2_untied", "fsdp_2_untied"):
        for path in ("", "global_step_4", "global_step_4/actor"):
            assert merge(checkpoints / name / path, tmp_path / "merged") == 0
            assert f"{checkpoints / name}/global_step_4/actor: " in capsys.readouterr().out
            assert_is_tiny(tmp_path / "merged", tie=False)


def test_the_newest_complete_step_is_taken_and_the_others_named(checkpoints, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(checkpoints / "fsdp_2_untied" / "global_step_4", run / "global_step_9")
    shutil.copytree(checkpoints / "dcp_2_tied" / "global_step_4", run / "global_step_10")
    half = shutil.copytree(checkpoints / "fsdp_2_untied" / "global_step_4", run / "global_step_12")
    (half / "actor" / "model_world_size_2_rank_1.pt").unlink()
    shutil.copytree(checkpoints / "dcp_2_tied" / "global_step_4", run / ".global_step_15.writing")
    (run / "global_step_100").mkdir()
    assert merge(run, tmp_path / "merged") == 0
    out = capsys.readouterr().out
    assert "global_step_10/actor: torch DCP shards" in out
    for name in ("global_step_12", ".global_step_15.writing", "global_step_100"):
        assert f"skipped: {name} is not complete" in out
    (run / "global_step_10" / "trainer_state.json").unlink()
    assert merge(run, tmp_path / "merged") == 0
    assert "global_step_9/actor: FSDP shards of 2 ranks" in capsys.readouterr().out
    shutil.rmtree(run / "global_step_9")
    line = error_line(capsys, merge(run, tmp_path / "merged"))
    assert "no complete step" in line and "global_step_12" in line and ".global_step_15.writing" in line


def test_a_folder_without_a_checkpoint_is_an_error(checkpoints, tmp_path, capsys):
    assert f"--local_dir={tmp_path / 'none'} is not a folder" in error_line(
        capsys, merge(tmp_path / "none", tmp_path / "merged")
    )
    assert f"--local_dir={tmp_path} holds no checkpoint" in error_line(capsys, merge(tmp_path, tmp_path / "merged"))
    step = shutil.copytree(checkpoints / "dcp_1_tied" / "global_step_4", tmp_path / "step")
    (step / "actor" / ".metadata").unlink()
    assert "holds neither .metadata nor" in error_line(capsys, merge(step, tmp_path / "merged"))
    actor = shutil.copytree(checkpoints / "dcp_1_tied" / "global_step_4" / "actor", tmp_path / "both")
    save_rank(actor, {}, 0, 1)
    assert "holds both" in error_line(capsys, merge(actor, tmp_path / "merged"))


def test_the_config_is_the_checkpoints_own_or_the_one_given(single, tmp_path, capsys):
    assert "--hf_model_path" in error_line(capsys, merge(single.folder, tmp_path / "merged"))
    assert merge(single.folder, tmp_path / "merged", "--hf_model_path", str(single.model)) == 0
    assert_is_tiny(tmp_path / "merged", tie=False)
    # The checkpoint's own config is preferred; that of the given model would not fit.
    save_tiny(single.folder / "huggingface", tie=False)
    other = save_tiny(tmp_path / "other", hidden_size=128)
    assert merge(single.folder, tmp_path / "merged", "--hf_model_path", str(other)) == 0
    shutil.rmtree(single.folder / "huggingface")
    line = error_line(
        capsys, merge(single.folder, tmp_path / "merged", "--hf_model_path", str(tmp_path / "no/folder/x"))
    )
    assert f"--hf_model_path={tmp_path}/no/folder/x is neither a folder nor" in line


@pytest.mark.parametrize("config", ["{", '{"model_type": "nope"}', '{"model_type": "clip"}',
                                    '{"model_type": "qwen2", "hidden_size": "abc"}'])  # fmt: skip
def test_a_config_without_a_causal_language_model_is_an_error(single, tmp_path, capsys, config):
    (single.model / "config.json").write_text(config)
    line = error_line(capsys, merge(single.folder, tmp_path / "merged", "--hf_model_path", str(single.model)))
    assert f"{single.model / 'config.json'} does not describe a causal language model" in line


# ---- What does not fit


def test_a_rank_that_is_missing_is_named(checkpoints, tmp_path, capsys):
    actor = shutil.copytree(checkpoints / "fsdp_4_tied" / "global_step_4" / "actor", tmp_path / "actor")
    (actor / "model_world_size_4_rank_2.pt").unlink()
    assert "lacks model_world_size_4_rank_2.pt" in error_line(capsys, merge(actor, tmp_path / "merged"))
    shutil.copy(actor / "model_world_size_4_rank_1.pt", actor / "model_world_size_2_rank_1.pt")
    assert "world sizes [2, 4]" in error_line(capsys, merge(actor, tmp_path / "merged"))
    step = shutil.copytree(checkpoints / "dcp_2_tied" / "global_step_4", tmp_path / "step")
    (step / "actor" / "__1_0.distcp").unlink()
    assert "lacks __1_0.distcp" in error_line(capsys, merge(step, tmp_path / "merged"))


@pytest.mark.parametrize(
    "wrapped",
    [
        "_orig_mod.{}", "module.{}", "module._orig_mod.{}", "_orig_mod.module.{}", "_fsdp_wrapped_module.{}",
        "model.layers.{n}._orig_mod.{rest}", "model.layers.{n}._fsdp_wrapped_module._checkpoint_wrapped_module.{rest}",
    ],
)  # fmt: skip
def test_names_of_a_wrapped_model_are_read(single, tmp_path, wrapped):
    def name(key):
        layer = key.removeprefix("model.layers.").partition(".") if key.startswith("model.layers.") else None
        if "{rest}" in wrapped:
            return wrapped.format(n=layer[0], rest=layer[2]) if layer else key
        return wrapped.format(key)

    single.write({name(key): weight for key, weight in tiny_model(False).state_dict().items()})
    assert merge(single.folder, tmp_path / "merged", "--hf_model_path", str(single.model)) == 0
    assert_is_tiny(tmp_path / "merged", tie=False)


def test_a_model_that_is_there_wrapped_and_plain_is_an_error(single, tmp_path, capsys):
    state = tiny_model(False).state_dict()
    single.write(state | {"_orig_mod.model.norm.weight": state["model.norm.weight"] + 1})
    line = error_line(capsys, merge(single.folder, tmp_path / "merged", "--hf_model_path", str(single.model)))
    assert "holds model.norm.weight twice, once in a wrapped model (_orig_mod., module.)" in line


@pytest.mark.parametrize(
    "key",
    ["base_model.model.model.norm.lora_A.default.weight", "base_model.model.model.norm.base_layer.weight",
     "model.norm.lora_B.weight", "_orig_mod.model.norm.lora_embedding_A"],
)  # fmt: skip
def test_a_lora_is_named_as_one(single, tmp_path, capsys, key):
    state = tiny_model(False).state_dict()
    single.write(state | {key: torch.zeros(64, 2)})
    line = error_line(capsys, merge(single.folder, tmp_path / "merged", "--hf_model_path", str(single.model)))
    assert f"unexpected {key.removeprefix('_orig_mod.')}; these are a LoRA's" in line and "merge_and_unload()" in line
    assert "config that the checkpoint was trained with" not in line


def test_keys_and_shapes_must_be_those_of_the_config(single, tmp_path, capsys):
    arguments = (single.folder, tmp_path / "merged", "--hf_model_path", str(single.model))
    state = tiny_model(False).state_dict()
    norm = state.pop("model.norm.weight")
    single.write(state)
    assert "missing model.norm.weight, unexpected none" in error_line(capsys, merge(*arguments))
    single.write(state | {"model.norm.weight": norm, "model.norm.lora_A": norm})
    assert "missing none, unexpected model.norm.lora_A" in error_line(capsys, merge(*arguments))
    single.write(state | {"model.norm.weight": norm[:-1]})
    assert "model.norm.weight" in (line := error_line(capsys, merge(*arguments))) and "[63]" in line and "[64]" in line
    single.write(state | {"model.norm.weight": "text"})
    assert "not a dictionary of tensors" in error_line(capsys, merge(*arguments))
    assert not (tmp_path / "merged").exists()


def test_dcp_shards_must_fit_the_config_too(checkpoints, tmp_path, capsys):
    actor = shutil.copytree(checkpoints / "dcp_2_untied" / "global_step_4" / "actor", tmp_path / "actor")
    wide = save_tiny(tmp_path / "wide", tie=False, hidden_size=128)
    line = error_line(capsys, merge(actor, tmp_path / "merged", "--hf_model_path", str(wide)))
    assert "model.embed_tokens.weight has shape [259, 64], the model of the config [259, 128]" in line
    llama = save_tiny(tmp_path / "llama", tie=False, llama=True)
    line = error_line(capsys, merge(actor, tmp_path / "merged", "--hf_model_path", str(llama)))
    assert "LlamaForCausalLM: missing none, unexpected model.layers.0.self_attn.k_proj.bias" in line
    assert "and 1 more" in line


def test_ranks_must_hold_the_same_keys(single, tmp_path, capsys):
    (single.folder / "model_world_size_1_rank_0.pt").unlink()
    state = tiny_model(False).state_dict()
    save_rank(single.folder, state, 0, 2)
    state.pop("model.norm.weight")
    save_rank(single.folder, state, 1, 2)
    line = error_line(capsys, merge(single.folder, tmp_path / "merged"))
    assert "rank_1.pt and model_world_size_2_rank_0.pt hold different keys: model.norm.weight" in line


def test_a_tied_head_may_be_absent_or_equal_and_nothing_else(single, tmp_path, capsys):
    arguments = (single.folder, tmp_path / "merged", "--hf_model_path", str(save_tiny(tmp_path / "tied")))
    state = tiny_model().state_dict()
    single.write({key: weight for key, weight in state.items() if key != "lm_head.weight"})
    assert merge(*arguments) == 0
    assert_is_tiny(tmp_path / "merged", tie=True)
    single.write(state | {"lm_head.weight": state["lm_head.weight"].clone()})
    assert merge(*arguments) == 0
    single.write(state | {"lm_head.weight": state["lm_head.weight"] + 1e-6})
    assert "lm_head.weight and model.embed_tokens.weight differ" in error_line(capsys, merge(*arguments))


# The optimizer's part is at the end of a .distcp file, and may be missing.
@pytest.mark.parametrize(
    ("name", "share"),
    [*((name, share) for name in (".metadata", "model_world_size_2_rank_1.pt") for share in (0, 0.4, 0.99)),
     ("__1_0.distcp", 0), ("__1_0.distcp", 0.2)],
)  # fmt: skip
def test_a_file_that_is_cut_off_is_named(checkpoints, tmp_path, capsys, name, share):
    kind = "fsdp_2_tied" if name.endswith(".pt") else "dcp_2_tied"
    step = shutil.copytree(checkpoints / kind / "global_step_4", tmp_path / "step")
    file = step / "actor" / name
    os.truncate(file, int(share * file.stat().st_size))
    assert str(file) in error_line(capsys, merge(step, tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


def test_dcp_shards_that_hold_a_tensor_in_part_are_an_error(checkpoints, tmp_path, capsys):
    step = shutil.copytree(checkpoints / "dcp_2_tied" / "global_step_4", tmp_path / "step")
    metadata = pickle.loads((step / "actor" / ".metadata").read_bytes())
    metadata.state_dict_metadata["model.lm.model.norm.weight"].chunks.pop()
    (step / "actor" / ".metadata").write_bytes(pickle.dumps(metadata))
    assert "hold only a part of model.norm.weight" in error_line(capsys, merge(step, tmp_path / "merged"))
