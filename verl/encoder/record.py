"""What is known of one text during one call of an encoder, from its prompt to its vector."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from verl.embedding.prompts import Prompt


class Rationale(NamedTuple):
    """What the model wrote about one text."""

    ids: tuple[int, ...]
    """Token ids, the end token included when there is one."""
    truncated: bool
    """Whether it hit the length limit."""


NO_RATIONALE = Rationale((), False)
"""The rationale of a text that is embedded without one."""


@dataclass(frozen=True)
class Sampling:
    """How the rationales of one call are sampled."""

    max_new_tokens: int
    temperature: float
    seed: int


@dataclass
class TextRecord:
    """One of the different texts of a call. The store and the backend fill in what is missing."""

    index: int
    """Position among the different texts of the call."""
    prompt: Prompt
    seed: int
    """Of its rationale, below 2**56."""
    rationale: Rationale | None = None
    """None = not known yet."""
    vector: np.ndarray | None = None
    """[H] float32, the mean of the pooled hidden states, or the average of two vectors; neither normalised nor without
    the centre. None = not known yet."""

    @property
    def rationale_tokens(self) -> int:
        """Tokens of the rationale, the end token included."""
        return len(self.rationale.ids) if self.rationale else 0


class EncodedText(NamedTuple):
    """What an encoder tells of one text."""

    mean: np.ndarray
    """[H] float32: the vector without the centre, before any cut and normalisation."""
    rationale: str
    """Empty without thinking."""
    prompt_tokens: int
    """Tokens of the rendered prompt, which holds the text."""
    rationale_tokens: int
    """Tokens of the rationale, the end token included."""
    shortened: bool
    """Whether the text was cut to fit max_prompt_length."""
