"""`scripts/bench.py tokenize`: a corpus from its file to token ids, by `mori`, by the usual script, and by one call."""

import hashlib
import itertools
import json
import math
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy
import torch
from transformers import AutoTokenizer

from mori.bench import harness
from mori.bench.options import TokenizeBenchConfig
from mori.cli import RunFailed
from mori.data.corpus import read_corpus
from mori.data.files import find_files
from mori.data.formats import ReadOptions
from mori.data.token_writer import make_token_file
from mori.model.loading import train_tokenizer
from mori.tracking.memory import peak_memory_bytes

_BLOCK = 128


def tokenize(config: TokenizeBenchConfig) -> None:
    """`scripts/bench.py tokenize`: seconds from a corpus file to all its token ids, after imports and loading the tokenizer.

    `mori` reads the documents and writes its token file; `run_clm` does what the example script of transformers with this
    name does (`datasets`: one row per line, tokenized and cut into blocks on all cores, stored in a cache); `one-call` is
    `tokenizer(text)`. All caches are empty. Raises RunFailed if the ids differ, apart from the end-of-text token that
    `mori` adds to the document: the timing is then void.

    `run_clm` tokenizes each row by itself, so lines with spaces at their ends may give it other tokens.
    """
    harness.check_writable(config.output_dir)
    if "run_clm" in config.arms:
        harness.require("datasets", "run_clm")
    text = "\n".join(read_corpus(find_files(config.corpus), ReadOptions(config.text_column, config.encoding)).texts())
    tokenizer = train_tokenizer([text])
    copies = math.ceil(config.megabytes * 1e6 / len(text.encode()))
    expected: dict[str, str] = {}

    def run(arm: str) -> dict:
        scratch = tempfile.mkdtemp(dir=folder)
        job = {"arm": arm, "folder": str(folder), "scratch": scratch, "cores": config.threads}
        printed = harness.run_process(arm, ["-m", "mori.bench.tokenize", json.dumps(job)])
        shutil.rmtree(scratch)
        result = json.loads(printed.splitlines()[-1])
        expected.setdefault(arm, result["sha256"])
        if len(set(expected.values())) > 1 or result["sha256"] != expected[arm]:
            raise RunFailed(f"the ids of {arm} differ from those of {' and '.join(expected)}: the timing is void")
        return result

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save_pretrained(folder / "tokenizer")
        with (folder / "corpus.txt").open("w", encoding="utf-8") as file:
            for _ in range(copies):  # a child's peak memory starts at that of this process, so keep it small
                file.write(text)
        size = (folder / "corpus.txt").stat().st_size
        results = harness.in_turn(config.arms, config.repeats, run)
    seconds = {arm: [run["seconds"] for run in runs] for arm, runs in results.items()}
    report = {
        "bench": "tokenize",
        "model": f"byte-level BPE of {len(tokenizer):,} tokens",
        "shape": {"bytes": size, "lines": text.count("\n") * copies + 1, "tokens": results["mori"][0]["tokens"]},
        "arms": {
            arm: {
                "seconds": seconds[arm],
                **harness.spread(seconds[arm]),
                "megabytes_per_second": [size / 1e6 / s for s in seconds[arm]],
                "peak_memory_bytes": [run["peak_memory_bytes"] for run in runs],
                "largest_worker_bytes": [run["largest_worker_bytes"] for run in runs],
                "tokens_in_blocks": runs[0]["tokens_in_blocks"],
            }
            for arm, runs in results.items()
        },
        "ratios": {f"{arm} / mori": harness.ratio(seconds[arm], seconds["mori"]) for arm in results if arm != "mori"},
    }
    packages = ("tokenizers", *(["datasets"] if "run_clm" in results else []))
    harness.write(config.output_dir, "tokenize", report, packages, threads=config.threads or _cores())


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


# ------------------------------------------------------------------------------------------- the process of one arm
# Each arm returns the token ids and the number of tokens in full blocks.


def _with_mori(path: Path, tokenizer, scratch: Path) -> tuple[numpy.ndarray, int]:
    tokens = make_token_file(read_corpus(find_files([str(path)])), tokenizer, scratch)
    return tokens.ids, (len(tokens.ids) - 1) // _BLOCK * _BLOCK


def _with_one_call(path: Path, tokenizer, scratch: Path) -> tuple[list[int], int]:
    ids = tokenizer(path.read_text(encoding="utf-8"))["input_ids"]
    return ids, len(ids) // _BLOCK * _BLOCK


def _with_run_clm(path: Path, tokenizer, scratch: Path) -> tuple[object, int]:
    from datasets import load_dataset

    def blocks(rows: dict) -> dict:
        joined = {name: list(itertools.chain.from_iterable(lists)) for name, lists in rows.items()}
        total = len(joined["input_ids"]) // _BLOCK * _BLOCK  # drops the remainder of every thousand rows
        cut = {name: [ids[at : at + _BLOCK] for at in range(0, total, _BLOCK)] for name, ids in joined.items()}
        return {**cut, "labels": [list(ids) for ids in cut["input_ids"]]}

    rows = load_dataset("text", data_files=str(path), split="train", keep_linebreaks=True, cache_dir=str(scratch))
    options = {"batched": True, "num_proc": _cores()}
    tokenized = rows.map(lambda batch: tokenizer(batch["text"]), remove_columns=["text"], **options)
    return tokenized, len(tokenized.map(blocks, **options)) * _BLOCK


ARMS = {"mori": _with_mori, "run_clm": _with_run_clm, "one-call": _with_one_call}


def measure_arm(job: dict) -> dict:
    """Tokenize with one arm in this process; return seconds, memory, and the count and SHA-256 of the ids."""
    if job["cores"] and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job["cores"]])
    folder = Path(job["folder"])
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    started = time.perf_counter()
    tokens, in_blocks = ARMS[job["arm"]](folder / "corpus.txt", tokenizer, Path(job["scratch"]))
    seconds = time.perf_counter() - started
    peak = peak_memory_bytes(torch.device("cpu"))
    import resource  # not on Windows

    largest_worker = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    count, digest = 0, hashlib.sha256()
    for part in [tokens] if job["arm"] != "run_clm" else (row["input_ids"] for row in tokens):
        ids = numpy.asarray(part[: len(part) - (job["arm"] == "mori")], dtype="<u4")  # without the end-of-text token
        count += len(ids)
        digest.update(ids.data)
    return {
        "seconds": seconds,
        "tokens": count,
        "tokens_in_blocks": in_blocks,
        "sha256": digest.hexdigest(),
        "peak_memory_bytes": peak,
        "largest_worker_bytes": largest_worker,
    }


if __name__ == "__main__":
    print(json.dumps(measure_arm(json.loads(sys.argv[1]))))
