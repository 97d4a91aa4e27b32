"""A module of sentence-transformers that embeds with rationales, by the encoder of this project.

A folder that `python3 -m verl.export_sentence_transformer --rationales` wrote names it in modules.json, so that
`SentenceTransformer(folder, trust_remote_code=True)` runs it where this project is installed.
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from sentence_transformers.base.modules.input_module import InputModule
from torch import Tensor

from verl.encoder.grace_encoder import GraceEncoder
from verl.errors import UserError
from verl.text_roles import ROLES

# What sentence-transformers writes itself, and what says of a folder what it is.
_OTHERS = ("modules.json", "config_sentence_transformers.json", "README.md")
# Arguments of SentenceTransformer that say where the files of a hub name are.
_WHERE = ("subfolder", "token", "cache_folder", "revision", "local_files_only")


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
        cls, model_name_or_path: str, *_: Any, model_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> Self:  # fmt: skip
        """The module of a model folder or hub name.

        Args:
            model_kwargs: options of `GraceEncoder`, such as engine, device and store.
            options: the other arguments of SentenceTransformer.

        Raises:
            UserError: an argument was given that this model cannot heed, or the files are not to be had.
            As `GraceEncoder`.
        """
        for name in ("processor_kwargs", "config_kwargs", "backend"):
            if options.get(name) not in (None, {}, "torch"):
                raise UserError(f"{name}={options[name]!r} has no effect on this model, whose options are model_kwargs")
        # All files are those of the one revision.
        folder = cls.load_dir_path(model_name_or_path, **{name: options[name] for name in _WHERE if name in options})
        if folder is None:
            raise UserError(
                f"{model_name_or_path!r} at revision={options.get('revision')} is not among the files that were "
                "downloaded; give local_files_only=False on a machine that can reach the hub"
            )
        return cls(GraceEncoder(folder, **(model_kwargs or {})))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What torch calls to move or convert a module. An encoder stays on its GPU, where its engine may be too.

        Raises:
            UserError: another device was asked for.
        """
        if self._encoder.backend.spec.device == "cuda":
            here = torch.empty(0, device="cuda")
            if (asked := fn(here).device) != here.device:
                raise UserError(
                    f"device={asked}: this model is on {here.device}; give model_kwargs={{'device': 'cpu'}} for the "
                    "CPU, and CUDA_VISIBLE_DEVICES for another GPU"
                )
        return super()._apply(fn, recurse)

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

    @property
    def max_seq_length(self) -> int:
        """Most tokens of a prompt, as SentenceTransformer names it; those of a rationale come on top."""
        return self._encoder.settings.max_prompt_length

    @max_seq_length.setter
    def max_seq_length(self, tokens: int) -> None:
        self._encoder.limit_prompts(tokens)

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
