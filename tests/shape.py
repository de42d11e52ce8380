"""`python -m tests.shape`: the shape of the house, measured: imports, lengths, files per folder."""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# A package imports only from what stands in an earlier row; packages of one row do not import each other.
ROWS = [
    {"cli"}, {"config"}, {"data", "checkpoint", "tracking", "speed"}, {"model"}, {"generation", "export"},
    {"train", "preflight", "run", "output", "state", "prepare", "optim", "evaluate", "distributed"}, {"bench"}, {"__main__"},
]  # fmt: skip
ROW_OF = {name: number for number, row in enumerate(ROWS) for name in row}
FRONT_ROW = ROW_OF["train"]
LIMITS = {"function": 80, "module": 400, "train.py": 300, "files in a folder": 9}


def modules() -> dict[str, Path]:
    """The modules of the package, by dotted name without `mori.`."""
    paths = sorted((ROOT / "mori").rglob("*.py"))
    names = {path: ".".join(path.relative_to(ROOT / "mori").with_suffix("").parts) for path in paths}
    return {name.removesuffix(".__init__"): path for path, name in names.items() if name != "__init__"}


def imports(path: Path) -> set[str]:
    """The modules of `mori` that a file imports, anywhere in it."""
    known, targets = modules(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "mori":
            base = node.module.partition(".")[2]
            for alias in node.names:
                name = f"{base}.{alias.name}" if base else alias.name
                targets |= {name if name in known else base} - {""}
        elif isinstance(node, ast.Import):
            targets |= {a.name.partition(".")[2] for a in node.names if a.name.startswith("mori.")}
    return targets & known.keys()


def against_the_rule() -> list[str]:
    """Every import that the rule forbids."""
    broken = []
    for name, path in modules().items():
        package = name.split(".")[0]
        for target in imports(path):
            other = target.split(".")[0]
            if other != package and not (
                ROW_OF[other] < ROW_OF[package] or ROW_OF[other] == ROW_OF[package] == FRONT_ROW and other != "train"
            ):
                broken.append(f"{name} imports {target}")
    return broken


def cycles() -> list[str]:
    """Modules that import each other, directly or not."""
    graph = {name: imports(path) for name, path in modules().items()}
    reachable = {name: set(targets) for name, targets in graph.items()}
    for _ in graph:
        reachable = {name: targets.union(*(graph[t] for t in targets)) for name, targets in reachable.items()}
    return sorted(name for name, targets in reachable.items() if name in targets)


def functions() -> list[tuple[int, str]]:
    """The length of every function, longest first."""
    lengths = []
    for path in [*modules().values(), *sorted((ROOT / "scripts").glob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lengths.append(
                    (node.end_lineno - node.lineno + 1, f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
                )
    return sorted(lengths, reverse=True)


def violations() -> list[str]:
    """Everything that breaks a limit."""
    found = against_the_rule() + [f"import cycle through {name}" for name in cycles()]
    found += [f"{lines} lines: {name}" for lines, name in functions() if lines > LIMITS["function"]]
    for path in modules().values():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        limit = LIMITS["train.py"] if path == ROOT / "mori/train.py" else LIMITS["module"] + 1
        found += [f"{lines} lines: {path.relative_to(ROOT)}"] if lines >= limit else []
    for folder in {path.parent for path in modules().values()}:
        count = _files_in(folder)
        found += [f"{count} files in {folder.relative_to(ROOT)}"] if count > LIMITS["files in a folder"] else []
    return found


def _files_in(folder: Path) -> int:
    """The modules of a folder, but for `__init__.py` and `__main__.py`."""
    return sum(not path.name.startswith("__") for path in folder.glob("*.py"))


def main() -> int:
    """Print the figures; 1 if a limit is broken."""
    lengths = {str(p.relative_to(ROOT)): len(p.read_text(encoding="utf-8").splitlines()) for p in modules().values()}
    print(f"{len(lengths)} modules, {sum(lengths.values())} lines; train.py {lengths['mori/train.py']}")
    print(
        "longest modules:",
        *(f"{lengths[p]} {p}" for p in sorted(lengths, key=lengths.get, reverse=True)[:5]),
        sep="\n  ",
    )
    print("longest functions:", *(f"{lines} {name}" for lines, name in functions()[:5]), sep="\n  ")
    for folder in sorted({path.parent for path in modules().values()}):
        print(f"{_files_in(folder)} files in {folder.relative_to(ROOT)}")
    broken = violations()
    print(*(f"BROKEN: {violation}" for violation in broken), sep="\n")
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
