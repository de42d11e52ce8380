"""`python -m tests.golden`: what training, generation and tokenizing give, to the bit, compared with what was recorded.

A refactoring must not change a bit. The record is of one processor (the last bits of matmuls differ between processors), so
it holds a fingerprint of the machine: elsewhere, record at the commit before the change (`--record`), then compare.
"""

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
STORIES, REAL_CORPUS = SHARED / "models/stories260K", SHARED / "data/mori_corpus.txt"
RECORD = Path(__file__).with_suffix(".json")
ENVIRONMENT = {
    **os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2", "TORCHELASTIC_ERROR_FILE": "",
}  # fmt: skip

SHORT = "--max_steps 12 --eval_steps 6 --save_steps 6 --logging_steps 1 --max_new_tokens 8 --max_eval_windows 0"
WITH_BOS = f"--model {STORIES} --learning_rate 1e-3"
STORY = f"{WITH_BOS} --no-document_bos"  # recorded before documents began with BOS
# name -> the command lines that are run one after the other in one folder; {folder} is that folder
RUNS = {
    "preset": [f"{SHORT}"],
    "stories": [f"{STORY} --corpus {REAL_CORPUS} {SHORT} --block_size 256"],
    "document-bos": [f"{WITH_BOS} --corpus {REAL_CORPUS} {SHORT} --cpu_matmul torch"],
    "short-last-window": [
        f"{SHORT} --corpus {{folder}}/short.txt --block_size 32 --gradient_accumulation_steps 3 --max_steps -1 "
        "--num_train_epochs 2 --per_device_train_batch_size 2"
    ],
    "fp16": [f"{SHORT} --precision fp16"],
    "bf16": [f"{SHORT} --precision bf16"],
    "document-mask": [f"{STORY} {SHORT} --document_mask"],
    "gradient-checkpointing": [f"{SHORT} --gradient_checkpointing"],
    "bfloat16-weights": [f"{SHORT} --dtype bfloat16 --precision bf16"],
    "8-bit": [f"{SHORT} --optim adamw_bnb_8bit --max_steps 6"],
    "2-ranks": [f"torchrun {STORY} {SHORT} --per_device_train_batch_size 2"],
    "killed": [
        f"{STORY} {SHORT} --save_steps 3 --max_steps 8 SIGKILL",
        f"{STORY} {SHORT} --save_steps 3 --max_steps 8",
    ],
    "extended": [f"{STORY} {SHORT} --max_steps 6", f"{STORY} {SHORT} --max_steps 10 --extend"],
    "exact": [
        f"{STORY} {SHORT} --no-chunked_loss --no-mask_free_attention --no-fused_activations --cpu_matmul torch --no-tf32"
    ],
    "schedule": [
        f"{SHORT} --lr_scheduler_type cosine --warmup_steps 4 --weight_decay 0.1 --dropout 0.2 --auto_find_batch_size "
        "--gradient_accumulation_steps 2 --max_grad_norm 0.5 --seed 7"
    ],
    "long-window": [f"{STORY} {SHORT} --block_size 512 --per_device_train_batch_size 2 --max_steps 6"],
    "no-fast-products": [f"{SHORT} --cpu_matmul torch --lr_scheduler_type constant_with_warmup"],
}
# name -> the model (the brain of a run above, or the stories), then the flags of scripts/generate.py
GENERATIONS = {
    "greedy-story": ("stories", "--temperature 0 --max_new_tokens 150"),
    "recipe": ("preset", "--top_k 50 --top_p 0.95 --temperature 0.9 --max_new_tokens 60"),
    "follow-up": ("preset", "--num_return_sequences 3 --temperature 0.7 --repetition_penalty 1.2 --seed 1 --max_new_tokens 40"),
    "batch": ("stories", "--top_p 0.9 --seed 3 --max_new_tokens 60 --prompt Once 'The big dog was' Lily --num_return_sequences 2"),
    "min-p": ("stories", "--min_p 0.05 --typical_p 0.9 --top_k 40 --max_new_tokens 60"),
    "cutoffs": ("stories", "--epsilon_cutoff 1e-3 --eta_cutoff 2e-3 --max_new_tokens 60"),
    "top-h": ("stories", "--top_h 0.6 --xtc_probability 0.5 --xtc_threshold 0.05 --seed 5 --max_new_tokens 60"),
    "penalties": ("stories", "--frequency_penalty 0.4 --presence_penalty 0.2 --no_repeat_ngram_size 3 --max_new_tokens 60"),
    "dry": ("stories", "--dry_multiplier 0.8 --dry_allowed_length 3 --top_k 20 --max_new_tokens 80"),
    "forbidden": (
        "stories",
        "--suppress_tokens 5 7 --bad_words_ids [[400,411],[403]] --sequence_bias [[[300],2.0]] --min_new_tokens 20 "
        "--exponential_decay_length_penalty 10 1.1 --max_new_tokens 60",
    ),
    "slide": ("stories", "--on_full_context slide --top_k 30 --max_new_tokens 560"),
    "stop": ("stories", "--temperature 0 --stop_strings Lily --max_new_tokens 60"),
    "greedy-mini": ("preset", "--temperature 0 --max_new_tokens 200 --prompt Halo 'Menurut saya, game ini' Terima"),
}  # fmt: skip


def run(name: str, folder: Path) -> dict:
    """One training run in `folder`; its losses and norms, and the SHA-256 of its weights."""
    short = (ROOT / "mori").rglob("*.txt")
    (folder / "short.txt").write_text(sorted(short)[0].read_text(encoding="utf-8")[:2600], encoding="utf-8")
    for command in RUNS[name]:
        words = command.replace("{folder}", str(folder)).split()
        where = ["--logging_dir", folder / "runs", "--run_name", "run", "--output_dir", folder / "brain"]
        launcher = [sys.executable]
        if words[0] == "torchrun":
            words, launcher = words[1:], [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
            launcher += ["--master-port=0", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
        killed = words[-1] == "SIGKILL"
        words = [*launcher, ROOT / "scripts/train.py", *(words[:-1] if killed else words), *where]
        with (folder / "output.txt").open("ab") as output:
            process = subprocess.Popen(list(map(str, words)), env=ENVIRONMENT, stdout=output, stderr=subprocess.STDOUT)
            while killed and process.poll() is None and not list((folder / "runs/run/checkpoints").glob("step-*3")):
                time.sleep(0.002)
            if killed:
                process.kill()
            if process.wait() != (-9 if killed else 0):
                raise SystemExit(
                    f"{name}: exit code {process.returncode}\n{(folder / 'output.txt').read_text()[-2000:]}"
                )
    lines = (folder / "runs/run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    keys = ("step", "train/loss", "train/grad_norm", "train/learning_rate", "eval/loss")
    metrics = [{key: line[key] for key in keys if key in line} for line in map(json.loads, lines)]
    weights = hashlib.sha256((folder / "brain/model.safetensors").read_bytes()).hexdigest()
    samples = json.loads((folder / "runs/run/summary.json").read_text(encoding="utf-8"))["samples"]["after"]
    return {"weights": weights, "metrics": metrics, "sample": samples[0]}


def generation(name: str, brain: Path) -> list:
    """The token ids that `scripts/generate.py` draws."""
    import shlex

    model, words = GENERATIONS[name]
    prompt = (
        [] if "--prompt" in words else ["--prompt", "Once upon a time" if model == "stories" else "Halo semua, selamat"]
    )
    command = [sys.executable, ROOT / "scripts/generate.py", "--model", STORIES if model == "stories" else brain]
    command += ["--json", *shlex.split(words), *prompt]
    done = subprocess.run(list(map(str, command)), env=ENVIRONMENT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr}")
    return [[answer["finish_reason"], *answer["new_token_ids"]] for answer in json.loads(done.stdout.splitlines()[-1])]


def tokenized() -> dict:
    """The number of tokens, and the SHA-256 of the ids, of each text by each tokenizer."""
    import numpy
    from transformers import AutoTokenizer

    from mori.data.corpus import read_corpus
    from mori.data.files import SHIPPED, find_files
    from mori.data.token_writer import make_token_file
    from mori.model.loading import train_tokenizer

    transcripts = [path.read_text(encoding="utf-8") for path in sorted(SHIPPED.glob("*.txt"))]
    text = "\n".join(transcripts)
    texts = {
        "short": "Halo semua,\r\nselamat datang.\n\n",
        "transcripts": transcripts,
        "one-line": text.replace("\n", " ") * 12,
        "many-lines": text * 10,
        "no-spaces": "".join(text.split())[:20_000] * 40,
        "mixed": ("naïve café 東京、大阪。 emoji 👩‍👩‍👧 العربية हिन्दी " + text[:500]) * 900,
        "digits": " ".join(str(number * 7919) for number in range(90_000)),
        "specials": ("<s>tebal</s> <|endoftext|> [MASK] " + text[:400]) * 1500,
        "blanks": ("a  b\t\tc   \n\n\n  d " + text[:300]) * 2000,
        "code": "def f(x):\n    return {'a': x['b']}\n\n" * 20_000,
    }
    if REAL_CORPUS.is_file():
        texts["real-corpus"] = REAL_CORPUS.read_text(encoding="utf-8")
    tokenizers = {"bpe": train_tokenizer([text], 2048)}
    if STORIES.is_dir():
        tokenizers["stories"] = AutoTokenizer.from_pretrained(STORIES)
    made = {}
    with tempfile.TemporaryDirectory() as name:
        for label, parts in texts.items():
            folder = Path(name) / label
            folder.mkdir()
            for number, part in enumerate([parts] if isinstance(parts, str) else parts):
                (folder / f"{number:03}.txt").write_text(part, encoding="utf-8", newline="")
            corpus = read_corpus(find_files([str(folder)]))
            for kind, tokenizer in tokenizers.items():
                ids = make_token_file(corpus, tokenizer, Path(name) / "cache").ids
                made[f"{label}/{kind}"] = [len(ids), hashlib.sha256(numpy.asarray(ids, "<u4").tobytes()).hexdigest()]
    return made


def machine() -> dict:
    """What decides about the last bits."""
    import torch
    import transformers

    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    return {
        "processor": f"{cpu.partition(':')[2].strip() or platform.processor()}, {torch.backends.cpu.get_cpu_capability()}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def give(only: list[str], jobs: int) -> dict:
    """All that the code gives now."""
    at_hand = [
        name for name in RUNS if STORIES.is_dir() and REAL_CORPUS.is_file() or str(SHARED) not in "".join(RUNS[name])
    ]
    runs = [name for name in at_hand if not only or name in only]
    generations = [
        n for n, (m, _) in GENERATIONS.items() if (not only or n in only) and (m != "stories" or STORIES.is_dir())
    ]
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(jobs) as pool:
        folders = {run: Path(name) / run for run in {*runs, *(["preset"] if generations else [])}}
        for folder in folders.values():
            folder.mkdir()
        found = dict(zip(folders, pool.map(run, folders, folders.values()), strict=True))
        brain = Path(name) / "preset/brain"
        ids = dict(zip(generations, pool.map(generation, generations, [brain] * len(generations)), strict=True))
    return {
        "runs": {name: found[name] for name in runs},
        "generations": ids,
        "tokenized": tokenized() if not only or "tokenized" in only else {},
    }


def main() -> int:
    """Record, or compare with the record; 1 where a bit differs."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__)
    parser.add_argument("--record", action="store_true", help=f"write {RECORD.name} instead of comparing with it")
    parser.add_argument("--only", nargs="+", default=[], help="names of entries, or `tokenized`")
    parser.add_argument("--jobs", type=int, default=2, help="entries that run side by side")
    options = parser.parse_args()
    now = machine()
    if not options.record:
        record = json.loads(RECORD.read_text(encoding="utf-8"))
        if record["machine"] != now:
            print(f"recorded on {record['machine']}, this is {now}: record at the commit before the change first")
            return 1
    found = give(options.only, options.jobs)
    if options.record:
        RECORD.write_text(json.dumps({"machine": now, **found}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"recorded {sum(map(len, found.values()))} entries")
        return 0
    differing = []
    for group, entries in found.items():
        for name, value in entries.items():
            if json.loads(json.dumps(value)) != record[group].get(name):
                differing.append(f"{group}/{name}")
                print(
                    f"{group}/{name} differs\n  recorded {str(record[group].get(name))[:900]}\n  now      {str(value)[:900]}"
                )
    print(f"{sum(map(len, found.values())) - len(differing)} of {sum(map(len, found.values()))} entries equal")
    return bool(differing)


if __name__ == "__main__":
    sys.exit(main())
