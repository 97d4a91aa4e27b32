"""The prompt that asks for a rationale, and its exact rendering to token ids.

Training, data preparation and evaluation all render through `PromptRenderer`. It finds, for every prompt, the first
token of the user's text (where pooling starts), and it shortens an over-long *user text*, never the rendered prompt, so
that the assistant header is always complete.

A chat template is a program of the model's authors. It may refuse a system turn, leave it out, show today's date, or
fail. What it does is looked at when a prompt is first rendered: a system prompt that would not reach the model is an
error, and its date is the one of the settings.

A text may contain the template's own markers, such as <|im_end|>. They are tokenized as plain characters, so that they
end no turn.

Imports neither torch nor transformers: the data programs use it too.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any, Literal

from verl.errors import UserError
from verl.prompt_options import DEFAULT_DATE, SystemPromptPlace, read_day

SYSTEM_PROMPT = (
    "Read the text. Inside <think> and </think>, reason about its topic, meaning and intent. "
    "Then write a complete understanding of it."
)

Message = dict[str, str]
Offsets = list[tuple[int, int]]
Truncation = Literal["left", "right", "middle", "error"]

# Texts that no template or user would write. Rendering the first two shows where a template puts the user's text; the
# next two stand around the system prompt, and the last is an answer.
_PROBES = ("QZXprobeoneXZQ", "JVWprobesecondWVJ")
_SYSTEM_PROBES = ("QZXsystembeginXZQ", "QZXsystemendXZQ")
_ANSWER_PROBE = "QZXanswerXZQ"
_FOLD_IT = (
    "to put the system prompt at the beginning of the user's turn, train with data.system_prompt_in=user, which the "
    "checkpoint keeps, or give programs --system_prompt_in user"
)


def rationale_messages(text: str, system_prompt: str | None = SYSTEM_PROMPT) -> list[Message]:
    """The chat that asks for a rationale of `text`; without a system turn if `system_prompt` is None."""
    user = {"role": "user", "content": text.strip()}
    return [user] if system_prompt is None else [{"role": "system", "content": system_prompt}, user]


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


@dataclass(frozen=True)
class Prompt:
    """One rendered prompt."""

    ids: list[int]
    """Token ids, the assistant header included."""
    text_start: int
    """Index in `ids` of the first token that holds a character of the user's text."""
    text: str
    """The user's text in the prompt, after any shortening."""
    shortened: bool
    """Whether the user's text was cut to fit."""


class PromptRenderer:
    """Turns messages into `Prompt`s with one tokenizer and one length limit.

    Args:
        tokenizer: a fast transformers tokenizer with a chat template.
        max_length: most tokens a prompt may have; None for no limit.
        truncation: which part of an over-long user text is cut: `right` keeps its beginning, `left` its end, `middle`
            both ends; `error` raises.
        allow_empty: render a user turn without text; its pooling starts at the token after the turn's header.
        system_prompt_in: the turn that a chat's system text is rendered in.
        template_date: what a template shows that asks for today's date, as 2024-07-26; it also sets the variable
            `date_string` of Llama 3's templates. None = `DEFAULT_DATE`, and the template's own `date_string`.

    Raises:
        ValueError: the tokenizer has no chat template, or cannot report character offsets.
        UserError: `template_date` is not a day.
    """

    def __init__(
        self, tokenizer: Any, max_length: int | None = None, truncation: Truncation = "right",
        allow_empty: bool = False, system_prompt_in: SystemPromptPlace = "system", template_date: str | None = None,
    ) -> None:  # fmt: skip
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                f"the tokenizer of {tokenizer.name_or_path!r} has no chat template; use an instruction-tuned model "
                "(often the one whose name ends in -Instruct)"
            )
        if not tokenizer.is_fast:
            raise ValueError(
                f"the tokenizer of {tokenizer.name_or_path!r} is not a fast one and reports no character offsets; "
                "convert it to tokenizer.json"
            )
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.truncation = truncation
        self.allow_empty = allow_empty
        self.system_prompt_in = system_prompt_in
        self.template_date = _day_shown(tokenizer.get_chat_template(), template_date)
        """The day that prompts show, as 2024-07-26; None where a setting cannot change what they show."""
        self._frames: dict[str, tuple[str, str]] = {}
        markers = [re.escape(t.content) for t in tokenizer.added_tokens_decoder.values() if t.special and t.content]
        self._marker = re.compile("|".join(markers)) if markers else None

    def render(self, conversations: Sequence[Sequence[Message]]) -> list[Prompt]:
        """Render each conversation (its last user turn is the text to embed) in one tokenizer call.

        Raises:
            UserError: the chat template cannot be used; see `frame`.
            ValueError: a text is empty or not valid Unicode, or a prompt is over-long and `truncation` is `error`, or
                nothing of the text would be left.
        """
        if not conversations:
            return []
        framed = [(self.frame(c), self._user_text(c)) for c in conversations]
        encoded = self._tokenize([(prefix, text, suffix) for (prefix, suffix), text in framed])
        return [
            self._finish(frame, text, ids, offsets)
            for (frame, text), (ids, offsets) in zip(framed, encoded, strict=True)
        ]

    def lengths(self, conversations: Sequence[Sequence[Message]]) -> list[int]:
        """Number of token ids of each rendered prompt, before any shortening."""
        if not conversations:
            return []
        parts = [(prefix, self._user_text(c), suffix) for c in conversations for prefix, suffix in [self.frame(c)]]
        counts = {i: len(self._tokenize_marked(*part)[0]) for i, part in enumerate(parts) if self._has_marker(part[1])}
        plain = ["".join(part) for i, part in enumerate(parts) if i not in counts]
        # The backend's own call, which builds no lists of ids and masks.
        encoded = iter(self.tokenizer.backend_tokenizer.encode_batch_fast(plain, add_special_tokens=False))
        return [counts[i] if i in counts else len(next(encoded)) for i in range(len(parts))]

    def fingerprint(self) -> str:
        """SHA-256 of what determines a prompt's length: tokenizer, chat template, the system text's place, the date."""
        digest = hashlib.sha256(self.tokenizer.backend_tokenizer.to_str().encode())
        digest.update(json.dumps(self.tokenizer.chat_template, sort_keys=True).encode())
        digest.update(json.dumps([self.system_prompt_in, self.template_date]).encode())
        return digest.hexdigest()

    def frame(self, messages: Sequence[Message]) -> tuple[str, str]:
        """The rendered characters before and after the last user text.

        Raises:
            UserError: the chat template fails, refuses a system turn or leaves its text out, shows the user's text not
                exactly once or not unchanged, or does not begin the assistant's turn.
        """
        turn = _last_user_turn(messages)
        fixed = [(m["role"], None if i == turn else m["content"]) for i, m in enumerate(messages)]
        key = json.dumps(fixed, ensure_ascii=False)
        if key not in self._frames:
            first, second = (self._split_at_probe(messages, turn, probe) for probe in _PROBES)
            if first != second:
                raise UserError(
                    f"{self._template} changes with the user's text, so that the text's place cannot be found"
                )
            self._check_system_text(messages, turn)
            self._check_assistant_header(messages, turn, *first)
            self._frames[key] = first
        return self._frames[key]

    @property
    def _template(self) -> str:
        return f"the chat template of {self.tokenizer.name_or_path!r}"

    def _user_text(self, messages: Sequence[Message]) -> str:
        text = messages[_last_user_turn(messages)]["content"].strip()
        if not text and not self.allow_empty:
            raise ValueError("a prompt has an empty user text; nothing can be embedded")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"character {error.start} of the text {text[:60]!r} is a lone surrogate, half of a character; replace "
                "it, for example with text.encode(errors='replace').decode()"
            ) from error
        return text

    def _split_at_probe(self, messages: Sequence[Message], turn: int, probe: str) -> tuple[str, str]:
        rendered = self._render_chat(_replaced(messages, turn, probe))
        if rendered.count(probe) != 1:
            raise UserError(
                f"{self._template} shows the user's text {rendered.count(probe)} times instead of once; "
                "rationale embeddings need a template that shows it once"
            )
        prefix, suffix = rendered.split(probe)
        return prefix, suffix

    def _render_chat(self, messages: Sequence[Message]) -> str:
        """The characters of a chat, the assistant header included."""
        if self.system_prompt_in == "user":
            return self._apply_template(fold_system_turn(messages))
        try:
            return self._apply_template(messages)
        except UserError as refusal:
            if system_prompt_of(messages) is None:
                raise
            # If it fails without a system turn too, that is the error to tell.
            self._apply_template(fold_system_turn(messages))
            reason = _in_one_line(refusal.__cause__)
            raise UserError(f"{self._template} takes no system turn ({reason}); {_FOLD_IT}") from refusal

    def _apply_template(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        variables: dict[str, Any] = {}
        if self.template_date:
            day = date.fromisoformat(self.template_date)
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
                f"{self._template} fails for the turns {roles} ({_in_one_line(error)}); mend chat_template.jinja in a "
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
                f"{self._template} leaves out the system turn, or a part of it, so that the model would not be asked "
                f"for a rationale; {way_out}"
            )

    def _check_assistant_header(self, messages: Sequence[Message], turn: int, prefix: str, suffix: str) -> None:
        """Raise where an answer would follow a header that the prompt does not end with.

        Templates that never write a header (Mistral) are as good as those that write one when they are asked to.
        """
        chat = _replaced(messages, turn, _PROBES[0])
        if self.system_prompt_in == "user":
            chat = fold_system_turn(chat)
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
                f"{self._template} does not begin the assistant's turn: a prompt ends before {header!r}, so that the "
                "model would not be asked to answer; write it where add_generation_prompt is true, in "
                "chat_template.jinja of a copy of the model's folder"
            )

    def _has_marker(self, text: str) -> bool:
        return bool(self._marker and self._marker.search(text))

    def _tokenize(self, parts: Sequence[tuple[str, str, str]]) -> list[tuple[list[int], Offsets]]:
        """Ids and character offsets of each (prefix, text, suffix)."""
        marked = {i: self._tokenize_marked(*part) for i, part in enumerate(parts) if self._has_marker(part[1])}
        plain = ["".join(part) for i, part in enumerate(parts) if i not in marked]
        encoded = iter(self._encode(plain) if plain else [])
        return [marked[i] if i in marked else next(encoded) for i in range(len(parts))]

    def _tokenize_marked(self, prefix: str, text: str, suffix: str) -> tuple[list[int], Offsets]:
        """Ids and offsets of prefix + text + suffix, with the text's markers as plain characters."""
        (head,), (middle,), (tail,) = (
            self._encode([prefix]),
            self._encode([text], markers=False),
            self._encode([suffix]),
        )
        ids, offsets, start = [], [], 0
        for part, (part_ids, part_offsets) in zip((prefix, text, suffix), (head, middle, tail), strict=True):
            ids += part_ids
            offsets += [(start + first, start + last) for first, last in part_offsets]
            start += len(part)
        return ids, offsets

    def _encode(self, texts: list[str], markers: bool = True) -> list[tuple[list[int], Offsets]]:
        encoded = self.tokenizer(
            texts, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=not markers
        )
        # The backend keeps the setting of the last call, and `lengths` calls it directly.
        self.tokenizer.backend_tokenizer.encode_special_tokens = False
        return list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))

    def _finish(self, frame: tuple[str, str], text: str, ids: list[int], offsets: Offsets) -> Prompt:
        prefix, suffix = frame
        shortened = False
        if self.max_length is not None and len(ids) > self.max_length:
            text, ids, offsets = self._shorten(prefix, text, suffix, ids, offsets)
            shortened = True
        text_start = next(i for i, (_, end) in enumerate(offsets) if end > len(prefix))
        return Prompt(ids=ids, text_start=text_start, text=text, shortened=shortened)

    def _shorten(
        self, prefix: str, text: str, suffix: str, ids: list[int], offsets: Offsets
    ) -> tuple[str, list[int], Offsets]:
        assert self.max_length is not None
        if self.truncation == "error":
            raise ValueError(
                f"a prompt has {len(ids)} tokens, more than data.max_prompt_length={self.max_length}: "
                f"{text[:60]!r}...; filter the data (offline_filter_data.py), raise data.max_prompt_length, "
                "or set data.truncation=right"
            )
        first, last = len(prefix), len(prefix) + len(text)
        spans = [(max(s, first) - first, min(e, last) - first) for s, e in offsets if e > first and s < last]
        keep = self.max_length - (len(ids) - len(spans))
        while keep > 0:
            cut = _cut(text, spans, keep, self.truncation)
            ((ids, offsets),) = self._tokenize([(prefix, cut, suffix)])
            if len(ids) <= self.max_length:
                return cut, ids, offsets
            # A text that is cut inside a word can have a few more tokens than it had as part of the whole text.
            keep -= len(ids) - self.max_length
        raise ValueError(
            f"the chat template alone fills data.max_prompt_length={self.max_length} and leaves no room for text; "
            "raise it"
        )


def _cut(text: str, spans: list[tuple[int, int]], keep: int, side: Truncation) -> str:
    """`text` cut to `keep` of its tokens, whose character spans are given."""
    if side == "right":
        return text[: spans[keep - 1][1]].rstrip()
    if side == "left":
        return text[spans[-keep][0] :].lstrip()
    head = keep // 2
    tail = keep - head
    return (text[: spans[head - 1][1]] if head else "") + text[spans[-tail][0] :]


def _day_shown(template: str, given: str | None) -> str | None:
    day = None if given is None else read_day(given)
    if "strftime_now" in template:
        return day or DEFAULT_DATE
    return day if "date_string" in template else None


def _in_one_line(error: BaseException | None) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _replaced(messages: Sequence[Message], turn: int, text: str) -> list[Message]:
    return [{**m, "content": text} if i == turn else m for i, m in enumerate(messages)]


def _last_user_turn(messages: Sequence[Message]) -> int:
    for i in range(len(messages) - 1, -1, -1):
        if messages[i]["role"] == "user":
            return i
    raise ValueError(f"a prompt needs a user turn; got the roles {[m['role'] for m in messages]}")
