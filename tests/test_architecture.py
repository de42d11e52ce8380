"""The rules of the house: who may import whom, and what is not done anywhere."""

import ast
import re
from pathlib import Path

import pytest
from conftest import ROOT

FLOORS = {
    "config": 0, "optim": 0, "sampling": 0, "replay": 0, "attention": 0, "monitor": 0,
    "products": 0.3,  # on a CPU attention is made of products
    "loss": 0.5,  # made of products
    "startup": 0.5,  # for a config, before anything else
    "foreign": 0.5,  # a mezzanine: corpus and model both look at files before they read them
    "words": 0.6, "pieces": 0.7,  # what corpus cuts its texts with
    "corpus": 1, "data": 1, "runtime": 1, "model": 1,
    "checkpoint": 2, "decode": 2, "evaluate": 2, "diagnose": 2, "fast": 2,
    "prepare": 3, "generate": 3,
    "train": 4, "report": 4, "talk": 4,
    "compare": 5, "bench": 5,
    "bench_decode": 6, "bench_tokenize": 6, "bench_train": 6,
}  # fmt: skip
OUTSIDE = {
    "config": set(),
    "startup": set(),
    "foreign": set(),
    "loss": {"torch"},
    "optim": {"torch", "bitsandbytes"},
    "sampling": {"torch"},
    "replay": {"torch"},
    "attention": {"torch"},
    "products": {"torch"},
    "monitor": {"torch", "tqdm"},
    "words": {"numpy", "tokenizers"},
    "pieces": {"numpy", "tokenizers"},
    "corpus": {"numpy", "tqdm"},
    "data": {"torch", "numpy"},
    "runtime": {"torch", "numpy"},
    "model": {"torch", "transformers", "tokenizers", "safetensors", "huggingface_hub"},
    "checkpoint": {"torch", "safetensors"},
    "decode": {"torch", "transformers"},
    "generate": {"torch"},
    "evaluate": {"torch"},
    "fast": {"torch"},
    "diagnose": {"torch"},
    "prepare": {"torch", "transformers"},
    "train": {"torch"},
    "report": {"matplotlib"},
    "talk": {"readline"},
    "bench": {"torch"},
    "bench_decode": {"torch", "transformers"},
    "bench_tokenize": {"torch", "transformers", "numpy", "datasets"},  # the last for what `mori` is measured against
    "bench_train": {"torch", "transformers"},
    "compare": {"torch", "safetensors", "transformers"},
}
STANDARD = {
    "argparse", "bisect", "codecs", "collections", "concurrent", "contextlib", "ctypes", "dataclasses", "datetime", "difflib", "fcntl", "functools", "gc", "glob", "hashlib",
    "importlib", "inspect", "itertools", "json", "math", "multiprocessing", "operator", "os", "pathlib", "platform", "random", "re", "resource",
    "shlex", "shutil", "signal", "statistics", "subprocess", "sys", "tempfile",
    "textwrap", "threading", "time", "typing", "unicodedata", "weakref",
}  # fmt: skip
ROOMS = sorted(path.stem for path in (ROOT / "mori").glob("*.py") if path.stem != "__init__")


def imports(path: Path) -> tuple[set[str], set[str]]:
    """The rooms and the packages that a file imports, anywhere in it."""
    rooms, packages = set(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.level or node.module.split(".")[0] == "mori"):
            module = node.module or ""
            module = module if node.level else module.partition(".")[2]
            rooms |= {module} if module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            packages.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            packages |= {alias.name.split(".")[0] for alias in node.names}
    return rooms - {"__version__"}, packages


def test_every_room_has_its_floor():
    assert ROOMS == sorted(FLOORS) == sorted(OUTSIDE)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_from_floors_below(room):
    rooms, packages = imports(ROOT / "mori" / f"{room}.py")
    assert all(FLOORS[other] < FLOORS[room] for other in rooms), rooms
    assert packages - STANDARD <= OUTSIDE[room]


def test_the_package_itself_imports_nothing():
    assert imports(ROOT / "mori" / "__init__.py") == (set(), set())


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").glob("*.py")), ids=lambda path: path.name)
def test_doors_import_no_library_before_the_flags_are_right(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    light = {f"mori.{room}" for room in ("config", "startup")}
    assert all(isinstance(node, ast.ImportFrom) and node.module in light for node in top)


@pytest.mark.parametrize(
    "path", sorted([*(ROOT / "mori").glob("*.py"), *(ROOT / "scripts").glob("*.py")]), ids=lambda p: p.name
)
def test_what_is_not_done_anywhere(path):
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            broad = node.type is None or getattr(node.type, "id", "") in ("Exception", "BaseException")
            # The one place that loads files from anywhere, through libraries whose errors have no common base.
            assert not broad or (path.name == "foreign.py" and source.count("except BaseException") == 1)
        if isinstance(node, ast.ImportFrom) and path.stem != "compare":
            assert not {"Trainer", "TrainingArguments"} & {alias.name for alias in node.names}
    for word in ("pickle", "torch.load(", "torch.save(", "exec(", "import accelerate", "from accelerate"):
        assert word not in source, word
    assert not re.search(r'(?<!\.type) == "cuda', source.replace('name == "cuda"', "")), "a torch.device is no string"


@pytest.mark.parametrize("room", ROOMS)
def test_public_functions_say_what_they_do(room):
    tree = ast.parse((ROOT / "mori" / f"{room}.py").read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    for node in tree.body:
        members = [node, *node.body] if isinstance(node, ast.ClassDef) and not node.name.startswith("_") else [node]
        for member in members:
            if (
                isinstance(member, (ast.FunctionDef, ast.ClassDef))
                and not member.name.startswith("_")
                and member.name != "forward"
            ):
                assert ast.get_docstring(member), member.name
