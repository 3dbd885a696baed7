"""The one exception a person can mend."""


class UserError(Exception):
    """Something the user can mend: one line saying what is wrong, where, and what to do.

    The command line prints it without a traceback and exits with status 2.
    """
