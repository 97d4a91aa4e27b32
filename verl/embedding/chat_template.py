"""What a model's chat template makes of a chat: the characters around the user's text.

A chat template is a program of the model's authors. It may refuse a system turn, leave it out, show today's date, or
fail. What it does is found when a frame is first rendered: a system prompt that would not reach the model is an error,
and the date is that of the settings.

Imports neither torch nor transformers.
"""

from collections.abc import Sequence
from datetime import date
from typing import Any

from verl.errors import UserError
from verl.prompt_options import DEFAULT_DATE, SystemPromptPlace, read_day

Message = dict[str, str]

# Texts that no template or user would write. Rendering the first two shows where a template puts the user's text; the
# next two stand around the system prompt, and the last is an answer.
_PROBES = ("QZXprobeoneXZQ", "JVWprobesecondWVJ")
_SYSTEM_PROBES = ("QZXsystembeginXZQ", "QZXsystemendXZQ")
_ANSWER_PROBE = "QZXanswerXZQ"
_FOLD_IT = (
    "to put the system prompt at the beginning of the user's turn, train with data.system_prompt_in=user, which the "
    "checkpoint keeps, or give programs --system_prompt_in user"
)


def system_prompt_of(messages: Sequence[Message]) -> str | None:
    """The text of a chat's system turn, or None."""
    return next((turn["content"] for turn in messages if turn["role"] == "system"), None)


def with_system_prompt(messages: Sequence[Message], system_prompt: str | None) -> list[Message]:
    """The chat with this text as its only system turn; without one if `system_prompt` is None."""
    turns = [turn for turn in messages if turn["role"] != "system"]
    return turns if system_prompt is None else [{"role": "system", "content": system_prompt}, *turns]


def fold_system_turn(messages: Sequence[Message]) -> list[Message]:
    """The chat with its system text at the beginning of the first user turn, an empty line between them."""
    system = [turn["content"] for turn in messages if turn["role"] == "system"]
    turns = with_system_prompt(messages, None)
    first = next(i for i, turn in enumerate(turns) if turn["role"] == "user")
    turns[first] = {**turns[first], "content": "\n\n".join([*system, turns[first]["content"]])}
    return turns


def last_user_turn(messages: Sequence[Message]) -> int:
    """The position of the turn whose text is embedded.

    Raises:
        ValueError: there is none.
    """
    for i in range(len(messages) - 1, -1, -1):
        if messages[i]["role"] == "user":
            return i
    raise ValueError(f"a prompt needs a user turn; got the roles {[m['role'] for m in messages]}")


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        system_prompt_in: the turn that a chat's system text is rendered in.
        template_date: what a template shows that asks for today's date, as 2024-07-26; it also sets the variable
            `date_string` of Llama 3's templates. None = `DEFAULT_DATE`, and the template's own `date_string`.

    Raises:
        ValueError: the tokenizer has no chat template, or `template_date` is not a day.
    """

    def __init__(
        self, tokenizer: Any, system_prompt_in: SystemPromptPlace = "system", template_date: str | None = None
    ) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                f"the tokenizer of {tokenizer.name_or_path!r} has no chat template; use an instruction-tuned model "
                "(often the one whose name ends in -Instruct)"
            )
        self.tokenizer = tokenizer
        self.system_prompt_in = system_prompt_in
        self.date = _day_shown(tokenizer.get_chat_template(), template_date)
        """The day that prompts show, as 2024-07-26; None where a setting cannot change what they show."""
        self._frames: dict[tuple[tuple[str, str | None], ...], tuple[str, str]] = {}

    def frame(self, messages: Sequence[Message]) -> tuple[str, str]:
        """The rendered characters before and after the last user text.

        Raises:
            UserError: the chat template fails, refuses a system turn or leaves its text out, shows the user's text not
                exactly once or not unchanged, or does not begin the assistant's turn.
        """
        turn = last_user_turn(messages)
        key = tuple((m["role"], None if i == turn else m["content"]) for i, m in enumerate(messages))
        if key not in self._frames:
            first, second = (self._split_at_probe(messages, turn, probe) for probe in _PROBES)
            if first != second:
                raise UserError(f"{self._name} changes with the user's text, so that the text's place cannot be found")
            self._check_system_text(messages, turn)
            self._check_assistant_header(messages, turn, *first)
            self._frames[key] = first
        return self._frames[key]

    @property
    def _name(self) -> str:
        return f"the chat template of {self.tokenizer.name_or_path!r}"

    def _split_at_probe(self, messages: Sequence[Message], turn: int, probe: str) -> tuple[str, str]:
        rendered = self._render_chat(_replaced(messages, turn, probe))
        if rendered.count(probe) != 1:
            raise UserError(
                f"{self._name} shows the user's text {rendered.count(probe)} times instead of once; "
                "rationale embeddings need a template that shows it once"
            )
        prefix, suffix = rendered.split(probe)
        return prefix, suffix

    def _placed(self, messages: Sequence[Message]) -> Sequence[Message]:
        return fold_system_turn(messages) if self.system_prompt_in == "user" else messages

    def _render_chat(self, messages: Sequence[Message]) -> str:
        """The characters of a chat, the assistant header included."""
        try:
            return self._apply_template(self._placed(messages))
        except UserError as refusal:
            if self.system_prompt_in == "user" or system_prompt_of(messages) is None:
                raise
            # If it fails without a system turn too, that is the error to tell.
            self._apply_template(fold_system_turn(messages))
            reason = _in_one_line(refusal.__cause__)
            raise UserError(f"{self._name} takes no system turn ({reason}); {_FOLD_IT}") from refusal

    def _apply_template(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        variables: dict[str, Any] = {}
        if self.date:
            day = date.fromisoformat(self.date)
            variables = {"strftime_now": day.strftime, "date_string": day.strftime("%d %b %Y")}
        try:
            return self.tokenizer.apply_chat_template(
                [dict(turn) for turn in messages], tokenize=False, add_generation_prompt=add_generation_prompt,
                **variables,
            )  # fmt: skip
        except Exception as error:
            # A template is a program that comes with the model: it may raise anything.
            roles = ", ".join(turn["role"] for turn in messages)
            raise UserError(
                f"{self._name} fails for the turns {roles} ({_in_one_line(error)}); mend chat_template.jinja in a "
                "copy of the model's folder, or give another model"
            ) from error

    def _check_system_text(self, messages: Sequence[Message], turn: int) -> None:
        """Raise unless the whole system text reaches the prompt, in whatever case or between whatever else."""
        wanted = sum(m["role"] == "system" for m in messages)
        if not wanted:
            return
        marked = [
            {**m, "content": f" {m['content']} ".join(_SYSTEM_PROBES)} if m["role"] == "system" else m for m in messages
        ]
        shown = "".join(self._split_at_probe(marked, turn, _PROBES[0])).casefold()
        if any(shown.count(probe.casefold()) < wanted for probe in _SYSTEM_PROBES):
            way_out = "give another model" if self.system_prompt_in == "user" else _FOLD_IT
            raise UserError(
                f"{self._name} leaves out the system turn, or a part of it, so that the model would not be asked "
                f"for a rationale; {way_out}"
            )

    def _check_assistant_header(self, messages: Sequence[Message], turn: int, prefix: str, suffix: str) -> None:
        """Raise where an answer would follow a header that the prompt does not end with.

        Templates that never write a header (Mistral) are as good as those that write one when they are asked to.
        """
        chat = self._placed(_replaced(messages, turn, _PROBES[0]))
        prompt = prefix + _PROBES[0] + suffix
        if self._apply_template(chat, add_generation_prompt=False) != prompt:
            return
        try:
            answered = self._apply_template(
                [*chat, {"role": "assistant", "content": _ANSWER_PROBE}], add_generation_prompt=False
            )
        except UserError:
            return  # a template for single turns; it shows no header to compare with
        before, found, _ = answered.partition(_ANSWER_PROBE)
        header = before.removeprefix(prompt.rstrip()).strip()
        # What user turns begin with too is no header of the assistant's.
        if found and before.startswith(prompt.rstrip()) and header and header not in prompt:
            raise UserError(
                f"{self._name} does not begin the assistant's turn: a prompt ends before {header!r}, so that the "
                "model would not be asked to answer; write it where add_generation_prompt is true, in "
                "chat_template.jinja of a copy of the model's folder"
            )


def _replaced(messages: Sequence[Message], turn: int, text: str) -> list[Message]:
    return [{**m, "content": text} if i == turn else m for i, m in enumerate(messages)]


def _day_shown(template: str, given: str | None) -> str | None:
    day = None if given is None else read_day(given)
    if "strftime_now" in template:
        return day or DEFAULT_DATE
    return day if "date_string" in template else None


def _in_one_line(error: BaseException | None) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
