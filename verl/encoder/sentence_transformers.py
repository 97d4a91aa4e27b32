"""A module of sentence-transformers that embeds with rationales, by the encoder of this project.

A folder that `python3 -m verl.export_sentence_transformer --rationales` wrote names it in modules.json, so that
`SentenceTransformer(folder, trust_remote_code=True)` runs it where this project is installed.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from sentence_transformers.base.modules.input_module import InputModule

from verl.encoder.grace_encoder import GraceEncoder
from verl.errors import UserError
from verl.text_roles import ROLES

# What sentence-transformers writes itself, and what says of a folder what it is.
_OTHERS = ("modules.json", "config_sentence_transformers.json", "README.md")


class GraceModule(InputModule):
    """The one module of a model; the vectors are those of `GraceEncoder.encode`, of unit length."""

    # Arguments of SentenceTransformer.encode that reach `forward`.
    forward_kwargs = {"think", "max_new_tokens", "seed", "task"}

    def __init__(self, encoder: GraceEncoder) -> None:
        super().__init__()
        self._encoder = encoder
        self.tokenizer = encoder.tokenizer

    @classmethod
    def load(
        cls, model_name_or_path: str, *_: Any, model_kwargs: dict[str, Any] | None = None, **__: Any
    ) -> Self:  # fmt: skip
        """The module of a model folder.

        Args:
            model_kwargs: options of `GraceEncoder`, such as engine, device and store.

        Raises:
            As `GraceEncoder`.
        """
        return cls(GraceEncoder(model_name_or_path, **(model_kwargs or {})))

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **_: Any) -> dict[str, Any]:
        """The inputs as they are; the encoder refuses what is no text.

        Raises:
            UserError: a prompt was given.
        """
        if prompt:
            raise UserError("the prompt of this model is in its embedder_config.json; give none")
        return {"texts": list(inputs)}

    def forward(self, features: dict[str, Any], task: str | None = None, **options: Any) -> dict[str, Any]:
        """Add `sentence_embedding`, [N,H] float32, to the N `texts`."""
        role = next((role for role in ROLES if role == task), None)
        vectors = self._encoder.encode(features["texts"], role=role, convert_to_tensor=True, **options)
        return {**features, "sentence_embedding": vectors}

    def get_embedding_dimension(self) -> int:
        return self._encoder.embedding_dim

    def save(self, output_path: str, *_: Any, **__: Any) -> None:
        """Copy the model's files."""
        for file in self._encoder.folder.iterdir():
            target = Path(output_path) / file.name
            if file.is_dir():
                shutil.copytree(file, target, dirs_exist_ok=True)
            elif file.name not in _OTHERS:
                shutil.copyfile(file, target)
