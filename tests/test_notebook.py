"""The notebook of Module 11 runs from its first cell to its last, and goes on after its machine was lost."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT, assert_equal_weights
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

from mori.config import TrainConfig
from mori.train import train

NOTEBOOK = ROOT / "scripts/modul_11.ipynb"
TRAINING = {"block_size": 16, "learning_rate": 1e-3, "max_steps": 8, "save_steps": 3, "eval_steps": 4}
TRAINING |= {"max_new_tokens": 5, "max_eval_windows": 4}

# What Colab has beside Jupyter: a Drive, and a button that uploads the next file of $UPLOADS.
COLAB = """
import os
from pathlib import Path

class drive:
    mount = print

class files:
    def upload():
        path = min(Path(os.environ["UPLOADS"]).iterdir())
        content = path.read_bytes()
        path.unlink()
        return {path.name: content}
"""

# In the place of the settings: pip only tells what it was asked for, and the keyboard types two lines.
SETTINGS = """
import importlib.metadata
from IPython import get_ipython

installed = importlib.metadata.distributions
importlib.metadata.distributions = lambda **about: [] if about.get("name") == "mori" else installed(**about)
get_ipython().register_magic_function(lambda line: print("pip", line), magic_name="pip")
typed = iter(["Halo semua,", "/quit"])
get_ipython().kernel.raw_input = lambda prompt="": next(typed)
PAKAI_DRIVE, KORPUS, MODEL = True, "mori_corpus.txt", "cahya/gpt2-small-indonesian-522M"
"""

KILL = """
import os, signal
import mori.optim

steps, set_learning_rate = iter(range(5)), mori.optim.set_learning_rate

def killed_at_the_sixth(*arguments):
    if next(steps, None) is None:
        os.kill(os.getpid(), signal.SIGKILL)
    set_learning_rate(*arguments)

mori.optim.set_learning_rate = killed_at_the_sixth
"""


class Machine:
    """A machine on which the notebook runs: a folder, with Colab's modules or without.

    Args:
        folder: all files are under it.
        colab: whether the machine is Colab's; `drive` and `uploads` stay if the machine is lost.
    """

    def __init__(self, folder: Path, colab: bool):
        self.folder, self.drive, self.uploads = folder, folder / "drive/mori", folder / "uploads"
        self.modules = folder / "modules"
        (self.modules / "google").mkdir(parents=True)
        self.uploads.mkdir()
        if colab:
            (self.modules / "google/colab.py").write_text(COLAB)

    def run(self, name: str, cells: int | None = None, insert: str = "", project: str = "") -> list[str]:
        """Execute the first `cells` cells in the new folder `name`; returns what each printed or showed.

        `insert` is executed before the training; `project` is what the settings name. Raises DeadKernelError if the kernel
        is killed.
        """
        notebook = nbformat.read(NOTEBOOK, as_version=4)
        settings = f"{SETTINGS}\nPROYEK, FOLDER_DRIVE, SETELAN = {project!r}, {str(self.drive)!r}, {TRAINING!r}\n"
        ids = [cell.id for cell in notebook.cells]
        notebook.cells[ids.index("pengaturan")].source = settings
        notebook.cells[ids.index("latih")].source = insert + notebook.cells[ids.index("latih")].source
        notebook.cells = notebook.cells[:cells]
        folder = self.folder / name
        folder.mkdir()
        path = [str(self.modules), str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "TMPDIR": str(self.folder),  # where TensorBoard notes its process
            "UPLOADS": str(self.uploads),
        }
        client = NotebookClient(notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": folder}})
        client.execute(env=environment)
        return [_shown(cell) for cell in notebook.cells]

    def stop_tensorboard(self) -> None:
        """Kill the servers that the notebook has started."""
        for path in (self.folder / ".tensorboard-info").glob("*.info"):
            os.kill(json.loads(path.read_text())["pid"], signal.SIGKILL)


def _shown(cell) -> str:
    """All text of a cell's outputs."""
    outputs = cell.get("outputs", [])
    return "".join(output.get("text", "") + str(output.get("data", "")) for output in outputs)


@pytest.fixture
def machine(tmp_path):
    """A function that makes the machine; its servers end with the test."""
    machines = []

    def make(colab: bool) -> Machine:
        machines.append(Machine(tmp_path, colab))
        return machines[0]

    yield make
    for each in machines:
        each.stop_tensorboard()


def test_notebook_is_valid_short_and_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert len(notebook.cells) <= 8 and all(cell.id for cell in notebook.cells)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)


def test_notebook_killed_in_training_goes_on_to_the_weights_of_a_run_never_killed(machine, text_file, tmp_path):
    colab = machine(colab=True)
    (colab.uploads / "1-mori-main.zip").write_bytes(b"the project")
    shutil.copy(text_file, colab.uploads / "2-transkrip.txt")

    with pytest.raises(DeadKernelError):
        colab.run("machine 1", insert=KILL)
    project = colab.drive / "proyek/1-mori-main.zip"
    assert project.read_bytes() == b"the project"
    assert (colab.drive / "korpus/2-transkrip.txt").read_bytes() == text_file.read_bytes()
    shutil.rmtree(colab.folder / "machine 1")  # what Colab does

    shown = colab.run("machine 2")
    assert "/content/drive\n" in shown[2] and f'pip install --quiet "{project}"\n' in shown[2]
    assert "mini" in shown[3]
    assert "iframe" in shown[4]
    assert "checkpoints/step-00000003" in shown[5]
    assert shown[6].count("Terima kasih") >= 3
    assert "Halo semua," in shown[7]

    never_killed = {"model": "mini", "corpus": [str(text_file)], "output_dir": str(tmp_path / "brain"), **TRAINING}
    train(TrainConfig(**never_killed, logging_dir=str(tmp_path / "runs")))
    assert_equal_weights(colab.drive / "mori_brain_coba", tmp_path / "brain")


def test_notebook_outside_colab_takes_the_shipped_transcripts_and_the_preset(machine):
    shown = machine(colab=False).run("here", cells=4, project=str(ROOT))
    assert "Ini bukan Colab" in shown[2] and f'pip install --quiet "{ROOT}"\n' in shown[2]
    assert "transkrip bawaan | Model: mini" in shown[3]


@pytest.mark.parametrize("suffix, requirement", [("", "git+https://host/mori"), (".zip", "https://host/mori.zip")])
def test_notebook_installs_the_project_from_an_address(machine, suffix, requirement):
    shown = machine(colab=False).run("here", cells=3, project=f"https://host/mori{suffix}")
    assert f'pip install --quiet "{requirement}"\n' in shown[2]


def test_notebook_never_asks_the_package_index_for_a_project_that_is_not_there(machine):
    with pytest.raises(CellExecutionError, match="FileNotFoundError"):
        machine(colab=False).run("here", cells=3, project="mori")
