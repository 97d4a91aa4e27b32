"""How a model embeds: what training writes into a model folder as embedder_config.json, and encoders read.

Imports neither torch nor transformers.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from verl.embedding.prompts import SYSTEM_PROMPT, Prompt, Truncation
from verl.errors import UserError

FILE_NAME = "embedder_config.json"

Pooling = Annotated[Literal["mean", "last"], BeforeValidator(lambda value: "last" if value == "eos" else value)]
Span = Literal["input+rationale", "rationale"]


class EmbedderSettings(BaseModel):
    """Everything besides the weights that decides a vector."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    system_prompt: str | None = SYSTEM_PROMPT
    """Text of the system turn, which asks for the rationale; null = no system turn."""
    pooling: Pooling = "mean"
    """mean: the mean of the hidden states of the span; last: that of its last token (`eos` is an old name for last)."""
    span: Span = "input+rationale"
    """Pooled tokens. input+rationale: the user's text and everything after it; rationale: the rationale alone."""
    pool_system_prompt: bool = False
    """With input+rationale: start at the first token of the prompt instead of the first token of the user's text."""
    max_prompt_length: int = Field(1024, ge=1)
    """Most tokens of a rendered prompt; the user's text is cut to fit."""
    truncation: Truncation = "right"
    """Where a user text that is too long is cut: right keeps its beginning, left its end, middle both; error raises."""
    max_new_tokens: int = Field(2048, ge=1)
    """Most tokens of a rationale."""
    temperature: float = Field(1.0, ge=0, allow_inf_nan=False)
    """Sampling temperature of a rationale; 0 is greedy."""
    base_model: str | None = None
    """The model that training started from."""

    @classmethod
    def read(cls, folder: Path) -> "EmbedderSettings":
        """The settings of a model folder, or the defaults when it has no embedder_config.json.

        Raises:
            ValueError: the file is not JSON, or has an unknown key or a wrong value.
        """
        file = folder / FILE_NAME
        if not file.is_file():
            return cls()
        try:
            return cls.model_validate(json.loads(file.read_text()))
        except (json.JSONDecodeError, ValidationError) as error:
            raise ValueError(f"{file}: {error}") from error

    def write(self, folder: Path) -> None:
        (folder / FILE_NAME).write_text(json.dumps(self.model_dump(), indent=1, ensure_ascii=False) + "\n")

    def replaced(self, changes: Mapping[str, Any]) -> "EmbedderSettings":
        """A copy with those of `changes` that are not None.

        Raises:
            UserError: a value is not allowed.
        """
        given = {name: value for name, value in changes.items() if value is not None}
        try:
            return type(self).model_validate({**self.model_dump(), **given})
        except ValidationError as error:
            wrong = (f"{'.'.join(map(str, e['loc']))}={e['input']!r}: {e['msg']}" for e in error.errors())
            raise UserError("; ".join(wrong)) from error

    def pool_start(self, prompt: Prompt, response_length: int) -> int:
        """The first pooled position of a row, counted from the start of its prompt; the row is pooled from there on.

        Training and encoding both use it.

        Raises:
            ValueError: span=rationale, and the rationale is empty.
        """
        if self.span == "rationale" and not response_length:
            raise ValueError("span=rationale pools rationales; it needs think=True")
        if self.pooling == "last":
            return len(prompt.ids) + response_length - 1
        if self.span == "rationale":
            return len(prompt.ids)
        return 0 if self.pool_system_prompt else prompt.text_start
