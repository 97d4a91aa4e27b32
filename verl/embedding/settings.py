"""How a model embeds: what training writes into a model folder as embedder_config.json, and encoders read.

Imports neither torch nor transformers.
"""

import argparse
import json
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from verl.embedding.prompts import SYSTEM_PROMPT, Prompt
from verl.errors import UserError
from verl.prompt_options import Day, SystemPromptPlace, Truncation
from verl.text_roles import (
    DEFAULT_TASK,
    INSTRUCTION,
    ROLES,
    TEXT,
    Around,
    ResolvedRole,
    Role,
    RoleSettings,
    Template,
    fill,
)
from verl.utils.files import replace_file

FILE_NAME = "embedder_config.json"
# Most characters of a system prompt that a table shows.
_SHOWN = 60

Pooling = Annotated[Literal["mean", "last"], BeforeValidator(lambda value: "last" if value == "eos" else value)]
Span = Literal["input+rationale", "rationale"]
# As an argument None means "the folder's own", so that the share by length needs a word.
BY_LENGTH = "length"
TextShare = Annotated[
    Annotated[float, Field(ge=0, le=1)] | None, BeforeValidator(lambda value: None if value == BY_LENGTH else value)
]


class Mix(NamedTuple):
    """How the states of a text and of its rationale become one vector; see the settings of the same names."""

    text_share: float | None = None
    no_rationale_weight: float = 0.0


NO_MIX = Mix()
"""One mean, in which every token counts the same."""


class EmbedderSettings(BaseModel):
    """Everything besides the weights that decides a vector."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    system_prompt: Annotated[str | None, BeforeValidator(lambda value: None if value == "" else value)] = SYSTEM_PROMPT
    """Text of the system turn, which asks for the rationale; null = no system turn."""
    system_prompt_in: SystemPromptPlace = "system"
    """Turn that this text stands in: system, or user for chat templates that take no system turn."""
    template_date: Day | None = None
    """Day that the chat template shows where it asks for today's; null = 2024-07-26."""
    template: Template = TEXT
    """The user's turn of a prompt: {text} is the text, {instruction} what it is embedded for, of `instructions`. What
    stands before the text is not pooled, unless the system prompt is; it is never cut."""
    instructions: dict[str, str] = {}
    """What {instruction} stands for in a template, by the name of a task (mteb's names work for its tasks, their types,
    and `query` and `document`); `default` where no task is named."""
    think: bool = True
    """Whether a rationale is written, unless the caller decides; false = of no text, whatever its role."""
    query: RoleSettings = RoleSettings()
    """Template, thinking and token limit of texts that are embedded as queries."""
    document: RoleSettings = RoleSettings()
    """The same of texts that are embedded as documents."""
    pooling: Pooling = "mean"
    """mean: the mean of the hidden states of the span; last: that of its last token (`eos` is an old name for last)."""
    span: Span = "input+rationale"
    """Pooled tokens. input+rationale: the user's text and everything after it; rationale: the rationale alone."""
    pool_system_prompt: bool = False
    """With input+rationale: start at the first token of the prompt instead of the first token of the user's text."""
    text_share: TextShare = None
    """Share of the text in the mean, from 0 to 1: share x mean(text) + (1 - share) x mean(rationale), where the text is
    all that is pooled of the prompt. null (as an argument: length) = every token counts the same, so that the share
    follows the lengths. It needs pooling=mean and span=input+rationale."""
    no_rationale_weight: float = Field(0.0, ge=0, le=1)
    """Weight of the vector without the rationale in an average with the one that has it: weight x unit(without) +
    (1 - weight) x unit(with); 0 = no average. It needs span=input+rationale, and has no effect without thinking."""
    matryoshka_dims: list[Annotated[int, Field(ge=1)]] | None = None
    """Numbers of first dimensions that were trained to be used alone; null = all of them together. It decides no
    vector: an encoder warns where it is asked for another number."""
    centre: bool = False
    """Take the direction of the mean vector out of every vector; the mean is in embedder_centre/mean.safetensors."""
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

    @model_validator(mode="after")
    def _check_mix(self) -> "EmbedderSettings":
        needed = {"text_share": ("pooling", "span"), "no_rationale_weight": ("span",)}
        given = {"text_share": self.text_share is not None, "no_rationale_weight": self.no_rationale_weight > 0}
        for name in (name for name, is_given in given.items() if is_given):
            for other in needed[name]:
                needs, value = EmbedderSettings.model_fields[other].default, getattr(self, other)
                if value != needs:
                    off = BY_LENGTH if name == "text_share" else 0
                    raise ValueError(
                        f"{name}={getattr(self, name)} needs {other}={needs}, and {other} is {value}; change it, or "
                        f"give {name}={off}"
                    )
        return self

    @model_validator(mode="after")
    def _check_roles(self) -> "EmbedderSettings":
        thinking = {"think": self.think, **{f"{role}.think": self.of_role(role).think for role in ROLES}}
        off = next((name for name, thinks in thinking.items() if not thinks), None)
        if off and self.span == "rationale":
            raise ValueError(f"{off}=False needs span={EmbedderSettings.model_fields['span'].default}")
        if self.uses_instructions and DEFAULT_TASK not in self.instructions:
            raise ValueError(
                f"a template has {INSTRUCTION}, so that instructions needs one named {DEFAULT_TASK}, for texts whose "
                "task is not named"
            )
        return self

    def of_role(self, role: Role | None) -> ResolvedRole:
        """What holds for texts of a role, or without one."""
        return self._by_role[role]

    @cached_property
    def _by_role(self) -> dict[Role | None, ResolvedRole]:
        own: dict[Role | None, RoleSettings] = {None: RoleSettings(), "query": self.query, "document": self.document}
        return {
            role: ResolvedRole(
                found.template or self.template, self.think and found.think, found.max_new_tokens or self.max_new_tokens
            )
            for role, found in own.items()
        }

    def around(self, role: Role | None, task: str | None = None, instruction: str | None = None) -> Around:
        """What the user's turn holds besides a text.

        Args:
            task: the name of an instruction of the settings; None = the one named `default`.
            instruction: in place of one of the settings.

        Raises:
            UserError: the settings have no such task.
        """
        return fill(self.of_role(role).template, self.instruction(task, instruction))

    def instruction(self, task: str | None, given: str | None) -> str:
        """What {instruction} stands for; see `around`."""
        if task is not None and task not in self.instructions:
            known = ", ".join(sorted(self.instructions)) or "none"
            raise UserError(f"task={task!r} is none of the settings' instructions, which are: {known}")
        return self.instructions.get(DEFAULT_TASK if task is None else task, "") if given is None else given

    @property
    def uses_instructions(self) -> bool:
        """Whether any template has a place for an instruction."""
        return any(INSTRUCTION in self.of_role(role).template for role in (None, *ROLES))

    @property
    def longest_rationale(self) -> int:
        """Most tokens of a rationale of any role."""
        return max(self.of_role(role).max_new_tokens for role in (None, *ROLES))

    @property
    def mix(self) -> Mix:
        return Mix(self.text_share, self.no_rationale_weight)

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

        max_new_tokens is for texts of every role then, unless a role is changed too.

        Raises:
            UserError: a value is wrong.
        """
        wanted = {name: value for name, value in changes.items() if value is not None}
        if "max_new_tokens" in wanted:
            for role in ROLES:
                wanted.setdefault(role, {**getattr(self, role).model_dump(), "max_new_tokens": None})
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
        replace_file(folder / FILE_NAME, json.dumps(self.model_dump(), indent=1, ensure_ascii=False) + "\n")

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


def add_vector_flags(parser: argparse._ActionsContainer) -> None:
    """The flags --text_share, --no_rationale_weight and --no_centre."""
    parser.add_argument(
        "--text_share", metavar="SHARE",
        help="share of the text in the mean over text and rationale, from 0 to 1; length: every token counts the same; "
        "default: the model's settings",
    )  # fmt: skip
    parser.add_argument(
        "--no_rationale_weight", type=float, metavar="WEIGHT",
        help="average each vector with that of its text without a rationale, which gets this weight; default: the "
        "model's settings",
    )  # fmt: skip
    parser.add_argument(
        "--no_centre", action="store_true",
        help="do not take out the direction of the mean vector that is kept with the model (see verl.centre)",
    )  # fmt: skip


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
    # What is wrong with several values together has no place of its own, and names them.
    return "; ".join(
        f"{found['loc'][0]}={found['input']!r}: {found['msg']}" if found["loc"] else str(found["ctx"]["error"])
        for found in error.errors()
    )
