"""The exception for errors that the user can fix, and short texts of other errors."""


class UserError(Exception):
    """An error that the user can fix: one line with what failed, where, and what to do.

    The command line prints it without a traceback and exits with status 2.
    """


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class name if it has no message."""
    return (str(error).strip() or type(error).__name__).partition("\n")[0]
