"""Queries and documents: what their prompts say around the text, and whether a rationale is written about them.

Imports neither torch nor transformers.
"""

from typing import Annotated, Literal, NamedTuple, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Role = Literal["query", "document"]
ROLES: tuple[Role, ...] = get_args(Role)
TEXT, INSTRUCTION = "{text}", "{instruction}"
DEFAULT_TASK = "default"
"""The instruction of this name is that of texts whose task is not named."""


TRIPLET_ROLES: dict[str, Role] = {"query": "query", "positive": "document", "negative": "document"}
"""What the texts of a triplet are embedded as."""


class Around(NamedTuple):
    """What the user's turn of a prompt holds besides the text."""

    before: str = ""
    after: str = ""


BARE = Around()
"""The text alone."""


def _check_template(value: str) -> str:
    value = value.strip()
    if value.count(TEXT) != 1:
        raise ValueError(f"a template has {TEXT} once, where the text stands, such as 'Query: {TEXT}'")
    return value


Template = Annotated[str, AfterValidator(_check_template)]
"""The user's turn of a prompt, with {text} once and {instruction} at will."""


def fill(template: str, instruction: str) -> Around:
    """What a template puts around a text."""
    before, _, after = template.partition(TEXT)
    return Around(before.replace(INSTRUCTION, instruction), after.replace(INSTRUCTION, instruction))


class ResolvedRole(NamedTuple):
    """How the texts of a role are embedded, with nothing left to other settings."""

    template: str
    think: bool
    max_new_tokens: int


class RoleSettings(BaseModel):
    """How the texts of a role are embedded, where that differs from texts without a role."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    template: Template | None = None
    """The user's turn of a prompt, as `EmbedderSettings.template`; null = the same as without a role."""
    think: bool = True
    """Whether a rationale is written, unless the caller decides; needs the same of texts without a role."""
    max_new_tokens: int | None = Field(None, ge=1)
    """Most tokens of a rationale; null = the same as without a role."""
