"""`scripts/bench.py decode`: text generation with random weights, by `mori` and by `generate()`."""

import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mori import distributed
from mori.bench import harness
from mori.bench.options import DECODE_ARMS, SHAPES, DecodeBenchConfig
from mori.cli import RunFailed
from mori.config import SamplingConfig
from mori.data.files import SHIPPED
from mori.distributed import Runtime
from mori.generation.decode import decode as decode_ids
from mori.generation.sampler import Sampler
from mori.model import loading, saving
from mori.speed.fused import fuse_activations
from mori.speed.startup import keep_freed_memory

PROMPT_TOKENS = 16
RECIPE = {"top_k": 50, "top_p": 0.95, "temperature": 0.9}
CONTEXTS = (100, 1000)
# The usual script, to compare with scripts/generate.py.
GENERATE_PROGRAM = """
import sys; from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer, model = AutoTokenizer.from_pretrained(sys.argv[1]), AutoModelForCausalLM.from_pretrained(sys.argv[1])
model, inputs = model.to(sys.argv[4]), tokenizer(sys.argv[2], return_tensors="pt").to(sys.argv[4])
out = model.generate(**inputs, do_sample=False, max_new_tokens=int(sys.argv[3]), pad_token_id=0)
print(out[0, inputs["input_ids"].shape[1]:].tolist())
"""
# Numerator and denominator of each ratio; the first two pairs must generate the same ids.
_SAME_IDS = (("generate-greedy", "mori-greedy"), ("generate-process", "mori-process"))
_PAIRS = (
    *_SAME_IDS,
    ("generate-sampled", "mori-sampled"),
    ("context-1000", "context-100"),
    ("generate-compiled", "mori-greedy"),
)


def decode(config: DecodeBenchConfig) -> None:
    """`scripts/bench.py decode`: `mori` and `generate()`, per generation, per process, and at the end of a long context.

    Raises RunFailed if the two greedy arms (except in bf16 on a GPU), the two processes, or two repeats of an arm
    generate different ids; sampled arms draw other random numbers and must generate as many. A GPU adds `generate()` with a
    compiled static cache, whose ids may differ if two logits are nearly equal. The share of the bandwidth counts the
    weights, which are read for every token.
    """
    if config.arm:
        print(json.dumps(measure_arm(config)))
        return
    harness.check_writable(config.output_dir)
    device = distributed.start(config.device).device
    config = replace(config, device=distributed.for_children(device))
    results, ids = _run_arms(config, device)
    # In bf16 logits are often equal, and a GPU's kernels for different shapes round them to either side.
    exact = device.type == "cpu" or config.dtype == "float32"
    for a, b in _SAME_IDS if exact else ():
        if a in ids and ids[a] != ids[b]:
            raise RunFailed(f"{a} and {b} generated different ids: the timing is void")
    name = f"decode-{config.shape}-batch{config.batch_size}"
    name += "" if device.type == "cpu" else f"-{config.dtype}-{device.type}"
    harness.write(config.output_dir, name, report(config, results), device=device, threads=config.threads)


def report(config: DecodeBenchConfig, results: dict[str, list[dict]]) -> dict:
    """The report of the benchmark; `results` has what `measure_arm` returned in each repeat of an arm."""
    seconds = {arm: [repeat["seconds"] for repeat in repeats] for arm, repeats in results.items()}
    for length in CONTEXTS if "contexts" in results else ():
        seconds[f"context-{length}"] = [repeat["at"][str(length)] for repeat in results["contexts"]]
    seconds.pop("contexts", None)
    return {
        "bench": "decode",
        "model": f"random weights, {config.shape}",
        "shape": {
            **SHAPES[config.shape],
            "dtype": config.dtype,
            "batch_size": config.batch_size,
            "prompt": PROMPT_TOKENS,
            "new_tokens": config.new_tokens,
        },
        "sampled": RECIPE,
        "arms": {arm: {"seconds": values, **harness.spread(values)} for arm, values in seconds.items()},
        "copy_bytes_per_second": [repeat["copy_bytes_per_second"] for repeat in results["mori-greedy"]],
        "share_of_copy_bandwidth": [
            config.new_tokens * repeat["weight_bytes"] / repeat["seconds"] / repeat["copy_bytes_per_second"]
            for repeat in results["mori-greedy"]
        ],
        "ratios": {f"{a} / {b}": harness.ratio(seconds[a], seconds[b]) for a, b in _PAIRS if a in seconds},
    }


def _run_arms(config: DecodeBenchConfig, device: torch.device) -> tuple[dict[str, list[dict]], dict[str, list]]:
    """The results of every repeat, and the ids of each arm. Raises RunFailed if a repeat generates other ids."""
    arms = list(DECODE_ARMS[:4])
    arms += ["generate-compiled"] if device.type == "cuda" else []
    arms += ["contexts"] if config.batch_size == 1 else []
    arms += DECODE_ARMS[4:] if config.batch_size == 1 and config.dtype == "float32" else []
    ids: dict[str, list] = {}

    def run(arm: str) -> dict:
        result = _run_process(arm, config, folder)
        generated = result.pop("ids")
        ids.setdefault(arm, generated)
        if generated != ids[arm] or len(generated[0]) != len(ids[arms[0]][0]):
            raise RunFailed(f"{arm} generated other ids than before: the timing is void")
        return result

    with tempfile.TemporaryDirectory() as folder:
        _save_model(config, Path(folder))
        return harness.in_turn(arms, config.repeats, run), ids


def _run_process(arm: str, config: DecodeBenchConfig, folder: str) -> dict:
    """Run one arm in a new process; return what `measure_arm` returns, or the whole process' `seconds` and its `ids`."""
    prompt, count = "Halo semua, selamat datang", str(config.new_tokens)
    if arm == "generate-process":
        command = ["-c", GENERATE_PROGRAM, folder, prompt, count, config.device]
    elif arm == "mori-process":
        flags = ["--model", folder, "--prompt", prompt, "--max_new_tokens", count, "--temperature", "0", "--json"]
        command = ["-m", "mori", "generate", *flags, "--device", config.device]
    else:
        flags = [f"--{name}={value}" for name, value in asdict(config).items() if name not in ("arm", "output_dir")]
        command = ["-m", "mori", "bench", "decode", f"--arm={arm}", *flags]
    started = time.perf_counter()
    printed = harness.run_process(arm, command, config.threads)
    seconds = time.perf_counter() - started
    answer = json.loads(printed.splitlines()[-1])
    if arm == "generate-process":
        return {"seconds": seconds, "ids": [answer]}
    if arm == "mori-process":
        return {"seconds": seconds, "ids": [answer[0]["new_token_ids"]]}
    return answer


def measure_arm(config: DecodeBenchConfig) -> dict:
    """Generate with the arm `config.arm` in this process; return `seconds` for all new tokens, prompt included, and `ids`.

    After a warm-up, `seconds` is the median of the `rounds`, because other processes on the machine disturb single ones.
    `contexts` has the seconds for one token at each context length in `at`.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    runtime = distributed.start(config.device)
    model = _model(config).to(runtime.device, getattr(torch, config.dtype))
    # PyTorch's default, which `mori.generation.generate` switches off.
    torch.backends.cuda.enable_cudnn_sdp(config.arm.startswith("generate"))
    if not config.arm.startswith("generate"):
        if runtime.device.type == "cpu":
            keep_freed_memory()
        fuse_activations(model)
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(1, model.config.vocab_size, (config.batch_size, PROMPT_TOKENS), generator=generator)
    if config.arm == "contexts":
        return _measure_contexts(config, model, prompts, generator)
    result = _time_rounds(config, _generator(config.arm, model, prompts))
    if config.arm == "mori-greedy":
        looked_up = {model.get_input_embeddings().weight} - {model.get_output_embeddings().weight}
        result["weight_bytes"] = sum(weight.nbytes for weight in {*model.parameters()} - looked_up)
        result["copy_bytes_per_second"] = _copy_bytes_per_second(runtime)
    return result


def _generator(arm: str, model, prompts: torch.Tensor) -> Callable[[int], list[list[int]]]:
    """The call that generates so many tokens after each prompt, `(B, T)`, and returns the new ids."""
    controls = RECIPE if arm.endswith("sampled") else {}
    if not arm.startswith("generate"):
        return lambda count: _generate_with_mori(model, prompts, count, controls or {"temperature": 0.0})
    options = {"do_sample": bool(controls), "pad_token_id": 0, **controls}
    if arm == "generate-compiled":
        options["cache_implementation"] = "static"  # generate() compiles a model with this cache on a GPU

    def generate(count: int) -> list[list[int]]:
        ids = prompts.to(model.device)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, **options)
        return out[:, ids.size(1) :].tolist()

    return generate


def _generate_with_mori(model, prompts: torch.Tensor, count: int, controls: dict, times: list | None = None) -> list:
    """The new ids after each prompt; `times` receives the time of each token."""
    rows: list[list[int]] = [[] for _ in prompts]
    at_once = 8 if model.device.type == "cuda" and times is None else 1
    sampler = Sampler(range(len(rows)), SamplingConfig(**controls), device=model.device)
    for new_ids in decode_ids(model, prompts.tolist(), sampler, count, steps_at_once=at_once):
        for row, ids in zip(rows, new_ids, strict=True):
            row += ids
        if times is not None:
            times.append(time.perf_counter())
    return rows


def _time_rounds(config: DecodeBenchConfig, generate: Callable[[int], list]) -> dict:
    seconds, ids = [], []
    generate(config.new_tokens if config.arm == "generate-compiled" else 8)
    for _ in range(config.rounds):
        torch.manual_seed(0)  # generate() samples with the global RNG
        started = time.perf_counter()
        ids = generate(config.new_tokens)
        seconds.append(time.perf_counter() - started)
    return {"seconds": statistics.median(seconds), "ids": ids}


def _measure_contexts(config: DecodeBenchConfig, model, prompts: torch.Tensor, generator: torch.Generator) -> dict:
    """Median seconds for one token after each context length, the lengths in turn."""
    greedy = {"temperature": 0.0}
    seconds: dict[int, list[float]] = {length: [] for length in CONTEXTS}
    for _ in range(2 * config.rounds):
        for length in CONTEXTS:
            times: list[float] = []
            prompt = torch.randint(1, model.config.vocab_size, (1, length - 25), generator=generator)
            _generate_with_mori(model, prompt, 40, greedy, times)
            seconds[length] += [b - a for a, b in zip(times[10:], times[11:], strict=False)]
    medians = {length: statistics.median(values) for length, values in seconds.items()}
    ids = _generate_with_mori(model, prompts, config.new_tokens, greedy)
    return {"seconds": max(medians.values()), "at": medians, "ids": ids}


def _copy_bytes_per_second(runtime: Runtime) -> float:
    """Bytes that the memory reads and writes per second during the copy of a large tensor, the best of ten."""
    source = torch.ones(1 << 27, device=runtime.device)  # 512 MiB
    target, best = torch.empty_like(source), math.inf
    for _ in range(10):
        runtime.synchronize()
        started = time.perf_counter()
        target.copy_(source)
        runtime.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * source.nbytes / best


def _model(config: DecodeBenchConfig, **changes):
    torch.manual_seed(0)
    options = {
        **SHAPES[config.shape],
        "bos_token_id": 0,
        "eos_token_id": None,
        "max_position_embeddings": 1024,
        **changes,
    }
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**options)).eval()


def _save_model(config: DecodeBenchConfig, folder: Path) -> None:
    """Save a model of this shape with its own tokenizer, for the arms that measure whole processes."""
    tokenizer = loading.train_tokenizer([path.read_text(encoding="utf-8") for path in sorted(SHIPPED.glob("*.txt"))])
    tokenizer.eos_token = None
    vocab_size = max(len(tokenizer), SHAPES[config.shape]["vocab_size"])
    saving.save(_model(config, vocab_size=vocab_size), tokenizer, folder)
