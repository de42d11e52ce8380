"""`python -m tests.adapters`: full training, frozen layers, LoRA and QLoRA of one model on one corpus, side by side.

Two parts, because held-out loss does not depend on a machine's load and times do: `--steps` trains each way once; `--repeats`
measures seconds a step and peak memory in short runs that take turns. Either may be 0; the JSON file keeps what the other wrote.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from mori.bench import harness

ROOT = Path(__file__).parent.parent
LORA = ["--use_peft", "--no-save_merged", "--lora_r"]
WAYS = {
    "full": [],
    "last 4 layers": ["--freeze_trainable_layers", "4"],
    "LoRA r 8": [*LORA, "8", "--lora_alpha", "16"],
    "LoRA r 64": [*LORA, "64", "--lora_alpha", "128"],
    "LoRA r 8 with dropout": [*LORA, "8", "--lora_alpha", "16", "--lora_dropout", "0.05"],
    "QLoRA r 8": [*LORA, "8", "--lora_alpha", "16", "--load_in_4bit"],
}
TIMED_STEPS = 12


def train(model: str, corpus: str, way: str, *options: str) -> dict:
    """A training run in a new process: its summary, and the size of its last checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "scripts/train.py", "--model", model, "--corpus", corpus, *WAYS[way], *options,
            "--logging_dir", folder, "--run_name", "run", "--output_dir", f"{folder}/model",
        ]  # fmt: skip
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
        summary = json.loads(Path(folder, "run/summary.json").read_text())
        checkpoints = Path(folder, "run/checkpoints")
        summary["checkpoint_bytes"] = sum(file.stat().st_size for file in checkpoints.rglob("*") if file.is_file())
        lines = Path(folder, "run/metrics.jsonl").read_text().splitlines()
        speeds = [line["perf/tokens_per_second"] for line in map(json.loads, lines) if "perf/tokens_per_second" in line]
        summary["step_seconds"] = [512 / speed for speed in speeds]
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output_dir", default="runs/bench/zen5")
    arguments = parser.parse_args()
    path = Path(arguments.output_dir, "adapters.json")
    ways = json.loads(path.read_text())["arms"] if path.exists() else {way: {} for way in WAYS}
    for way in WAYS if arguments.steps else ():
        steps = str(arguments.steps)
        options = ["--max_steps", steps, "--eval_steps", steps, "--save_steps", steps, "--no-eval_on_start"]
        summary = train(arguments.model, arguments.corpus, way, *options, "--max_new_tokens", "20")
        ways[way] |= {
            "steps": arguments.steps,
            "bits_per_byte": summary["eval"]["after"]["bits_per_byte"],
            "checkpoint_megabytes": summary["checkpoint_bytes"] / 1e6,
        }
        print(way, ways[way], flush=True)
    times = {way: [] for way in WAYS}
    memory = {way: [] for way in WAYS}
    for _ in range(arguments.repeats):
        for way in WAYS:
            options = ["--max_steps", str(TIMED_STEPS), "--logging_steps", "1", "--save_strategy", "no"]
            summary = train(arguments.model, arguments.corpus, way, *options, "--eval_strategy", "no")
            times[way].append(statistics.median(summary["step_seconds"][3:]))
            memory[way].append(summary["peak_memory_bytes"])
            ways[way] |= {"step_seconds": times[way], "peak_memory_bytes": memory[way]}
            print(way, times[way][-1], memory[way][-1], flush=True)
    ratios = {}
    for way in list(WAYS)[1:] if "step_seconds" in ways["full"] else ():
        ratios[f"full / {way}"] = harness.ratio(ways["full"]["step_seconds"], ways[way]["step_seconds"])
        memory = (ways[each]["peak_memory_bytes"] for each in (way, "full"))
        ratios[f"memory of {way} / full"] = harness.ratio(*memory)
    report = {"bench": "adapters", "model": Path(arguments.model).name, "arms": ways, "ratios": ratios}
    harness.write(arguments.output_dir, "adapters", report, ("transformers",), threads=len(os.sched_getaffinity(0)))


if __name__ == "__main__":
    main()
