"""The seconds before the first step: torch and transformers are imported on one core, and another makes memory ready meanwhile."""

import contextlib
import ctypes
import functools
import gc
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from mori.config import TrainConfig

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_TOUCHED_AT_MOST = 2 << 30  # bytes that are touched in less time than the imports take
# Of NVIDIA, of AMD, and of Windows for its Linux: PyTorch is not here to be asked.
_GPUS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")


@contextlib.contextmanager
def imports(memory: int = 0) -> Iterator[None]:
    """The context in which a script imports what takes seconds: without garbage collection, they take a quarter less.

    Importing makes objects by the hundred thousand, and hardly one of them is garbage. Those that are there afterwards are
    not looked at again (gc.freeze), so that a collection within a training step is short.

    transformers reads its models' 1,600 files twice to list what is in them: what it keeps of the first time is 128 of
    550 folders, the default of `lru_cache`. It keeps all of them here, and half a second.

    Args:
        memory: bytes that the process is going to need in its own memory, see `training_memory`. They are got from the
            system meanwhile, which takes it half a second a gigabyte.
    """
    bounded = functools.lru_cache

    def roomy(maxsize=128, typed=False):
        if getattr(maxsize, "__name__", "") == "create_import_structure_from_path":
            return bounded(None)(maxsize)
        return bounded(maxsize, typed)

    gc.disable()
    functools.lru_cache = roomy
    try:
        with _touched(memory):
            yield
    finally:
        functools.lru_cache = bounded
        gc.freeze()
        gc.enable()


def training_memory(config: TrainConfig) -> int:
    """Bytes that a training on this CPU is sure to need: for each weight itself, its gradient and two moments.

    0 where the model is not in a folder here, a GPU is there to train on, or the optimizer keeps less.
    """
    on_cpu = config.device == "cpu" or config.device == "auto" and not any(map(os.path.exists, _GPUS))
    if not on_cpu or config.dtype != "float32" or config.optim != "adamw_torch_fused":
        return 0
    with contextlib.suppress(OSError, ValueError):  # what is wrong with the folder is told later
        return 4 * sum(path.stat().st_size for path in Path(config.model).glob("*.safetensors"))
    return 0


def keep_freed_memory() -> bool:
    """Let the C library keep what is freed for what is asked for later (mallopt(3)); returns whether it can.

    glibc gives large blocks back to the system, which hands them out again page by page, each filled with zeros: some
    170,000 pages in every step of 124M parameters at 512 tokens on a CPU. With other C libraries nothing happens.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(libc, "mallopt"):
        return False
    return bool(libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, -1))


@contextlib.contextmanager
def _touched(memory: int) -> Iterator[None]:
    """Meanwhile write to so many bytes, and free them for later; to half of what is free at most."""
    if not memory or not keep_freed_memory():
        yield
        return
    memory = min(memory, _TOUCHED_AT_MOST, os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    libc = ctypes.CDLL(None)
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    block = libc.malloc(memory)
    # In one call, for which the thread lets go of the interpreter: for many it would have to wait each time, and so would we.
    touching = threading.Thread(target=ctypes.memset, args=(block, 0, memory if block else 0), daemon=True)
    touching.start()
    try:
        yield
    finally:
        touching.join()
        libc.free(block)
