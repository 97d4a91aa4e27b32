"""The former place of GraceEncoder, which model cards of earlier versions name."""

from verl import GraceEncoder

__all__ = ["GraceEncoder"]
