"""Locks on files, which end with the process that holds them."""

import errno
from typing import IO

from mori.cli.errors import optional

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    try:
        import msvcrt
    except ImportError:
        msvcrt = None


def lock(file: IO, lost: str) -> bool:
    """Lock an open file until it is closed; False, and a note of what is `lost`, if the file system has no locks.

    Raises BlockingIOError if another process holds the lock.
    """
    with optional("flock", lost):
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        elif msvcrt:
            try:
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            except OSError as error:
                raise BlockingIOError(errno.EAGAIN, "another process has locked the file") from error
        else:
            raise OSError(errno.ENOSYS, "this system has no locks")
        return True
    return False
