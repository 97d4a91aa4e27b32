"""The values of a JSON file whose values are not one a line: one array, or objects that span lines."""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NoReturn

from verl.data.lines import MAX_LINE_BYTES, Line, decoded, too_long
from verl.errors import UserError

_CHUNK = 2**20


def spans_lines(head: str) -> bool:
    """Whether a JSON file that begins with `head` is one array, or has objects of several lines."""
    first, *others = [line.strip() for line in head.split("\n") if line.strip()][:2]
    if first.startswith("["):
        # An array of objects or of lists; a list of texts on a line of its own is one sample.
        return head.lstrip()[1:].lstrip()[:1] in ("{", "[", "]") or not _is_json(first)
    # An object does not begin with another one: before such a line is a damaged one.
    return bool(others) and not others[0].startswith("{") and not _is_json(first)


def read_values(file: BinaryIO, path: Path) -> Iterator[Line]:
    """Yield the source text of every value with the line that it begins on, holding one of them in memory.

    Raises:
        UserError: a value is not valid JSON, so that it is unknown where the next one begins, or the end is missing.
    """
    window = _Window(file, path)
    in_array = window.next_character(" \t\r\n") == "["
    if in_array:
        window.at += 1
    while (character := window.next_character(" \t\r\n,")) and character != "]":
        line_idx = window.line_idx
        raw = window.take_value().encode(errors="surrogateescape")
        yield too_long(line_idx, raw, "value") if len(raw) > MAX_LINE_BYTES else decoded(line_idx, raw)
    if in_array and not character:
        window.fail("the array is not closed; is the file cut off?")
    window.at += in_array
    if window.next_character(" \t\r\n"):
        window.fail("there is more after the end of the array; write one array, or one value a line")


class _Window:
    """The part of a text that is being parsed."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path = file, path
        # Bytes that are not UTF-8 become surrogates here, and are told for the value that has them. A TextIOWrapper
        # would close the file, which its opener still asks for its position.
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self._text = ""
        self.at = 0
        self._counted_to = self._newlines = 0

    @property
    def line_idx(self) -> int:
        """Of the current position, from 0."""
        self._newlines += self._text.count("\n", self._counted_to, self.at)
        self._counted_to = self.at
        return self._newlines

    def next_character(self, skipped: str) -> str:
        """Go to the first character that is not one of `skipped`, and return it; empty at the end of the file."""
        while True:
            while self.at < len(self._text):
                if self._text[self.at] not in skipped:
                    return self._text[self.at]
                self.at += 1
            if not self._read_more():
                return ""

    def take_value(self) -> str:
        """The source of the value that begins here; goes past it."""
        while True:
            try:
                _, end = _DECODER.raw_decode(self._text, self.at)
            except (json.JSONDecodeError, RecursionError) as error:
                if len(self._text) - self.at <= MAX_LINE_BYTES and self._read_more():
                    continue
                self.fail(f"the JSON value that begins here is not valid: {getattr(error, 'msg', error)}")
            if end < len(self._text) or not self._read_more():
                source, self.at = self._text[self.at : end], end
                return source

    def fail(self, problem: str) -> NoReturn:
        raise UserError(f"{self._path}, line {self.line_idx + 1}: {problem}")

    def _read_more(self) -> bool:
        raw = self._file.read(_CHUNK)
        more = self._decoder.decode(raw, final=not raw)
        self._newlines = self.line_idx
        self._text, self.at, self._counted_to = self._text[self.at :] + more, 0, 0
        # The bytes may be a part of a character, whose end is yet to come.
        return bool(raw or more)


_DECODER = json.JSONDecoder()


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
