"""Counts of what an encoder did: texts, rationales, vectors, tokens, seconds."""

from dataclasses import dataclass, fields


@dataclass
class Usage:
    """Sums over all calls of an encoder; the difference of two is what happened in between."""

    texts: int = 0
    """Texts given, repeated ones included."""
    unique_texts: int = 0
    """Different texts of each call."""
    shortened: int = 0
    """Texts that were cut to fit max_prompt_length."""
    empty_texts: int = 0
    """Texts of white space only; they are embedded as an empty user turn and its rationale."""
    rationales_made: int = 0
    rationales_stored: int = 0
    """Rationales found in the store and used for a new vector."""
    truncated: int = 0
    """Rationales that hit the length limit, made or found."""
    vectors_made: int = 0
    vectors_stored: int = 0
    """Vectors found in the store."""
    generated_tokens: int = 0
    """Tokens of the rationales made, end tokens included."""
    forward_tokens: int = 0
    """Tokens of the rows (prompt and rationale) that were embedded by a forward of their own; the hf engine pools while
    it decodes, without one."""
    thinking_s: float = 0.0
    """Seconds of generating rationales, with the hf engine those of pooling too; summed over processes."""
    embedding_s: float = 0.0
    """Seconds of the forwards that embed, summed over processes."""

    def __sub__(self, other: "Usage") -> "Usage":
        return Usage(**{f.name: getattr(self, f.name) - getattr(other, f.name) for f in fields(self)})

    @property
    def hit_rate(self) -> float:
        """Share of the vectors that needed no generation: they or their rationales were in the store."""
        asked = self.vectors_made + self.vectors_stored
        return (self.vectors_stored + self.rationales_stored) / asked if asked else 0.0
