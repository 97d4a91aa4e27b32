"""The card of a model on the hub: that of its folder, with what the hub and the leaderboards read at its head."""

from pathlib import Path
from typing import Any, cast

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError

from verl.checkpoint.hub import HUB_ERRORS, in_one_line
from verl.checkpoint.model_card import FILE_NAME
from verl.embedding.settings import EmbedderSettings
from verl.errors import UserError
from verl.utils.hub_names import is_hub_name

_LICENCE = ("license", "license_name", "license_link")


def published_card(
    folder: Path, settings: EmbedderSettings, licence: str | None, repo: str, entries: list[EvalResult]
) -> tuple[ModelCardData, str]:
    """The card that is uploaded: its head, and all of it.

    What the folder's own card says at its head stays, but for `licence` and the scores.

    Args:
        licence: by the hub's name; None = that of the folder's card, else that of the base model's.
        repo: names the model of the scores.
        entries: scores; without any, those of the folder's card stay.

    Raises:
        UserError: there is no card, its head cannot be read, or the licence is not known.
    """
    card = _read(folder)
    data = cast(ModelCardData, card.data)
    base = settings.base_model
    if data.base_model is None and base and is_hub_name(base):
        data.base_model = base
    head, why_not = _head_of_base(base)
    if licence:
        data.license, data.license_name, data.license_link = licence, None, None
    elif data.license is None:
        if not head.get("license"):
            raise UserError(f"the licence of this model is not known: {why_not}; give it as --license, as apache-2.0")
        for name in _LICENCE:
            setattr(data, name, head.get(name))
    data.language = data.language or head.get("language")
    if entries:
        data.model_name, data.eval_results = repo.rpartition("/")[2], entries
        data.tags = [*(data.tags or []), *({"mteb"} - set(data.tags or []))]
    # As the hub will read it.
    return cast(ModelCardData, ModelCard(str(card)).data), str(card)


def _read(folder: Path) -> ModelCard:
    file = folder / FILE_NAME
    if not file.is_file():
        raise UserError(f"{folder} has no {FILE_NAME}, the model's card; write what a reader needs to know of it")
    try:
        return ModelCard.load(file)
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"the head of {file} cannot be read: {in_one_line(error)}; put it right") from error


def _head_of_base(base: str | None) -> tuple[dict[str, Any], str]:
    """What the card of the base model has at its head, and why nothing of it can be known."""
    if base is None:
        return {}, "its settings name no base_model"
    folder = Path(base).expanduser()
    file = folder / FILE_NAME
    if folder.is_dir() and not file.is_file():
        return {}, f"its base model {base} has no {FILE_NAME}"
    if not folder.is_dir() and not is_hub_name(base):
        return {}, f"its base model {base} is not there"
    try:
        head = ModelCard.load(file if folder.is_dir() else base, ignore_metadata_errors=True).data
    except (*HUB_ERRORS, EntryNotFoundError, ValueError, yaml.YAMLError) as error:
        return {}, f"the card of its base model {base} cannot be read ({in_one_line(error)})"
    return head.to_dict(), f"the card of its base model {base} names none"
