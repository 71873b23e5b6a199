"""What a user can fix, told apart from what is a bug."""

from __future__ import annotations

import errno


class ConfigError(ValueError):
    """Something the user can fix. The door prints `problems`, one a line, and exits 2.

    `shared` is True where every rank raises the same, so that one of them need speak.
    """

    def __init__(self, *problems: str, shared: bool = False) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems
        self.shared = shared


# What an operating system refuses for reasons outside this program.
_USER_ERRNOS = {
    getattr(errno, name)
    for name in (
        "ENOSPC EDQUOT EACCES EPERM EROFS ENOENT ENOTDIR EISDIR EEXIST ENAMETOOLONG EIO EFBIG "
        "EMFILE ENFILE ELOOP ESTALE EBUSY ETXTBSY"
    ).split()
    if hasattr(errno, name)
}


def os_problem(error: OSError) -> str:
    """One line for a full disk, a missing permission and the like; re-raises what is none of these."""
    if error.errno not in _USER_ERRNOS:
        raise error
    return f"{error.filename or 'file system'}: {error.strerror}"


def reason(error: BaseException) -> str:
    """The first line of what another library's error says, or its kind if it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
