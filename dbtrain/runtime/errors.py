"""Errors that a user can fix, as opposed to bugs."""

from __future__ import annotations

import errno


class ConfigError(ValueError):
    """An error that the user can fix. The command line prints `problems`, one per line, and exits with 2.

    `shared`: every rank raises the same error, so only one rank per node prints it.
    """

    def __init__(self, *problems: str, shared: bool = False) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems
        self.shared = shared


class Preempted(Exception):
    """Work stopped early on request. Everything is saved; the same command resumes it."""


class Lost(Exception):
    """Another rank is gone or does not answer. A rerun resumes from the last checkpoint.

    `ended`: the other rank reported its own error before it exited, so a rerun would fail the same way.
    """

    def __init__(self, text: str, ended: bool) -> None:
        super().__init__(text)
        self.ended = ended


# Errors of the operating system whose cause lies outside this program.
_USER_ERRNOS = {
    errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR,
    errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.EIO, errno.EFBIG, errno.EMFILE, errno.ENFILE,
    errno.ELOOP, errno.ESTALE, errno.EBUSY, errno.ETXTBSY,
}  # fmt: skip


def os_problem(error: OSError) -> str:
    """One line on a full disk, a missing permission and the like. Re-raises any other error."""
    if error.errno not in _USER_ERRNOS:
        raise error
    return f"{error.filename or 'file system'}: {error.strerror}"


def reason(error: BaseException) -> str:
    """The first line of another library's error message, or the error's class if it has no message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
