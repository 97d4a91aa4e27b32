"""How a model embeds: what training writes into a model folder as embedder_config.json, and encoders read.

Imports neither torch nor transformers.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from verl.embedding.prompts import SYSTEM_PROMPT, Prompt, Truncation
from verl.errors import UserError
from verl.prompt_options import Day, SystemPromptPlace

FILE_NAME = "embedder_config.json"
# Most characters of a system prompt that a table shows.
_SHOWN = 60

Pooling = Annotated[Literal["mean", "last"], BeforeValidator(lambda value: "last" if value == "eos" else value)]
Span = Literal["input+rationale", "rationale"]


class EmbedderSettings(BaseModel):
    """Everything besides the weights that decides a vector."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    system_prompt: Annotated[str | None, BeforeValidator(lambda value: None if value == "" else value)] = SYSTEM_PROMPT
    """Text of the system turn, which asks for the rationale; null = no system turn."""
    system_prompt_in: SystemPromptPlace = "system"
    """Turn that this text stands in: system, or user for chat templates that take no system turn."""
    template_date: Day | None = None
    """Day that the chat template shows where it asks for today's; null = 2024-07-26."""
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
            UserError: the file is not JSON, or has an unknown key or a wrong value.
        """
        file = folder / FILE_NAME
        if not file.is_file():
            return cls()
        try:
            return cls.model_validate(json.loads(file.read_text()))
        except json.JSONDecodeError as error:
            raise UserError(f"{file} is not JSON: {error}") from error
        except ValidationError as error:
            raise UserError(f"{file}: {_explain(error)}") from error

    def changed(self, **changes: Any) -> "EmbedderSettings":
        """These settings with other values; a value of None changes nothing.

        Raises:
            UserError: a value is wrong.
        """
        wanted = {name: value for name, value in changes.items() if value is not None}
        try:
            return EmbedderSettings.model_validate({**self.model_dump(), **wanted})
        except ValidationError as error:
            raise UserError(_explain(error)) from error

    def prompt_line(self) -> str:
        """The system prompt, cut to one line, and where it stands."""
        if self.system_prompt is None:
            return "none: there is no system turn"
        words = " ".join(self.system_prompt.split())
        shown = words if len(words) <= _SHOWN else f"{words[:_SHOWN]}..."
        return f"{shown!r}{' in the user turn' if self.system_prompt_in == 'user' else ''}"

    def write(self, folder: Path) -> None:
        (folder / FILE_NAME).write_text(json.dumps(self.model_dump(), indent=1, ensure_ascii=False) + "\n")

    def pool_start(self, prompt: Prompt, has_rationale: bool) -> int:
        """Where pooling starts in a row of prompt and rationale, which is pooled from there to its end.

        A position as in a slice: -1 is the row's last token, however long its rationale becomes. Training and encoding
        both use it.

        Raises:
            ValueError: span=rationale, and there is no rationale.
        """
        if self.span == "rationale" and not has_rationale:
            raise ValueError("span=rationale pools rationales; it needs think=True")
        if self.pooling == "last":
            return -1
        if self.span == "rationale":
            return len(prompt.ids)
        return 0 if self.pool_system_prompt else prompt.text_start


def why_this_prompt(folder: Path, given: str | None) -> str:
    """Where an encoder's system prompt comes from, in words.

    Args:
        folder: whose settings the encoder uses.
        given: the value of --system_prompt; None = not given.
    """
    if given is not None:
        return "--system_prompt"
    if (folder / FILE_NAME).is_file():
        return f"{FILE_NAME} of {folder}"
    return f"this project's own, because {folder} has no {FILE_NAME}; --system_prompt gives that of its training"


def _explain(error: ValidationError) -> str:
    """Every wrong value in one line."""
    return "; ".join(
        f"{'.'.join(str(part) for part in found['loc'][:1])}={found['input']!r}: {found['msg']}"
        for found in error.errors()
    )
