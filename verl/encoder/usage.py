"""What an encoder did: texts, rationales, tokens, seconds."""

from dataclasses import dataclass, fields


@dataclass
class Usage:
    """Sums over calls; two of them can be subtracted."""

    texts: int = 0
    """Texts given, repeated ones counted as often as they came."""
    unique_texts: int = 0
    """Texts embedded: repeated ones of one call counted once."""
    shortened: int = 0
    """Texts that were cut to fit max_prompt_length."""
    empty_texts: int = 0
    """Texts without a character; their embedding is that of an empty user turn and its rationale."""
    rationales_made: int = 0
    rationales_stored: int = 0
    """Rationales that the store had already."""
    truncated: int = 0
    """Rationales of this call that hit the length limit, made or stored."""
    vectors_made: int = 0
    vectors_stored: int = 0
    """Vectors that the store had already."""
    generated_tokens: int = 0
    """Tokens of the rationales made, end tokens included."""
    forward_tokens: int = 0
    """Tokens of the rows embedded, prompt and rationale."""
    thinking_s: float = 0.0
    embedding_s: float = 0.0

    def __sub__(self, other: "Usage") -> "Usage":
        return Usage(**{f.name: getattr(self, f.name) - getattr(other, f.name) for f in fields(self)})

    @property
    def hit_rate(self) -> float:
        """Share of the vectors asked for that cost no generation: found, or pooled over a stored rationale."""
        asked = self.vectors_made + self.vectors_stored
        return (self.vectors_stored + self.rationales_stored) / asked if asked else 0.0
