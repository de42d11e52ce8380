"""The commands from Python: `mori.train(...)`, `mori.generate(...)`, `mori.evaluate(...)`, also twice in one process."""

import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import numpy
import pytest
import torch
from conftest import ROOT, assert_equal_weights, run_script

import mori
import mori.run
from mori import optim
from mori.cli import UserError, checked
from mori.config import TrainConfig
from mori.data.files import SHIPPED


def python(code: str, *words: object, **options) -> subprocess.CompletedProcess:
    """Run a program that imports `mori`."""
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **{"cwd": ROOT, **options})


# ------------------------------------------------------------------------------------------------------ values
@pytest.mark.parametrize("prompt", ["Halo semua", ["Halo semua"], ("Halo semua",), Path("Halo semua")])
def test_config_reads_a_text_as_one_prompt(prompt):
    assert TrainConfig(prompt=prompt).prompt == ["Halo semua"]


def test_config_reads_paths_tuples_and_numbers_as_flags_do():
    config = checked(
        TrainConfig(
            model=Path("a/b"),
            corpus=(Path("c"), "d"),
            learning_rate=1,
            eval_steps=numpy.int64(6),
            max_steps=numpy.int32(5),
            weight_decay=numpy.float32(0.5),
            output_dir=Path("e"),
            suppress_tokens=7,
            bad_words_ids=([5],),
        )
    )
    assert (config.model, config.corpus, config.output_dir) == ("a/b", ["c", "d"], "e")
    assert (config.learning_rate, config.eval_steps, config.max_steps, config.weight_decay) == (1.0, 6.0, 5, 0.5)
    assert type(config.learning_rate) is type(config.eval_steps) is type(config.weight_decay) is float
    assert type(config.max_steps) is int and config.suppress_tokens == [7] and config.bad_words_ids == [[5]]


@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("max_steps", "fifty", "a whole number"),
        ("max_steps", 50.0, "a whole number"),
        ("max_steps", True, "a whole number"),
        ("max_steps", None, "a whole number"),
        ("learning_rate", "1e-4", "a number"),
        ("learning_rate", [1e-4], "a number"),
        ("document_mask", 1, "true or false"),
        ("model", 5, "text"),
        ("model", ["mini"], "text"),
        ("prompt", 5, "text or a list of texts"),
        ("prompt", None, "text or a list of texts"),
        ("corpus", ["a", 5], "text or a list of texts"),
        ("suppress_tokens", ["a"], "whole numbers"),
        ("bad_words_ids", "a", "a list"),
        ("lr_scheduler_kwargs", "a", "a table of names and values"),
    ],
)
def test_config_names_the_field_and_the_type_of_a_wrong_value(name, value, expected):
    with pytest.raises(UserError) as error:
        checked(TrainConfig(**{name: value, "block_size": 0}))
    assert str(error.value).startswith(f"{name} is {value!r}, must be {expected}") or str(error.value).startswith(
        "block"
    )
    assert f"{name} is {value!r}, must be {expected}" in str(error.value) and "block_size is 0" in str(error.value)


def test_config_shortens_a_long_value():
    with pytest.raises(UserError, match=r"^model is \[0, 1, .*\.\.\., must be text$") as error:
        checked(TrainConfig(model=list(range(1000))))
    assert len(str(error.value)) < 100


def test_unknown_keyword_is_told_with_the_nearest():
    for call in (TrainConfig, mori.train):
        with pytest.raises(UserError, match="learning_rat; did you mean --learning_rate"):
            call(learning_rat=1)
    with pytest.raises(mori.UserError, match="top_kk; did you mean --top_k"):
        mori.generate("m", "Halo", top_kk=1)


def test_call_takes_the_names_of_other_programs(tmp_path):
    with pytest.raises(UserError, match="learning_rate is -1.0, must be above 0"):
        mori.train(lr=-1)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: mori.train("mini", model="mini"), "model is given twice"),
        (lambda: mori.train("mini", "a.txt", 5), "only model and corpus may stand without a name"),
        (lambda: mori.train(corpus="gone.txt"), "corpus gone.txt does not exist"),
        (lambda: mori.generate("mini"), "to be trained first"),
        (lambda: mori.generate("m", "a", interactive=True), "for the command line"),
        (lambda: mori.evaluate("m", Path("gone.txt")), "corpus gone.txt does not exist"),
    ],
)
def test_call_raises_a_mistake_of_one_line(call, message):
    with pytest.raises(mori.UserError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------ the package
def test_package_imports_no_torch_before_it_is_used():
    code = (
        "import sys, mori; mori.UserError, mori.TrainConfig, mori.__version__, dir(mori), mori.generate\n"
        "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)\n"
        "import mori.config; assert 'train' in dir(mori)\n"
        "try: mori.trian\n"
        "except AttributeError as error: print(error)"
    )
    done = python(code)
    assert done.stdout == "module 'mori' has no attribute 'trian'\n", done.stderr


@pytest.mark.parametrize(
    "imports",
    [
        "import mori",
        "import mori.train",
        "from mori.train import train_step; import mori",
        "import mori.run, mori.evaluate, mori",
        "import mori; from mori import train, evaluate",
    ],
)
def test_train_is_module_and_function_in_any_order(imports):
    code = (
        f"{imports}\n"
        "for name in ('train', 'evaluate'):\n"
        "    try: getattr(mori, name)(corpus='gone.txt')\n"
        "    except mori.UserError as error: print(error)\n"
        "from mori.train import train; assert mori.train.train is train and callable(mori.train.train_step)"
    )
    done = python(code)
    assert done.stdout.count("corpus gone.txt does not exist") == 2, done.stderr


# ------------------------------------------------------------------------------------------------------ the calls
@pytest.fixture
def call(settings):
    """The keywords of a run of a few seconds, without its model."""
    return {name: value for name, value in settings.items() if name != "model"}


def test_train_returns_the_summary_of_the_command(call, settings, small_model, text_file, run_train, tmp_path):
    call = {**call, "corpus": text_file, "prompt": "Halo"}
    summary = mori.train(small_model, **call)
    assert summary == json.loads((tmp_path / "runs" / "run" / "summary.json").read_text()) and summary["steps"] == 12
    again = mori.train(TrainConfig(**settings))
    assert again == summary, "the run is finished"
    run_train(run_name="command", output_dir=str(tmp_path / "command"))
    assert_equal_weights(tmp_path / "brain", tmp_path / "command")


def test_generate_returns_the_texts_of_the_command(small_model):
    words = ("--num_return_sequences", "2", "--max_new_tokens", "5", "--seed", "3", "--top_k", "50")
    done = run_script("generate.py", "--model", small_model, "--prompt", "Halo", "Apa", *words, "--json")
    expected = [entry["prompt"] + entry["text"] for entry in json.loads(done.stdout)]
    options = {"num_return_sequences": 2, "max_new_tokens": 5, "seed": 3, "top_k": 50}
    assert mori.generate(small_model, ["Halo", "Apa"], **options) == expected
    assert mori.generate(str(small_model), prompt="Halo", **options) == expected[:2]


def test_evaluate_returns_the_scores_of_the_command(small_model, text_file, tmp_path, capsys):
    options = {"block_size": 16, "logging_dir": tmp_path}
    result = mori.evaluate(small_model, text_file, **options)
    assert capsys.readouterr().out == ""
    words = ("--block_size", "16", "--logging_dir", tmp_path, "--json")
    done = run_script("evaluate.py", "--model", small_model, "--corpus", text_file, *words)
    assert result == json.loads(done.stdout)


def test_lines_of_the_readme_run(tmp_path, monkeypatch):
    [lines] = re.findall(r"^```python\n(import mori\n.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    monkeypatch.chdir(tmp_path)
    for name in ("my_text.txt", "another.txt"):
        shutil.copy(sorted(SHIPPED.glob("*.txt"))[0], name)
    names: dict = {}
    eval(compile(lines.replace("max_steps=50", "max_steps=2"), "README.md", "exec"), names)
    assert names["summary"]["steps"] == 2 and Path("runs/mini-my_text/summary.json").is_file()
    assert [text[:4] for text in names["texts"]] == ["Halo", "Jadi"] and names["scores"]["loss"] > 0


# ------------------------------------------------------------------------------------------- a notebook's process
def test_three_runs_in_one_process_equal_one(call, small_model, tmp_path):
    """Also from another thread, which may set no signal handlers."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    threads, collects = torch.get_num_threads(), gc.isenabled()

    def train(name: str) -> None:
        mori.train(small_model, **call | {"run_name": name, "output_dir": tmp_path / name})

    train("first")
    train("second")
    thread = threading.Thread(target=train, args=("third",))
    thread.start()
    thread.join()
    for name in ("second", "third"):
        assert_equal_weights(tmp_path / "first", tmp_path / name)
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert (threads, collects) == (torch.get_num_threads(), gc.isenabled())


def test_train_restores_the_settings_of_pytorch(call, small_model, monkeypatch):
    """A GPU run changes them."""
    real, before = mori.run.build_module, torch.get_float32_matmul_precision()

    def as_on_a_gpu(*arguments, **options):
        torch.set_float32_matmul_precision("medium")
        torch.backends.cuda.enable_cudnn_sdp(False)
        return real(*arguments, **options)

    monkeypatch.setattr(mori.run, "build_module", as_on_a_gpu)
    mori.train(small_model, **call | {"max_steps": 1})
    assert torch.get_float32_matmul_precision() == before and torch.backends.cuda.cudnn_sdp_enabled()


def interrupt_at(monkeypatch, call_number: int) -> None:
    """A Ctrl-C in a step."""
    real, calls = optim.set_learning_rate, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == call_number:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments)

    monkeypatch.setattr(optim, "set_learning_rate", interrupted)


def test_interrupted_call_saves_and_the_same_call_goes_on(call, small_model, tmp_path, monkeypatch):
    mori.train(small_model, **call | {"run_name": "whole", "output_dir": tmp_path / "whole"})
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5)
        with pytest.raises(KeyboardInterrupt, match="saved at step 5") as stop:
            mori.train(small_model, **call)
    assert isinstance(stop.value, mori.Interrupted) and not isinstance(stop.value, Exception)
    assert mori.train(small_model, **call)["steps"] == 12
    assert_equal_weights(tmp_path / "whole", tmp_path / "brain")


@pytest.mark.parametrize("ends_by", ["itself", "Ctrl-C", "a failure"])
def test_memory_of_a_run_is_free_when_it_ends(call, small_model, monkeypatch, request, ends_by):
    """A notebook keeps the last error, whose frames would keep the model."""
    models, real = [], mori.run.build_module

    def remembered(model, *arguments, **options):
        models.append(weakref.ref(model))
        return real(model, *arguments, **options)

    monkeypatch.setattr(mori.run, "build_module", remembered)
    request.addfinalizer(gc.enable)
    gc.disable()
    kept = None
    if ends_by == "itself":
        mori.train(small_model, **call)
    elif ends_by == "Ctrl-C":
        interrupt_at(monkeypatch, 3)
        try:
            mori.train(small_model, **call)
        except KeyboardInterrupt as error:
            kept = error
    else:
        monkeypatch.setattr(optim, "set_learning_rate", lambda *_: _out_of_memory())
        try:
            mori.train(small_model, **call)
        except mori.RunFailed as error:
            kept = error
    assert (kept is None) == (ends_by == "itself") and len(models) == 1
    assert models[0]() is None


def _out_of_memory():
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_two_runs_of_one_program_under_torchrun(settings, tmp_path):
    """The second run does not meet the addresses of the first."""
    program = tmp_path / "program.py"
    program.write_text(
        "import json, sys, mori\n"
        "settings = json.loads(sys.argv[1])\n"
        "for name in ('first', 'second'):\n"
        "    mori.train(**settings | {'run_name': name, 'output_dir': settings['output_dir'] + name})\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", program]
    done = subprocess.run(
        [*map(str, torchrun), json.dumps(settings | {"max_steps": 2})],
        cwd=ROOT, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert_equal_weights(tmp_path / "brainfirst", tmp_path / "brainsecond")
