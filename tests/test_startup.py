"""What happens while Python imports: nothing that outlives it but memory that is ready."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from mori.config import TrainConfig
from mori.speed.startup import training_memory

HELD = """
import gc, sys
from mori.speed import startup
startup._TOUCHED_AT_MOST = 80 << 20
def resident():
    return int(open("/proc/self/statm").read().split()[1])
try:
    with startup.imports(int(sys.argv[1])):
        if sys.argv[2:]: raise ImportError("no torch")
except ImportError: pass
assert gc.isenabled()
before = resident()
asked_for = [bytearray(1 << 24) for _ in range(4)]
print(resident() - before)
"""


def test_imports_read_transformers_own_files_once_and_leave_python_as_it_was():
    code = (
        "import functools, gc; bounded = functools.lru_cache\n"
        "from mori.speed.startup import imports\n"
        "with imports(): import transformers.models\n"
        "assert functools.lru_cache is bounded and gc.isenabled()\n"
        "scan = transformers.utils.import_utils.create_import_structure_from_path.cache_info()\n"
        "assert scan.misses == scan.currsize > 300 and scan.hits, scan"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="what is freed goes back to the system")
@pytest.mark.parametrize("words", [[], ["fails"]], ids=["imported", "not imported"])
def test_memory_is_got_from_the_system_meanwhile(words):
    """What the process holds already it does not ask for again (proc(5), statm)."""

    def more(memory: int) -> int:
        """Bytes that the process grows by when it asks for 64 MiB."""
        command = [sys.executable, "-c", HELD, str(memory), *words]
        pages = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    assert more(0) > 60 << 20
    assert more(80 << 20) < 4 << 20
    assert more(1 << 60) < 4 << 20  # there is not so much: the most that is touched


def test_training_takes_memory_for_four_numbers_a_weight(tmp_path):
    for number in range(2):
        (tmp_path / f"model-0000{number}-of-00002.safetensors").write_bytes(bytes(1000))
    config = {"model": str(tmp_path), "device": "cpu"}
    assert training_memory(TrainConfig(**config)) == 4 * 2000
    for changed in ({"device": "cuda"}, {"dtype": "bfloat16"}, {"optim": "adamw_bnb_8bit"}, {"model": "mini"}):
        assert training_memory(TrainConfig(**{**config, **changed})) == 0


def test_what_is_wrong_with_a_model_is_not_told_yet(tmp_path):
    (tmp_path / "model.safetensors").symlink_to("nowhere")
    for name in (str(tmp_path), "a\0b", "~nobody-of-that-name/model", str(tmp_path / "none")):
        assert training_memory(TrainConfig(model=name, device="cpu")) == 0


@pytest.mark.parametrize("there", [True, False])
def test_no_memory_is_made_ready_for_a_model_that_goes_to_a_gpu(tmp_path, monkeypatch, there):
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    monkeypatch.setattr("mori.speed.startup._GPUS", [str(tmp_path) if there else str(tmp_path / "none")])
    assert training_memory(TrainConfig(model=str(tmp_path))) == (0 if there else 4000)


def test_what_the_first_step_does_not_need_is_not_imported_before_it(settings):
    code = (
        "import json, sys\n"
        "from mori.train import TrainConfig, train\n"
        "config = TrainConfig(**json.loads(sys.argv[1]))\n"
        "unneeded = {'tensorboard', 'datasets', 'matplotlib', 'bitsandbytes', 'torch._inductor.compile_fx'}\n"
        "train(config, on_step=lambda step, _: print(step, sorted(unneeded & set(sys.modules))))"
    )
    changed = {"eval_on_start": False, "max_steps": 2, "logging_steps": 2}
    words = [sys.executable, "-c", code, json.dumps({**settings, **changed})]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert "\n1 []\n" in done.stdout, done.stderr
    assert "\n2 ['tensorboard']\n" in done.stdout
