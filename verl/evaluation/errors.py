"""The errors of evaluation."""


class EvaluationError(ValueError):
    """Something the person who runs an evaluation can put right; shown as one line, exit code 2."""
