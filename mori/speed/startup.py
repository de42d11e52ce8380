"""Faster imports, threads that soon sleep where they wait, and a C library that keeps the memory that training frees."""

import contextlib
import ctypes
import gc
import os
import sys
from collections.abc import Iterator

_SPINS = "1000"  # at a barrier of OpenMP's threads, before they sleep: microseconds; by default it is milliseconds
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


@contextlib.contextmanager
def imports() -> Iterator[None]:
    """The context in which a script imports torch and transformers, with the garbage collector off.

    Imports create some 100,000 objects that live until the end; they are frozen (`gc.freeze`), so that collections during
    training skip them. GNU's OpenMP reads at its import how long a thread that waits for the others spins
    (https://gcc.gnu.org/onlinedocs/libgomp/GOMP_005fSPINCOUNT.html): on a core that another process wants, that stops both.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def keep_freed_memory() -> bool:
    """Make the C library keep freed memory for later allocations (mallopt(3)); returns whether it can.

    glibc returns large blocks to the system, which zeroes each of their pages when it hands them out again. Other C libraries
    are left alone.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(libc, "mallopt"):
        return False
    return bool(libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, -1))


def return_freed_memory() -> None:
    """Return to the system what was freed so far (malloc_trim(3)): threads that loaded the model keep it, and no step reuses it."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
