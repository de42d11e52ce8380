"""Decoding on a GPU: the tests of the suite that need one, CUDA graphs by family, their cost for each text, speed."""

import contextlib
import importlib.util
import re
import subprocess
import sys
import time

import torch
from torch._dynamo.utils import counters
from transformers import AutoConfig, AutoModelForCausalLM

from mori.bench import decode as bench
from mori.bench import harness
from mori.bench.options import SHAPES, DecodeBenchConfig
from mori.generation import replaying_reader
from mori.speed.fused import fuse_activations
from tests.families import CAPTURED, expected, greedy, prompts_of, small_model
from tests.gpu_day.common import ROOT, Task, attempt, keep_report, read_json, say, synchronize


def suite(task: Task) -> None:
    """The tests of the suite that need a GPU, if pytest is installed."""
    if importlib.util.find_spec("pytest") is None:
        say(tests={"ok": True, "absent": "pytest is not installed: the tests that need a GPU did not run"})
        return
    files = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if "needs_a_gpu" in path.read_text("utf-8")]
    options = ["-n", "4"] if importlib.util.find_spec("xdist") and not task.dry else []
    pick = "host_sync" if task.dry else "on_a_gpu"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options, "-k", pick, *map(str, files)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace", timeout=task.left - 3)
    print(done.stdout[-20_000:], done.stderr[-3000:])
    failed = re.findall(r"^(?:FAILED|ERROR) (.*)", done.stdout, re.M)
    passed = re.findall(r"(\d+) passed", done.stdout)
    ok = done.returncode == 0
    say(tests={"ok": ok, "passed": passed and int(passed[0]), "code": done.returncode, "failed": failed[:40]})


@contextlib.contextmanager
def _captures():
    """The seconds of every capture of a graph inside this context."""
    graph, seconds = replaying_reader.Graph, []

    def timed(*arguments, **options):
        synchronize()
        started = time.perf_counter()
        captured = graph(*arguments, **options)
        synchronize()
        seconds.append(time.perf_counter() - started)
        return captured

    replaying_reader.Graph = timed
    try:
        yield seconds
    finally:
        replaying_reader.Graph = graph


def graphs(task: Task) -> None:
    """Families whose step is captured, and some others: greedy ids equal `generate()`'s, and a graph was captured."""
    families = sorted(CAPTURED) + ["gptj", "mistral", "phi3", "mamba", "mixtral"]
    torch.backends.cuda.enable_cudnn_sdp(False)  # as `generate` of mori does
    for family in dict.fromkeys(families[:2] if task.dry else families):
        attempt(family, _decode_family, task, family, torch.float32)
    for family in ("gpt2", "llama"):
        attempt(f"{family} bf16", _decode_family, task, family, torch.bfloat16)


def _decode_family(task: Task, family: str, dtype: torch.dtype) -> dict:
    model = small_model(family, 97).eval().to(task.device, dtype)
    model.generation_config.eos_token_id = None
    model.config.output_router_logits = False
    same = []
    with _captures() as captures:
        for lengths, count in (((9,), 40), ((3, 9, 6), 30)):
            prompts = prompts_of(*lengths)
            same.append(greedy(model, prompts, count, steps_at_once=8) == expected(model, prompts, count))
    must_be_captured = family in CAPTURED and task.cuda
    must_be_equal = dtype == torch.float32  # in bf16 logits are often equal
    ok = (all(same) or not must_be_equal) and (bool(captures) or not must_be_captured)
    return {"ok": ok, "same": same, "captures": len(captures)}


def graph_cost(task: Task) -> None:
    """What each text pays before its steps are replayed: milliseconds of a text of 20 tokens, of one more token, of a capture."""
    torch.backends.cuda.enable_cudnn_sdp(False)  # as `generate` of mori does
    for shape in ("small",) if task.dry else ("small", "124m"):
        for dtype in ("float32", "bfloat16"):
            attempt(f"{shape} {dtype}", _text_costs, task, shape, dtype)


def _text_costs(task: Task, shape: str, dtype: str) -> dict:
    short, long, texts = (4, 8, 2) if task.dry else (20, 100, 6)
    config = AutoConfig.for_model(**SHAPES[shape], max_position_embeddings=1024, bos_token_id=0, eos_token_id=None)
    model = AutoModelForCausalLM.from_config(config).eval().to(task.device, getattr(torch, dtype))
    fuse_activations(model)
    [prompt] = prompts_of(16)
    seconds: dict[int, list[float]] = {short: [], long: []}
    with _captures() as captures:
        for _ in range(texts):
            for count, times in seconds.items():
                synchronize()
                started = time.perf_counter()
                greedy(model, [prompt], count, steps_at_once=8)
                synchronize()
                times.append(time.perf_counter() - started)
    first, short_text, long_text = seconds[short][0], min(seconds[short][1:]), min(seconds[long][1:])
    token = (long_text - short_text) / (long - short)
    return {
        "first_text_ms": round(1e3 * first, 2),
        "text_ms": round(1e3 * short_text, 2),
        "token_ms": round(1e3 * token, 3),
        "before_replaying_ms": round(1e3 * (short_text - short * token), 2),
        "capture_ms": round(1e3 * min(captures), 2) if captures else None,
        "captures_per_text": len(captures) / (2 * texts),
    }


def speed(task: Task, arms: str, dtypes: str, batches: tuple[int, ...] = (1,)) -> None:
    """Tokens per second of `mori` and of `generate()`, in one process; the ids of the greedy arms must be equal in fp32."""
    shape, count, rounds = ("small", 12, 1) if task.dry else ("124m", 128, 3)
    for dtype in dtypes.split(","):
        for batch in batches[:1] if task.dry else batches:
            config = DecodeBenchConfig(
                shape=shape, dtype=dtype, batch_size=batch, new_tokens=count, rounds=rounds, device=task.device
            )
            _one_setting(task, config, arms.split(","))


def _one_setting(task: Task, config: DecodeBenchConfig, arms: list[str]) -> None:
    results: dict[str, list[dict]] = {}
    name = f"{config.dtype} batch {config.batch_size}"
    rates: dict[str, int] = {}
    for arm in arms:
        if arm == "contexts" and (config.batch_size > 1 or task.dry):
            continue

        def measured(arm=arm) -> dict:
            config.arm = arm
            counters.clear()
            result = bench.measure_arm(config)
            if arm == "contexts":
                result["at"] = {str(length): seconds for length, seconds in result["at"].items()}
                figures = {"ms_at": {length: round(1e3 * seconds, 3) for length, seconds in result["at"].items()}}
            else:
                rates[arm] = round(config.batch_size * config.new_tokens / result["seconds"])
                figures = {"tokens_per_second": rates[arm]}
            if arm == "generate-compiled":
                graphs = counters["stats"].get("unique_graphs", 0)
                figures |= {"ok": graphs > 0 or not task.cuda, "compiled_graphs": graphs}
            results[arm] = [result]
            return figures

        attempt(f"{name} {arm}", measured)
        say(**{name: rates})
    ids = {arm: runs[0]["ids"] for arm, runs in results.items() if arm in ("mori-greedy", "generate-greedy")}
    if len(ids) == 2:
        same = ids["mori-greedy"] == ids["generate-greedy"]
        say(**{f"{name} ids": {"ok": same or config.dtype != "float32", "same": same}})
    if "mori-greedy" in results:
        attempt(f"{name} report", _keep_report, task, config, results)


def _keep_report(task: Task, config: DecodeBenchConfig, results: dict[str, list[dict]]) -> str:
    name = f"decode-{config.shape}-batch{config.batch_size}-{config.dtype}-{task.device}"
    name += "-compiled" if "generate-compiled" in results else ""
    device = torch.device(task.device, 0) if task.cuda else torch.device("cpu")
    harness.write(str(task.place), name, bench.report(config, results), device=device)
    keep_report(task, name, read_json(task.place / f"{name}.json"))
    return name
