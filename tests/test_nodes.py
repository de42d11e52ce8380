"""Nodes without a shared disk: three ranks, each with a folder that the others do not see."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as multiprocessing
from conftest import ROOT, flags, stop_after

from mori import distributed
from mori.checkpoint import checkpoints, writing
from mori.cli import UserError
from mori.distributed import nodes

RANKS = 3


def save(root: Path, step: int, value: float = 0.0) -> Path:
    """A checkpoint whose weights are `value`."""
    model = torch.nn.Linear(600, 400)  # more than one block
    torch.nn.init.constant_(model.weight, value)
    torch.nn.init.constant_(model.bias, value)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return writing.save(root, step, model=model, optimizer=optimizer, state={}, beside={"a/b.txt": b"", "c.txt": b"c"})


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def one_rank_lacks_it(rank: int, root: Path) -> None:
    if rank != 1:
        save(root, 4)
        save(root, 8)


def the_main_rank_lacks_all(rank: int, root: Path) -> None:
    if rank == 2:
        save(root, 4)


def each_has_another_damage(rank: int, root: Path) -> None:
    save(root, 4)
    damage(save(root, 8) / ["model.safetensors", "optimizer.safetensors", "c.txt"][rank])


def each_has_a_part(rank: int, root: Path) -> None:
    folder = save(root, 8)
    for name in {"model.safetensors", "optimizer.safetensors", "state.json"} - {sorted(checkpoints.read_manifest(folder)["files"])[rank + 2]}:  # fmt: skip
        (folder / name).unlink()


def a_manifest_is_damaged(rank: int, root: Path) -> None:
    folder = save(root, 8)
    if rank == 0:
        damage(folder / "manifest.json")


def the_newest_is_damaged_everywhere(rank: int, root: Path) -> None:
    save(root, 4)
    damage(save(root, 8) / "model.safetensors")


def a_part_is_on_no_rank(rank: int, root: Path) -> None:
    (save(root, 8) / "optimizer.safetensors").unlink()


def they_rounded_otherwise(rank: int, root: Path) -> None:
    save(root, 8, value=float(rank == 1))


def there_is_none(rank: int, root: Path) -> None:
    pass


CASES = {
    one_rank_lacks_it: 8,
    the_main_rank_lacks_all: 4,
    each_has_another_damage: 8,
    each_has_a_part: 8,
    a_manifest_is_damaged: 8,
    the_newest_is_damaged_everywhere: 4,
    they_rounded_otherwise: 8,
    a_part_is_on_no_rank: "refused",
    there_is_none: None,
}


def rank_main(rank: int, folder: Path, port: int) -> None:
    """What each rank does: it finds its writer, and the newest checkpoint in each case; the results go to a JSON file."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    runtime = distributed.start("cpu", timeout=120)
    own = folder / f"rank-{rank}"
    results = {"shared": nodes.first_that_sees(runtime, folder), "own": nodes.first_that_sees(runtime, own)}
    runtime.writer = results["own"]
    for case in CASES:
        root, lines = own / case.__name__ / "checkpoints", []
        case(rank, root)
        try:
            actual = nodes.newest_checkpoint(runtime, root, lines.append)
            actual = actual and actual.relative_to(folder).as_posix()
            if actual:
                checkpoints.verify(folder / actual)
        except UserError as error:
            actual = f"refused: {error}"
        results[case.__name__] = {"actual": actual, "lines": lines}
    try:
        nodes.check_same(runtime, {"seed": 42 + (rank == 2), "epochs": 3}, "give all the same")
    except UserError as error:
        results["differing"] = str(error)
    mistakes = []
    try:
        runtime.agreed((own / "x" / "y").touch, rank == 1)
    except UserError as error:
        mistakes.append(str(error))
    results["mistakes"] = mistakes
    (folder / f"{rank}.json").write_text(json.dumps(results))
    runtime.barrier()
    runtime.close()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each rank took."""
    from tests.faults.common import free_port

    folder = tmp_path_factory.mktemp("nodes")
    for rank in range(RANKS):
        (folder / f"rank-{rank}").mkdir()
    multiprocessing.start_processes(rank_main, (folder, free_port()), RANKS, start_method="spawn")
    return folder, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


def test_first_that_sees_is_the_main_rank_of_a_shared_folder_and_each_of_its_own(results):
    folder, ranks = results
    assert [rank["shared"] for rank in ranks] == [0, 0, 0] and [rank["own"] for rank in ranks] == [0, 1, 2]
    assert not [path for path in folder.rglob(".*") if path.is_file()]


@pytest.mark.parametrize("case, step", [(case.__name__, step) for case, step in CASES.items()])
def test_newest_checkpoint_is_the_same_on_every_node(case, step, results):
    folder, ranks = results
    actual = [rank[case]["actual"] for rank in ranks]
    if step == "refused":
        assert all(
            "no whole checkpoint is left" in f and "step 8 has optimizer.safetensors on no node" in f for f in actual
        )
        return
    assert actual == [step and f"rank-{r}/{case}/checkpoints/step-{step:08d}" for r in range(RANKS)]
    if step:
        contents = [
            {
                path.relative_to(folder / f).as_posix(): path.read_bytes()
                for path in (folder / f).rglob("*")
                if path.is_file()
            }
            for f in actual
        ]
        assert contents[0] == contents[1] == contents[2] and "a/b.txt" in contents[0]
    assert not [path for path in folder.rglob("*.partial")]


def test_newest_checkpoint_says_which_rank_fetches_and_why(results):
    _, ranks = results
    assert "rank 1 on" in ranks[0]["one_rank_lacks_it"]["lines"][0] and "fetches 5 files of step-00000008" in ranks[0]["one_rank_lacks_it"]["lines"][0]  # fmt: skip
    lines = "\n".join(ranks[0]["each_has_another_damage"]["lines"])
    assert lines.count("SHA-256 differs") == 3 and "optimizer.safetensors" in lines


def test_newest_checkpoint_sets_aside_what_no_node_has_whole(results):
    folder, _ = results
    for rank in range(RANKS):
        names = {path.name for path in (folder / f"rank-{rank}/the_newest_is_damaged_everywhere/checkpoints").iterdir()}
        assert names == {"step-00000004", "step-00000008.corrupt"}


def test_ranks_agree_on_mistakes(results):
    _, ranks = results
    assert len({rank["differing"] for rank in ranks}) == 1
    assert re.fullmatch(
        r"rank 2 on \S+ differs from rank 0 on \S+ \(seed 43, not 42\); give all the same", ranks[0]["differing"]
    )
    messages = [rank["mistakes"] for rank in ranks]
    assert messages[0] == messages[1] == messages[2] and len(messages[0]) == 1
    assert messages[0][0].startswith("rank 1 on ") and messages[0][0].endswith("No such file or directory")


@pytest.mark.parametrize(
    "differing, phrase",
    [
        (
            "corpus",
            r"rank 1 on \S+ differs from rank 0 on \S+ \(the corpus's SHA-256 .*\); give every node the same text",
        ),
        ("seed", r"rank 1 on \S+ differs from rank 0 on \S+ \(seed 7, not 42\); give every node the same command"),
        ("output_dir", r"rank 1 on \S+: output_dir: \S+ contains something that is not a model"),
    ],
)
def test_nodes_that_differ_are_refused_in_one_line(differing, phrase, settings, tmp_path):
    """Each rank starts in its own folder, as on a node with its own disk."""
    for rank in range(2):
        (tmp_path / f"rank-{rank}" / "brain").mkdir(parents=True)
        (tmp_path / f"rank-{rank}" / "text.txt").write_text("Halo semua. " * (50 + (differing == "corpus") * rank))
    if differing == "output_dir":
        (tmp_path / "rank-1" / "brain" / "notes.txt").write_text("mine")
    own = {"corpus": ["text.txt"], "logging_dir": "runs", "output_dir": "brain", "seed": 42}
    words = " ".join(map(shlex.quote, flags({**settings, **own})))
    other = "--seed $((42 - 35 * RANK))" if differing == "seed" else ""
    script = f"cd {tmp_path}/rank-$RANK && exec {sys.executable} {ROOT}/scripts/train.py {words} {other}"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    done = subprocess.run([*torchrun, "bash", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    [line] = [line for line in done.stderr.splitlines() if "error: " in line and "train.py" in line]
    assert re.search(phrase, line), line
    assert done.stderr.count("Traceback") == 1  # torchrun's own
    assert not list(tmp_path.glob("*/runs/run"))


def test_ranks_that_torchrun_starts_again_for_a_node_that_joins_do_not_begin_anew(run_train, tmp_path, monkeypatch):
    """torchrun counts no restart then, and the command says `none` still."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    stop_after(8, lambda: run_train(resume_from_checkpoint="none"))
    assert run_train(resume_from_checkpoint="none")["steps"] == 12
    assert {path.name for path in (tmp_path / "runs").glob("[!.]*")} == {"run"}
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another job")
    run_train(resume_from_checkpoint="none")
    assert {path.name for path in (tmp_path / "runs").glob("[!.]*")} == {"run", "run.1"}
