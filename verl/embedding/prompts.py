"""The prompt that asks for a rationale, and its exact rendering to token ids.

Training, data preparation and evaluation all render through `PromptRenderer`. It finds, for every prompt, the first
token of the user's text (where pooling starts), and it shortens an over-long *user text*, never the rendered prompt, so
that the assistant header is always complete.

A text may contain the template's own markers, such as <|im_end|>. They are tokenized as plain characters, so that they
end no turn.

Imports neither torch nor transformers: the data programs use it too.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from verl.embedding.chat_template import ChatTemplate, Message, last_user_turn
from verl.embedding.constant_start import constant_start
from verl.errors import UserError
from verl.prompt_options import SystemPromptPlace, Truncation
from verl.text_roles import BARE, Around

SYSTEM_PROMPT = (
    "Read the text. Inside <think> and </think>, reason about its topic, meaning and intent. "
    "Then write a complete understanding of it."
)

Offsets = list[tuple[int, int]]

_WORTH_PROBING = 100
"""Prompts of one frame in a call from which on finding their constant start, 16 short prompts once, pays."""


def rationale_messages(text: str, system_prompt: str | None = SYSTEM_PROMPT) -> list[Message]:
    """The chat that asks for a rationale of `text`; without a system turn if `system_prompt` is None."""
    user = {"role": "user", "content": text.strip()}
    return [user] if system_prompt is None else [{"role": "system", "content": system_prompt}, user]


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
        system_prompt_in, template_date: see `ChatTemplate`.
        limit_name: the setting that `max_length` comes from, for messages.

    Raises:
        ValueError: the tokenizer has no chat template, or cannot report character offsets; or `template_date` is not a
            day.
    """

    def __init__(
        self, tokenizer: Any, max_length: int | None = None, truncation: Truncation = "right",
        allow_empty: bool = False, system_prompt_in: SystemPromptPlace = "system", template_date: str | None = None,
        limit_name: str = "data.max_prompt_length",
    ) -> None:  # fmt: skip
        if not tokenizer.is_fast:
            raise ValueError(
                f"the tokenizer of {tokenizer.name_or_path!r} is not a fast one and reports no character offsets; "
                "convert it to tokenizer.json"
            )
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.truncation = truncation
        self.allow_empty = allow_empty
        self._limit_name = limit_name
        self._template = ChatTemplate(tokenizer, system_prompt_in, template_date)
        markers = [re.escape(t.content) for t in tokenizer.added_tokens_decoder.values() if t.special and t.content]
        self._marker = re.compile("|".join(markers)) if markers else None
        self._starts: dict[tuple[str, str], tuple[int, int]] = {}

    @property
    def template_date(self) -> str | None:
        """The day that prompts show, as 2024-07-26; None where a setting cannot change what they show."""
        return self._template.date

    def render(
        self, conversations: Sequence[Sequence[Message]], around: Sequence[Around] | None = None
    ) -> list[Prompt]:
        """Render each conversation (its last user turn is the text to embed) in one tokenizer call.

        Args:
            around: what each last user turn holds besides the text, and what is never cut; None = nothing.

        Raises:
            UserError: the chat template cannot be used, see `ChatTemplate.frame`; or `around` has a marker of it.
            ValueError: a text is empty or not valid Unicode, or a prompt is over-long and `truncation` is `error`, or
                nothing of the text would be left.
        """
        if not conversations:
            return []
        framed = self._framed(conversations, around)
        encoded = self._tokenize([(prefix, text, suffix) for (prefix, suffix), text in framed])
        return [
            self._finish(frame, text, ids, offsets)
            for (frame, text), (ids, offsets) in zip(framed, encoded, strict=True)
        ]

    def lengths(self, conversations: Sequence[Sequence[Message]], around: Sequence[Around] | None = None) -> list[int]:
        """Number of token ids of each rendered prompt, before any shortening; see `render`."""
        if not conversations:
            return []
        parts = [(prefix, text, suffix) for (prefix, suffix), text in self._framed(conversations, around)]
        counts = {i: len(self._tokenize_marked(*part)[0]) for i, part in enumerate(parts) if self._has_marker(part[1])}
        backend = self._plain_backend()
        plain = [part for i, part in enumerate(parts) if i not in counts]
        starts = self._constant_starts(backend, Counter((prefix, suffix) for prefix, _, suffix in plain))
        rests = [prefix[starts[prefix, suffix][0] :] + text + suffix for prefix, text, suffix in plain]
        # The backend's own call, which builds no lists of ids and masks.
        encoded = zip(plain, backend.encode_batch_fast(rests, add_special_tokens=False), strict=True)
        measured = (starts[prefix, suffix][1] + len(rest) for (prefix, _, suffix), rest in encoded)
        return [counts[i] if i in counts else next(measured) for i in range(len(parts))]

    def _constant_starts(
        self, backend: Any, frames: Counter[tuple[str, str]]
    ) -> dict[tuple[str, str], tuple[int, int]]:
        """`constant_start` of each frame, nothing for those too rare to be worth its probes."""
        for frame, count in frames.items():
            if count >= _WORTH_PROBING and frame not in self._starts:
                self._starts[frame] = constant_start(backend, *frame)
        return {frame: self._starts.get(frame, (0, 0)) for frame in frames}

    def fingerprint(self) -> str:
        """SHA-256 of what determines a prompt's length: tokenizer, chat template, the system text's place, the date."""
        digest = hashlib.sha256(self._plain_backend().to_str().encode())
        digest.update(json.dumps(self.tokenizer.chat_template, sort_keys=True).encode())
        digest.update(json.dumps([self._template.system_prompt_in, self.template_date]).encode())
        return digest.hexdigest()

    def frame(self, messages: Sequence[Message]) -> tuple[str, str]:
        """The rendered characters before and after the last user text; see `ChatTemplate.frame`."""
        return self._template.frame(messages)

    def _framed(
        self, conversations: Sequence[Sequence[Message]], around: Sequence[Around] | None
    ) -> list[tuple[tuple[str, str], str]]:
        """The characters before and after each conversation's text, and the text."""
        framed = []
        for chat, (before, after) in zip(conversations, around or [BARE] * len(conversations), strict=True):
            if self._has_marker(before + after):
                raise UserError(
                    f"the template or instruction {before + after!r} holds a marker of the chat template, which would "
                    "end the user's turn; leave it out"
                )
            prefix, suffix = self.frame(chat)
            framed.append(((prefix + before, after + suffix), self._user_text(chat)))
        return framed

    def _user_text(self, messages: Sequence[Message]) -> str:
        text = messages[last_user_turn(messages)]["content"].strip()
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
        return list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))

    def _plain_backend(self) -> Any:
        """The tokenizer's backend for a direct call.

        It keeps the settings of the tokenizer's last call, and those that tokenizer.json was saved with: truncation
        and padding, with which many model folders are published.
        """
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = False
        return backend

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
                f"a prompt has {len(ids)} tokens, more than {self._limit_name}={self.max_length}: "
                f"{text[:60]!r}...; filter the data (offline_filter_data.py), raise {self._limit_name}, "
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
            f"the prompt without the text fills {self._limit_name}={self.max_length} and leaves no room for text; "
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
