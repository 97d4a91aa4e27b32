"""Sharded checkpoints of the tiny model, written by real process groups, and calls of verl.merge_model on them."""

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from tiny import save_tiny, tiny_model
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from verl import merge_model as program
from verl.checkpoint.training_state import save_training_state
from verl.config import FsdpConfig, OptimConfig
from verl.models.fsdp import build_optimizer, build_scheduler, shard
from verl.models.policy import PolicyModel

HEAVY = ["verl.models.fsdp", "verl.checkpoint.shards", "transformers.models.qwen2.modeling_qwen2"]
TIES = {"tied": True, "untied": False}
# No world size but 1 divides the vocabulary of 259.
DCP = [f"dcp_{world}_{tie}" for world in (1, 2) for tie in TIES]
FSDP = [f"{layout}_{tie}" for layout in ("fsdp_2", "old_torch_2", "fsdp_4", "ddp_fsdp_4", "mixed_4") for tie in TIES]


@contextmanager
def process_group(folder: Path, rank: int, world_size: int) -> Iterator[None]:
    store = f"file://{folder}/store_{world_size}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    yield
    dist.destroy_process_group()


def write_everything(rank: int, folder: Path) -> None:
    """Run in each of four processes: groups of 1, 2 and 4 of them write their checkpoints."""
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
        # A step that changes no weight, so that the optimizer has a state to save.
        optimizer.param_groups[0]["lr"] = 0.0
        for weight in policy.parameters():
            weight.grad = torch.zeros_like(weight)
        optimizer.step()
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
    """The other ways to hold a tensor: a plain copy, a plain slice, replicated, sharded on another dimension."""
    if "layernorm" in key:
        return weight
    if "embed_tokens" in key or "lm_head" in key or "down_proj" in key:
        return weight.chunk(mesh.size())[mesh.get_rank()].clone()
    if key.endswith("bias"):
        return distribute_tensor(weight, mesh, [Replicate()])
    return distribute_tensor(weight, mesh, [Shard(weight.ndim - 1)])


def write_odd_tensors(folder: Path, rank: int) -> None:
    """Tensors of no model: fewer rows than ranks, partial sums, and ranks that disagree."""
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


def write_checkpoints(folder: Path) -> None:
    """A run folder for every name in DCP and FSDP; its model folder has no weights, so that only the shards count."""
    # The four are forked from one process that has done the imports, which take most of the time.
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


def merge(local_dir: Path, target: Path, *more: str) -> int:
    return program.main(
        ["merge", "--backend", "fsdp", "--local_dir", str(local_dir), "--target_dir", str(target), *more]
    )


def compare(local_dir: Path, reference: Path, *more: str) -> int:
    return program.main(
        ["test", "--backend", "fsdp", "--local_dir", str(local_dir), "--test_hf_dir", str(reference), *more]
    )


def error_line(capsys, code: int) -> str:
    """The error that the program printed, one line; its exit code was 2."""
    assert code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("merge_model: ")]
    return line


def assert_is_tiny(folder: Path, tie: bool, dtype: torch.dtype = torch.float32) -> None:
    """The folder's weights are bit for bit those of the model that was sharded."""
    expected = {k: w.to(dtype) for k, w in tiny_model(tie).state_dict().items() if not (tie and k == "lm_head.weight")}
    merged = load_file(folder / "model.safetensors")
    assert merged.keys() == expected.keys()
    for key, weight in expected.items():
        assert merged[key].dtype == dtype
        assert torch.equal(merged[key], weight), key


@dataclass
class Single:
    """Shards of verl 0.4 by one rank, as plain tensors, written without processes; and the folder of their model."""

    folder: Path
    model: Path

    def write(self, state: dict[str, torch.Tensor]) -> None:
        save_rank(self.folder, state, 0, 1)
