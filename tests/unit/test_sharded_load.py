"""Loading into shards in one process: every family, what is wrong with files, and the proof on a small model."""

import json
from pathlib import Path

import pytest
import torch
from family_models import SETTINGS, tiny
from measured import peak_of
from safetensors.torch import load_file, save_file
from tiny import save_tiny, tiny_config, tiny_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping

from verl.errors import UserError
from verl.models import attention
from verl.models.fsdp import full_weights, shard_over
from verl.models.load import load_causal_lm, round_weights
from verl.models.policy import PolicyModel
from verl.models.sharded_load import load_rounded, load_to_shard, small_config

# A type of device on which one process shards too; nothing is moved there.
CUDA = torch.device("cuda")
CPU = torch.device("cpu")
CONVERTED = {
    "qwen2_moe", "qwen3_moe", "mixtral", "granitemoe", "olmoe", "deepseek_v3", "gpt_neox",
}  # fmt: skip


def load(folder: Path, **override):
    return load_to_shard(str(folder), False, override, "auto", CUDA)


def rounded(folder: Path):
    return load_rounded(str(folder), False, torch.bfloat16, CPU)


@pytest.mark.parametrize("family", SETTINGS)
def test_a_family_is_read_into_shards_as_transformers_loads_it_or_loaded_whole_with_the_reason(
    tmp_path, process_group, family
):
    converted = bool(get_model_conversion_mapping(tiny(tmp_path, family), add_legacy=False))
    assert converted == (family in CONVERTED)
    loaded, whole = load(tmp_path), load_causal_lm(str(tmp_path))
    if converted:
        assert loaded.source is None and loaded.why_whole.startswith("transformers converts the weights")
        assert all(torch.equal(a, b) for a, b in zip(loaded.lm.parameters(), whole.parameters(), strict=True))
        return
    policy = PolicyModel(loaded.lm)
    policy.device = torch.device("cpu")
    shard_over(policy, init_device_mesh("cpu", (1,)), MixedPrecisionPolicy())
    loaded.source.fill(policy, policy.device)
    weights = dict(full_weights(policy))
    assert list(weights) == [name for name, _ in whole.named_parameters()]
    for name, weight in whole.named_parameters():
        assert torch.equal(weights[name], weight), name
    # Some families share one buffer under two names from the first forward on.
    for name, buffer in whole.named_buffers(remove_duplicate=False):
        assert torch.equal(loaded.lm.get_buffer(name), buffer) and loaded.lm.get_buffer(name).dtype == buffer.dtype
    assert loaded.lm.config.to_dict() == whole.config.to_dict()
    assert loaded.lm.generation_config.to_dict() == whole.generation_config.to_dict()
    assert not loaded.lm.training


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model", tie=False)


def change(folder: Path, changes: dict) -> None:
    """Replace, add or (None) drop weights of the one file."""
    weights = load_file(folder / "model.safetensors") | changes
    kept = {name: weight for name, weight in weights.items() if weight is not None}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


BIAS = "model.layers.2.self_attn.k_proj.bias"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({BIAS: None}, f"lack {BIAS};"),
        ({"model.layers.1.extra.weight": torch.ones(2)}, "does not have: model.layers.1.extra.weight;"),
        ({BIAS: torch.ones(7)}, rf"have {BIAS} in the shape \[7\], and by the config it is \[32\]"),
    ],
    ids=["missing", "unexpected", "another shape"],
)
def test_files_that_are_not_the_model_of_their_config_are_an_error_that_names_the_weight(folder, changes, problem):
    change(folder, changes)
    with pytest.raises(UserError, match=problem):
        load(folder)


def test_no_weight_is_made_up_where_the_whole_model_is_loaded_either(folder):
    change(folder, {BIAS: None})
    with pytest.raises(UserError, match=f"lack {BIAS};"):
        load_causal_lm(str(folder))


@pytest.mark.parametrize("load", [load, rounded])
def test_a_damaged_file_is_an_error_that_names_the_model(folder, load):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"a file of weights of '.*model' is damaged: .*"):
        load(folder)


def test_frequencies_that_old_files_hold_are_left_out(folder):
    change(folder, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    assert load(folder).source is not None


def other_names(folder: Path) -> str:
    weights = load_file(folder / "model.safetensors")
    change(folder, dict.fromkeys(weights) | {name.removeprefix("model."): own for name, own in weights.items()})
    return "its files name weights otherwise"


def both_of_a_tie(folder: Path) -> str:
    save_tiny(folder, tie=True)
    change(folder, {"lm_head.weight": torch.randn(259, 64)})
    return "its config ties model.embed_tokens.weight and lm_head.weight, and its files have both"


def no_safetensors(folder: Path) -> str:
    torch.save(tiny_model(False).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return "it has neither model.safetensors nor model.safetensors.index.json"


@pytest.mark.parametrize("prepare", [other_names, both_of_a_tie, no_safetensors])
def test_what_only_transformers_can_load_is_loaded_whole_and_the_reason_is_kept(folder, prepare):
    reason = prepare(folder)
    loaded, whole = load(folder), load_causal_lm(str(folder))
    assert loaded.source is None and loaded.why_whole.startswith(reason)
    for (name, weight), (_, expected) in zip(loaded.lm.named_parameters(), whole.named_parameters(), strict=True):
        assert torch.equal(weight, expected), name


def test_one_process_on_a_cpu_loads_as_ever(folder, process_group):
    loaded = load_to_shard(str(folder), False, {}, "auto", torch.device("cpu"))
    assert (loaded.source, loaded.why_whole) == (None, None) and not loaded.lm.get_input_embeddings().weight.is_meta


def test_other_files_in_the_folder_are_not_read(folder, process_group):
    stale = {name: torch.zeros_like(weight) for name, weight in load_file(folder / "model.safetensors").items()}
    save_file(stale | {"more": torch.ones(1)}, folder / "stale.safetensors")
    loaded = load(folder)
    policy = PolicyModel(loaded.lm)
    policy.device = torch.device("cpu")
    shard_over(policy, init_device_mesh("cpu", (1,)), MixedPrecisionPolicy())
    loaded.source.fill(policy, policy.device)
    for name, weight in full_weights(policy):
        assert torch.equal(weight, tiny_model(False).get_parameter(name)), name


def test_the_small_model_has_every_kind_of_layer_and_the_settings_of_the_large_one():
    config = AutoConfig.for_model("gemma3_text", num_hidden_layers=62, vocab_size=262144)
    small = small_config(config)
    assert (small.num_hidden_layers, len(small.layer_types), set(small.layer_types)) == (6, 6, set(config.layer_types))
    assert (small.vocab_size, small.intermediate_size, config.num_hidden_layers) == (256, 64, 62)
    changed = {
        name for name, own in config.to_dict().items()
        if json.dumps(small.to_dict()[name], default=str) != json.dumps(own, default=str)
    }  # fmt: skip
    assert changed == {"num_hidden_layers", "layer_types", "vocab_size", "intermediate_size"}


@pytest.mark.parametrize(
    ("family", "settings", "part"),
    [("mistral", {"sliding_window": 100}, "_narrowed"), ("gemma2", {"attn_logit_softcapping": 50.0}, "_capped")],
    ids=["window", "cap"],
)
def test_the_proof_on_the_small_model_finds_what_is_not_computed(tmp_path, monkeypatch, family, settings, part):
    tiny(tmp_path, family, **settings)
    assert load(tmp_path).source is not None
    monkeypatch.setattr(attention, part, lambda tensor, *_: tensor)
    with pytest.raises(UserError, match="the packed forward differs from the model's own by"):
        load(tmp_path)


def rounded_whole(folder: Path):
    lm = load_causal_lm(str(folder))
    round_weights(lm, torch.bfloat16)
    return lm


def assert_same(found, expected) -> None:
    """Two models of the same numbers, also where one weight has two names."""
    for kind in ("named_parameters", "named_buffers"):
        own, others = (dict(getattr(lm, kind)(remove_duplicate=False)) for lm in (found, expected))
        assert own.keys() == others.keys()
        for name, values in others.items():
            assert own[name].dtype == values.dtype and torch.equal(own[name], values), name
    assert [name for name, _ in found.named_parameters()] == [name for name, _ in expected.named_parameters()]
    assert found.config.to_dict() == expected.config.to_dict() and not found.training


@pytest.mark.parametrize("family", SETTINGS)
def test_a_family_is_read_in_bfloat16_as_it_is_rounded(tmp_path, family):
    tiny(tmp_path, family)
    found, expected = rounded(tmp_path), rounded_whole(tmp_path)
    assert_same(found, expected)
    assert {weight.dtype for weight in found.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("prepare", [other_names, both_of_a_tie, no_safetensors])
def test_what_only_transformers_can_load_is_loaded_whole_and_rounded(folder, prepare):
    prepare(folder)
    assert_same(rounded(folder), rounded_whole(folder))


def test_weights_that_the_model_has_not_are_let_pass_by_an_encoder_and_missing_ones_are_not(folder):
    expected = rounded_whole(folder)
    change(folder, {"v_head.weight": torch.ones(2)})
    assert_same(rounded(folder), expected)
    change(folder, {BIAS: None})
    with pytest.raises(UserError, match=f"lack {BIAS};"):
        rounded(folder)


def test_the_host_never_holds_a_model_that_is_read_in_bfloat16(tmp_path):
    config = tiny_config(False, hidden_size=128, llama=True)
    config.num_hidden_layers, config.intermediate_size = 12, 1024
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path, max_shard_size="2MB")
    size = sum(weight.numel() * 4 for file in tmp_path.glob("*.safetensors") for weight in load_file(file).values())
    by_reading, whole = (peak_of(lambda load=load: lambda: load(tmp_path)) for load in (rounded, rounded_whole))
    # Half of it is kept, on a GPU not here. One file is mapped at a time, which counts as allocated here.
    assert by_reading < 0.7 * size < size <= whole
