"""The imports before the first step."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, flags, run_script


def test_imports_context_freezes_objects_and_restores_the_collector():
    code = (
        "import gc\n"
        "from mori.speed.startup import imports\n"
        "try:\n"
        "    with imports():\n"
        "        assert not gc.isenabled()\n"
        "        raise ImportError\n"
        "except ImportError: pass\n"
        "assert gc.isenabled() and gc.get_freeze_count() > 1000"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch uses GNU's OpenMP on Linux")
@pytest.mark.parametrize(
    "settings, spins", [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, "0")]
)
def test_imports_context_lets_waiting_threads_sleep_soon_unless_the_user_decides(settings, spins):
    code = "from mori.speed.startup import imports\nwith imports(): import torch"
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    environment |= {"OMP_DISPLAY_ENV": "verbose", **settings}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("this PyTorch has another OpenMP library")
    assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr


def test_train_imports_nothing_before_the_first_step_that_it_needs_later(settings):
    code = (
        "import json, sys\n"
        "from mori.train import TrainConfig, train\n"
        "config = TrainConfig(**json.loads(sys.argv[1]))\n"
        "unneeded = {'tensorboard', 'datasets', 'matplotlib', 'bitsandbytes', 'torch._inductor.compile_fx'}\n"
        "train(config, on_step=lambda step, _: print(step, sorted(unneeded & set(sys.modules))))"
    )
    changed = {"eval_on_start": False, "max_steps": 2, "logging_steps": 2}
    words = [sys.executable, "-c", code, json.dumps({**settings, **changed})]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert "\n1 []\n" in done.stdout, done.stderr
    assert "\n2 ['tensorboard']\n" in done.stdout


def test_train_prints_nothing_of_transformers(text_file, tmp_path):
    """Neither its warnings nor its progress bars stand between our lines."""
    words = {"corpus": [str(text_file)], "block_size": 16, "max_steps": 2, "max_new_tokens": 2, "save_steps": 1}
    words |= {"logging_dir": str(tmp_path / "runs"), "output_dir": str(tmp_path / "brain")}
    done = run_script("train.py", *flags(words))
    assert done.returncode == 0, done.stderr
    assert "transformers]" not in done.stderr and "shards" not in done.stderr
