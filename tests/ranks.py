"""Several gloo ranks in forked processes, for tests of what they do together."""

import os
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist


def in_ranks(count: int, action: Callable[[int], object]) -> None:
    """Call `action(rank)` in `count` processes that form a group; fails if it raises in one of them."""
    with tempfile.TemporaryDirectory() as folder:
        pids = [_fork(rank, count, action, Path(folder) / "store") for rank in range(count)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert codes == [0] * count, f"the ranks ended with {codes}; see their tracebacks"


def _fork(rank: int, count: int, action: Callable[[int], object], store: Path) -> int:
    if pid := os.fork():
        return pid
    code = 1
    try:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)}
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=timedelta(seconds=60)
        )
        action(rank)
        dist.barrier()
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(code)
