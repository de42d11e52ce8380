"""The simulated GPU runs the tests that need one."""

import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

needs_cuda_libraries = pytest.mark.skipif(
    torch.version.cuda is None
    or not hasattr(torch._C, "_ensureCUDADeviceGuardSet")
    or torch.cuda.is_available()
    or not shutil.which("c++"),
    reason="simulating a GPU takes a recent PyTorch with CUDA libraries, a C++ compiler, and no GPU",
)


@needs_cuda_libraries
def test_simulated_gpu_trains_and_decodes():
    selected = "(host_sync and (bf16 or decoding)) or (resumes and fp16)"
    command = [sys.executable, "-m", "tests.sim", "tests/test_gpu.py", "-k", selected]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "5 passed" in done.stdout and "skipped" not in done.stdout
