"""What the tests share: a small corpus, a small model folder, and a call that trains on them."""

import os
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic matmuls on a GPU
os.environ.setdefault("OMP_NUM_THREADS", "1")  # several test processes on a few cores thrash otherwise

import pytest
import torch
from families import FAMILIES, MASK_FREE, MASK_FREE_REPRESENTATIVES, REPRESENTATIVES
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from mori import optim
from mori.config import TrainConfig
from mori.data.files import SHIPPED
from mori.distributed import Runtime
from mori.model.loading import train_tokenizer
from mori.train import train

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
STORIES = SHARED / "models" / "stories260K"
REAL_CORPUS = SHARED / "data" / "mori_corpus.txt"
needs_stories = pytest.mark.skipif(not STORIES.is_dir(), reason="the pretrained model stories260K is not at hand")
needs_corpus = pytest.mark.skipif(not REAL_CORPUS.is_file(), reason="the course's corpus is not at hand")
needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
CPU = Runtime(torch.device("cpu"), 0, 1, "fp32")


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="walk all model families instead of three representatives")


def pytest_generate_tests(metafunc):
    full = metafunc.config.getoption("--full")
    if "any_family" in metafunc.fixturenames:
        metafunc.parametrize("any_family", FAMILIES if full else REPRESENTATIVES)
    if "mask_free_family" in metafunc.fixturenames:
        metafunc.parametrize("mask_free_family", MASK_FREE if full else MASK_FREE_REPRESENTATIVES)


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE tokenizer of 320 tokens, learned from one transcript."""
    return train_tokenizer([sorted(SHIPPED.glob("*.txt"))[0].read_text(encoding="utf-8")], 320)


@pytest.fixture(scope="session")
def small_model(tmp_path_factory, tokenizer) -> Path:
    """A folder with a GPT-2 of 2 layers, context 64, dropout 0.1 and random weights, and its tokenizer."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    folder = tmp_path_factory.mktemp("small_model")
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_with_unused_parameters(tmp_path_factory, tokenizer) -> Path:
    """A folder with a GPT-2 whose cross-attention no text reaches, so that its parameters have no gradient."""
    torch.manual_seed(0)
    shape = {"n_positions": 64, "n_embd": 32, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    folder = tmp_path_factory.mktemp("model_with_unused_parameters")
    config = GPT2Config(vocab_size=len(tokenizer), add_cross_attention=True, **shape)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model_and_tokenizer(small_model):
    """The model of that folder in evaluation mode, and its tokenizer."""
    return AutoModelForCausalLM.from_pretrained(small_model).eval(), AutoTokenizer.from_pretrained(small_model)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """The first 3,000 characters of a transcript."""
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text(sorted(SHIPPED.glob("*.txt"))[1].read_text(encoding="utf-8")[:3000], encoding="utf-8")
    return path


@pytest.fixture
def deterministic():
    """Algorithms that give the same bits every time, on a GPU as well."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def two_threads():
    """Two threads in PyTorch, for code that splits its work."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def settings(small_model, text_file, tmp_path) -> dict:
    """The fields of a run of a few seconds, all of whose files are under `tmp_path`."""
    return {
        "model": str(small_model),
        "corpus": [str(text_file)],
        "block_size": 16,
        "held_out_fraction": 0.1,
        "max_steps": 12,
        "learning_rate": 1e-3,
        "eval_steps": 6,
        "save_steps": 4,
        "logging_steps": 1,
        "max_new_tokens": 5,
        "max_eval_windows": 0,
        "prompt": ["Halo"],
        "logging_dir": str(tmp_path / "runs"),
        "output_dir": str(tmp_path / "brain"),
        "run_name": "run",
    }


@pytest.fixture
def run_train(settings):
    """Train with `settings`, a few of them replaced; returns the summary."""
    return lambda **changed: train(TrainConfig(**{**settings, **changed}))


def flags(settings: dict) -> list[str]:
    """The same settings as a command line."""
    words = []
    for name, value in settings.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def run_script(script: str, *words: str, **options) -> subprocess.CompletedProcess:
    """Run `scripts/<script>` as a user does."""
    command = [sys.executable, str(ROOT / "scripts" / script), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of the model in `folder`."""
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def assert_equal_weights(one: Path, other: Path) -> None:
    """Every tensor is equal to the bit."""
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


class Stop(Exception):
    """A simulated power cut."""


def stop_after(step: int, run) -> None:
    """Run until `step` optimizer steps are begun, and break off in the middle of the next."""
    taken, real = [], optim.set_learning_rate

    def counted(*arguments):
        taken.append(1)
        if len(taken) > step:
            raise Stop
        real(*arguments)

    optim.set_learning_rate = counted
    try:
        with pytest.raises(Stop):
            run()
    finally:
        optim.set_learning_rate = real


def wait_for(path: Path, process: subprocess.Popen) -> None:
    """Wait until `path` is there, while `process` runs."""
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before its checkpoint"
        time.sleep(0.005)
