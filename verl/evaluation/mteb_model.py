"""GraceEncoder as a model of mteb, with a ModelMeta that differs whenever the vectors may differ.

mteb computes cosines itself where a task is defined by them. What sees the vectors' length is its classifiers, its
k-means, and the distances and products of pair classification.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from mteb.types import BatchedInput, PromptType
from torch.utils.data import DataLoader

from verl.encoder.grace_encoder import GraceEncoder
from verl.evaluation.records import revision_of
from verl.text_roles import ROLES


class GraceMTEB(AbsEncoder):
    """The model that `mteb.evaluate` is given.

    Args:
        name: of the model in result folders, after the owner `GRACE/`.
        options: arguments of `GraceEncoder.encode`, the same for every task. Vectors are not scaled to unit length
            unless `normalize_embeddings` is among them: the paper's scores come from vectors as they are.
        batch_size: of `GraceEncoder.encode`. The one of mteb's encode_kwargs is only that of its data loader.
    """

    mteb_model_meta: ModelMeta

    def __init__(
        self, encoder: GraceEncoder, name: str, options: Mapping[str, Any], batch_size: int | None = None
    ) -> None:
        self.encoder, self.batch_size = encoder, batch_size
        self.options = {"normalize_embeddings": False, **options}
        self.mteb_model_meta = model_meta(encoder, name, self.options)
        self.prompts_dict = encoder.settings.instructions

    def encode(
        self, inputs: DataLoader[BatchedInput], *, task_metadata: Any, hf_split: str, hf_subset: str,
        prompt_type: PromptType | None = None, **kwargs: Any,
    ) -> np.ndarray:  # fmt: skip
        """[N,H] float32; a failure of the engine is the task's failure.

        Texts of a task that has queries and documents get their role. Where a template has a place for an instruction,
        it is the settings' for the task, its type or the role, else the task's own of mteb.
        """
        texts = [text for batch in inputs for text in batch["text"]]
        asks = self.encoder.settings.uses_instructions
        instruction = self.get_instruction(task_metadata, prompt_type) if asks else None
        role = None if prompt_type is None else next(role for role in ROLES if role == prompt_type.value)
        return self.encoder.encode(
            texts, batch_size=self.batch_size, role=role, instruction=instruction, **self.options
        )  # fmt: skip


def described(encoder: GraceEncoder, options: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the vectors besides weights and texts, of the roles too where they differ."""
    alone = encoder.describe(**options)
    roles = {role: encoder.describe(role=role, **options) for role in ROLES}
    instructions = {"instructions": encoder.settings.instructions} if encoder.settings.uses_instructions else {}
    return alone | {role: own for role, own in roles.items() if own != alone} | instructions


def model_meta(encoder: GraceEncoder, name: str, options: Mapping[str, Any]) -> ModelMeta:
    """mteb keeps results by name, revision and experiment. Ours: the hash of the weights, and all settings."""
    size = encoder.backend.facts
    return ModelMeta(
        loader=None,
        name=f"GRACE/{name}",
        revision=revision_of(encoder.revision),
        release_date=None,
        languages=["eng-Latn"],
        n_parameters=size.parameters,
        n_embedding_parameters=size.embedding_parameters,
        memory_usage_mb=size.bytes / 2**20,
        max_tokens=encoder.settings.max_prompt_length,
        embed_dim=size.hidden,
        license=None,
        open_weights=None,
        public_training_code=None,
        public_training_data=None,
        framework=["PyTorch"],
        similarity_fn_name="cosine",
        use_instructions=encoder.settings.uses_instructions,
        training_datasets=None,
        adapted_from=encoder.settings.base_model,
        experiment_kwargs=described(encoder, options),
    )
