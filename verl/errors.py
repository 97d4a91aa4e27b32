"""The error of everything that the person who runs a program can put right."""


class UserError(ValueError):
    """A setting, a file or an argument that cannot work; programs show it without a traceback and exit with code 2.

    The message names the setting or the line, its value, and a way out.
    """


class WorkerError(RuntimeError):
    """A worker process failed, died or hangs.

    The message names the worker and the phase, and ends with the worker's own traceback where it has one.
    """
