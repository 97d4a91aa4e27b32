"""scripts/merge_model.py: shards of real process groups against the weights that were sharded, and what it refuses."""

import importlib.util
import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from tiny import save_tiny, tiny_model, tiny_tokenizer
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from verl import merge_model as program
from verl.config import FsdpConfig, OptimConfig
from verl.models.fsdp import build_optimizer, build_scheduler, shard
from verl.models.policy import PolicyModel
from verl.checkpoint.training_state import save_training_state
from verl.checkpoint.shards import FsdpShards
from verl.errors import UserError

HEAVY = ["verl.models.fsdp", "verl.checkpoint.shards", "transformers.models.qwen2.modeling_qwen2"]
TIES = {"tied": True, "untied": False}
# The vocabulary of 259 divides by none of the world sizes.
DCP = [f"dcp_{world}_{tie}" for world in (1, 2) for tie in TIES]
FSDP = [f"{layout}_{tie}" for layout in ("fsdp_2", "old_torch_2", "fsdp_4", "ddp_fsdp_4", "mixed_4") for tie in TIES]




@contextmanager
def process_group(folder: Path, rank: int, world_size: int):
    store = f"file://{folder}/store_{world_size}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    yield
    dist.destroy_process_group()


def write_everything(rank: int, folder: Path) -> None:
    """What one of four processes does: groups of 1, 2 and 4 of them write their checkpoints."""
    torch.set_num_threads(1)
    if rank < 2:
        with process_group(folder, rank, 2):
            write_dcp(folder, rank, 2)
            write_fsdp(folder, "fsdp_2", rank, (2,))
            write_fsdp(folder, "old_torch_2", rank, (1, 2))
    elif rank == 2:
        with process_group(folder, 0, 1):
            write_dcp(folder, 0, 1)
    with process_group(folder, rank, 4):
        for layout, shape in (("fsdp_4", (4,)), ("ddp_fsdp_4", (2, 2)), ("mixed_4", (4,))):
            write_fsdp(folder, layout, rank, shape)
        write_odd_tensors(folder, rank)


def write_dcp(folder: Path, rank: int, world_size: int) -> None:
    for name, tie in TIES.items():
        policy = shard(PolicyModel(tiny_model(tie)), torch.device("cpu"), FsdpConfig(), offload_policy=False)
        optimizer = build_optimizer(policy, OptimConfig())
        scheduler = build_scheduler(optimizer, OptimConfig(), 10)
        step = folder / f"dcp_{world_size}_{name}" / "global_step_4"
        save_training_state(step / "actor", policy, optimizer, scheduler, rank)


def write_fsdp(folder: Path, layout: str, rank: int, shape: tuple[int, ...]) -> None:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("ddp", "fsdp")[-len(shape) :])
    place = mixed_part if layout.startswith("mixed") else sharded_part
    getstate = DeviceMesh.__getstate__
    if layout.startswith("old_torch"):
        DeviceMesh.__getstate__ = state_of_torch_2_6
    for name, tie in TIES.items():
        parts = {key: place(key, weight, mesh) for key, weight in tiny_model(tie).state_dict().items()}
        actor = folder / f"{layout}_{name}" / "global_step_4" / "actor"
        save_rank(actor, parts, rank, dist.get_world_size())
    DeviceMesh.__getstate__ = getstate


def save_rank(folder: Path, parts: dict, rank: int, world_size: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(parts, folder / f"model_world_size_{world_size}_rank_{rank}.pt")


def state_of_torch_2_6(mesh: DeviceMesh) -> dict:
    return {
        "device_type": "cpu", "mesh": mesh.mesh, "mesh_dim_names": mesh.mesh_dim_names,
        "_coordinate_on_dim": list(mesh.get_coordinate() or []), "_thread_id": None,
    }  # fmt: skip


def sharded_part(key: str, weight: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    return distribute_tensor(weight, mesh, [*[Replicate()] * (mesh.ndim - 1), Shard(0)])


def mixed_part(key: str, weight: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """Every other way to hold a tensor: a plain copy, a plain piece, replicated, sharded on another dimension."""
    if "layernorm" in key:
        return weight
    if "embed_tokens" in key or "lm_head" in key or "down_proj" in key:
        return weight.chunk(mesh.size())[mesh.get_rank()].clone()
    if key.endswith("bias"):
        return distribute_tensor(weight, mesh, [Replicate()])
    return distribute_tensor(weight, mesh, [Shard(weight.ndim - 1)])


def write_odd_tensors(folder: Path, rank: int) -> None:
    """Of no model: fewer rows than ranks, sums yet to be made, and ranks that do not agree."""
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("fsdp",))
    whole = torch.arange(15.0).view(3, 5)
    parts = {
        "few_rows": distribute_tensor(whole, mesh, [Shard(0)]),
        "few_columns": distribute_tensor(whole, mesh, [Shard(1)]),
        "sum": DTensor.from_local(whole, mesh, [Partial()]),
        "replicas": DTensor.from_local(whole + rank, mesh, [Replicate()], run_check=False),
        "copies": whole + rank,
        "both": whole if rank else distribute_tensor(whole, mesh, [Replicate()], src_data_rank=None),
        "same_pieces": torch.zeros(2, 5),
        "number": torch.tensor(7),
    }
    save_rank(folder / "odd", parts, rank, 4)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Run folders by DCP and FSDP names; read only."""
    folder = tmp_path_factory.mktemp("merge")
    # The four are forked from one process that has done the imports, which are most of the work.
    multiprocessing.set_forkserver_preload(HEAVY)
    mp.start_processes(write_everything, args=(folder,), nprocs=4, start_method="forkserver")
    for name in (*DCP, *FSDP):
        step = folder / name / "global_step_4"
        own = step if name in DCP else step / "actor"
        save_tiny(own / "huggingface", tie=TIES[name.split("_")[-1]])
        for weights in (own / "huggingface").glob("*.safetensors"):
            weights.unlink()
        if name in DCP:
            (step / "trainer_state.json").write_text("{}")
    return folder


def run(command: str, local_dir: Path, *more: str) -> int:
    return program.main([command, "--backend", "fsdp", "--local_dir", str(local_dir), *more])


def merge(local_dir: Path, target: Path, *more: str) -> int:
    return program.main(
        ["merge", "--backend", "fsdp", "--local_dir", str(local_dir), "--target_dir", str(target), *more]
    )


def compare(local_dir: Path, reference: Path, *more: str) -> int:
    return program.main(
        ["test", "--backend", "fsdp", "--local_dir", str(local_dir), "--test_hf_dir", str(reference), *more]
    )


def refusal(capsys, code: int) -> str:
    """The one line of an error."""
    assert code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("merge_model: ")]
    return line


def assert_is_tiny(folder: Path, tie: bool, dtype: torch.dtype = torch.float32) -> None:
    """The folder's weights are exactly the model that was sharded."""
    expected = {k: w.to(dtype) for k, w in tiny_model(tie).state_dict().items() if not (tie and k == "lm_head.weight")}
    merged = load_file(folder / "model.safetensors")
    assert merged.keys() == expected.keys()
    for key, weight in expected.items():
        assert merged[key].dtype == dtype
        assert torch.equal(merged[key], weight), key


@dataclass
class Single:
    """verl 0.4's shards of one rank, plain tensors, made without processes; and the model they are of."""

    folder: Path
    model: Path

    def write(self, state: dict[str, torch.Tensor]) -> None:
        save_rank(self.folder, state, 0, 1)


@pytest.fixture
def single(tmp_path) -> Single:
    made = Single(tmp_path / "single", save_tiny(tmp_path / "model", tie=False))
    made.write(tiny_model(False).state_dict())
    return made


# ---- What is merged


@pytest.mark.parametrize("name", [*DCP, *FSDP])
def test_shards_of_any_layout_and_world_size_give_back_the_weights(made, tmp_path, name):
    assert merge(made / name, tmp_path / "merged") == 0
    assert_is_tiny(tmp_path / "merged", TIES[name.split("_")[-1]])


@pytest.mark.parametrize("name", ["dcp_2_tied", "fsdp_4_untied"])
def test_the_folder_loads_and_computes_what_the_model_does(made, tmp_path, name):
    own = made / name / "global_step_4" / ("" if name in DCP else "actor") / "huggingface"
    assert merge(made / name, tmp_path / "merged") == 0
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


def test_the_optimizer_is_not_read_and_the_embedder_settings_come_along(made, tmp_path):
    run = shutil.copytree(made / "dcp_2_tied", tmp_path / "run")
    step = run / "global_step_4"
    (step / "huggingface" / "embedder_config.json").write_text('{"pooling": "mean"}')
    metadata = pickle.loads((step / "actor" / ".metadata").read_bytes())
    for index, place in metadata.storage_data.items():
        if index.fqn.startswith("optimizer."):
            with (step / "actor" / place.relative_path).open("r+b") as file:
                file.seek(place.offset)
                file.write(b"\0" * place.length)
    assert merge(run, tmp_path / "merged") == 0
    assert_is_tiny(tmp_path / "merged", tie=True)
    assert (tmp_path / "merged" / "embedder_config.json").read_text() == '{"pooling": "mean"}'


@pytest.mark.parametrize("asked", ["auto", "float32", "bfloat16", "float16"])
def test_the_dtype_is_the_one_asked_for_or_the_configs(made, tmp_path, asked):
    run = shutil.copytree(made / "dcp_1_untied", tmp_path / "run")
    file = run / "global_step_4" / "huggingface" / "config.json"
    # As transformers wrote it in the days of verl 0.4.
    config = json.loads(file.read_text())
    del config["dtype"]
    file.write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))
    assert merge(run, tmp_path / "merged", "--dtype", asked) == 0
    dtype = torch.bfloat16 if asked == "auto" else getattr(torch, asked)
    assert_is_tiny(tmp_path / "merged", tie=False, dtype=dtype)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_parts_of_odd_sizes_and_parts_that_make_no_tensor(made):
    shards, whole = FsdpShards(made / "odd"), torch.arange(15.0).view(3, 5)
    for name in ("few_rows", "few_columns"):
        assert torch.equal(shards.read(name, whole.shape), whole)
    # Equal on all ranks, and still pieces: the model's shape tells.
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


# ---- Where the checkpoint is


def test_run_step_and_shard_folders_are_the_same_checkpoint(made, tmp_path, capsys):
    for name in ("dcp_2_untied", "fsdp_2_untied"):
        for path in ("", "global_step_4", "global_step_4/actor"):
            assert merge(made / name / path, tmp_path / "merged") == 0
            assert f"{made / name}/global_step_4/actor: " in capsys.readouterr().out
            assert_is_tiny(tmp_path / "merged", tie=False)


def test_the_newest_complete_step_is_taken_and_the_others_named(made, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(made / "fsdp_2_untied" / "global_step_4", run / "global_step_9")
    shutil.copytree(made / "dcp_2_tied" / "global_step_4", run / "global_step_10")
    half = shutil.copytree(made / "fsdp_2_untied" / "global_step_4", run / "global_step_12")
    (half / "actor" / "model_world_size_2_rank_1.pt").unlink()
    shutil.copytree(made / "dcp_2_tied" / "global_step_4", run / ".global_step_15.writing")
    (run / "global_step_100").mkdir()
    assert merge(run, tmp_path / "merged") == 0
    out = capsys.readouterr().out
    assert "global_step_10/actor: torch DCP shards" in out
    for name in ("global_step_12", ".global_step_15.writing", "global_step_100"):
        assert f"passed over: {name} is not whole" in out
    (run / "global_step_10" / "trainer_state.json").unlink()
    assert merge(run, tmp_path / "merged") == 0
    assert "global_step_9/actor: FSDP shards of 2 ranks" in capsys.readouterr().out
    shutil.rmtree(run / "global_step_9")
    line = refusal(capsys, merge(run, tmp_path / "merged"))
    assert "no complete step" in line and "global_step_12" in line and ".global_step_15.writing" in line


def test_a_folder_without_a_checkpoint_is_an_error(made, tmp_path, capsys):
    assert f"--local_dir={tmp_path / 'none'} is not a folder" in refusal(
        capsys, merge(tmp_path / "none", tmp_path / "merged")
    )
    assert f"--local_dir={tmp_path} holds no checkpoint" in refusal(capsys, merge(tmp_path, tmp_path / "merged"))
    step = shutil.copytree(made / "dcp_1_tied" / "global_step_4", tmp_path / "step")
    (step / "actor" / ".metadata").unlink()
    assert "holds neither .metadata nor" in refusal(capsys, merge(step, tmp_path / "merged"))
    actor = shutil.copytree(made / "dcp_1_tied" / "global_step_4" / "actor", tmp_path / "both")
    save_rank(actor, {}, 0, 1)
    assert "holds both" in refusal(capsys, merge(actor, tmp_path / "merged"))


def test_the_config_is_the_checkpoints_own_or_the_one_given(single, tmp_path, capsys):
    assert "--hf_model_path" in refusal(capsys, merge(single.folder, tmp_path / "merged"))
    assert merge(single.folder, tmp_path / "merged", "--hf_model_path", str(single.model)) == 0
    assert_is_tiny(tmp_path / "merged", tie=False)
    # The checkpoint's own goes first; the model given would not fit.
    save_tiny(single.folder / "huggingface", tie=False)
    other = save_tiny(tmp_path / "other", hidden_size=128)
    assert merge(single.folder, tmp_path / "merged", "--hf_model_path", str(other)) == 0
    shutil.rmtree(single.folder / "huggingface")
    line = refusal(capsys, merge(single.folder, tmp_path / "merged", "--hf_model_path", str(tmp_path / "no/folder/x")))
    assert f"--hf_model_path={tmp_path}/no/folder/x is neither a folder nor" in line


@pytest.mark.parametrize("config", ["{", '{"model_type": "nope"}', '{"model_type": "clip"}',
                                    '{"model_type": "qwen2", "hidden_size": "abc"}'])  # fmt: skip
def test_a_config_of_no_causal_language_model_is_an_error(single, tmp_path, capsys, config):
    (single.model / "config.json").write_text(config)
    line = refusal(capsys, merge(single.folder, tmp_path / "merged", "--hf_model_path", str(single.model)))
    assert f"{single.model / 'config.json'} gives no causal language model" in line


# ---- What does not fit


def test_a_rank_that_is_missing_is_named(made, tmp_path, capsys):
    actor = shutil.copytree(made / "fsdp_4_tied" / "global_step_4" / "actor", tmp_path / "actor")
    (actor / "model_world_size_4_rank_2.pt").unlink()
    assert "lacks model_world_size_4_rank_2.pt" in refusal(capsys, merge(actor, tmp_path / "merged"))
    shutil.copy(actor / "model_world_size_4_rank_1.pt", actor / "model_world_size_2_rank_1.pt")
    assert "world sizes [2, 4]" in refusal(capsys, merge(actor, tmp_path / "merged"))
    step = shutil.copytree(made / "dcp_2_tied" / "global_step_4", tmp_path / "step")
    (step / "actor" / "__1_0.distcp").unlink()
    assert "lacks __1_0.distcp" in refusal(capsys, merge(step, tmp_path / "merged"))


def test_keys_and_shapes_must_be_those_of_the_config(single, tmp_path, capsys):
    arguments = (single.folder, tmp_path / "merged", "--hf_model_path", str(single.model))
    state = tiny_model(False).state_dict()
    norm = state.pop("model.norm.weight")
    single.write(state)
    assert "missing model.norm.weight, unexpected none" in refusal(capsys, merge(*arguments))
    single.write(state | {"model.norm.weight": norm, "model.norm.lora_A": norm})
    assert "missing none, unexpected model.norm.lora_A" in refusal(capsys, merge(*arguments))
    single.write(state | {"model.norm.weight": norm[:-1]})
    assert "model.norm.weight" in (line := refusal(capsys, merge(*arguments))) and "[63]" in line and "[64]" in line
    single.write(state | {"model.norm.weight": "text"})
    assert "not a dictionary of tensors" in refusal(capsys, merge(*arguments))
    assert not (tmp_path / "merged").exists()


def test_dcp_shards_must_fit_the_config_too(made, tmp_path, capsys):
    actor = shutil.copytree(made / "dcp_2_untied" / "global_step_4" / "actor", tmp_path / "actor")
    wide = save_tiny(tmp_path / "wide", tie=False, hidden_size=128)
    line = refusal(capsys, merge(actor, tmp_path / "merged", "--hf_model_path", str(wide)))
    assert "model.embed_tokens.weight has shape [259, 64], the model of the config [259, 128]" in line
    llama = save_tiny(tmp_path / "llama", tie=False, llama=True)
    line = refusal(capsys, merge(actor, tmp_path / "merged", "--hf_model_path", str(llama)))
    assert "LlamaForCausalLM: missing none, unexpected model.layers.0.self_attn.k_proj.bias" in line
    assert "and 1 more" in line


def test_ranks_must_hold_the_same_keys(single, tmp_path, capsys):
    (single.folder / "model_world_size_1_rank_0.pt").unlink()
    state = tiny_model(False).state_dict()
    save_rank(single.folder, state, 0, 2)
    state.pop("model.norm.weight")
    save_rank(single.folder, state, 1, 2)
    line = refusal(capsys, merge(single.folder, tmp_path / "merged"))
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
    assert "lm_head.weight and model.embed_tokens.weight differ" in refusal(capsys, merge(*arguments))


# The optimizer's part is at the end of a .distcp file, and may be missing.
@pytest.mark.parametrize(
    ("name", "share"),
    [*((name, share) for name in (".metadata", "model_world_size_2_rank_1.pt") for share in (0, 0.4, 0.99)),
     ("__1_0.distcp", 0), ("__1_0.distcp", 0.2)],
)  # fmt: skip
def test_a_file_that_is_cut_off_is_named(made, tmp_path, capsys, name, share):
    kind = "fsdp_2_tied" if name.endswith(".pt") else "dcp_2_tied"
    step = shutil.copytree(made / kind / "global_step_4", tmp_path / "step")
    file = step / "actor" / name
    os.truncate(file, int(share * file.stat().st_size))
    assert str(file) in refusal(capsys, merge(step, tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


def test_dcp_shards_that_hold_a_tensor_in_part_are_an_error(made, tmp_path, capsys):
    step = shutil.copytree(made / "dcp_2_tied" / "global_step_4", tmp_path / "step")
    metadata = pickle.loads((step / "actor" / ".metadata").read_bytes())
    metadata.state_dict_metadata["model.lm.model.norm.weight"].chunks.pop()
    (step / "actor" / ".metadata").write_bytes(pickle.dumps(metadata))
    assert "hold model.norm.weight in part only" in refusal(capsys, merge(step, tmp_path / "merged"))


# ---- What could run code


class Evil:
    """Unpickled, it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def dotted(marker: Path) -> bytes:
    """A pickle that calls os.mkdir as a member of an innocent module."""
    path = str(marker).encode()
    return (
        b"\x80\x04\x8c\x05torch\x8c\x16serialization.os.mkdir\x93X" + len(path).to_bytes(4, "little") + path + b"\x85R."
    )


@pytest.fixture
def marker(tmp_path):
    """What must not exist in the end. The attack works where nothing is refused."""
    path = tmp_path / "marker"
    for attack in (pickle.dumps(Evil(path)), dotted(path)):
        pickle.loads(attack)
        path.rmdir()
    yield path
    assert not path.exists()


@pytest.mark.parametrize("attack", ["bare", "inside metadata", "member of a module"])
def test_metadata_runs_no_code(made, tmp_path, capsys, marker, attack):
    step = shutil.copytree(made / "dcp_2_tied" / "global_step_4", tmp_path / "step")
    file = step / "actor" / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    attacks = {
        "bare": pickle.dumps(Evil(marker)),
        "inside metadata": pickle.dumps(replace(metadata, planner_data=Evil(marker))),
        "member of a module": dotted(marker),
    }
    file.write_bytes(attacks[attack])
    line = refusal(capsys, merge(step, tmp_path / "merged"))
    assert f"{file} is refused: it names " in line and "mkdir, which could run code" in line


def test_dcp_shards_run_no_code(made, tmp_path, capsys, marker):
    step = shutil.copytree(made / "dcp_2_tied" / "global_step_4", tmp_path / "step")
    actor = step / "actor"
    torch.save(Evil(marker), actor / "evil.distcp")
    metadata = pickle.loads((actor / ".metadata").read_bytes())
    for index in metadata.storage_data:
        if index.fqn == "model.lm.model.norm.weight":
            metadata.storage_data[index] = _StorageInfo("evil.distcp", 0, (actor / "evil.distcp").stat().st_size)
    (actor / ".metadata").write_bytes(pickle.dumps(metadata))
    line = refusal(capsys, merge(step, tmp_path / "merged"))
    assert "model.norm.weight cannot be read: " in line and "mkdir" in line and "weights_only" not in line
    (actor / "evil.distcp").rename(step / "evil.distcp")
    moved = pickle.dumps(metadata).replace(b"\x0bevil.distcp", b"\x0e../evil.distcp")
    (actor / ".metadata").write_bytes(pickle.dumps(pickle.loads(moved[:2] + moved[11:])))
    assert "points out of its folder" in refusal(capsys, merge(step, tmp_path / "merged"))


@pytest.mark.parametrize(
    ("save", "said"),
    [(torch.save, "is refused: Trying to load unsupported GLOBAL posix.mkdir"),
     (lambda what, path: path.write_bytes(pickle.dumps(what)), "is cut off, or not a file of torch.save")],
    ids=["of torch.save", "bare pickle"],
)  # fmt: skip
def test_fsdp_shards_run_no_code(made, tmp_path, capsys, marker, save, said):
    step = shutil.copytree(made / "fsdp_2_tied" / "global_step_4", tmp_path / "step")
    file = step / "actor" / "model_world_size_2_rank_1.pt"
    save({"model.norm.weight": Evil(marker)}, file)
    line = refusal(capsys, merge(step, tmp_path / "merged"))
    assert str(file) in line and said in line


def test_files_beside_the_weights_are_left_alone(made, tmp_path, marker):
    for name, beside in (("dcp_1_tied", "extra_rank_0.pt"), ("fsdp_2_tied", "optim_world_size_2_rank_0.pt")):
        step = shutil.copytree(made / name / "global_step_4", tmp_path / name)
        torch.save(Evil(marker), step / "actor" / beside)
        assert merge(step, tmp_path / "merged") == 0


# ---- What is written


def test_an_earlier_result_is_replaced_and_anything_else_left(made, tmp_path, capsys):
    target = tmp_path / "some" / "merged"
    assert merge(made / "dcp_1_untied", target) == 0
    (target / "stale").write_text("")
    assert merge(made / "dcp_1_tied", target) == 0
    assert_is_tiny(target, tie=True)
    assert not (target / "stale").exists() and [path.name for path in target.parent.iterdir()] == ["merged"]
    own = tmp_path / "own"
    own.mkdir()
    assert merge(made / "dcp_1_tied", own) == 0
    (own / "merge_model.json").unlink()
    assert f"--target_dir={own} is there" in refusal(capsys, merge(made / "dcp_1_tied", own))
    file = tmp_path / "file"
    file.write_text("kept")
    assert f"--target_dir={file} is there" in refusal(capsys, merge(made / "dcp_1_tied", file))
    assert file.read_text() == "kept"


def test_what_does_not_read_back_is_not_published(made, tmp_path, capsys, monkeypatch):
    assert merge(made / "dcp_1_untied", tmp_path / "merged") == 0

    def broken_disk(weights, folder):
        save_torch_state_dict(weights | {"model.norm.weight": weights["model.norm.weight"] + 1e-6}, folder)

    monkeypatch.setattr(program, "save_torch_state_dict", broken_disk)
    line = refusal(capsys, merge(made / "dcp_1_tied", tmp_path / "merged"))
    assert "model.norm.weight read back are not what was written" in line
    assert_is_tiny(tmp_path / "merged", tie=False)
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


class Hub:
    """Stands in for the hub."""

    calls: list[tuple]
    public = False
    down = False

    def create_repo(self, repo, private, exist_ok):
        if self.down:
            raise ConnectionError("no route")
        self.calls.append(("create", repo, private))

    def repo_info(self, repo):
        return type("Info", (), {"private": not self.public})

    def upload_folder(self, repo_id, folder_path, ignore_patterns):
        sent = {path.name for path in Path(folder_path).iterdir()} - set(ignore_patterns)
        self.calls.append(("upload", repo_id, "model.safetensors" in sent, "merge_model.json" in sent))


def test_the_hub_is_used_when_asked_and_not_else(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Hub, "calls", [], raising=False)
    monkeypatch.setattr(program, "HfApi", Hub)
    run, target = made / "dcp_1_tied", tmp_path / "merged"
    assert merge(run, target) == 0
    assert Hub.calls == []
    assert "--private" in refusal(capsys, merge(run, target, "--private"))
    assert "--hf_upload_path=a/b/c" in refusal(capsys, merge(run, target, "--hf_upload_path", "a/b/c"))
    assert merge(run, target, "--hf_upload_path", "me/it", "--private") == 0
    assert Hub.calls == [("create", "me/it", True), ("upload", "me/it", True, False)]
    monkeypatch.setattr(Hub, "public", True)
    assert "me/it is there and is public" in refusal(
        capsys, merge(run, target, "--hf_upload_path", "me/it", "--private")
    )
    assert len(Hub.calls) == 3
    monkeypatch.setattr(Hub, "down", True)
    line = refusal(capsys, merge(run, target, "--hf_upload_path", "me/it"))
    assert "no route" in line and f"hf upload me/it {target}" in line


# ---- The test sub-command


def test_a_folder_that_is_the_merged_model_passes(made, tmp_path, capsys):
    for name in ("dcp_2_tied", "mixed_4_untied"):
        assert merge(made / name, tmp_path / name) == 0
        assert compare(made / name, tmp_path / name) == 0
        assert "is the merged model: " in capsys.readouterr().out
    # In several files; with the tied head; and rounded as the reference is.
    weights = load_file(tmp_path / "dcp_2_tied" / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    parts = tmp_path / "parts"
    parts.mkdir()
    save_torch_state_dict({k: w.bfloat16() for k, w in weights.items()}, parts, max_shard_size=100_000)
    assert len(list(parts.glob("*.safetensors"))) > 1
    assert compare(made / "dcp_2_tied", parts, "--dtype", "bfloat16") == 0
    weights["model.norm.weight"] += 1e-7
    save_file(weights, tmp_path / "dcp_2_tied" / "model.safetensors")
    assert compare(made / "dcp_2_tied", tmp_path / "dcp_2_tied") == 0


def test_every_difference_is_shown(made, tmp_path, capsys):
    assert merge(made / "dcp_1_tied", tmp_path / "merged") == 0
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    del weights["model.layers.0.input_layernorm.weight"]
    weights["model.extra"] = torch.zeros(3)
    weights["model.norm.weight"][5] += 1e-3
    weights["model.layers.1.input_layernorm.weight"] = torch.ones(63)
    weights["model.layers.2.input_layernorm.weight"] = torch.ones(64).bfloat16()
    weights["model.layers.2.self_attn.q_proj.bias"][0] = float("nan")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
    save_file(weights, tmp_path / "merged" / "model.safetensors")
    capsys.readouterr()
    assert compare(made / "dcp_1_tied", tmp_path / "merged") == 1
    out = capsys.readouterr().out
    assert "7 tensors differ" in out
    rows = dict(line.split(maxsplit=1) for line in out.splitlines() if line.startswith("  "))
    assert rows == {
        "model.layers.0.input_layernorm.weight": "not in --test_hf_dir",
        "model.extra": "only in --test_hf_dir",
        "model.norm.weight": "1 of 64 values differ, by up to 0.001",
        "model.layers.1.input_layernorm.weight": "[64] float32, in --test_hf_dir [63] float32",
        "model.layers.2.input_layernorm.weight": "[64] float32, in --test_hf_dir [64] bfloat16",
        "model.layers.2.self_attn.q_proj.bias": "1 of 64 values differ, by up to nan",
        "lm_head.weight": "16576 of 16576 values differ, by up to 1",
    }
    wide = save_tiny(tmp_path / "wide", tie=False, hidden_size=128)
    assert compare(made / "dcp_1_untied", wide) == 1
    out = capsys.readouterr().out
    assert "... and 19 more" in out and "39 tensors differ" in out


def test_a_reference_that_cannot_be_read_is_an_error(made, tmp_path, capsys):
    run = made / "dcp_1_tied"
    assert f"--test_hf_dir={tmp_path / 'none'} is not a folder" in refusal(capsys, compare(run, tmp_path / "none"))
    assert "has no model.safetensors" in refusal(capsys, compare(run, tmp_path))
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "lost.safetensors"}}')
    assert "cannot be read" in refusal(capsys, compare(run, tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"123")
    assert "cannot be read" in refusal(capsys, compare(run, tmp_path))


# ---- As a user runs it


def test_the_program_says_what_it_wrote(made, tmp_path):
    command = [sys.executable, "-m", "verl.merge_model", "merge", "--backend", "fsdp", "--local_dir", str(made / "ddp_fsdp_4_tied")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "wrote tmp: Qwen2ForCausalLM, 38 tensors, float32" in done.stdout.splitlines()[-1]
    assert all(line.startswith("reading") for line in done.stderr.splitlines())
    assert_is_tiny(tmp_path / "tmp", tie=True)


def test_megatron_checkpoints_do_not_exist(tmp_path, capsys):
    code = program.main(["merge", "--backend", "megatron", "--local_dir", str(tmp_path)])
    assert "--backend=megatron: only fsdp checkpoints exist here" in refusal(capsys, code)
