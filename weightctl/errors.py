"""The tree of errors: what went wrong, what to do about it, and the exit code it ends in."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import ClassVar


class WeightctlError(Exception):
    """Something failed that a user can meet. `message` says what was wrong, `hint` what to do."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if hint and sys.version_info >= (3, 11):
            self.add_note(f"hint: {hint}")  # below the traceback of whoever calls this from Python


class UsageError(WeightctlError):
    """The command line, an argument or the configuration asks for something that cannot be."""

    exit_code = 2


class NotInstalledError(UsageError):
    """A command needs a package that is not installed; the hint names the extra that brings it."""

    def __init__(self, what: str, missing: str, extra: str) -> None:
        super().__init__(f"{what} needs {missing}, which is not installed", f"pip install 'weightctl[{extra}]'")


class IntegrityError(WeightctlError):
    """Bytes are not what they should be: a wrong hash, a header that lies, a file that changed while it was read."""

    exit_code = 3


_HINTS = {
    errno.ENOSPC: "free some space there, or choose another destination",
    errno.EDQUOT: "the quota there is used up: free some of it, or choose another destination",
    errno.EROFS: "it is mounted read-only: choose another destination",
    errno.EACCES: "check its owner and its permissions",
    errno.EPERM: "check its owner and its permissions",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path: a part of it is a file",
    errno.EISDIR: "it is a directory: name a file",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "check the links in that path, and remove the one that does not belong there",
    errno.EIO: "the device reports an input/output error: check its health, then try again",
    errno.ESTALE: "the mount went away: mount it again, then run this again",
    errno.ENOTCONN: "the mount went away: mount it again, then run this again",
}


@contextlib.contextmanager
def translated_os_errors(doing: str) -> Iterator[None]:
    """Turn an `OSError` in the block into a `WeightctlError` that says what was being done, to which file, and why."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        name = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else None
        where = f" ({name})" if name and name not in doing else ""
        raise WeightctlError(f"cannot {doing}: {reason}{where}", _HINTS.get(error.errno or 0)) from error
