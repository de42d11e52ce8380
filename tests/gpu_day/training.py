"""Runs as a user starts them: trained, killed, resumed, generated from; the same curve as on a CPU; out of memory; NCCL."""

import json
import subprocess
import sys
import threading
import time

import torch
import torch.distributed as dist

from mori.bench.compare import max_weight_difference
from mori.config import TrainConfig
from mori.distributed import Runtime
from mori.distributed.sharding import weights_of
from mori.model.lm import CausalLMLoss
from mori.train import train
from tests.families import small_model
from tests.gpu_day.common import (
    ROOT,
    Task,
    attempt,
    curve,
    deterministic,
    free_memory,
    largest_gap,
    peak_gib,
    read_json,
    run_script,
    say,
    without_bars,
)
from tests.gpu_day.step import Step, sizes


def train_and_resume(task: Task, model: str, precision: str) -> None:
    """Train the preset or stories260K, kill the run at its first checkpoint, resume it, and generate from its model."""
    flags = ["--device", task.device, "--precision", precision]
    if model == "stories":
        if not task.stories:
            say(skipped="stories260K is not at hand (--stories)")
            return
        flags += ["--model", task.stories, "--learning_rate", 1e-3]
        flags += ["--corpus", task.corpus] if task.corpus and not task.dry else []
    if task.dry:
        flags += ["--max_steps", 12, "--save_steps", 3, "--eval_steps", 6, "--logging_steps", 1, "--block_size", 16]
        flags += ["--max_new_tokens", 5, "--held_out_fraction", 0.01]
    else:
        flags += ["--logging_steps", 5, *([] if (model, precision) == ("mini", "bf16") else ["--max_steps", 120])]

    def folders(name: str) -> list:
        return ["--logging_dir", task.place / name, "--output_dir", task.place / name / "brain", "--run_name", "run"]

    run_dir = task.place / "killed" / "run"
    _kill_at_first_checkpoint(task, [*flags, *folders("killed")], run_dir / "checkpoints")
    again = run_script("train.py", *flags, *folders("killed"), timeout=0.6 * task.limit)
    summary = read_json(run_dir / "summary.json")
    resumed = next((line for line in again.stdout.splitlines() if line.startswith("resumes")), "")
    say(resumed={"ok": again.returncode == 0 and bool(resumed and summary), "code": again.returncode, "line": resumed})
    if not summary:
        return
    losses = {name: (summary["eval"][name] or {}).get("loss") for name in ("before", "best", "after")}
    say(
        run={
            "ok": task.dry or losses["after"] < losses["before"],
            **losses,
            "tokens_per_second": round(summary["tokens_per_second"]),
            "peak_mib": summary["peak_memory_bytes"] >> 20,
            "steps": summary["steps"],
            "skipped": summary["skipped_steps"],
            "wall_seconds": round(summary["wall_seconds"], 1),
        },
        sample=summary["samples"]["after"][:1],
    )
    _generate(task, precision)
    if (model, precision) == ("mini", "bf16"):  # two runs on a GPU, one of them killed: how far apart are they?
        whole = run_script("train.py", *flags, *folders("whole"), timeout=max(1.0, task.left - 2))
        curves = [curve(task.place / name / "run" / "metrics.jsonl") for name in ("killed", "whole")]
        gap = largest_gap(*curves)
        say(resumed_against_whole={"ok": gap is not None and gap < 0.05, "gap": gap, "code": whole.returncode})


def _kill_at_first_checkpoint(task: Task, flags: list, checkpoints) -> None:
    """Start the run, kill it right after its first checkpoint, and report what it said about itself."""
    command = [sys.executable, str(ROOT / "scripts/train.py"), *map(str, flags)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace", "cwd": ROOT}
    process, printed = subprocess.Popen(command, **options), []
    reader = threading.Thread(target=lambda: printed.extend(process.stdout), daemon=True)
    reader.start()
    deadline = time.monotonic() + 0.5 * task.limit
    while process.poll() is None and time.monotonic() < deadline and not list(checkpoints.glob("step-????????")):
        time.sleep(0.01)
    alive = process.poll() is None
    process.kill()
    process.wait()
    reader.join(5)
    text = without_bars("".join(printed))
    print(text[-4000:], flush=True)
    lines = text.splitlines()
    faster = next((line for line in lines if line.startswith("faster")), "")
    saved = sorted(path.name for path in checkpoints.glob("step-????????"))
    say(
        machine=next((line for line in lines if " threads" in line), ""),
        killed={"ok": alive and bool(saved), "checkpoints": saved},
        variants={"ok": "mask-free" in faster and "chunked loss" in faster, "line": faster},
    )


def _generate(task: Task, precision: str) -> None:
    """Generate from the trained model, greedily and sampled; in fp32 the greedy ids must be those of a CPU."""
    model, count = task.place / "killed" / "brain", 8 if task.dry else 60
    prompts = ["--model", model, "--prompt", "Halo semua,", "Menurut saya,", "--max_new_tokens", count, "--json"]

    def answers(device: str, *controls) -> list[dict]:
        done = run_script("generate.py", *prompts, "--device", device, *controls, timeout=60)
        return json.loads(done.stdout.strip().splitlines()[-1]) if done.returncode == 0 else []

    greedy = answers(task.device, "--temperature", 0)
    sampled = answers(task.device, "--top_k", 50, "--top_p", 0.95, "--temperature", 0.9, "--repetition_penalty", 1.2)
    for name, texts in (("greedy", greedy), ("sampled", sampled)):
        say(**{f"generated_{name}": {"ok": len(texts) == 2, "texts": [text["text"][:90] for text in texts]}})
    if precision == "fp32" and greedy:
        on_cpu = answers("cpu", "--temperature", 0)
        same = [ours["new_token_ids"] == theirs["new_token_ids"] for ours, theirs in zip(greedy, on_cpu, strict=False)]
        say(greedy_ids_equal_the_cpus={"ok": len(same) == 2 and all(same), "same": same})


def curves(task: Task) -> None:
    """The losses of 50 steps of the preset, dropout off, against a CPU in fp32: within 1e-3 in fp32, 1 % in bf16."""
    steps, block = (3, 16) if task.dry else (50, 128)
    arms = {
        "cpu": {"device": "cpu", "precision": "fp32", "cpu_matmul": "torch"},
        "fp32": {"precision": "fp32", "tf32": False},
        "bf16": {"precision": "bf16"},
        "fp16": {"precision": "fp16"},  # its first steps are skipped until the loss scale fits
        "tf32": {"precision": "fp32"},  # the last: it changes the precision of all later matmuls
    }
    limits, losses = {"fp32": 1e-3, "bf16": 1e-2}, {}
    for arm, changed in arms.items():

        def gap(arm=arm, changed=changed) -> dict:
            _train(task, arm, **{"max_steps": steps, "block_size": block, "dropout": 0.0, **changed})
            losses[arm] = curve(task.place / arm / "metrics.jsonl")
            largest = largest_gap(losses[arm], losses["cpu"])
            ok = {"ok": largest is not None and largest <= limits[arm]} if arm in limits else {}
            return {**ok, "largest_relative_gap": largest, "steps": len(losses[arm])}

        attempt(f"curve_{arm}", gap)
        free_memory()


def _train(task: Task, name: str, **values) -> dict:
    """Train in this process; the run's folder is `name`, its model is in `<name>-brain`."""
    quiet = {"eval_steps": 1e9, "save_steps": 1e9, "max_new_tokens": 1, "logging_steps": 1, "device": task.device}
    quiet |= {"eval_on_start": False, "held_out_fraction": 1e-9}
    where = {"logging_dir": str(task.place), "run_name": name, "output_dir": str(task.place / f"{name}-brain")}
    return train(TrainConfig(**{**quiet, **where, **values}))


def out_of_memory(task: Task) -> None:
    """A batch that is too large: the step is repeated in halves and ends with the weights of a run with the smaller batch.

    PyTorch's deterministic kernels make the two runs comparable to the bit. A dry run pretends that three windows do not fit.
    """
    deterministic(warn_only=True)
    if task.dry:
        _pretend_that_three_windows_are_too_many()
    shape, _, block = sizes(task, "124m", 0, 1024)
    rows = 8 if task.dry else 768
    with Step(task, shape, 1, block):  # makes the model and the text
        pass
    text = (task.place / shape / "corpus.txt").read_text(encoding="utf-8")
    (task.place / "corpus.txt").write_text(text * (1 if task.dry else 5), encoding="utf-8")
    values = {
        "model": str(task.place / shape / "model"), "corpus": [str(task.place / "corpus.txt")], "block_size": block,
        "precision": "bf16", "max_steps": 2, "torch_compile": False,
    }  # fmt: skip

    def run(name: str, **changed) -> tuple[int, float | None]:
        free_memory()
        _train(task, name, **values, **changed)
        sizes_tried = curve(task.place / name / "metrics.jsonl", "train/micro_batch_size")
        return int(min(sizes_tried.values(), default=0)), peak_gib()

    def halved() -> dict:
        fits, peak = run("large", per_device_train_batch_size=rows)
        return {"ok": 0 < fits < rows, "windows": rows, "fits": fits, "peak_gib": peak}

    found = attempt("halved", halved)
    if not found or not found["fits"]:
        return
    fits = found["fits"]

    def same_weights() -> dict:
        accumulation = {"per_device_train_batch_size": fits, "gradient_accumulation_steps": -(-rows // fits)}
        _, peak = run("small", **accumulation)
        weights = max_weight_difference(task.place / "large-brain", task.place / "small-brain")
        losses = largest_gap(*(curve(task.place / name / "metrics.jsonl") for name in ("large", "small")))
        return {
            "ok": weights == 0.0,
            "largest_weight_difference": weights,
            "largest_loss_gap": losses,
            "peak_gib": peak,
        }

    attempt("same_weights", same_weights)
    if task.left < 0.3 * task.limit:
        return

    def auto_find() -> dict:
        accumulation = {"per_device_train_batch_size": rows // 8, "gradient_accumulation_steps": 8}
        fits_too, _ = run("auto", **accumulation, auto_find_batch_size=True)
        return {"ok": fits_too == fits, "fits": fits_too}

    attempt("auto_find_batch_size", auto_find)


def _pretend_that_three_windows_are_too_many() -> None:
    forward = CausalLMLoss.forward

    def limited(self, input_ids, *rest):
        if self.training and len(input_ids) > 2:
            raise torch.OutOfMemoryError("pretended")
        return forward(self, input_ids, *rest)

    CausalLMLoss.forward = limited


def one_rank(task: Task) -> None:
    """DDP and FSDP2 over NCCL (gloo on a CPU) in a group of one: passes with and without exchange, steps, sums, gathering."""
    device = torch.device("cuda:0" if task.cuda else "cpu")
    started = time.perf_counter()
    store = dist.FileStore(str(task.place / "store"), 1)
    if task.cuda:
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=device)
    else:
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    # It asks nobody how many ranks there are: with 2 it takes the paths of several.
    runtime = Runtime(device, 0, 2, "bf16", dist.new_group(backend="gloo"))
    model = small_model("gpt2", 97).train().to(device)
    module = CausalLMLoss(model, chunked_loss=True)
    module.use_mask_free_attention()
    input_ids = torch.randint(97, (2, 32), device=device)
    nothing = torch.full_like(input_ids, -100)

    def passes() -> dict:
        parallel = runtime.parallel(module, lambda: (input_ids, nothing, torch.tensor(1.0, device=device)))
        for skip in (True, False):
            divisor = runtime.all_sum(torch.tensor(64, device=device)) / runtime.world_size
            with runtime.no_sync(parallel, skip=skip):
                with runtime.autocast():
                    loss = parallel(input_ids, input_ids, divisor)
                loss.backward()
        runtime.barrier()
        gradient = sum(float(parameter.grad.abs().sum()) for parameter in module.parameters())
        flags = [runtime.any(False), runtime.any(True)]
        seconds = round(time.perf_counter() - started, 1)
        return {"ok": gradient > 0 and flags == [False, True], "backend": dist.get_backend(), "seconds": seconds}

    attempt("ddp", passes)

    def gathered() -> dict:
        values = [None]
        dist.all_gather_object(values, {"a": 1})
        return {"ok": values == [{"a": 1}]}

    attempt("gather", gathered)

    def losses(runtime: Runtime) -> list[float]:
        config = TrainConfig(learning_rate=1e-3, max_grad_norm=0.5)
        module = CausalLMLoss(small_model("gpt2", 97).train().to(device), chunked_loss=True)
        module.eval()  # without dropout
        weights = weights_of(module, runtime, "full_shard", None)
        optimizer, seen = weights.build_optimizer(config), []
        for _ in range(5):
            with runtime.autocast():
                loss = module(input_ids, input_ids, torch.tensor(64.0, device=device))
            loss.backward()
            weights.take_gradients(scaled=False)
            weights.clip_grad_norm_(config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            seen.append(float(loss))
        text = weights.call(lambda model: model(input_ids=input_ids).logits.float().sum().item())
        return [*seen, text]

    def sharded() -> dict:
        whole, shared = losses(Runtime(device, 0, 1, "bf16")), losses(Runtime(device, 0, 1, "bf16", sharded=True))
        gap = max(abs(a - b) / abs(a) for a, b in zip(whole[:-1], shared[:-1], strict=True))
        return {"ok": gap < 1e-2, "gap": gap, "losses": shared}

    attempt("fsdp", sharded)
    runtime.close()
