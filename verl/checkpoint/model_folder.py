"""Model folders: where the files of a model are, and a hash of its weights."""

import hashlib
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from verl.models.lora import CONFIG_NAME, base_of_adapter
from verl.utils.files import sha256_of_all
from verl.utils.hub_names import is_hub_name

_CONFIG = "config.json"
# The files of a hub repository that are downloaded: of several weight formats only safetensors.
_NEEDED = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]


def model_folder(path: str) -> Path:
    """The folder of a model that is given as a folder or a hub name; files from the hub are downloaded once.

    Raises:
        ValueError: the folder holds no model, or the hub has no such model.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not any((folder / name).is_file() for name in (_CONFIG, CONFIG_NAME)):
            raise ValueError(f"{path!r} holds no {_CONFIG} (nor {CONFIG_NAME}); give a folder that transformers loads")
        return folder
    if not is_hub_name(path):
        raise ValueError(f"model path {path!r} does not exist; give a folder that holds a model, or a hub name")
    try:
        return Path(snapshot_download(path, allow_patterns=_NEEDED))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"{path!r} is not a folder, and downloading it from the hub failed: {error}\n"
            "Give a folder that exists, or a hub name on a machine that can reach the hub."
        ) from error


def weights_revision(folder: Path) -> str:
    """Hex sha256 over the files of a model's weights and its config; of an adapter, over those of its model too.

    Raises:
        ValueError: the folder has no weights.
    """
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not weights:
        raise ValueError(f"{folder} holds no *.safetensors (nor *.bin) files")
    configs = [folder / name for name in (_CONFIG, CONFIG_NAME) if (folder / name).is_file()]
    own = sha256_of_all([*configs, *weights])
    base = base_of_adapter(str(folder))
    return own if base is None else hashlib.sha256(f"{own} {weights_revision(model_folder(base))}".encode()).hexdigest()
