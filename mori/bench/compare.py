"""Runs the same training with `mori` and with `transformers.Trainer`, and compares their numbers, speed and memory.

Every arm runs in a new process, see `mori.bench.arms`.
"""

import dataclasses
import itertools
import json
import math
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from statistics import median

import torch
from safetensors import safe_open

from mori import distributed
from mori.bench import harness, report
from mori.bench.options import CompareConfig
from mori.checkpoint.files import set_aside
from mori.checkpoint.run_folder import check_writable
from mori.cli import RunFailed, checked
from mori.model import loading, saving
from mori.prepare import Prepared, prepare
from mori.tracking.loggers import read_metrics
from mori.tracking.overview import environment

_WARM_UP_STEPS = 3  # the first steps, which the speed leaves out
_COMPARED = ("loss", "grad_norm", "learning_rate")


def compare(config: CompareConfig) -> dict:
    """Run every arm `repeats` times, in turn; write `compare.json`, `report.md` and `curves.png`; return the first.

    If an arm fails, its `error` has the reason and the other arms are still compared. Raises UserError for invalid
    input before any arm starts, RunFailed if every arm fails.
    """
    config = checked(config).resolve()
    for arm in config.arms:
        if not arm.startswith("mori"):
            harness.require("accelerate", arm)
    folder = Path(config.logging_dir).resolve() / f"compare-{config.run_name}"
    check_writable(folder, folder / "initial")
    runtime = distributed.start(config.device, config.precision)
    config = dataclasses.replace(config, device=distributed.for_children(runtime.device))
    distributed.set_seed(config.seed)
    prepared = prepare(config, runtime)
    config = dataclasses.replace(config, precision=runtime.precision)  # every arm computes in the same
    set_aside(folder)
    parameters = _save_initial_model(config, prepared, folder / "initial")
    threads = int(os.environ.get("OMP_NUM_THREADS", 0)) or torch.get_num_threads()
    results = _run_arms(config, folder, threads)
    comparison = {
        "name": config.run_name,
        "model": {"name": config.model, "parameters": parameters},
        "ledger": asdict(prepared.ledger),
        "config": asdict(config),
        "environment": environment(runtime.device, runtime.precision, runtime.world_size) | {"threads": threads},
        "arms": {arm: _summary(runs) for arm, runs in results.items()},
        "pairs": {
            f"{a}|{b}": compare_arms(results[a], results[b], runtime.precision)
            for a, b in itertools.combinations(config.arms, 2)
            if not results[a][0]["error"] and not results[b][0]["error"]
        },
    }
    (folder / "compare.json").write_text(json.dumps(comparison, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    report.write(folder, comparison, {arm: read_metrics(folder / arm / "metrics.jsonl") for arm in config.arms})
    print(f"report: {folder / 'report.md'}; curves: tensorboard --logdir {config.logging_dir}")
    if all(runs[0]["error"] for runs in results.values()):
        raise RunFailed(f"every arm failed; the reasons are in {folder / 'report.md'}")
    return comparison


def _save_initial_model(config: CompareConfig, prepared: Prepared, folder: Path) -> int:
    """Save the weights that every arm starts from; return the number of parameters."""
    model = loading.load_model(config.model, prepared.model_config, config.trust_remote_code)
    saving.save(model, prepared.tokenizer, folder)
    return sum(parameter.numel() for parameter in model.parameters())


def _run_arms(config: CompareConfig, folder: Path, threads: int) -> dict[str, list[dict]]:
    """The results of each arm, one for each repeat; an arm that failed is not repeated."""
    results: dict[str, list[dict]] = {arm: [] for arm in config.arms}
    for repeat, arm in itertools.product(range(config.repeats), config.arms):
        if results[arm] and results[arm][-1]["error"]:
            continue
        print(f"[{repeat + 1}/{config.repeats}] {arm} ...", end=" ", flush=True)
        result = _run_arm(arm, config, folder, repeat, threads)
        results[arm].append(result)
        if result["error"]:
            print(result["error"])
        else:
            loss = result["held_out"]["after"]["loss"]
            print(f"{_tokens_per_second(result):.0f} tokens/s, held-out loss {loss:.6f}")
    return results


def _run_arm(arm: str, config: CompareConfig, folder: Path, repeat: int, threads: int) -> dict:
    """Run an arm in a new process; its result, or the reason of its failure in `error`."""
    # TensorBoard shows the first repeat of each arm; only the figures of the others are kept.
    arm_folder = folder / arm if repeat == 0 else folder / ".repeats" / f"{arm}-{repeat}"
    arm_folder.mkdir(parents=True)
    log = arm_folder / "output.txt"
    try:
        result = harness.run_arm(
            arm,
            config.arm_config(model=str(folder / "initial"), dropout=None),
            arm_folder,
            threads=threads,
            warm_up_steps=_WARM_UP_STEPS,
            log=log,
            TOKENIZERS_PARALLELISM="false",
        )
    except RunFailed as failure:
        return {"error": f"{failure} (see {log})"}
    if repeat:
        shutil.rmtree(arm_folder)
    return {**result, "model": arm_folder / "model", "error": None}


def _summary(runs: list[dict]) -> dict:
    """An arm's entry in `compare.json`, over its repeats."""
    first = runs[0]
    if first["error"]:
        return {"error": first["error"]}
    runs = [run for run in runs if not run["error"]]
    return {
        "error": None,
        **{name: first[name] for name in ("held_out", "steps", "tokens_trained", "targets")},
        "tokens_per_second": harness.spread([_tokens_per_second(run) for run in runs]),
        "first_step_seconds": harness.spread([run["first_step_seconds"] for run in runs]),
        "peak_memory_bytes": median(run["peak_memory_bytes"] for run in runs),
        "settings": first["settings"],
    }


def compare_arms(a: list[dict], b: list[dict], precision: str) -> dict:
    """Compare two arms, given the results of their repeats.

    The differences are those of the first repeats, None if the arms logged different steps; a ratio (a / b) is the
    spread over the repeats.
    """
    lines_a, lines_b = ({line["step"]: line for line in runs[0]["metrics"]} for runs in (a, b))
    same_steps = lines_a.keys() == lines_b.keys()
    steps = list(lines_a) if same_steps else []
    pair: dict = {"steps": len(steps) if same_steps else None}
    for name in _COMPARED:
        differences = [abs(lines_a[step][name] - lines_b[step][name]) for step in steps]
        pair[f"max_abs_{name}_diff"] = _largest(differences)
    pair["max_abs_weight_diff"] = max_weight_difference(a[0]["model"], b[0]["model"])
    relative = [
        abs(lines_a[step]["loss"] - lines_b[step]["loss"]) / max(abs(lines_b[step]["loss"]), 1e-12) for step in steps
    ]
    pair["max_relative_loss_diff"] = _largest(relative)
    pair["timing_valid"] = same_steps and all(r <= harness.LOSS_TOLERANCE[precision] for r in relative)
    complete = [(x, y) for x, y in zip(a, b, strict=False) if not x["error"] and not y["error"]]
    for name, figure in (
        ("speed_ratio", _tokens_per_second),
        ("first_step_ratio", lambda run: run["first_step_seconds"]),
        ("memory_ratio", lambda run: run["peak_memory_bytes"]),
    ):
        pair[name] = harness.ratio([figure(x) for x, _ in complete], [figure(y) for _, y in complete])
    return pair


def _largest(values: list[float]) -> float | None:
    """The maximum, NaN if one of the values is NaN, None without values."""
    return max(values, key=lambda value: math.inf if math.isnan(value) else value, default=None)


def max_weight_difference(a: Path, b: Path) -> float | None:
    """The largest absolute difference between the weights of two model folders; None if their tensors do not match."""
    largest = 0.0
    names = sorted(path.name for path in a.glob("*.safetensors"))
    if names != sorted(path.name for path in b.glob("*.safetensors")):
        return None
    for name in names:
        with safe_open(a / name, "pt") as file_a, safe_open(b / name, "pt") as file_b:
            if set(file_a.keys()) != set(file_b.keys()):
                return None
            for key in file_a.keys():  # noqa: SIM118 (not a dict)
                difference = (file_a.get_tensor(key) - file_b.get_tensor(key)).abs()
                if difference.numel():
                    largest = max(largest, math.inf if difference.isnan().any() else difference.max().item())
    return largest


def _tokens_per_second(run: dict) -> float:
    """Targets per second from the end of the warm-up steps (in a very short run, of the first step) to the last step."""
    seconds, targets = run["seconds_after_step"], run["targets_after_step"]
    first = min(_WARM_UP_STEPS, len(seconds) - 1) - 1
    if first < 0:
        return targets[-1] / seconds[-1]
    return (targets[-1] - targets[first]) / (seconds[-1] - seconds[first])
