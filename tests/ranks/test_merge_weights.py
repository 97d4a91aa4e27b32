"""verl.merge_model merges shards of real process groups into the weights that were sharded."""

import json
import pickle
import shutil

import pytest
import torch
from sharded_checkpoints import DCP, FSDP, TIES, assert_is_tiny, merge
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from verl.checkpoint.shards import FsdpShards
from verl.errors import UserError


@pytest.mark.parametrize("name", [*DCP, *FSDP])
def test_shards_of_any_layout_and_world_size_give_back_the_weights(checkpoints, tmp_path, name):
    assert merge(checkpoints / name, tmp_path / "merged") == 0
    assert_is_tiny(tmp_path / "merged", TIES[name.split("_")[-1]])


@pytest.mark.parametrize("name", ["dcp_2_tied", "fsdp_4_untied"])
def test_the_folder_loads_and_computes_what_the_model_does(checkpoints, tmp_path, name):
    own = checkpoints / name / "global_step_4" / ("" if name in DCP else "actor") / "huggingface"
    assert merge(checkpoints / name, tmp_path / "merged") == 0
    ids = torch.arange(40).view(2, 20)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, tiny_model("untied" not in name)(ids).logits, atol=0, rtol=0)
    assert loaded.config.architectures == ["Qwen2ForCausalLM"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.chat_template == tiny_tokenizer().chat_template
    assert tokenizer("héllo")["input_ids"] == tiny_tokenizer()("héllo")["input_ids"]
    generation = (tmp_path / "merged" / "generation_config.json").read_text()
    assert generation == (own / "generation_config.json").read_text()
    assert not (tmp_path / "merged" / "embedder_config.json").exists()


def test_the_optimizer_is_not_read_and_the_embedder_settings_are_copied(checkpoints, tmp_path):
    run = shutil.copytree(checkpoints / "dcp_2_tied", tmp_path / "run")
    step = run / "global_step_4"
    (step / "huggingface" / "embedder_config.json").write_text('{"pooling": "mean"}')
    (step / "huggingface" / "embedder_centre").mkdir()
    (step / "huggingface" / "embedder_centre" / "mean.safetensors").write_bytes(b"a centre")
    metadata = pickle.loads((step / "actor" / ".metadata").read_bytes())
    assert any(index.fqn.startswith("optimizer.state.") for index in metadata.storage_data)
    for index, place in metadata.storage_data.items():
        if index.fqn.startswith("optimizer."):
            with (step / "actor" / place.relative_path).open("r+b") as file:
                file.seek(place.offset)
                file.write(b"\0" * place.length)
    assert merge(run, tmp_path / "merged") == 0
    assert_is_tiny(tmp_path / "merged", tie=True)
    assert (tmp_path / "merged" / "embedder_config.json").read_text() == '{"pooling": "mean"}'
    assert (tmp_path / "merged" / "embedder_centre" / "mean.safetensors").read_bytes() == b"a centre"


@pytest.mark.parametrize("asked", ["auto", "float32", "bfloat16", "float16"])
def test_the_dtype_is_the_one_asked_for_or_the_configs(checkpoints, tmp_path, asked):
    run = shutil.copytree(checkpoints / "dcp_1_untied", tmp_path / "run")
    file = run / "global_step_4" / "huggingface" / "config.json"
    # As transformers wrote it at the time of verl 0.4.
    config = json.loads(file.read_text())
    del config["dtype"]
    file.write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))
    assert merge(run, tmp_path / "merged", "--dtype", asked) == 0
    dtype = torch.bfloat16 if asked == "auto" else getattr(torch, asked)
    assert_is_tiny(tmp_path / "merged", tie=False, dtype=dtype)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_parts_of_odd_sizes_are_joined_and_parts_that_do_not_fit_are_rejected(checkpoints):
    shards, whole = FsdpShards(checkpoints / "odd"), torch.arange(15.0).view(3, 5)
    for name in ("few_rows", "few_columns"):
        assert torch.equal(shards.read(name, whole.shape), whole)
    # Equal on all ranks, and still pieces: the model's shape decides.
    assert torch.equal(shards.read("same_pieces", torch.Size([8, 5])), torch.zeros(8, 5))
    assert torch.equal(shards.read("same_pieces", torch.Size([2, 5])), torch.zeros(2, 5))
    assert shards.read("number", torch.Size([])) == 7
    for name, shape, said in (
        ("sum", whole.shape, "Partial"),
        ("replicas", whole.shape, "replicas differ"),
        ("copies", whole.shape, "different values"),
        ("both", whole.shape, "only some ranks"),
        ("number", torch.Size([4]), r"shapes \[\[\], \[\], \[\], \[\]\], the model has \[4\]"),
        ("few_rows", torch.Size([3, 4]), r"\[3, 5\].*\[3, 4\]"),
    ):
        with pytest.raises(UserError, match=f"odd: {name} .*{said}"):
            shards.read(name, shape)
