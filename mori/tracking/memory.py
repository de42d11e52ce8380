"""Peak memory of a run."""

import contextlib
import sys

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory in use so far: PyTorch's on a CUDA device, else that of the process; 0 where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # On Linux ru_maxrss starts from the parent's peak, VmHWM from 0.
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii", errors="replace") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
