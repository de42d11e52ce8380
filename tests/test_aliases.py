"""What other programs call our flags: taken, or answered in one line that names our way."""

import re
import shlex
from dataclasses import asdict, fields
from pathlib import Path

import pytest
from conftest import run_script
from transformers import GenerationConfig, TrainingArguments

from mori import __version__
from mori.bench.options import COMMANDS, CompareConfig
from mori.cli import UserError, parse
from mori.cli.aliases import nearest, translated
from mori.cli.words import ANSWERS, CHANGES, SAME
from mori.config import EvaluateConfig, ExportConfig, GenerateConfig, TrainConfig

CONFIGS = (TrainConfig, GenerateConfig, EvaluateConfig, ExportConfig, CompareConfig, *COMMANDS.values())
# What people type first: the flags, and the fields that they set or the line that answers them.
GOLDEN = [
    line.split(" -> ") for line in (Path(__file__).parent / "first_flags.txt").read_text(encoding="utf-8").splitlines()
]


def outcome(cls, words: str, capsys) -> str:
    """The fields that a command line sets, and its notes, or the line that answers it."""
    try:
        config = parse(cls, "", shlex.split(words))
    except UserError as mistake:
        return f"error: {mistake}"
    except SystemExit:
        return f"prints {capsys.readouterr().out.strip().replace(__version__, 'VERSION')}"
    fields_set = ", ".join(f"{name}={getattr(config, name)!r}" for name in sorted(config.given))
    return "; ".join(filter(None, (fields_set or "taken", " ".join(capsys.readouterr().err.split()))))


def changed(cls, *words: str) -> dict:
    """The fields whose value is not the default."""
    default = asdict(cls())
    return {name: value for name, value in asdict(parse(cls, "", list(words))).items() if value != default[name]}


@pytest.mark.parametrize("words, expected", GOLDEN, ids=[words for words, _ in GOLDEN])
def test_first_flags_have_the_golden_outcome(words, expected, capsys):
    if words == "--report_to wandb":
        pytest.importorskip("wandb")
    assert outcome(TrainConfig, words, capsys) == expected


def test_every_field_of_training_arguments_is_understood():
    """Each is taken or answered in a line; none is an unknown flag, and none is answered with a look-alike."""
    known = {f.name for f in fields(TrainConfig)}
    for f in fields(TrainingArguments):
        if f.name in known:
            continue
        for value in (True, False, "7"):
            try:
                translated(TrainConfig, [(f.name, value)])
            except UserError as answer:
                assert "unknown" not in str(answer) and f.name in str(answer), answer


def test_every_field_of_generation_config_is_understood():
    known = {f.name for f in fields(GenerateConfig)}
    for name in vars(GenerationConfig()):
        if name not in known and not name.startswith("_"):
            for value in (True, False, "7"):
                try:
                    translated(GenerateConfig, [(name, value)])
                except UserError as answer:
                    assert "unknown" not in str(answer), answer


def test_dump_of_default_training_arguments_is_taken():
    """It asks for nothing that is not here; `do_train` is False in it, although Trainer trains."""
    dump = TrainingArguments(output_dir="brain").to_dict()
    skipped = {f.name for f in fields(TrainConfig)} | {"do_train"}
    taken = translated(TrainConfig, [(name, value) for name, value in dump.items() if name not in skipped])
    assert dict(taken) == {
        "eval_strategy": "no",
        "precision": "fp32",
        "device": "auto",
        "gradient_checkpointing": False,
    }


def test_training_arguments_and_aliases_give_the_same_fields():
    arguments = ["--lr", "2e-4", "--warmup_ratio", "0.25", "--epochs", "3", "--optim", "adamw_hf", "--grad_clip", "0.5"]
    theirs = TrainingArguments(
        learning_rate=2e-4, warmup_steps=0.25, num_train_epochs=3, optim="adamw_torch", max_grad_norm=0.5
    )
    ours = changed(TrainConfig, *arguments)
    assert ours == {name: getattr(theirs, name) for name in ours} and len(ours) == 5


@pytest.mark.parametrize(
    "cls, words, expected",
    [
        (TrainConfig, "--bf16 False --fp16 True", {"precision": "fp16"}),
        (TrainConfig, "--bf16 False --fp16 False", {"precision": "fp32"}),
        (TrainConfig, "--no-bf16", {"precision": "fp32"}),
        (TrainConfig, "--precision bf16 --fp16=False", {"precision": "bf16"}),
        (TrainConfig, "--mixed_precision no", {"precision": "fp32"}),
        (TrainConfig, "--use_cpu", {"device": "cpu"}),
        (TrainConfig, "--extend True", {"extend": True}),
        (TrainConfig, "--chunked_loss False --tf32=false", {"chunked_loss": False, "tf32": False}),
        (TrainConfig, "--compile=False", {"torch_compile": False}),
        (TrainConfig, "--no-compile", {"torch_compile": False}),
        (TrainConfig, "--resume_from_checkpoint True", {}),
        (TrainConfig, "--resume_from_checkpoint", {}),
        (TrainConfig, "--resume_from_checkpoint False", {"resume_from_checkpoint": "none"}),
        (TrainConfig, "--lr 1e-4 --learning_rate 0.0001", {"learning_rate": 1e-4}),
        (TrainConfig, "--torch_dtype bfloat16 --bf16", {"dtype": "bfloat16", "precision": "bf16"}),
        (TrainConfig, "--torch_dtype auto --load_in_4bit False --fsdp ''", {}),
        (TrainConfig, "a.txt b.txt", {"corpus": ["a.txt", "b.txt"]}),
        (TrainConfig, "--extend a.txt", {"corpus": ["a.txt"], "extend": True}),
        (TrainConfig, "--max_steps 5 a.txt --corpus b", {"corpus": ["b", "a.txt"], "max_steps": 5}),
        (TrainConfig, "--dataset data/", {"error": "data sets of the hub"}),
        (TrainConfig, "--dataset a.jsonl", {"corpus": ["a.jsonl"]}),
        (TrainConfig, "--init_from gpt2 --max_iters 7 --eval_interval 3", {"model": "gpt2", "max_steps": 7, "eval_steps": 3.0}),
        (TrainConfig, "--decay_lr=False --beta2=0.9", {"lr_scheduler_type": "constant_with_warmup", "adam_beta2": 0.9}),
        (TrainConfig, "--base_model x --sequence_len 64 --micro_batch_size 2", {"model": "x", "block_size": 64, "per_device_train_batch_size": 2}),
        (TrainConfig, "--use_gradient_checkpointing unsloth --random_state 1", {"gradient_checkpointing": True, "seed": 1}),
        (TrainConfig, "--stage pt --finetuning_type full --cutoff_len 64", {"block_size": 64}),
        (GenerateConfig, "-m x -p Halo -n 20 --temp 0.5 --top-k 9 --repeat-penalty 1.1",
         {"model": "x", "prompt": ["Halo"], "max_new_tokens": 20, "temperature": 0.5, "top_k": 9, "repetition_penalty": 1.1}),
        (GenerateConfig, "--do_sample False", {"temperature": 0.0}),
        (GenerateConfig, "--do_sample --num_beams 1", {}),
        (GenerateConfig, "--start FILE:a.txt --num_samples 3", {"prompt_file": "a.txt", "num_return_sequences": 3}),
        (GenerateConfig, "--batch_size 2 -cnv", {"batch_size": 2, "interactive": True}),
        (EvaluateConfig, "--batch_size 2 --max_length 32 a.txt", {"per_device_eval_batch_size": 2, "block_size": 32, "corpus": ["a.txt"]}),
        (CompareConfig, "--lr 1e-4 --bf16", {"learning_rate": 1e-4, "precision": "bf16"}),
        (EvaluateConfig, "--report_to none", {}),
        (COMMANDS["train"], "--bf16 --max_iters 50 -t 2", {"precision": "bf16", "max_steps": 50, "threads": 2}),
    ],
)  # fmt: skip
def test_alias_sets_the_same_fields(cls, words, expected):
    if "error" in expected:
        with pytest.raises(UserError, match=expected["error"]):
            changed(cls, *shlex.split(words))
        return
    assert changed(cls, *shlex.split(words)) == expected


@pytest.mark.parametrize(
    "cls, words, line",
    [
        (TrainConfig, "--bf16 --fp16", "bf16 and fp16 give precision different values (bf16, fp16); leave one out"),
        (TrainConfig, "--bf16 False --precision bf16", "precision and bf16 contradict each other"),
        (TrainConfig, "--lr 1e-4 --learning_rate 1e-3", "lr and learning_rate give learning_rate different values"),
        (TrainConfig, "--train_file a --corpus b", "train_file and corpus give corpus different values (a, b)"),
        (TrainConfig, "--bf16 perhaps", "bf16 is 'perhaps', must be True or False"),
        (TrainConfig, "--warmup_ratio 2", "warmup_ratio is '2', must be"),
        (TrainConfig, "--warmup_ratio much", "warmup_ratio is 'much', must be"),
        (TrainConfig, "--packing False", "packing: windows are always full"),
        (TrainConfig, "--do_train False", "do_train: a run always trains"),
        (EvaluateConfig, "--report_to wandb", "report_to: only a training reports its numbers"),
        (TrainConfig, "--mlflow_tracking_uri x", "--report_to knows TensorBoard and Weights & Biases"),
        (TrainConfig, "--learning_rate 1e-4 1e-3", "'1e-3' belongs to no flag"),
        (TrainConfig, "run.toml --max_steps 3", "'run.toml' belongs to no flag: settings are read with --config FILE"),
        (TrainConfig, "--max_steps 3 config/train_shakespeare.py", "'config/train_shakespeare.py' belongs to no flag: settings"),
        (TrainConfig, "--batch_size 8", "--per_device_train_batch_size"),
        (GenerateConfig, "--max_length 50", "--max_new_tokens"),
        (GenerateConfig, "--do_sample False --temperature 0.7", "do_sample and temperature give temperature"),
        (GenerateConfig, "--num_beams 4", "beam"),
        (GenerateConfig, "--lr 1", "unknown flag --lr: this command has no --learning_rate"),
        (GenerateConfig, "a.txt", "'a.txt' belongs to no flag; a text to continue follows --prompt, in quotes"),
        (EvaluateConfig, "--num_epoch 1", "unknown flag --num_epoch; --help lists the flags"),
        (TrainConfig, "--num_epoch 1", "unknown flag --num_epoch; did you mean --num_train_epochs?"),
        (TrainConfig, "-max_steps 1", "unknown flag -max_steps; did you mean --max_steps?"),
    ],
)  # fmt: skip
def test_contradictions_and_what_is_not_here_are_one_line(cls, words, line):
    with pytest.raises(UserError) as mistake:
        parse(cls, "", shlex.split(words))
    assert line in str(mistake.value) and "\n" not in str(mistake.value)


def test_look_alikes_are_alike_by_spelling():
    """Each slip of a letter finds its flag; a word that shares only an ending does not."""
    known = [f.name for f in fields(TrainConfig)]
    for typed, meant in {
        "learnig_rate": "learning_rate",
        "max_stesp": "max_steps",
        "modle": "model",
        "sed": "seed",
    }.items():
        assert nearest(known, typed) == meant
    for typed in ("image_size", "portal", "foo", "vocab_size", "save_all"):
        assert nearest(known, typed) is None, (typed, nearest(known, typed))
    assert nearest(known, "batch_size") != "block_size"


def test_aliases_are_no_fields_and_name_fields():
    names = {name for names in SAME.values() for name in names.split()} | set(CHANGES)
    own = {cls: {f.name for f in fields(cls)} for cls in CONFIGS}
    for ours in SAME:
        assert any(ours in known for known in own.values()), ours
    assert not names & own[TrainConfig]
    assert len(names) == sum(len(names.split()) for names in SAME.values()) + len(set(CHANGES) - {
        name for names in SAME.values() for name in names.split()
    })  # fmt: skip


def test_answers_name_only_flags_that_exist():
    known = {f.name for cls in CONFIGS for f in fields(cls)}
    for names, _, sentence in ANSWERS:
        assert set(re.findall(r"--(\w+)", sentence)) <= known, names


def test_scripts_take_aliases(settings, tmp_path):
    """Through the door: the words of run_clm.py train the model that our words train."""
    done = run_script(
        "train.py", "--model_name_or_path", settings["model"], "--train_file", *settings["corpus"], "--max_seq_length", "16",
        "--max_train_steps", "2", "--do_train", "--do_eval", "--overwrite_output_dir", "--output_dir", tmp_path / "brain",
        "--log_dir", tmp_path / "runs", "--report_to", "none", "--optim", "adamw_hf", "--dataloader_num_workers", "4",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "note: overwrite_output_dir changes nothing here" in done.stderr
    assert (tmp_path / "brain" / "config.json").exists()
    assert run_script("generate.py", "--help").stdout.count("llama.cpp") == 1
