"""The error of everything that the person who runs a program can put right."""


class UserError(ValueError):
    """A setting, a file or an argument that cannot work; programs show it without a traceback and exit with code 2.

    The message names the setting or the line, its value, and a way out.
    """
