"""`scripts/bench.py decode`: text from random weights, by `mori` and by `generate()`."""

import json
import math
import statistics
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mori import distributed as runtime
from mori.bench import harness as bench
from mori.config import DECODE_ARMS, DecodeBenchConfig, RunFailed, SamplingConfig
from mori.generation.decode import decode as decode_ids
from mori.generation.sampler import Sampler
from mori.model.loading import fuse_activations, save, train_tokenizer
from mori.speed.startup import keep_freed_memory

PROMPT = 16
RECIPE = {"top_k": 50, "top_p": 0.95, "temperature": 0.9}
CONTEXTS = (100, 1000)
# What a person would write instead of scripts/generate.py.
FIVE_LINES = """
import sys; from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer, model = AutoTokenizer.from_pretrained(sys.argv[1]), AutoModelForCausalLM.from_pretrained(sys.argv[1])
model, inputs = model.to(sys.argv[4]), tokenizer(sys.argv[2], return_tensors="pt").to(sys.argv[4])
out = model.generate(**inputs, do_sample=False, max_new_tokens=int(sys.argv[3]), pad_token_id=0)
print(out[0, inputs["input_ids"].shape[1]:].tolist())
"""


def decode(config: DecodeBenchConfig) -> None:
    """`scripts/bench.py decode`: `mori` against `generate()`, per token and per process, and at the end of a long context.

    The new ids of both greedy arms must be the same in every repeat, and so must those of both whole processes; sampled
    arms draw other numbers, and must draw as many. Raises RunFailed where they are not: there is nothing to compare then.
    On a GPU `generate()` is measured with a static cache and compiled as well, whose ids may be others where two logits are
    as good as equal. The share of the bandwidth is that of the weights alone, which are read for every token.
    """
    if config.arm:
        print(json.dumps(_arm(config)))
        return
    bench.check_writable(config.output_dir)
    device = runtime.start(config.device).device
    config = replace(config, device=runtime.for_children(device))
    arms = list(DECODE_ARMS[:4])
    arms += ["generate-compiled"] if device.type == "cuda" else []
    arms += ["contexts"] if config.batch_size == 1 else []
    arms += DECODE_ARMS[4:] if config.batch_size == 1 and config.dtype == "float32" else []
    ids: dict[str, list] = {}

    def run(arm: str) -> dict:
        found = _run(arm, config, folder)
        drawn = found.pop("ids")
        ids.setdefault(arm, drawn)
        if drawn != ids[arm] or len(drawn[0]) != len(ids[arms[0]][0]):
            raise RunFailed(f"{arm} drew other ids than before: the timing is void")
        return found

    with tempfile.TemporaryDirectory() as folder:
        _save_model(config, Path(folder))
        found = bench.in_turn(arms, config.repeats, run)
    seconds = {arm: [repeat["seconds"] for repeat in repeats] for arm, repeats in found.items()}
    for length in CONTEXTS if "contexts" in found else ():
        seconds[f"context-{length}"] = [repeat["at"][str(length)] for repeat in found["contexts"]]
    seconds.pop("contexts", None)
    pairs = [("generate-greedy", "mori-greedy"), ("generate-process", "mori-process")]
    for one, other in pairs:
        if one in ids and ids[one] != ids[other]:
            raise RunFailed(f"{one} and {other} drew other ids: the timing is void")
    pairs += [
        ("generate-sampled", "mori-sampled"),
        ("context-1000", "context-100"),
        ("generate-compiled", "mori-greedy"),
    ]
    ratios = {f"{one} / {other}": bench.ratio(seconds[one], seconds[other]) for one, other in pairs if one in seconds}
    report = {
        "bench": "decode",
        "model": f"random weights, {config.shape}",
        "shape": {
            **bench.SHAPES[config.shape],
            "dtype": config.dtype,
            "batch_size": config.batch_size,
            "prompt": PROMPT,
            "new_tokens": config.new_tokens,
        },
        "sampled": RECIPE,
        "arms": {arm: {"seconds": took, **bench.spread(took)} for arm, took in seconds.items()},
        "copy_bytes_per_second": [repeat["copy_bytes_per_second"] for repeat in found["mori-greedy"]],
        "share_of_copy_bandwidth": [
            config.new_tokens * repeat["weight_bytes"] / repeat["seconds"] / repeat["copy_bytes_per_second"]
            for repeat in found["mori-greedy"]
        ],
        "ratios": ratios,
    }
    name = f"decode-{config.shape}-batch{config.batch_size}"
    name += "" if device.type == "cpu" else f"-{config.dtype}-{device.type}"
    bench.write(config.output_dir, name, report, device=device, threads=config.threads)


def _run(arm: str, config: DecodeBenchConfig, folder: str) -> dict:
    """One process: the `seconds` it took, the `ids` that it drew, and `at` a context of so many tokens the seconds for one."""
    prompt, count = "Halo semua, selamat datang", str(config.new_tokens)
    if arm == "generate-process":
        command = ["-c", FIVE_LINES, folder, prompt, count, config.device]
    elif arm == "mori-process":
        flags = ["--model", folder, "--prompt", prompt, "--max_new_tokens", count, "--temperature", "0", "--json"]
        flags += ["--device", config.device]
        command = [str(bench.ROOT / "scripts/generate.py"), *flags]
    else:
        flags = [f"--{name}={value}" for name, value in asdict(config).items() if name not in ("arm", "output_dir")]
        command = [str(bench.ROOT / "scripts/bench.py"), "decode", f"--arm={arm}", *flags]
    started = time.perf_counter()
    printed = bench.in_a_process(arm, command, config.threads)
    took = time.perf_counter() - started
    answer = json.loads(printed.splitlines()[-1])
    if arm == "generate-process":
        return {"seconds": took, "ids": [answer]}
    if arm == "mori-process":
        return {"seconds": took, "ids": [answer[0]["new_token_ids"]]}
    return answer


def _arm(config: DecodeBenchConfig) -> dict:
    """Seconds for all new tokens, the prompt's pass included; of `contexts`, seconds for a token at each, in turn.

    After a warm-up, the median of the `rounds`: neighbours on a shared machine disturb single ones.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    where = runtime.start(config.device)
    device = where.device
    model = _model(config).to(device, getattr(torch, config.dtype))
    if not config.arm.startswith("generate"):
        if device.type == "cpu":
            keep_freed_memory()
        fuse_activations(model)
    generator = torch.Generator().manual_seed(1)
    arm = config.arm
    prompts = torch.randint(1, model.config.vocab_size, (config.batch_size, PROMPT), generator=generator)
    controls = {"temperature": 0.0} if not arm.endswith("sampled") else RECIPE

    def by_generate(count: int) -> list:
        how = (
            {"do_sample": False}
            if "temperature" in controls and not controls["temperature"]
            else {"do_sample": True, **controls}
        )
        ids = prompts.to(device)
        if arm == "generate-compiled":
            how["cache_implementation"] = "static"  # which is compiled by itself on a GPU
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, pad_token_id=0, **how)
        return out[:, ids.size(1) :].tolist()

    def by_mori(count: int, prompts=prompts, times: list | None = None) -> list:
        rows = [[] for _ in prompts]
        at_once = 8 if device.type == "cuda" and times is None else 1
        sampler = Sampler(range(len(rows)), SamplingConfig(**controls), device=device)
        for new_ids in decode_ids(model, prompts.tolist(), sampler, count, steps_at_once=at_once):
            for row, ids in zip(rows, new_ids, strict=True):
                row += ids
            if times is not None:
                times.append(time.perf_counter())
        return rows

    if arm == "contexts":
        at: dict[int, list[float]] = {length: [] for length in CONTEXTS}
        for _ in range(2 * config.rounds):
            for length in CONTEXTS:
                times: list[float] = []
                by_mori(40, torch.randint(1, model.config.vocab_size, (1, length - 25), generator=generator), times)
                at[length] += [b - a for a, b in zip(times[10:], times[11:], strict=False)]
        middle = {length: statistics.median(seconds) for length, seconds in at.items()}
        return {"seconds": max(middle.values()), "at": middle, "ids": by_mori(config.new_tokens)}
    run, seconds = by_generate if arm.startswith("generate") else by_mori, []
    run(config.new_tokens if arm == "generate-compiled" else 8)
    for _ in range(config.rounds):
        torch.manual_seed(0)  # generate() draws from the global generator
        started = time.perf_counter()
        ids = run(config.new_tokens)
        seconds.append(time.perf_counter() - started)
    found = {"seconds": statistics.median(seconds), "ids": ids}
    if arm == "mori-greedy":
        looked_up = {model.get_input_embeddings().weight} - {model.get_output_embeddings().weight}
        found["weight_bytes"] = sum(weight.nbytes for weight in {*model.parameters()} - looked_up)
        found["copy_bytes_per_second"] = _copy_bytes_per_second(where)
    return found


def _copy_bytes_per_second(where: runtime.Runtime) -> float:
    """What the memory reads and writes while a large tensor is copied, at best."""
    one = torch.ones(1 << 27, device=where.device)  # 512 MiB
    other, best = torch.empty_like(one), math.inf
    for _ in range(10):
        where.synchronize()
        began = time.perf_counter()
        other.copy_(one)
        where.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * one.nbytes / best


def _model(config: DecodeBenchConfig, **more):
    torch.manual_seed(0)
    words = {"bos_token_id": 0, "eos_token_id": None, "max_position_embeddings": 1024, **more}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**bench.SHAPES[config.shape], **words})).eval()


def _save_model(config: DecodeBenchConfig, folder: Path) -> None:
    """A folder for the whole processes: the shape with a tokenizer of its own, as a run leaves it."""
    tokenizer = train_tokenizer(
        [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.parent.glob("transcripts/*.txt"))]
    )
    tokenizer.eos_token = None
    save(_model(config, vocab_size=max(len(tokenizer), bench.SHAPES[config.shape]["vocab_size"])), tokenizer, folder)
