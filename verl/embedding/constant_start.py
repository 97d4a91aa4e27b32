"""The tokens at the beginning of a prompt that are the same whatever the user's text is.

The tokenizers library first cuts a prompt at its special tokens, from left to right; normalizer, pre-tokenizer and
model then see one piece at a time. The pieces before the last special token that stands before the text are hence
constant. What is left begins with that token, so that rules for the first piece of a prompt, as sentencepiece's leading
space, apply to the text no more than before.

Imports neither torch nor transformers.
"""

from typing import Any

# Each asks for another rule: words, leading spaces and line ends, the word mark of sentencepiece, bytes, nothing.
_PROBES = ("A text, of words.", "  x", "\n\nx\n", "▁x", "é北🙂\u0301", "<|x", "7" * 40, "")


def constant_start(backend: Any, prefix: str, suffix: str) -> tuple[int, int]:
    """Characters of `prefix`, and the tokens that they make, that no text between it and `suffix` can change.

    (0, 0) where that is not certain from the tokenizer's added tokens, or a probe contradicts it.

    Args:
        backend: a `tokenizers.Tokenizer` without truncation and padding.
    """
    added = backend.get_added_tokens_decoder().values()
    # Normalized tokens are looked for within pieces; single words depend on the character before them.
    cutting = {t.content for t in added if t.content and not t.normalized and not t.single_word}
    start, marker = max(((prefix.rfind(content), content) for content in cutting), default=(-1, ""))
    # A longer token around the marker could be completed by the text.
    if start <= 0 or sum(marker in token.content for token in added) != 1:
        return 0, 0
    whole = _ids(backend, [prefix + probe + suffix for probe in _PROBES])
    rest = _ids(backend, [prefix[start:] + probe + suffix for probe in _PROBES])
    marker_id = backend.token_to_id(marker)
    heads = set()
    for ids, tail in zip(whole, rest, strict=True):
        head = ids[: max(0, len(ids) - len(tail))]
        if tail[:1] != [marker_id] or head + tail != ids:
            return 0, 0
        heads.add(tuple(head))
    return (start, len(heads.pop())) if len(heads) == 1 else (0, 0)


def _ids(backend: Any, texts: list[str]) -> list[list[int]]:
    return [encoded.ids for encoded in backend.encode_batch_fast(texts, add_special_tokens=False)]
