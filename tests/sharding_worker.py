"""Started by torchrun: train as each line of a JSON file says, in one process, and write what rank 0 saw beside it.

Usage: torchrun ... tests/sharding_worker.py RUNS.json. A run is a dict of settings; `LOCAL_WORLD_SIZE` among them is that of the
environment, `overflow_at` a step whose gradient overflows on the last rank alone.
"""

import functools
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import mori.train
from mori.config import TrainConfig
from mori.model.lm import CausalLMLoss

# Inductor would take minutes.
CausalLMLoss.compile_trunk = functools.partialmethod(CausalLMLoss.compile_trunk, backend="aot_eager")
PLACE = Path(sys.argv[1])
real_log, real_forward_backward = mori.train.log, mori.train.forward_backward


def run(settings: dict) -> dict:
    """Losses and gradient norms of the steps, the sizes of what this rank holds, and the summary."""
    os.environ["LOCAL_WORLD_SIZE"] = settings.pop("LOCAL_WORLD_SIZE", os.environ["LOCAL_WORLD_SIZE"])
    overflow_at, seen = settings.pop("overflow_at", None), {"losses": [], "norms": [], "skipped": 0}

    def log(run, state, grad_norm, lr, weights=None):
        losses = run.runtime.all_sum(torch.stack(state.losses)) / run.runtime.world_size
        seen["losses"] += losses.tolist()
        seen["norms"].append(float(grad_norm))
        seen["skipped"], seen["scale"] = int(state.skipped[0]), state.scaler.get_scale()
        moments = [t for s in state.optimizer.state.values() for t in s.values() if t.dim()]
        seen["held"] = [sum(t.nbytes for t in tensors) for tensors in (run.weights.parameters, moments)]
        seen["whole"] = sum(parameter.nbytes for parameter in run.weights.in_model)
        real_log(run, state, grad_norm, lr, weights)

    def forward_backward(run, state, *tensors):
        loss = real_forward_backward(run, state, *tensors)
        if state.step == overflow_at and run.runtime.rank == run.runtime.world_size - 1:
            next(p for p in run.weights.in_model if p.grad is not None).grad.to_local().fill_(float("inf"))
        return loss

    mori.train.log, mori.train.forward_backward = log, forward_backward
    summary = mori.train.train(TrainConfig(**settings))
    return {**seen, "eval": summary["eval"], "samples": summary["samples"], "parameters": summary["parameters"]}


if __name__ == "__main__":
    runs = json.loads(PLACE.read_text())
    results = [run(settings) for settings in runs]
    if os.environ["RANK"] == "0":
        PLACE.with_suffix(".results").write_text(json.dumps(results))
