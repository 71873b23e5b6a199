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


class Preempted(Exception):
    """Work that stopped early and in order: all is saved, and the same command goes on from there."""


class Lost(Exception):
    """Another rank is gone or does not answer; what was saved last is where a rerun goes on.

    `ended`: it ended of itself, having said why, so that a rerun would end alike.
    """

    def __init__(self, text: str, ended: bool) -> None:
        super().__init__(text)
        self.ended = ended


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
