"""The errors of the data programs."""


class UserError(ValueError):
    """Something the person who runs a program can put right; `main` shows it as one line, exit code 2."""


class BadSample(ValueError):
    """One record cannot be used; its message is the reason written to rejected.jsonl."""


class MissingField(BadSample):
    """A record has none of the accepted names of a field."""
