"""How a model embeds: what training writes into a model folder as embedder_config.json, and encoders read.

Imports neither torch nor transformers.
"""

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from verl.embedding.prompts import SYSTEM_PROMPT, Prompt, Truncation

FILE_NAME = "embedder_config.json"

Pooling = Annotated[Literal["mean", "last"], BeforeValidator(lambda value: "last" if value == "eos" else value)]
Span = Literal["input+rationale", "rationale"]


class EmbedderSettings(BaseModel):
    """Everything but the weights that decides a vector."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    system_prompt: str | None = SYSTEM_PROMPT
    """The system turn, which asks for the rationale; null = none."""
    pooling: Pooling = "mean"
    """mean of the hidden states of the span, or that of its last token (`eos` is an old name of it)."""
    span: Span = "input+rationale"
    """Pooled tokens: the user's text and everything after it, or the rationale alone."""
    pool_system_prompt: bool = False
    """Start the span input+rationale at the first token of the prompt instead of the text's."""
    max_prompt_length: int = 1024
    """Most tokens of a rendered prompt; the user's text is cut to fit."""
    truncation: Truncation = "right"
    """Part of an over-long user text that is cut: right keeps its beginning."""
    max_new_tokens: int = 2048
    """Most tokens of a rationale."""
    temperature: float = 1.0
    """Sampling temperature of a rationale; 0 is greedy."""
    base_model: str | None = None
    """The model that training started from."""

    @classmethod
    def read(cls, folder: Path) -> "EmbedderSettings":
        """The settings of a model folder; a model that was not trained here has none and gets the defaults.

        Raises:
            ValueError: the file is not JSON, or holds a key or a value that is not one of these.
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

    def pool_start(self, prompt: Prompt, response_length: int) -> int:
        """Position in prompt and response of the first token that is pooled; all after it are too.

        Raises:
            ValueError: the span is the rationale and there is none.
        """
        if self.span == "rationale" and not response_length:
            raise ValueError("span=rationale pools rationales; it needs think=True")
        if self.pooling == "last":
            return len(prompt.ids) + response_length - 1
        if self.span == "rationale":
            return len(prompt.ids)
        return 0 if self.pool_system_prompt else prompt.text_start
