"""The whole model of a LoRA adapter, read like the shards of a checkpoint."""

from pathlib import Path

import torch
from torch import Tensor

from verl.models.load import load_causal_lm
from verl.models.lora import CONFIG_NAME, whole_model_of


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG_NAME).is_file()


class MergedAdapter:
    """The weights of an adapter's model, in float32, with the adapter added.

    Args:
        folder: with adapter_config.json, the adapter's weights and a tokenizer.

    Raises:
        UserError: the adapter does not fit its model, or that is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = self.model_folder = folder
        self._weights = load_causal_lm(str(folder)).state_dict()
        self.names = frozenset(self._weights)

    def __str__(self) -> str:
        return f"a LoRA adapter of {whole_model_of(str(self.folder))}"

    def read(self, name: str, shape: torch.Size) -> Tensor:
        """The tensor of a name; the model is that of the config, and so is its shape."""
        return self._weights[name]
