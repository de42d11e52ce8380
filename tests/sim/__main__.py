"""`python -m tests.sim [arguments of pytest]`: the tests that need a GPU, on a simulated one.

It needs PyTorch with CUDA libraries, a C++ compiler, and no GPU. Without arguments it runs every test whose name has `on_a_gpu`.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def main(arguments: list[str]) -> int:
    """Compile the library that hides the missing driver, and run pytest with it; returns pytest's exit code."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "no_accelerator.so"
        source = Path(__file__).with_name("no_accelerator.cpp")
        subprocess.run(["c++", "-shared", "-fPIC", "-std=c++17", "-o", library, source], check=True)
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        selected = arguments or ["-k", "on_a_gpu", "tests"]
        command = [sys.executable, "-m", "pytest", "-p", "tests.sim.plugin", *selected]
        return subprocess.run(command, cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
