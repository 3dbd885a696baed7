"""Convert an exception to the one-line message of the command line."""

import errno

from tcan.errors import UserError


def user_message(error: BaseException) -> str | None:
    """Return the one-line message of an error that the user can fix, or None for a bug.

    These are `UserError`, a full disk, and workers that Ray killed because the machine ran out of memory. Errors of
    workers are wrapped: Ray stores the original in `cause`, Ray Train in `worker_failures` or `controller_failure`.
    """
    pending, seen = [error], set()
    while pending:
        error = pending.pop()
        if id(error) in seen:
            continue
        seen.add(id(error))
        causes = [
            getattr(error, "cause", None),
            getattr(error, "controller_failure", None),
            error.__cause__,
            *getattr(error, "worker_failures", {}).values(),
        ]
        causes = [cause for cause in causes if isinstance(cause, BaseException)]
        if isinstance(error, UserError) and not causes:
            return " ".join(str(error).split())
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            where = f" while writing {error.filename}" if error.filename else ""
            return f"the disk is full{where}; free some space and rerun the command"
        if type(error).__module__ == "ray.exceptions" and type(error).__name__ == "OutOfMemoryError":
            return (
                "Ray killed workers because a machine ran out of main memory; stop other programs there, or use fewer "
                "workers or smaller batches, and rerun the command"
            )
        pending += causes
    return None
