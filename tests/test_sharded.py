"""Checkpoints of a model that is divided over ranks: whole tensors in several files, for any number of ranks."""

import json
import shutil

import pytest
import torch
import torch.distributed as dist
from ranks import in_ranks
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from transformers import AutoModelForCausalLM, GPT2Config

from mori.checkpoint import checkpoints, shards, writing
from mori.checkpoint.tensors import HostMemory
from mori.distributed import Runtime, nodes

LAYOUTS = {"2 ranks": (2,), "3 ranks": (3,), "2 x 2 ranks": (2, 2)}  # the last: two replicas of two parts
CONFIG = GPT2Config(vocab_size=33, n_positions=8, n_embd=6, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)


def whole_model(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A GPT-2 with tied embeddings, and AdamW with random moments for it."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        moments = {name: torch.randn_like(parameter).square() for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(3.0 + seed), **moments}
    return model, optimizer


def divided(layout: tuple[int, ...], seed: int = 0):
    """The same by FSDP2: the model, the optimizer of this rank's parts, and `as_saved` for its state."""
    model, whole = whole_model(seed)
    moments = list(whole.state.values())
    mesh = init_device_mesh("cpu", layout, mesh_dim_names=("replicate", "shard")[-len(layout) :])
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    parameters = list(model.parameters())
    parts = [nn.Parameter(parameter.detach().to_local()) for parameter in parameters]
    optimizer = torch.optim.AdamW(parts)
    for parameter, part, state in zip(parameters, parts, moments, strict=True):
        index = shards.rows(parameter)
        optimizer.state[part] = {name: value[index].clone() if value.dim() else value for name, value in state.items()}

    def as_saved(number: int, tensor: torch.Tensor) -> torch.Tensor:
        like = parameters[number]
        if tensor.shape != like.to_local().shape:
            return tensor
        return DTensor.from_local(
            tensor, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )

    return model, optimizer, as_saved


def save_divided(root, layout, **options) -> None:
    """Save the checkpoint of step 5 with ranks in this layout."""

    def action(rank: int) -> None:
        model, optimizer, as_saved = divided(layout)
        ranks = dist.get_world_size()
        taken = writing.snapshot(
            5, model=model, optimizer=optimizer, state={"note": 1}, beside={"config.json": CONFIG.to_json_string().encode()},
            as_saved=as_saved, ranks=ranks, **options,
        )  # fmt: skip
        total = sum(p.nbytes for p in model.parameters())
        for content in taken.tensors.values():  # a share and a tensor at most, and a number a tensor
            largest = max((tensor.nbytes for tensor in content.values()), default=0)
            assert sum(tensor.nbytes for tensor in content.values()) <= 2 * total / ranks + largest + 200
        parts = [None] * ranks
        dist.all_gather_object(parts, writing.stage(root, taken))
        if rank == 0:
            writing.publish(root, 5, *parts)

    in_ranks(layout[0] * layout[-1] if len(layout) > 1 else layout[0], action)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a checkpoint by three ranks."""
    root = tmp_path_factory.mktemp("saved")
    save_divided(root, (3,))
    return checkpoints.folder_of(root, 5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_checkpoint_of_several_ranks_holds_whole_tensors_and_loads_with_transformers(layout, tmp_path):
    save_divided(tmp_path, LAYOUTS[layout])
    [folder] = checkpoints.published(tmp_path)
    checkpoints.verify(folder)
    model, optimizer = whole_model()
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    files = sorted(folder.glob("optimizer-*.safetensors"))
    assert len(files) >= 2 and len(list(folder.glob("model-*.safetensors"))) >= 2
    moments = {name: tensor for path in files for name, tensor in load_file(path).items()}
    for number, state in enumerate(optimizer.state.values()):
        for name, tensor in state.items():
            assert torch.equal(moments.pop(f"{number}.{name}"), tensor)
    assert not moments


def test_checkpoint_of_several_ranks_names_the_files_of_each(saved):
    manifest = json.loads((saved / "manifest.json").read_text())
    ranks = manifest["files_of_ranks"]
    assert [f"model-{n:05d}-of-00003.safetensors" in ranks[n - 1] for n in (1, 2, 3)] == [True] * 3
    assert sorted(name for files in ranks for name in files) == sorted(manifest["files"])
    assert {path.name for path in saved.iterdir()} == {*manifest["files"], "manifest.json"}
    assert checkpoints.files_of_the_run(saved) == [
        "manifest.json", *(f"optimizer-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)), "state.json"
    ]  # fmt: skip


def test_checkpoint_of_several_ranks_resumes_in_one_process(saved):
    expected_model, expected = whole_model()
    model, optimizer = whole_model(seed=1)
    checkpoints.load_tensors(saved, model, optimizer)
    assert_equal_states(model.state_dict(), expected_model.state_dict())
    for state, other in zip(optimizer.state.values(), expected.state.values(), strict=True):
        assert_equal_states(state, other)
    assert checkpoints.load_state(saved)["note"] == 1


def assert_equal_states(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize("source", ["one process", "3 ranks"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_checkpoint_resumes_on_any_number_of_ranks(source, layout, saved, tmp_path):
    folder = saved
    if source == "one process":
        model, optimizer = whole_model()
        folder = writing.save(tmp_path, 5, model=model, optimizer=optimizer, state={})

    def action(rank: int) -> None:
        expected_model, expected, _ = divided(LAYOUTS[layout])
        model, optimizer, as_saved = divided(LAYOUTS[layout], seed=1)
        checkpoints.load_tensors(folder, model, optimizer, as_saved)
        for parameter, other in zip(model.parameters(), expected_model.parameters(), strict=True):
            assert torch.equal(parameter.to_local(), other.to_local())
        for state, other in zip(optimizer.state.values(), expected.state.values(), strict=True):
            assert_equal_states(state, other)

    sizes = LAYOUTS[layout]
    in_ranks(sizes[0] * sizes[-1] if len(sizes) > 1 else sizes[0], action)


def test_gather_gives_the_owner_alone_the_whole_of_any_tensor():
    """Parts of different lengths and without rows, every type, replicas."""

    def action(rank: int) -> None:
        line, grid = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
        shapes = [(9, 2), (2, 3), (4,), (0, 3), (1,)]
        dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool]
        cases = [(line, [Shard(0)], shape) for shape in shapes]
        cases += [(line, [Replicate()], (3, 5))]
        cases += [(grid, [Replicate(), Shard(0)], (5, 2)), (grid, [Shard(0), Replicate()], (5, 2))]
        for number, (mesh, placements, shape) in enumerate(cases):
            for owner in range(4):
                torch.manual_seed(number)
                whole = torch.randint(0, 2, shape).to(dtypes[(number + owner) % 5])
                tensor = distribute_tensor(whole, mesh, placements)
                assert torch.equal(whole[shards.rows(tensor)], tensor.to_local())
                gathered = shards.gather(tensor, owner)
                assert (gathered is None) == (rank != owner)
                assert gathered is None or torch.equal(gathered, whole) and gathered.dtype == whole.dtype
        sums = DTensor.from_local(torch.ones(3), line, [Partial()])
        for tensor in (sums, distribute_tensor(torch.ones(3, 5), line, [Shard(1)])):
            with pytest.raises(TypeError, match="cannot be saved with the placements"):
                shards.gather(tensor, 0)

    in_ranks(4, action)


def test_owners_divide_the_bytes_and_plain_tensors_belong_to_the_first():
    def action(rank: int) -> None:
        mesh = init_device_mesh("cpu", (2,))
        tensors = {str(n): distribute_tensor(torch.ones(n + 1, 8), mesh, [Shard(0)]) for n in range(30)}
        tensors["step"] = torch.ones(())
        owner = shards.owners(tensors, 4)
        shares = [sum(t.nbytes for n, t in tensors.items() if owner[n] == r) for r in range(4)]
        assert max(shares) <= sum(shares) / 4 + 30 * 32 and min(shares) >= sum(shares) / 4 - 30 * 32
        assert list(owner.values())[:-1] == sorted(list(owner.values())[:-1]) and owner["step"] == 0
        assert set(shards.owners(tensors, 1).values()) == {0}

    in_ranks(2, action)


def test_snapshot_of_several_ranks_does_not_change_with_the_model(tmp_path):
    def action(rank: int) -> None:
        model, optimizer, as_saved = divided((2,))
        memory = HostMemory()
        for _ in range(2):
            taken = writing.snapshot(
                5, model=model, optimizer=optimizer, state={}, as_saved=as_saved, ranks=2, memory=memory
            )
        before = {n: t.clone() for content in taken.tensors.values() for n, t in content.items()}
        with torch.no_grad():
            for tensor in [*model.parameters(), *(t for s in optimizer.state.values() for t in s.values())]:
                (tensor.to_local() if isinstance(tensor, DTensor) else tensor).add_(1)
        after = {n: t for content in taken.tensors.values() for n, t in content.items()}
        assert before and all(torch.equal(after[name], tensor) for name, tensor in before.items())

    in_ranks(2, action)


@pytest.mark.parametrize("number", range(10))
@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_damage_to_any_file_of_any_rank_sets_the_checkpoint_aside(saved, number, damage, tmp_path):
    names = sorted(path.name for path in saved.iterdir())
    assert len(names) == 10
    shutil.copytree(saved, tmp_path / "step-00000005")
    model, optimizer = whole_model()
    writing.save(tmp_path, 4, model=model, optimizer=optimizer, state={})
    path = tmp_path / "step-00000005" / names[number]
    raw = bytearray(path.read_bytes())
    if damage == "delete":
        path.unlink()
    else:
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw if damage == "flip" else raw[: len(raw) // 2])
    messages = []
    assert checkpoints.newest(tmp_path, messages.append).name == "step-00000004"
    assert len(messages) == 1 and names[number] in messages[0] and (tmp_path / "step-00000005.corrupt").is_dir()


def test_manifest_says_that_its_files_are_those_of_one_rank_or_of_several(saved, tmp_path):
    for number, replaced in (("2", "1"), ("1", "2"), ("2", "3")):
        folder = tmp_path / number / replaced / "step-00000005"
        if number == "2":
            shutil.copytree(saved, folder)
        else:
            model, optimizer = whole_model()
            writing.save(folder.parent, 5, model=model, optimizer=optimizer, state={})
        text = (folder / "manifest.json").read_text()
        (folder / "manifest.json").write_text(text.replace(f'"format": {number}', f'"format": {replaced}'))
        with pytest.raises(checkpoints.CorruptCheckpoint, match=f"has format {replaced}"):
            checkpoints.verify(folder)


def test_manifest_of_several_ranks_is_sealed_with_who_wrote_what(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "step-00000005")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files_of_ranks"].reverse()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(checkpoints.CorruptCheckpoint, match="its seal differs"):
        checkpoints.verify(folder)


def test_ranks_share_the_hashing_of_a_checkpoint_and_agree_on_what_is_damaged(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "step-00000005")
    model, optimizer = whole_model()
    writing.save(tmp_path, 4, model=model, optimizer=optimizer, state={})
    path = tmp_path / "step-00000005" / "optimizer-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    files = sorted(json.loads((saved / "manifest.json").read_text())["files"])

    def action(rank: int) -> None:
        hashed, describe, messages = [], checkpoints.describe, []
        checkpoints.describe = lambda file: (hashed.append(file.name), describe(file))[1]
        runtime = Runtime(torch.device("cpu"), rank, 3, "fp32")
        nodes.verify_together(runtime, saved)
        everywhere = runtime.gather(hashed)
        assert sorted(name for names in everywhere for name in names) == files
        assert min(map(len, everywhere)) >= 2  # of nine files
        assert nodes.newest_checkpoint(runtime, tmp_path, messages.append).name == "step-00000004"
        assert len(messages) == (rank == 0) and path.name in "".join([*messages, path.name * (rank > 0)])

    in_ranks(3, action)
    assert (tmp_path / "step-00000005.corrupt").is_dir()
