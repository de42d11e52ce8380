"""The report of a run and of a folder of runs: what a user sees in the pages, and what they hold of the files."""

import json
import math
import random
import re
import shutil
import signal
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import flags, run_script, stop_after

from mori.__main__ import main
from mori.cli import Interrupted
from mori.config import TrainConfig
from mori.tracking.loggers import read_metrics
from mori.tracking.report import charts
from mori.tracking.report.data import read_run
from mori.tracking.report.write import Reporter, write_run
from mori.train import train

NASTY = [
    "Halo <script>alert(1)</script> & <b>bold</b> </td></table>",
    "| a | b |\n| --- | --- |\n`code` ``` ~~~ **bold** _it_ ~~no~~ # title",
    "שלום עולם \u202eabc ‏مرحبا 😀 :smile: &amp; &#42; \\| \\",
    "[a](http://x.y) ![i](http://x.y/z.png) <http://x.y> http://x.y www.example.com me@example.com",
    "- one\n1. two\n\n    indented\n\n\n> quote $x^2$ \"double\" 'single' %s {0} {{}}",
]
VOID = {"meta", "br", "hr", "img", "link", "input", "wbr", "path"}


class Html(HTMLParser):
    """The tags of a page with their attributes, and the text inside elements of one class or tag. Raises if tags do not match."""

    def __init__(self, page: str, inside: str = ""):
        super().__init__()
        self.tags, self.texts, self._open, self._inside = [], [], [], inside
        self.feed(page)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag == "br" and self.texts:
            self.texts[-1] += "\n"
        if tag in VOID and not (tag == "path" and not self.get_starttag_text().endswith("/>")):
            return
        wanted = self._inside in (tag, *(attributes.get("class") or "").split())
        self._open.append((tag, wanted))
        if wanted:
            self.texts.append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "br" and self.texts:
            self.texts[-1] += "\n"

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        if any(wanted for _, wanted in self._open):
            self.texts[-1] += data


def pages(folder: Path) -> dict[str, str]:
    """The two pages of a folder."""
    return {name: (folder / f"report.{name}").read_text(encoding="utf-8") for name in ("html", "md")}


def rendered(markdown: str) -> str:
    """The page as GitHub's Markdown renders it."""
    markdown_it = pytest.importorskip("markdown_it")
    return markdown_it.MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(markdown)


def made_run(folder: Path, **files) -> Path:
    """A folder with the files of a finished run of 40 steps, some of them replaced; None leaves one out."""
    folder.mkdir(parents=True)
    metrics = [{"step": 0, "eval/loss": 5.0, "eval/perplexity": math.exp(5.0), "eval/bits_per_byte": 2.5}]
    for step in range(1, 41):
        metrics.append({"step": step, "train/loss": 5 - step / 20, "train/learning_rate": 1e-3, "train/grad_norm": 1.0})
    metrics.append({"step": 40, "eval/loss": 4.0, "eval/perplexity": math.exp(4.0), "eval/bits_per_byte": 2.0})
    evaluations = [{"step": step, "loss": loss, "bits_per_byte": loss / 2} for step, loss in ((0, 5.0), (40, 4.0))]
    content = {
        "config": {"model": "mini", "learning_rate": 1e-3, "corpus": ["text.txt"], "prompt": ["Halo"], "seed": 1},
        "environment": {"device": "cpu", "command": ["mori", "train", "--seed", "1"]},
        "ledger": {"documents": 2, "bytes": 3000, "tokens": 900, "train_tokens": 800, "held_out_tokens": 100},
        "summary": {
            "steps": 40,
            "total_steps": 40,
            "published_step": 40,
            "eval": {"before": evaluations[0], "best": evaluations[1], "after": evaluations[1]},
            "samples": {"before": ["Halo before"], "after": ["Halo after"]},
            "wall_seconds": 65.2,
            "tokens_per_second": 1234.5,
            "peak_memory_bytes": 3 << 29,
        },
        "metrics": metrics,
    } | files
    for name, value in content.items():
        if name == "metrics" and value is not None:
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in value), encoding="utf-8")
        elif value is not None:
            text = value if isinstance(value, str) else json.dumps(value)
            (folder / f"{name}.json").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def mori(monkeypatch, capsys, tmp_path):
    """Run `mori ...` in `tmp_path`: exit code, standard output, standard error."""

    def call(*words) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["mori", *map(str, words)])
        monkeypatch.setattr("mori.cli.errors._open_closed_streams", lambda: None)
        monkeypatch.setattr(sys.stdout, "reconfigure", lambda **_: None, raising=False)
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code, *capsys.readouterr()

    return call


def test_report_of_a_run_has_the_figures_of_its_files(run_train, tmp_path):
    summary = run_train(max_steps=12)
    folder = tmp_path / "runs/run"
    metrics, ledger = read_metrics(folder / "metrics.jsonl"), json.loads((folder / "ledger.json").read_text())
    before, after = summary["eval"]["before"], summary["eval"]["after"]
    wanted = [f"{before['bits_per_byte']:.3f}", f"{after['bits_per_byte']:.3f}", f"{after['loss']:.4f}"]
    wanted += [f"{line['eval/bits_per_byte']:.4f}" for line in metrics if "eval/bits_per_byte" in line]
    wanted += [f"{ledger[name]:,}" for name in ("bytes", "tokens", "train_tokens", "held_out_tokens")]
    wanted += [
        f"{summary['tokens_per_second']:,.0f}",
        f"{summary['parameters']:,}",
        summary["sha256"]["documents_sha256"],
    ]
    wanted += [summary["output_sha256"]["model.safetensors"], "checkpoints/step-000000"]
    for page in pages(folder).values():
        for figure in wanted:
            assert figure in page.replace("\\", ""), figure
    [big] = Html(pages(folder)["html"], "big").texts
    assert big == f"{before['bits_per_byte']:.3f}→{after['bits_per_byte']:.3f}"
    samples = [
        re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", s)
        for name in ("before", "after")
        for s in summary["samples"][name]
    ]
    assert Html(pages(folder)["html"], "sample").texts == samples
    assert not (folder / "progress.json").exists()


def test_report_knows_parameters_and_hashes_of_a_run(run_train, small_model, tmp_path):
    from transformers import AutoModelForCausalLM

    summary = run_train(max_steps=2, freeze_trainable_layers=1)
    model = AutoModelForCausalLM.from_pretrained(small_model)
    assert summary["parameters"] == model.num_parameters() > summary["trained_parameters"] > 0
    assert all(re.fullmatch("[0-9a-f]{64}", value) for value in summary["sha256"].values())


def test_report_is_one_file_that_loads_nothing(run_train, tmp_path):
    run_train(max_steps=4)
    page = pages(tmp_path / "runs/run")["html"]
    html = Html(page)
    assert {tag for tag, _ in html.tags} >= {"svg", "table", "style"} and not {tag for tag, _ in html.tags} & {
        "script", "link", "img", "iframe", "object",
    }  # fmt: skip
    attributes = [name for _, attributes in html.tags for name in attributes]
    assert not {"src", "href", "srcset", "xlink:href"} & set(attributes) and not any(
        n.startswith("on") for n in attributes
    )
    assert not re.search(r"https?:|url\(|@import|javascript:", page)
    assert "prefers-color-scheme:dark" in page and 'name="viewport"' in page


def test_report_has_no_absolute_path_of_the_runs_folder(run_train, tmp_path):
    run_train(max_steps=4)
    for page in pages(tmp_path / "runs/run").values():
        assert str(tmp_path) not in page and "--config runs/run/config.json" in page


def test_killed_run_has_a_report_and_its_end_replaces_it(run_train, tmp_path):
    stop_after(8, run_train)
    folder = tmp_path / "runs/run"
    for page in pages(folder).values():
        assert "This run is not finished: this page covers it up to step 6 of 12" in page
    assert len(Html(pages(folder)["html"], "sample").texts) == 2  # at steps 0 and 6
    run_train()
    for page in pages(folder).values():
        assert "not finished" not in page
    assert not (folder / "progress.json").exists()


def test_run_that_was_killed_in_its_last_report_gets_it_when_it_is_started_again(run_train, tmp_path, monkeypatch):
    """All else of the run was finished."""
    write = Reporter.write
    monkeypatch.setattr(Reporter, "write", lambda self, results, finished=False: finished or write(self, results))
    run_train()
    folder = tmp_path / "runs/run"
    (folder / ".report.html.99.partial").write_text("half of it")
    assert (folder / "summary.json").exists() and "not finished" in pages(folder)["html"]
    monkeypatch.undo()
    run_train()
    for page in pages(folder).values():
        assert "not finished" not in page
    assert not (folder / "progress.json").exists() and not list(folder.glob(".*partial"))


def test_run_that_a_signal_stops_has_a_report_of_its_last_step(settings, tmp_path):
    with pytest.raises(Interrupted):
        train(TrainConfig(**settings), on_step=lambda step, _: step == 8 and signal.raise_signal(signal.SIGINT))
    for page in pages(tmp_path / "runs/run").values():
        assert "This run is not finished: this page covers it up to step 8 of 12" in page


def test_extended_run_that_was_killed_is_not_called_finished(run_train, tmp_path):
    run_train(max_steps=6, eval_steps=3)
    stop_after(3, lambda: run_train(max_steps=12, eval_steps=3, extend=True))
    page = pages(tmp_path / "runs/run")["html"]
    assert re.search("not finished: this page covers it up to step (6|9) of 12", page)


def test_report_that_cannot_be_written_is_one_warning(run_train, tmp_path, capsys):
    folder = tmp_path / "runs/run"
    (folder / "report.html").mkdir(parents=True)
    summary = run_train(max_steps=4, eval_steps=1)
    output = capsys.readouterr().out
    assert summary["steps"] == 4 and output.count("WARNING: the report in ") == 1
    assert not list(folder.glob(".*partial"))


def test_reporter_takes_a_hundredth_of_the_time(tmp_path, monkeypatch):
    now, written = [100.0], []

    def slow(run):
        written.append(now[0])
        now[0] += 2.0

    monkeypatch.setattr("mori.tracking.report.write.write_run", slow)
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr("time.thread_time", lambda: now[0])
    reporter = Reporter(tmp_path)
    for _ in range(1000):
        reporter.write({"steps": 1})
        now[0] += 1.0
    assert len(written) * 2.0 <= 0.011 * (now[0] - 100) + 2.0 and json.loads((tmp_path / "progress.json").read_text())
    reporter.write({}, finished=True)
    assert written[-1] == now[0] - 2.0


@pytest.mark.parametrize("sample", NASTY)
def test_sample_is_shown_letter_by_letter(tmp_path, sample):
    samples = {"before": [f"Halo {sample}"], "after": [f"Halo{sample}"], "copied": [[[6, 9], [0, 2]]]}
    folder = made_run(tmp_path / "runs/run", summary={"steps": 40, "samples": samples, "eval": {"after": {"step": 40}}})
    write_run(read_run(folder))
    page = pages(folder)
    assert Html(page["html"], "sample").texts == [f"Halo {sample}", f"Halo{sample}"]
    assert Html(page["html"], "mark").texts == [f"Halo{sample}"[6:9]]  # what is copied of the prompt is not the model's
    shown = rendered(page["md"])
    cells = [re.sub(r"\s+", " ", text).strip() for text in Html(shown, "td").texts]
    for text in (f"Halo {sample}", f"Halo{sample}"):
        assert re.sub(r"\s+", " ", text).strip() in cells
    assert {tag for tag, _ in Html(shown).tags} <= {
        "h1", "h2", "p", "em", "strong", "table", "thead", "tbody", "tr", "th", "td", "i", "br", "mark", "code", "pre", "blockquote",
    }  # fmt: skip
    assert not re.search(r"(?<!\\)(:smile:|https?:|www\.|me@)", page["md"])  # GitHub alone reads these


@pytest.mark.parametrize("character", ["\x00", "\x1b", "\ud800", "\uffff", "\r\n", "\u2028", "\x0b"])
def test_sample_with_what_no_page_can_hold_is_written(tmp_path, character):
    folder = made_run(tmp_path / "run", summary={"samples": {"before": [], "after": [f"a{character}b"]}})
    write_run(read_run(folder))
    page = pages(folder)
    assert len(Html(page["html"], "sample").texts) == 1
    assert "a" in Html(rendered(page["md"]), "td").texts[-1] or "a" in page["md"]


def test_copied_spans_are_marked_and_malformed_ones_left_out(tmp_path):
    samples = {
        "before": ["Halo abcdef"],
        "copied_before": [[[5, 7]]],
        "after": ["Halo abcdef", "Halo 123456", "Halo xyz"],
        "copied": [[[9, 30], [5, 7], [6, 8]], "no", [[1], [3, 2], ["a", "b"], [5.0, 7.0], [True, 2], None]],
    }
    folder = made_run(tmp_path / "run", summary={"steps": 40, "samples": samples})
    write_run(read_run(folder))
    assert Html(pages(folder)["html"], "mark").texts == ["ab", "abc", "ef"]
    assert pages(folder)["md"].count("<mark>") == 3


def test_copying_is_shown_beside_the_held_out_text(tmp_path):
    metrics = [
        {
            "step": step,
            "copying/share_of_8_tokens": step / 100,
            "copying/longest_run": step,
            "copying/baseline_share_of_8_tokens": 0.02,
        }
        for step in (0, 20, 40)
    ]
    folder = made_run(tmp_path / "run", metrics=metrics)
    write_run(read_run(folder))
    for page in pages(folder).values():
        assert "40.0%" in page and "at most 40 tokens in a row; held-out text 2.0%" in page


def test_figures_of_short_runs_and_adapters_are_not_rounded_away(tmp_path):
    losses = [{"step": step, "perf/mfu": mfu, "train/epoch": step / 1000} for step, mfu in ((2, 0.1), (4, 0.3))]
    evaluations = {name: {"step": 4, "loss": 3.0} for name in ("best", "after")}
    figures = {"parameters": 139_400_000, "trained_parameters": 4_880_000, "tokens_per_second": 50.0}
    summary = {"steps": 4, "eval": evaluations, "scored_windows": 8, "held_out_windows": 57, **figures}
    folder = made_run(
        tmp_path / "run", config={"model": "/models/smol"}, summary=summary,
        metrics=[*losses, {"step": 4, "eval/loss": 3.0}],
    )  # fmt: skip
    write_run(read_run(folder))
    for page in pages(folder).values():
        assert "smol (139.4 M parameters, 4.9 M of them trainable), " in page and "../smol (" not in page
        assert "0.004 epochs" in page and "MFU 20%" in page and "8 of 57 held-out windows scored." in page


def test_plan_stands_beside_what_happened(tmp_path):
    plan = {"step": 0, "seconds": {"total": 50.0}, "seconds_before": 5.0, "peak_memory_bytes": {"host": 1 << 30}}
    folder = made_run(tmp_path / "run", preflight=plan)
    write_run(read_run(folder))
    cells = Html(pages(folder)["html"], "td").texts
    assert [cells[i : i + 4] for i, cell in enumerate(cells) if cell in ("Time", "Peak memory")] == [
        ["Time", "0:50", "1:00", "20.4% higher"],
        ["Peak memory", "1.00 GiB", "1.50 GiB", "50.0% higher"],
    ]


def test_samples_bear_the_step_at_which_they_were_drawn(tmp_path):
    evaluations = {
        name: {"step": step, "loss": loss} for name, step, loss in (("before", 0, 5), ("best", 20, 3), ("after", 40, 4))
    }
    samples = {"before": ["a"] * 30, "after": ["b"] * 30}
    summary = {"steps": 40, "total_steps": 90, "published_step": 20, "eval": evaluations, "samples": samples}
    folder = made_run(tmp_path / "run", summary=summary)
    write_run(read_run(folder))
    page = pages(folder)["html"]
    assert (
        "Before · step 0" in page and "After · step 40" in page
    )  # the weights of step 20 are published, without samples
    assert Html(page, "now").texts == ["3.0000"] and "of 90, stopped early" in page
    assert Html(page, "sample").texts == ["a", "b"] * 24 and "summary.json has all 30 samples" in page


def test_heaviest_operations_of_a_profile_are_listed(tmp_path):
    operations = [{"name": f"aten::{name}<float>", "calls": 12, "ms": 3.25, "share": 0.5} for name in ("mm", "add_")]
    folder = made_run(tmp_path / "run", profile={"steps": [3, 5], "operations": [*operations, {"ms": 1}, None]})
    write_run(read_run(folder))
    cells = Html(pages(folder)["html"], "td").texts
    for name in ("aten::mm<float>", "aten::add_<float>"):
        assert cells[cells.index(name) : cells.index(name) + 4] == [name, "12", "3.2", "50.0%"]
    assert "Steps 3 to 5." in pages(folder)["html"] and r"aten\:\:mm\<float\>" in pages(folder)["md"]


def test_values_that_are_not_finite_break_the_line_and_are_named(tmp_path):
    metrics = [
        {
            "step": step,
            "train/loss": float("nan") if step in (3, 4) else 5.0 - step,
            **({"eval/loss": math.inf} if step == 6 else {}),
        }
        for step in range(1, 8)
    ]
    folder = made_run(tmp_path / "run", metrics=metrics, summary=None)
    write_run(read_run(folder))
    page = pages(folder)["html"]
    paths = [attributes["d"] for tag, attributes in Html(page).tags if tag == "path" and attributes["class"] == "line"]
    assert [path.count("M") for path in paths] == [2] and not re.search("nan|inf", "".join(paths).lower())
    assert all("Not finite, so not drawn: step 3, 4, 6" in page for page in pages(folder).values())


@pytest.mark.parametrize("missing", ["config", "environment", "ledger", "summary", "metrics"])
def test_report_without_a_file_is_written(tmp_path, mori, missing):
    made_run(tmp_path / "runs/run", **{missing: None})
    code, out, _ = mori("report", "runs/run")
    assert code == 0 and out == "runs/run/report.html, runs/run/report.md\n"
    Html(pages(tmp_path / "runs/run")["html"])


def test_report_of_arbitrary_values_raises_nothing(tmp_path):
    values = [
        None,
        True,
        -1,
        1e308,
        10**400,
        math.nan,
        -math.inf,
        "",
        "x|`<",
        [],
        [[]],
        {},
        {"a": 1},
        [None, {"b": []}],
        "\ud800",
        [1, 2],
    ]
    draw = random.Random(0)

    def spoiled(value, depth=0):
        if depth and draw.random() < 0.25:
            return draw.choice(values)
        if isinstance(value, dict):
            return {key: spoiled(item, depth + 1) for key, item in value.items()}
        return [spoiled(item, depth + 1) for item in value] if isinstance(value, list) else value

    profile = {"steps": [1, 2], "operations": [{"name": "mm", "calls": 3, "ms": 1.0, "share": 0.5}]}
    plan = {"step": 0, "seconds": {"total": 50.0}, "seconds_before": 5.0, "peak_memory_bytes": {"host": 1 << 30}}
    whole = made_run(tmp_path / "whole", profile=profile, preflight=plan)
    for number in range(60):
        folder = tmp_path / f"runs/{number}"
        shutil.copytree(whole, folder)
        for path in folder.glob("*.json"):
            path.write_text(json.dumps(spoiled(json.loads(path.read_text()))))
        lines = [json.dumps(spoiled(json.loads(line))) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        (folder / "metrics.jsonl").write_text("\n".join(lines))
        write_run(read_run(folder))
        Html(pages(folder)["html"])
    assert main_code("report", tmp_path / "runs") == 0
    Html(pages(tmp_path / "runs")["html"])


def main_code(*words) -> int:
    """The exit code of `mori ...` in a new process."""
    return subprocess.run([sys.executable, "-m", "mori", *map(str, words)], capture_output=True).returncode


def test_compare_table_has_all_runs_the_best_first(tmp_path, mori):
    for name, loss, rate in (("alpha", 4.5, 1e-4), ("zeta", 3.5, 1e-3), ("mid", 4.0, 1e-3)):
        metrics = [
            {"step": s, "eval/loss": 6.0 - (6.0 - loss) * s / 40, "eval/bits_per_byte": 2 - s / 100}
            for s in (0, 20, 40)
        ]
        metrics[-1]["eval/bits_per_byte"] = loss / 2
        config = {"model": "mini", "learning_rate": rate, "corpus": ["text.txt"], "seed": 1, "run_name": name}
        made_run(tmp_path / f"runs/{name}", metrics=metrics, config=config)
    code, out, _ = mori("report", "runs/")
    assert (code, out) == (0, "runs/report.html, runs/report.md: 3 runs\n")
    page = pages(tmp_path / "runs")
    rows = [line for line in page["md"].splitlines() if "/report.html)" in line]
    assert [re.search(r"\[(\w+)\]", row)[1] for row in rows] == ["zeta", "mid", "alpha"]
    for row, loss in zip(rows, (3.5, 4.0, 4.5), strict=True):
        cells = [cell.strip(" *") for cell in row.strip("|").split(" | ")]
        assert cells[1:6] == ["40", f"{loss:.4f}", f"{loss / 2:.4f}", "40", f"{loss:.4f}"]
        assert cells[7:] == ["1,234", "1.50 GiB", "1:05"]
    assert "<code>alpha</code> | 0.0001 |" in page["md"] and "| Run | learning\\_rate |" in page["md"]
    html = Html(page["html"], "td")
    links = [attributes["href"] for tag, attributes in html.tags if tag == "a"]
    assert links == [f"{name}/report.html" for name in ("zeta", "mid", "alpha")]
    assert all((tmp_path / "runs" / link).is_file() for link in links)
    assert "1.750" in page["html"] and len([1 for tag, a in html.tags if tag == "path" and a["class"] == "line"]) == 3


def test_compare_shows_the_training_losses_that_were_logged(tmp_path, mori):
    for name in "ab":
        made_run(tmp_path / f"runs/{name}")  # 40 points: 4.95, 4.90, ... 3.00
    mori("report", "runs")
    assert "| Training loss, a | 4.9500 (step 1) | 3.0000 (step 40) |" in pages(tmp_path / "runs")["md"]


def test_compare_leaves_out_settings_that_change_no_model(tmp_path, mori):
    for name, steps in (("a", 10), ("b", 20)):
        settings = {"save_steps": steps, "logging_steps": steps, "profile_steps": f"1:{steps}", "language": [name]}
        made_run(tmp_path / f"runs/{name}", config={"model": "mini", "max_steps": steps, **settings})
    mori("report", "runs")
    assert "| Run | max\\_steps |\n" in pages(tmp_path / "runs")["md"]


def test_compare_ranks_by_the_loss_if_a_run_has_no_bits_per_byte(tmp_path, mori):
    for name, evaluation in (
        ("a", {"eval/loss": 3.0, "eval/bits_per_byte": 1.0}),
        ("b", {"eval/loss": 2.0}),
        ("c", {}),
    ):
        made_run(tmp_path / f"runs/{name}", metrics=[{"step": 5, "train/loss": 1.0, **evaluation}], summary=None)
    mori("report", "runs")
    page = pages(tmp_path / "runs")
    assert re.findall(r"\[(\w)\]\(", page["md"]) == ["b", "a", "c"] and Html(page["html"], "now").texts == ["2.0000"]


def test_compare_warns_of_different_held_out_texts(tmp_path, mori):
    made_run(tmp_path / "runs/a")
    made_run(
        tmp_path / "runs/b", summary={"sha256": {"documents_sha256": "0" * 64}}
    )  # the other run is too old to tell
    mori("report", "runs")
    assert not any("different held-out texts" in page for page in pages(tmp_path / "runs").values())
    made_run(tmp_path / "runs/c", ledger={"bytes": 77})
    mori("report", "runs")
    assert all("2 different held-out texts" in page for page in pages(tmp_path / "runs").values())
    made_run(tmp_path / "runs/d", config={"model": "mini", "max_eval_windows": 8})  # scores a part of the text
    mori("report", "runs")
    assert all("3 different held-out texts" in page for page in pages(tmp_path / "runs").values())


def test_compare_names_what_is_damaged(tmp_path, mori):
    made_run(tmp_path / "runs/a")
    made_run(tmp_path / "runs/b", summary="{", ledger="[]")
    damaged = made_run(tmp_path / "runs/c", config="\x00", metrics=None, summary=None)
    with (tmp_path / "runs/a/metrics.jsonl").open("a") as lines:
        lines.write('{"step": 4')
    (tmp_path / "runs/.cache").mkdir()
    (tmp_path / "runs/bench").mkdir()
    code, _, err = mori("report", "runs")
    assert (code, err) == (0, "")
    for page in pages(tmp_path / "runs").values():
        text = page.replace("\\", "")
        for line in (
            "a: metrics.jsonl: 1 of 43 lines",
            "b: summary.json cannot be used",
            "b: ledger.json cannot be used",
            "c: config.json cannot",
        ):
            assert line in text
    assert not (damaged / "report.md").exists()


@pytest.mark.parametrize(
    "name, line",
    [
        ("nothing", "nothing is not a folder; give the folder of a run, or one that holds runs"),
        ("file", "file is not a folder; give the folder of a run, or one that holds runs"),
        ("empty", "empty holds no runs; give the folder of a run, or one that holds runs"),
        ("damaged", "damaged is a damaged run: config.json cannot be used: it is not whole JSON"),
        ("compared", "compared is a comparison with Trainer, whose report is compared/report.md"),
    ],
)
def test_report_of_no_run_is_one_line_and_code_2(tmp_path, mori, name, line):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    made_run(tmp_path / "damaged", config="{", metrics=None, summary=None)
    (tmp_path / "compared").mkdir()
    (tmp_path / "compared/compare.json").write_text("{}")
    assert mori("report", name) == (2, "", f"mori report: error: {line}\n")
    assert not list(tmp_path.rglob("report.*"))


def test_report_without_a_folder_takes_runs(tmp_path, mori):
    made_run(tmp_path / "runs/a b#1")
    assert mori("report")[:2] == (0, "runs/report.html, runs/report.md: 1 run\n")
    assert 'href="a%20b%231/report.html"' in pages(tmp_path / "runs")["html"]


def test_report_takes_several_folders_and_writes_only_pages(tmp_path, mori):
    made_run(tmp_path / "runs/a")
    made_run(tmp_path / "runs/b")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert mori("report", "runs/a", "--folder", "runs/b")[0] == 0
    new = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()} - {
        path.relative_to(tmp_path).as_posix() for path in before
    }
    assert new == {f"runs/{run}/report.{kind}" for run in "ab" for kind in ("md", "html")}
    assert all(path.read_bytes() == content for path, content in before.items())


def test_report_script_is_the_command_and_needs_no_torch(tmp_path):
    made_run(tmp_path / "runs/a")
    done = run_script("report.py", "runs", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "runs/report.html, runs/report.md: 1 run\n"), done.stderr
    code = "import sys; from mori.tracking.report import write; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent).returncode == 0


@pytest.mark.parametrize(
    "command, shown",
    [
        (["/usr/bin/mori", "train", "--seed", "1"], "mori train --seed 1"),
        (["/x/mori/__main__.py", "train"], "python -m mori train"),
        (["/x/scripts/train.py", "--prompt", "a b"], "python scripts/train.py --prompt 'a b'"),
        (
            ["/x/ipykernel_launcher.py", "-f", "k.json"],
            "mori.train(corpus=['text.txt'], prompt=['Halo'], seed=1, run_name='run')",
        ),
    ],
)
def test_report_shows_the_command_of_the_run(tmp_path, command, shown):
    folder = made_run(tmp_path / "runs/run", environment={"command": command})
    write_run(read_run(folder))
    assert shown in Html(pages(folder)["html"], "pre").texts and f"```bash\n{shown}\n```" in pages(folder)["md"]


def test_command_of_a_run_has_paths_from_its_folder(tmp_path):
    command = [
        "/usr/bin/mori",
        "train",
        "--corpus",
        str(tmp_path / "data/text.txt"),
        f"--output_dir={tmp_path / 'brain'}",
    ]
    folder = made_run(tmp_path / "runs/run", environment={"command": command, "world_size": 2})
    write_run(read_run(folder))
    wanted = "torchrun --nproc-per-node=2 --no-python mori train --corpus data/text.txt --output_dir=brain"
    assert wanted in Html(pages(folder)["html"], "pre").texts


def test_settings_that_are_the_defaults_of_the_model_are_not_listed(settings, run_train, tmp_path):
    run_train(max_steps=2, learning_rate=5e-5)
    page = pages(tmp_path / "runs/run")["html"]
    assert "<code>block_size</code>" in page and "<code>learning_rate</code>" not in page
    assert flags({"learning_rate": 5e-5}) and TrainConfig(model="x").resolve().learning_rate == 5e-5


def test_thinned_line_keeps_its_ends_and_extremes():
    points = [(step, math.sin(step / 3) + (50 if step == 7777 else 0)) for step in range(20_000)]
    thin = charts.thinned(points, 400)
    assert len(thin) <= 420 and thin == sorted(set(thin)) and set(thin) <= set(points)
    assert thin[0] == points[0] and thin[-1] == points[-1] and (7777, points[7777][1]) in thin
    assert charts.thinned(points[:400], 400) == points[:400]


def test_smoothed_line_is_the_mean_of_its_neighbours():
    import pandas

    values = [math.cos(step) + step / 100 for step in range(600)]
    reach = 10
    expected = pandas.Series(values).rolling(2 * reach + 1, center=True).mean()
    smooth = charts.smoothed(list(enumerate(values)))
    assert [step for step, _ in smooth] == list(range(600))
    for step in range(reach, 600 - reach):
        assert smooth[step][1] == pytest.approx(expected[step])


@pytest.mark.parametrize(
    "low, high", [(0, 1), (4.2, 9.7), (1e-5, 1e-3), (-3, 250), (7, 7), (0, 0), (1e9, 3e9), (0.3, 0.30001)]
)
def test_axis_covers_its_values_with_a_few_round_ticks(low, high):
    axis = charts.Axis(low, high)
    places = [place for place, _ in axis.ticks()]
    assert 3 <= len(places) <= 8 and places == sorted(places)
    assert 0 <= axis(low) <= axis(high) <= 1 and all(-1e-9 <= place <= 1 + 1e-9 for place in places)
    assert len({label for _, label in axis.ticks()}) == len(places)


@pytest.mark.parametrize("shares, labels", [
    ([0.0, 0.06], ["0%", "2%", "4%", "6%"]),
    ([0.0, 0.0], ["0%", "20%", "40%", "60%", "80%", "100%"]),
    ([0.001, 0.004], ["0.1%", "0.2%", "0.3%", "0.4%"]),
])  # fmt: skip
def test_axis_of_shares_is_written_in_percent(shares, labels):
    chart = charts.Chart("copied", [charts.Series("samples", list(enumerate(shares)), "held")], ".1%")
    assert [label for _, label in chart.axis.ticks()] == labels


def test_logarithmic_axis_is_taken_for_values_of_many_sizes():
    points = [(step, 10.0**-step) for step in range(6)]
    chart = charts.Chart("norm", [charts.Series("norm", points, "plain")], logarithmic=True)
    assert chart.axis.logarithmic and [chart.axis(value) for _, value in points] == pytest.approx(
        [1, 0.8, 0.6, 0.4, 0.2, 0]
    )
    flat = charts.Chart("norm", [charts.Series("norm", [(0, 1.0), (1, 2.0)], "plain")], logarithmic=True)
    assert not flat.axis.logarithmic


def test_reporter_removes_what_a_killed_run_left(tmp_path):
    folder = made_run(tmp_path / "run")
    for name in (".report.md.123.partial", ".progress.json.77.partial"):
        (folder / name).write_text("half")
    Reporter(folder).write({"steps": 1})
    assert not list(folder.glob(".*.partial")) and (folder / "report.md").is_file()
