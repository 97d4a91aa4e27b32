"""Model folders: finding the files of a model, and a hash of its weights."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from verl.utils.files import sha256_of_all

# What of a repository a model needs; one format of weights is enough.
_NEEDED = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]


def model_folder(path: str) -> Path:
    """The folder of `path`, a folder or a hub name; the files of a hub name are downloaded once.

    Raises:
        ValueError: it is neither.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"{path!r} holds no config.json; give a folder that transformers loads")
        return folder
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise ValueError(f"model path {path!r} does not exist; give a folder that holds a model, or a hub name")
    try:
        return Path(snapshot_download(path, allow_patterns=_NEEDED))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"{path!r} is not a folder here, and the hub did not give it: {error}\n"
            "Give a folder that exists, or a hub name on a machine that reaches the hub."
        ) from error


def weights_revision(folder: Path) -> str:
    """Hex sha256 over a model's weights and config.json: two folders with one revision compute the same.

    Raises:
        ValueError: there are no weights.
    """
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not weights:
        raise ValueError(f"{folder} holds no *.safetensors (nor *.bin) files")
    return sha256_of_all([folder / "config.json", *weights])
