"""Errors that a user can fix, as opposed to bugs."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager


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
    errno.ELOOP, errno.ESTALE, errno.EBUSY, errno.ETXTBSY, errno.ENOTEMPTY,
    # Of network file systems, and of those that lack an operation.
    errno.ETIMEDOUT, errno.EREMOTEIO, errno.ENOTCONN, errno.ESHUTDOWN, errno.EHOSTDOWN, errno.EHOSTUNREACH,
    errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.ENOLCK, errno.ENODEV, errno.ENXIO,
    errno.EUCLEAN, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS,
}  # fmt: skip


def os_problem(error: OSError) -> str:
    """One line on a full disk, a missing permission and the like. Re-raises any other error."""
    if error.errno not in _USER_ERRNOS:
        raise error
    return f"{error.filename or 'file system'}: {error.strerror}"


@contextmanager
def fixable() -> Iterator[None]:
    """In the block, an OSError whose cause lies outside this program is a ConfigError."""
    try:
        yield
    except OSError as error:
        raise ConfigError(os_problem(error)) from error


# Control characters, marks that reverse the direction of text, and bytes of names that are not UTF-8.
UNPRINTABLE = re.compile(
    r"[\x00-\x08\n-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    """A line of text that steers neither a terminal nor a page: what could is written as an escape."""
    return UNPRINTABLE.sub(lambda match: _escape(ord(match[0])), text)


def _escape(code: int) -> str:
    byte = 0xDC80 <= code <= 0xDCFF  # how Python keeps a byte that is not UTF-8
    return f"\\x{code & 0xFF:02x}" if byte or code < 0x100 else f"\\u{code:04x}"


def reason(error: BaseException) -> str:
    """The first line of another library's error message, or the error's class if it has no message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
