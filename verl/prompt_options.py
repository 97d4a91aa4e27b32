"""What decides a prompt besides its text and the chat template: keys of a run, flags of programs, settings of a model.

Imports neither torch, ray nor transformers.
"""

import argparse
import os
import re
from datetime import date
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator

from verl.errors import UserError

SystemPromptPlace = Literal["system", "user"]
"""The turn that the system prompt stands in: one of its own, or the beginning of the first user turn."""

Truncation = Literal["left", "right", "middle", "error"]
"""The part of an over-long text that is cut."""

DEFAULT_DATE = "2024-07-26"
"""What a template that asks for today's date gets: a day that never changes, the one that Llama 3 falls back to."""


def read_system_prompt(given: str) -> str:
    """A system prompt that is given as text, or as the name of a file that holds it; empty = no system turn.

    Raises:
        UserError: it looks like a file and is none, or it is not valid text.
    """
    path = os.path.expanduser(given)  # noqa: PTH111 - Path would alter texts
    # isfile answers False for what can be no path at all, where Path.is_file raises.
    if os.path.isfile(path):  # noqa: PTH113
        try:
            text = Path(path).read_text(encoding="utf-8-sig").rstrip("\r\n")
        except (UnicodeDecodeError, OSError) as error:
            raise UserError(f"the system prompt cannot be read from {given}: {error}") from error
        if not text.strip():
            raise UserError(f"the system prompt's file {given} is empty; for no system turn give '' itself")
        return text
    if _looks_like_a_path(given):
        raise UserError(f"the system prompt {given!r} is not a file that exists; give its path, or the prompt itself")
    try:
        given.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the system prompt {given[:60]!r} holds half a character, at {error.start}") from error
    return given if given.strip() else ""


def _looks_like_a_path(given: str) -> bool:
    """Whether it is the name of a file rather than a prompt: one word with a slash or a suffix, or words with both."""
    return bool(re.fullmatch(r"\S*(/|\w\.\w)\S*|.*/[^/]*\w\.\w{1,5}", given))


def read_day(given: str) -> str:
    """A day as 2024-07-26.

    Raises:
        UserError: it is none.
    """
    try:
        return date.fromisoformat(given).isoformat()
    except ValueError as error:
        raise UserError(f"{given!r} is not a day ({error}); write it as {DEFAULT_DATE}") from error


GivenSystemPrompt = Annotated[str, AfterValidator(read_system_prompt)]
Day = Annotated[str, AfterValidator(read_day)]


def add_system_prompt_flag(parser: argparse._ActionsContainer, default: str) -> None:
    """The flag --system_prompt, whose value is for `read_system_prompt`."""
    parser.add_argument(
        "--system_prompt", help=f"text, or a file that holds it; '' = no system turn; default: {default}"
    )


def add_template_flags(parser: argparse._ActionsContainer, default: str) -> None:
    """The flags --system_prompt_in and --template_date."""
    parser.add_argument(
        "--system_prompt_in", choices=("system", "user"),
        help="turn that the system prompt stands in; user: the first user turn, for chat templates without a system "
        f"turn (Gemma, Mistral v0.1); default: {default}",
    )  # fmt: skip
    parser.add_argument(
        "--template_date", metavar="YYYY-MM-DD",
        help=f"what a chat template that asks for today's date shows; default: {default}",
    )  # fmt: skip
