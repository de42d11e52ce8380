"""`python -m tests.shares`: what each of some ranks holds, sends and writes when they share GPT-2 124M (`--fsdp full_shard`).

The weights are random. Bytes are counted in the tensors themselves and at the calls of torch.distributed; the memory of a rank is
the peak of its own process (VmHWM). Seconds are those of ranks that share the cores of one machine: only ratios mean something.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).parent.parent
STEPS = 3


def worker(settings: dict, result: Path) -> None:
    """Train for a few steps on this rank, and write what it held, sent and wrote."""
    import mori.train
    from mori import output
    from mori.config import TrainConfig

    sent, seen = {"gathered": 0, "reduced": 0}, {}
    # torch 2.13 has new names for the collectives of FSDP2.
    names = (
        ("all_gather_single", "reduce_scatter_single")
        if hasattr(dist, "all_gather_single")
        else ("all_gather_into_tensor", "reduce_scatter_tensor")
    )
    real_gather, real_reduce = (getattr(dist, name) for name in names)
    real_step, real_save = mori.train.train_step, output.save

    def gather(output_tensor, input_tensor, **kwargs):
        sent["gathered"] += output_tensor.nbytes - input_tensor.nbytes
        return real_gather(output_tensor, input_tensor, **kwargs)

    def reduce(output, input, **kwargs):
        sent["reduced"] += input.nbytes - output.nbytes
        return real_reduce(output=output, input=input, **kwargs)

    def step(run, state):
        before, began = dict(sent), time.perf_counter()
        result = real_step(run, state)
        moments = [t for values in state.optimizer.state.values() for t in values.values() if t.dim()]
        seen["step_seconds"] = time.perf_counter() - began
        seen["received_bytes"] = {name: sent[name] - before[name] for name in sent}
        seen["bytes"] = {"weights": _bytes(run.weights.parameters), "moments": _bytes(moments)}
        seen["whole_bytes"] = _bytes(run.weights.in_model)
        return result

    def save(run, state):
        began = time.perf_counter()
        real_save(run, state)
        seen["save_seconds"] = time.perf_counter() - began

    for name, counted in zip(names, (gather, reduce), strict=True):
        setattr(dist, name, counted)
    mori.train.train_step, output.save = step, save
    mori.train.train(TrainConfig(**settings))
    [high] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    rank = os.environ.get("RANK", "0")
    result.with_suffix(f".{rank}").write_text(json.dumps({**seen, "peak_bytes": int(high.split()[1]) * 1024}))


def _bytes(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def measure(ranks: int, model: Path, folder: Path) -> list[dict]:
    """What each of `ranks` ranks saw."""
    settings = {
        "model": str(model), "max_steps": STEPS, "save_steps": STEPS, "logging_steps": 1, "eval_strategy": "no", "block_size": 64,
        "per_device_train_batch_size": 8 // ranks, "dropout": 0.0, "max_new_tokens": 1, "precision": "fp32",
        "fsdp": "full_shard", "logging_dir": str(folder / "runs"), "output_dir": str(folder / f"brain-{ranks}"),
        "run_name": str(ranks), "held_out_fraction": 0.0,
    }  # fmt: skip
    place = folder / f"{ranks}.json"
    place.write_text(json.dumps(settings))
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    subprocess.run([sys.executable, *launch, __file__, str(place)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return [json.loads(place.with_suffix(f".{rank}").read_text()) for rank in range(ranks)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--output_dir", default="runs/bench/zen5")
    arguments = parser.parse_args()
    from transformers import AutoModelForCausalLM, GPT2Config

    from mori.bench import harness
    from mori.data.files import SHIPPED
    from mori.model.loading import train_tokenizer

    arms = {}
    with tempfile.TemporaryDirectory() as name:
        model = Path(name) / "gpt2-124m"
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(GPT2Config(bos_token_id=0, eos_token_id=0)).save_pretrained(model)
        train_tokenizer(path.read_text(encoding="utf-8") for path in SHIPPED.glob("*.txt")).save_pretrained(model)
        for ranks in arguments.ranks:
            arms[f"{ranks} ranks"] = {"ranks": measure(ranks, model, Path(name))}
            print(json.dumps(arms[f"{ranks} ranks"]), flush=True)
    report = {
        "bench": "shares", "model": "gpt2-124m", "shape": {"block_size": 64, "windows": 8}, "arms": arms, "ratios": {},
    }  # fmt: skip
    harness.write(arguments.output_dir, "shares", report, ("torch",), threads=1)


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        sys.path.insert(0, str(ROOT))
        worker(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[1]))
    else:
        main()
