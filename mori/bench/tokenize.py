"""`scripts/bench.py tokenize`: a corpus from its file to token ids, by `mori`, by the usual script, and by one call."""

import hashlib
import itertools
import json
import math
import os
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy
import torch
from transformers import AutoTokenizer

from mori.bench import harness as bench
from mori.config import RunFailed, TokenizeBenchConfig
from mori.data import corpus
from mori.model.loading import train_tokenizer
from mori.tracking.memory import peak_memory_bytes

_BLOCK = 128


def tokenize(config: TokenizeBenchConfig) -> None:
    """`scripts/bench.py tokenize`: seconds from a corpus' file to all its token ids, imports and the tokenizer ready.

    `mori` reads documents and writes its token file, `run_clm` is what the script of that name in transformers' examples
    does (`datasets`: a row for each line, tokenized and cut into blocks on all cores, kept in its cache), `one-call` is
    `tokenizer(text)`. No arm finds a cache. Raises RunFailed where the ids differ, but for the end-of-text token that
    `mori` puts behind the document: the timing is void then.

    A row is tokenized by itself, so that lines with blanks around them may be other tokens in `run_clm`.
    """
    bench.check_writable(config.output_dir)
    if "run_clm" in config.arms:
        bench.require("datasets", "run_clm")
    documents = corpus.read_documents(corpus.find_files(config.corpus))
    text = "\n".join(document.text for document in documents)
    tokenizer = train_tokenizer([text])
    copies = math.ceil(config.megabytes * 1e6 / len(text.encode()))
    expected: dict[str, str] = {}

    def run(arm: str) -> dict:
        scratch = tempfile.mkdtemp(dir=folder)
        job = {"arm": arm, "folder": str(folder), "scratch": scratch, "cores": config.threads}
        answer = bench.in_a_process(arm, ["-m", "mori.bench.tokenize", json.dumps(job)])
        shutil.rmtree(scratch)
        found = json.loads(answer.splitlines()[-1])
        expected.setdefault(arm, found["sha256"])
        if len(set(expected.values())) > 1 or found["sha256"] != expected[arm]:
            raise RunFailed(f"the ids of {arm} differ from those of {' and '.join(expected)}: the timing is void")
        return found

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save_pretrained(folder / "tokenizer")
        with (folder / "corpus.txt").open("w", encoding="utf-8") as file:
            for _ in range(copies):  # never whole in memory: a child's peak would begin with that of this process
                file.write(text)
        size = (folder / "corpus.txt").stat().st_size
        found = bench.in_turn(config.arms, config.repeats, run)
    seconds = {arm: [run["seconds"] for run in runs] for arm, runs in found.items()}
    report = {
        "bench": "tokenize",
        "model": f"byte-level BPE of {len(tokenizer):,} tokens",
        "shape": {"bytes": size, "lines": text.count("\n") * copies + 1, "tokens": found["mori"][0]["tokens"]},
        "arms": {
            arm: {
                "seconds": seconds[arm],
                **bench.spread(seconds[arm]),
                "megabytes_per_second": [size / 1e6 / took for took in seconds[arm]],
                "peak_memory_bytes": [run["peak_memory_bytes"] for run in runs],
                "largest_worker_bytes": [run["largest_worker_bytes"] for run in runs],
                "tokens_in_blocks": runs[0]["tokens_in_blocks"],
            }
            for arm, runs in found.items()
        },
        "ratios": {f"{arm} / mori": bench.ratio(seconds[arm], seconds["mori"]) for arm in found if arm != "mori"},
    }
    packages = ("tokenizers", *(["datasets"] if "run_clm" in found else []))
    bench.write(config.output_dir, "tokenize", report, packages, threads=config.threads or _cores())


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


# ------------------------------------------------------------------------------------- what happens in an arm's process


def _mori(path: Path, tokenizer, scratch: Path) -> tuple[numpy.ndarray, int]:
    tokens = corpus.TokenFile.make(corpus.read_documents(corpus.find_files([str(path)])), tokenizer, scratch)
    return tokens.ids, (len(tokens.ids) - 1) // _BLOCK * _BLOCK


def _one_call(path: Path, tokenizer, scratch: Path) -> tuple[list[int], int]:
    ids = tokenizer(path.read_text(encoding="utf-8"))["input_ids"]
    return ids, len(ids) // _BLOCK * _BLOCK


def _run_clm(path: Path, tokenizer, scratch: Path) -> tuple[object, int]:
    from datasets import load_dataset

    def blocks(rows: dict) -> dict:
        joined = {name: list(itertools.chain.from_iterable(lists)) for name, lists in rows.items()}
        total = len(joined["input_ids"]) // _BLOCK * _BLOCK  # what is left over of every thousand rows is dropped
        cut = {name: [ids[at : at + _BLOCK] for at in range(0, total, _BLOCK)] for name, ids in joined.items()}
        return {**cut, "labels": [list(ids) for ids in cut["input_ids"]]}

    rows = load_dataset("text", data_files=str(path), split="train", keep_linebreaks=True, cache_dir=str(scratch))
    how = {"batched": True, "num_proc": _cores()}
    tokenized = rows.map(lambda batch: tokenizer(batch["text"]), remove_columns=["text"], **how)
    return tokenized, len(tokenized.map(blocks, **how)) * _BLOCK


_ARMS = {"mori": _mori, "run_clm": _run_clm, "one-call": _one_call}


def _main(job: dict) -> None:
    """The process of one arm: prints seconds, memory, and what identifies the ids."""
    if job["cores"] and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job["cores"]])
    folder = Path(job["folder"])
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    started = time.perf_counter()
    found, in_blocks = _ARMS[job["arm"]](folder / "corpus.txt", tokenizer, Path(job["scratch"]))
    seconds = time.perf_counter() - started
    peak = peak_memory_bytes(torch.device("cpu"))
    workers = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    count, digest = 0, hashlib.sha256()
    for part in [found] if job["arm"] != "run_clm" else (row["input_ids"] for row in found):
        ids = numpy.asarray(part[: len(part) - (job["arm"] == "mori")], dtype="<u4")  # without the end-of-text token
        count += len(ids)
        digest.update(ids.data)
    found = {"seconds": seconds, "tokens": count, "tokens_in_blocks": in_blocks, "sha256": digest.hexdigest()}
    print(json.dumps({**found, "peak_memory_bytes": peak, "largest_worker_bytes": workers}))


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
