"""The table of a GPU day: for each thing that must hold, what was measured, its floor and its goal."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.gpu_day.parts import PRECISIONS

Results = dict[str, dict]
_NOTHING = "not measured"


def read_results(folders: list[Path]) -> Results:
    """The results by part; a part that was run again counts as it was the last time, unless it was skipped then."""
    results: Results = {}
    for folder in folders:
        for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines():
            result = json.loads(line)
            if result["part"] not in results or not result["status"].startswith(("skipped", "not run")):
                results[result["part"]] = result
    return results


def report(results: Results, commit: str = "") -> dict:
    """The content of `gpu-day.json`: the rows of the table, other figures, and the machine."""
    machine = results.get("machine", {})
    parts = {name: {key: result.get(key) for key in ("status", "seconds", "wrong")} for name, result in results.items()}
    return {
        "bench": "gpu-day",
        "rows": [
            {"row": name, "measured": measured, "floor": floor, "goal": goal, "verdict": verdict}
            for name, measured, floor, goal, verdict in rows(results)
        ],
        "figures": dict(figures(results)),
        "parts": parts,
        "versions": {"python": machine.get("python"), **machine.get("versions", {})},
        "device": machine.get("name", "cpu"),
        "commit": commit or None,
    }


def text(report: dict) -> str:
    """The report as lines to read and to paste."""
    lines = [["", "measured", "floor", "goal", ""]]
    lines += [[row[key] for key in ("row", "measured", "floor", "goal", "verdict")] for row in report["rows"]]
    table = ["| " + " | ".join(map(str, line)) + " |" for line in lines]
    table.insert(1, "| --- | --- | ---: | ---: | --- |")
    others = [f"{name}: {value}" for name, value in report["figures"].items()]
    failed = [
        f"{name}: {part['status']} {part['wrong'] or ''}" for name, part in report["parts"].items() if part["wrong"]
    ]
    unfinished = [f"{n}: {p['status']}" for n, p in report["parts"].items() if p["status"] not in ("ok", "WRONG")]
    sections = [table, others, failed and ["WRONG in", *failed], unfinished and ["not finished", *unfinished]]
    return "\n\n".join("\n".join(section) for section in sections if section)


def rows(results: Results) -> Iterator[tuple]:
    """Name, measured, floor, goal and verdict of each row: "goal", "ok", "WRONG" or "not measured"."""
    for model in ("mini", "stories"):
        states = {precision: _state(results, f"train-{model}-{precision}") for precision in PRECISIONS}
        yield _checks(f"{model}: trains, is killed, resumes, generates", states)
    for precision, limit in (("fp32", 1e-3), ("bf16", 1e-2)):
        gap = _figure(results, "curves", f"curve_{precision}", "largest_relative_gap")
        yield _at_most(f"loss curve against a CPU in fp32, 50 steps: {precision}", gap, limit, None, "{:.1e}")
    for precision in PRECISIONS:
        pair = _figure(results, f"parity-{precision}", "mori_exact_equals_trainer") or {}
        gaps = [value for name, value in pair.items() if name.startswith("max_")]
        largest = None if not gaps else max((value for value in gaps if value is not None), default=None)
        name = f"mori-exact against Trainer, deterministic, {precision}: largest difference"
        yield _at_most(name, largest, 0.0, None, "{:.1e}")
    families = {name: value.get("ok") for name, value in results.get("graphs", {}).items() if isinstance(value, dict)}
    yield _checks("decoding graphs by family", families)
    tests = _figure(results, "suite", "tests") or {}
    yield _checks("tests that need a GPU", {tests.get("absent", "all"): None if "absent" in tests else tests.get("ok")})
    states = {name: _figure(results, "oom", name, "ok") for name in ("halved", "same_weights")}
    yield _checks("a batch too large: redone in halves, same weights", states)
    syncs = {name: value["syncs"] for name, value in results.get("syncs", {}).items() if _has(value, "syncs")}
    yield _at_most("host syncs between log points", sum(syncs.values()) if syncs else None, 0, 0, "{}")
    yield from _speed_rows(results)


def _speed_rows(results: Results) -> Iterator[tuple]:
    shape = "124M bf16 B16 x T1024"
    yield _at_least(f"{shape}: tokens/s, Trainer = 1", _speed_ratio(results, "bench", "trainer"), 1.3, 2.0)
    tuned = _speed_ratio(results, "bench-tuned", "trainer-tuned")
    yield _at_least(f"{shape}: tokens/s, tuned Trainer = 1", tuned, 1.05, 1.3)
    yield _at_least(f"{shape}: tokens/s", _figure(results, "bench", "tokens_per_second", "mori"), None, 460_000, "{:,}")
    memory = _ratio(*(_figure(results, "bench", "peak_gib", arm) for arm in ("mori", "trainer")))
    yield _at_most(f"{shape}: peak memory, Trainer = 1", memory, 0.55, 0.40)
    for dtype in ("bfloat16", "float32"):
        for part, arm, floor, goal in (("decode", "greedy", 5.0, 8.0), ("decode-compiled", "compiled", 1.0, 2.0)):
            rates = _figure(results, part, f"{dtype} batch 1") or {}
            ratio = _ratio(rates.get("mori-greedy"), rates.get(f"generate-{arm}"))
            other = "generate()" if arm == "greedy" else "static cache, compiled"
            yield _at_least(f"decode 124M {dtype}, batch 1: tokens/s, {other} = 1", ratio, floor, goal)
    for name, part in (("B4 x T128", "bench-fp16-128"), ("B16 x T512", "bench-fp16-512")):
        yield _at_least(f"124M fp16 {name}: tokens/s, Trainer = 1", _speed_ratio(results, part, "trainer"), 1.2, 1.5)
        memory = _ratio(*(_figure(results, part, "peak_gib", arm) for arm in ("mori", "trainer")))
        yield _at_most(f"124M fp16 {name}: peak memory, Trainer = 1", memory, 0.7, 0.5)


def figures(results: Results) -> Iterator[tuple[str, object]]:
    """Other measurements, by name; those that are missing are left out."""
    variants = results.get("variants", {})
    small = _figure(results, "variants", "small", "ms")
    medium = _figure(results, "variants", "fp16 T512, all logits", "ms")
    found = {
        "ceilings": _figure(results, "machine", "ceilings"),
        "share of the peak, bf16 B16 x T1024": _figure(results, "bench", "mfu", "mori"),
        "bf16 B4 x T128, Trainer = 1": _speed_ratio(results, "bench-small", "trainer"),
        "compiling, B16 x T1024": _figure(results, "profile", "compiling"),
        "compiling, llama-160m": _figure(results, "profile-llama", "compiling"),
        "GPU ms by kind, eager": _figure(results, "profile", "eager_kernels", "ms_by_kind"),
        "GPU ms by kind, compiled": _figure(results, "profile", "compiled_kernels", "ms_by_kind"),
        **{
            f"{name} / B4 x T128, ms": _ratio(_figure(results, "variants", name, "ms"), small)
            for name in variants
            if name.startswith("small, ")
        },
        "fp16 chunked / all logits, ms": _ratio(_figure(results, "variants", "fp16 T512", "ms"), medium),
        **{
            f"text cost, {name}": value
            for name, value in results.get("graph-cost", {}).items()
            if _has(value, "capture_ms")
        },
        "dropout in a step": _figure(results, "attention", "step_with_dropout"),
        **{
            f"attention ms, {name}": value
            for name, value in results.get("attention-speed", {}).items()
            if _has(value, "default")
        },
    }
    return ((name, value) for name, value in found.items() if value is not None)


def _has(value: object, name: str) -> bool:
    return isinstance(value, dict) and name in value


def _figure(results: Results, part: str, *keys: str):
    """The value below `keys` in the result of a part; None if there is none."""
    value: object = results.get(part)
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _ratio(numerator: float | None, denominator: float | None) -> float | None:
    return round(numerator / denominator, 3) if numerator and denominator else None


def _speed_ratio(results: Results, part: str, arm: str) -> float | None:
    return _ratio(*(_figure(results, part, "tokens_per_second", name) for name in ("mori", arm)))


def _state(results: Results, part: str) -> bool | None:
    """Whether a part's checks held; None if it was not run or did not finish in time."""
    result = results.get(part, {"skipped": ""})
    if result.get("wrong") or str(result.get("status")).startswith("exit"):
        return False
    return None if "skipped" in result or result["status"] not in ("ok", "WRONG") else True


def _checks(name: str, states: dict[str, bool | None]) -> tuple:
    wrong = [label for label, state in states.items() if state is False]
    missing = [label for label, state in states.items() if state is None]
    passed = len(states) - len(wrong) - len(missing)
    measured = f"{passed} of {len(states)}"
    measured += f"; wrong: {', '.join(wrong)}" if wrong else ""
    measured += f"; {_NOTHING}: {', '.join(missing)}" if missing and passed + len(wrong) else ""
    if not states or not passed + len(wrong):
        return name, "–", "all", "", ", ".join([_NOTHING, *(label for label in missing if " " in label)])
    return name, measured, "all", "", "WRONG" if wrong else _NOTHING if missing else "ok"


def _at_least(name: str, value: float | None, floor: float | None, goal: float | None, form: str = "{:.2f}") -> tuple:
    return _judged(name, value, floor, goal, form, lambda value, bound: value >= bound)


def _at_most(name: str, value: float | None, floor: float | None, goal: float | None, form: str = "{:.2f}") -> tuple:
    return _judged(name, value, floor, goal, form, lambda value, bound: value <= bound)


def _judged(name: str, value, floor, goal, form: str, reaches: Callable) -> tuple:
    bounds = ["" if bound is None else bound for bound in (floor, goal)]
    if value is None:
        return name, "–", *bounds, _NOTHING
    verdict = "WRONG" if floor is not None and not reaches(value, floor) else "ok"
    verdict = "goal" if goal is not None and reaches(value, goal) else verdict
    return name, form.format(value), *bounds, verdict
