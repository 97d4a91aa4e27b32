"""verl.merge_model runs no code that a checkpoint holds."""

import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sharded_checkpoints import error_line, merge
from torch.distributed.checkpoint.filesystem import _StorageInfo


class Evil:
    """Creates a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def dotted(marker: Path) -> bytes:
    """A pickle that reaches os.mkdir through a module that is allowed."""
    path = str(marker).encode()
    return (
        b"\x80\x04\x8c\x05torch\x8c\x16serialization.os.mkdir\x93X" + len(path).to_bytes(4, "little") + path + b"\x85R."
    )


@pytest.fixture
def marker(tmp_path):
    """A path that must not exist at the end. First it is shown that the attacks work on plain pickle."""
    path = tmp_path / "marker"
    for attack in (pickle.dumps(Evil(path)), dotted(path)):
        pickle.loads(attack)
        path.rmdir()
    yield path
    assert not path.exists()


@pytest.mark.parametrize("attack", ["bare", "inside metadata", "member of a module"])
def test_metadata_runs_no_code(checkpoints, tmp_path, capsys, marker, attack):
    step = shutil.copytree(checkpoints / "dcp_2_tied" / "global_step_4", tmp_path / "step")
    file = step / "actor" / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    attacks = {
        "bare": pickle.dumps(Evil(marker)),
        "inside metadata": pickle.dumps(replace(metadata, planner_data=Evil(marker))),
        "member of a module": dotted(marker),
    }
    file.write_bytes(attacks[attack])
    line = error_line(capsys, merge(step, tmp_path / "merged"))
    assert f"{file} is rejected: it names " in line and "mkdir, which could run code" in line


def test_dcp_shards_run_no_code(checkpoints, tmp_path, capsys, marker):
    step = shutil.copytree(checkpoints / "dcp_2_tied" / "global_step_4", tmp_path / "step")
    actor = step / "actor"
    torch.save(Evil(marker), actor / "evil.distcp")
    metadata = pickle.loads((actor / ".metadata").read_bytes())
    for index in metadata.storage_data:
        if index.fqn == "model.lm.model.norm.weight":
            metadata.storage_data[index] = _StorageInfo("evil.distcp", 0, (actor / "evil.distcp").stat().st_size)
    (actor / ".metadata").write_bytes(pickle.dumps(metadata))
    line = error_line(capsys, merge(step, tmp_path / "merged"))
    assert "model.norm.weight cannot be read: " in line and "mkdir" in line and "weights_only" not in line
    (actor / "evil.distcp").rename(step / "evil.distcp")
    moved = pickle.dumps(metadata).replace(b"\x0bevil.distcp", b"\x0e../evil.distcp")
    (actor / ".metadata").write_bytes(pickle.dumps(pickle.loads(moved[:2] + moved[11:])))
    assert "points out of its folder" in error_line(capsys, merge(step, tmp_path / "merged"))


@pytest.mark.parametrize(
    ("save", "said"),
    [(torch.save, "is rejected: Trying to load unsupported GLOBAL posix.mkdir"),
     (lambda what, path: path.write_bytes(pickle.dumps(what)), "is cut off, or not a file of torch.save")],
    ids=["of torch.save", "bare pickle"],
)  # fmt: skip
def test_fsdp_shards_run_no_code(checkpoints, tmp_path, capsys, marker, save, said):
    step = shutil.copytree(checkpoints / "fsdp_2_tied" / "global_step_4", tmp_path / "step")
    file = step / "actor" / "model_world_size_2_rank_1.pt"
    save({"model.norm.weight": Evil(marker)}, file)
    line = error_line(capsys, merge(step, tmp_path / "merged"))
    assert str(file) in line and said in line


def test_other_files_in_the_folder_are_not_read(checkpoints, tmp_path, marker):
    for name, beside in (("dcp_1_tied", "extra_rank_0.pt"), ("fsdp_2_tied", "optim_world_size_2_rank_0.pt")):
        step = shutil.copytree(checkpoints / name / "global_step_4", tmp_path / name)
        torch.save(Evil(marker), step / "actor" / beside)
        assert merge(step, tmp_path / "merged") == 0
