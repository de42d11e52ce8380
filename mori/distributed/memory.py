"""What to do when memory runs out."""

import gc
import re

import torch

from mori.cli import RunFailed

# PyTorch has no error types for a host without memory, nor for cuBLAS, whose handles are memory too.
_OUT_OF_MEMORY = re.compile(
    "can't allocate memory|out of memory|CUBLAS_STATUS_ALLOC_FAILED|CUBLAS_STATUS_NOT_INITIALIZED"
)


class BatchSize:
    """The number of windows in one forward pass, and the context of that pass: `with batch_size: ...`

    If memory runs out inside the context, it ends there, `size` is halved and `halved` is true: the caller tries again.
    Raises RunFailed if not even one window fits.
    """

    def __init__(self, size: int):
        self.size, self.halved = size, False

    def __enter__(self) -> None:
        if self.halved:
            gc.collect()  # reference cycles keep tensors of the failed attempt
            torch.cuda.empty_cache()  # libraries allocate outside PyTorch's cache
        self.halved = False

    def __exit__(self, error_type, error, traceback) -> bool:
        if error is None or not out_of_memory(error):
            return False
        if self.size == 1:
            raise RunFailed(
                "not even one window fits in memory; use a smaller --block_size or --model, or --precision bf16"
            ) from None
        self.size, self.halved = -(-self.size // 2), True
        return True


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` reports that the device or the host ran out of memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))
