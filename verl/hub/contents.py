"""What of a checkpoint is uploaded, and whether it is whole."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from verl.checkpoint.merge import RECORD, SavedTensors, read_config
from verl.checkpoint.merged_adapter import MergedAdapter, is_adapter
from verl.checkpoint.run_folder import MODEL, saved_steps
from verl.embedding.settings import FILE_NAME as SETTINGS_FILE
from verl.errors import UserError
from verl.evaluation.published import Own
from verl.models.lora import base_of_adapter
from verl.utils.hub_names import is_hub_name
from verl.utils.tokenizer import load_tokenizer

# A file of another kind, or whose name begins with a dot, is left out.
_SENT = {".json", ".safetensors", ".jinja", ".model", ".txt", ".md"}
_SENT_NAMES = {"LICENSE", "NOTICE"}
_WORD = "card"
# How this project's programs made a folder, with paths of this machine.
_NOT_SENT = {RECORD, "demo_model.json"}


@dataclass(frozen=True)
class Contents:
    """A model folder, sorted into what is uploaded and what is not."""

    folder: Path
    files: dict[str, Path]
    """By their names in the repository."""
    left_out: dict[str, int]
    """Bytes by name: of files beside those, and of folders as a whole."""


def read_contents(path: Path) -> Contents:
    """The files of a model folder, or of a checkpoint's step, of which the model is uploaded and nothing else.

    Raises:
        UserError: there is no model.
    """
    folder = next((p for p in (path, path / MODEL) if is_adapter(p) or (p / "config.json").is_file()), None)
    if folder is None:
        steps = saved_steps(path) if path.is_dir() else []
        what = f"give a step of it, such as {path / f'global_step_{steps[-1]}'}" if steps else "give a model folder"
        raise UserError(f"--model={path} holds no config.json; {what}")
    files, left_out = {}, {}
    for file in _files_below(folder):
        name = file.relative_to(folder).as_posix()
        if _is_sent(file.relative_to(folder)):
            files[name] = file
        else:
            left_out[name] = file.stat().st_size
    if folder != path:
        for beside in sorted(path.iterdir()):
            if beside != folder:
                left_out[f"../{beside.name}"] = sum(file.stat().st_size for file in _files_below(beside))
    return Contents(folder, files, left_out)


def check_whole(contents: Contents) -> Own:
    """Check that a model can be loaded from what is uploaded; return how it embeds.

    Raises:
        UserError: config, a weight, the tokenizer, the settings or the centre is missing or cannot be read.
    """
    folder = contents.folder
    if is_adapter(folder):
        _check_adapter(folder)
    else:
        _check_weights(folder)
    tokenizer = load_tokenizer(str(folder))
    # Where its vocabulary is missing, transformers makes one that knows its special tokens alone.
    if tokenizer.decode(tokenizer.encode(_WORD, add_special_tokens=False)).strip() != _WORD:
        raise UserError(f"the tokenizer of {folder} cannot spell {_WORD!r}; copy all of its files there again")
    if SETTINGS_FILE not in contents.files:
        raise UserError(f"{folder} has no {SETTINGS_FILE}, which says how the model embeds; copy that of its training")
    return Own.read(folder, tokenizer)


def _check_adapter(folder: Path) -> None:
    """Check that an adapter can be loaded, also on another machine."""
    base = base_of_adapter(str(folder))
    if base is not None and not is_hub_name(base):
        raise UserError(
            f"{folder} is a LoRA adapter of the model {base}, a folder of this machine; upload the whole model, which "
            f"python3 -m verl.merge_model merge --backend fsdp --local_dir {folder} --target_dir merged makes, or "
            "write the hub name of the same model as base_model_name_or_path into its adapter_config.json"
        )
    MergedAdapter(folder)


def _check_weights(folder: Path) -> None:
    _, keys = read_config(folder)
    saved = SavedTensors(folder)
    missing = sorted(keys.shapes.keys() - saved.keys())
    if missing:
        raise UserError(
            f"{folder} lacks {len(missing)} of the {len(keys.shapes)} tensors of a {keys.architecture}, such as "
            f"{missing[0]}; copy it again, or make it again with python3 -m verl.merge_model"
        )


def _files_below(path: Path) -> Iterator[Path]:
    yield from [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())


def _is_sent(name: Path) -> bool:
    hidden = any(part.startswith(".") for part in name.parts)
    return not hidden and name.name not in _NOT_SENT and (name.suffix in _SENT or name.stem in _SENT_NAMES)
