"""Several ranks on one machine, started by torchrun, and the environment that describes them."""

import subprocess
import sys

import torch
from conftest import ROOT, flags, weights

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "scripts/train.py"]


def test_two_ranks_train_a_model_with_unused_parameters_as_one_rank_does(
    run_train, settings, model_with_unused_parameters, tmp_path
):
    options = {
        "model": str(model_with_unused_parameters),
        "dropout": 0.0,
        "max_steps": 4,
        "gradient_accumulation_steps": 2,
    }
    run_train(**options, per_device_train_batch_size=4)
    words = {**settings, **options, "per_device_train_batch_size": 2, "run_name": "ranks", "output_dir": tmp_path / "b"}
    done = subprocess.run([*TORCHRUN, *flags(words)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    expected, found = weights(tmp_path / "brain"), weights(tmp_path / "b")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, msg=name)
