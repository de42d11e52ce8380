"""A page as one HTML file that loads nothing: style sheet and charts are in it, and there is no script."""

import html
import re

from mori.cli import plural
from mori.tracking.report.charts import Chart, svg
from mori.tracking.report.page import Code, Link, Page, Sample, Table

# No HTML can hold these, and half of a surrogate pair is no UTF-8.
_UNSHOWN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")

_STYLE = """
:root{color-scheme:light dark;--paper:#faf9f6;--card:#fff;--ink:#1c1b22;--soft:#676570;--rule:#e6e3dc;--grid:#eeebe4;
--held:#5546d6;--train:#dd7a3c;--plain:#3d7f88;--mark:#fde9a9;--warn:#9a5b00;--warnpaper:#fdf3dc;--rest:#c9c5bc;
--c0:#5546d6;--c1:#dd7a3c;--c2:#1f8a70;--c3:#c2417c;--c4:#2f79c2;--c5:#8a6d1d;--c6:#7a4fa3;--c7:#4f7a1f}
@media(prefers-color-scheme:dark){:root{--paper:#131318;--card:#1b1b22;--ink:#ebe9f0;--soft:#9d9aa8;--rule:#2d2d37;--grid:#26262f;
--held:#a89dff;--train:#f3a26d;--plain:#74c0c9;--mark:#5c4a12;--warn:#f2c879;--warnpaper:#2c2517;--rest:#4a4a55;
--c0:#a89dff;--c1:#f3a26d;--c2:#5fd0b0;--c3:#f08cb8;--c4:#7db8f0;--c5:#d8bb62;--c6:#c9a3ee;--c7:#a5cf75}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",
"Noto Sans",sans-serif;font-variant-numeric:tabular-nums}
main{max-width:1080px;margin:0 auto;padding:44px 24px 64px}
h1{font-size:clamp(26px,4vw,38px);line-height:1.15;letter-spacing:-.02em;margin:4px 0 10px;overflow-wrap:anywhere}
h2{font-size:20px;letter-spacing:-.01em;margin:52px 0 14px}
p{margin:0}
.kind,.label{font-size:12px;letter-spacing:.07em;text-transform:uppercase;color:var(--soft);font-weight:600}
.summary{color:var(--soft);max-width:72ch;overflow-wrap:anywhere}
.card,.panel,details{background:var(--card);border:1px solid var(--rule);border-radius:14px}
.card{margin-top:28px;padding:26px 28px;display:grid;grid-template-columns:minmax(0,5fr) minmax(0,6fr);gap:20px 40px;align-items:center}
.card.alone{grid-template-columns:1fr}
.big{font-size:clamp(40px,6.4vw,68px);line-height:1.05;font-weight:680;letter-spacing:-.04em;margin:10px 0 8px;white-space:nowrap}
.big .was{color:var(--soft);font-weight:480}.big .to{color:var(--soft);font-weight:400;padding:0 .14em;font-size:.72em}
.big .now{color:var(--held)}
.note,.figure small{color:var(--soft);font-size:14px}
.figures{grid-column:1/-1;display:grid;grid-template-columns:repeat(auto-fit,minmax(112px,1fr));gap:18px;border-top:1px solid var(--rule);
padding-top:20px}
.figure b{display:block;font-size:23px;font-weight:620;letter-spacing:-.02em;line-height:1.3;white-space:nowrap}
.figure small{display:block;line-height:1.35}
.warnings{margin:20px 0 0;padding:12px 18px 12px 36px;border-radius:12px;background:var(--warnpaper);color:var(--warn);overflow-wrap:anywhere}
.grid{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:16px}
.panel{padding:18px 20px 14px;min-width:0}
.panel.wide{grid-column:1/-1}
.chart h3{font-size:15px;margin:0 0 2px}
.legend{display:flex;flex-wrap:wrap;gap:2px 16px;font-size:13px;color:var(--soft);margin-bottom:12px}
.legend span{max-width:100%;overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.legend b{color:var(--ink);font-weight:600}
.legend i,td i{display:inline-block;width:10px;height:10px;border-radius:5px;margin-right:6px}
.plot{position:relative;height:190px;margin:6px 0 24px 46px}
.card .plot{height:200px;margin-bottom:22px}
.plot svg{position:absolute;inset:0;width:100%;height:100%;overflow:visible}
.plot path{fill:none;vector-effect:non-scaling-stroke;stroke-linejoin:round;stroke-linecap:round}
.plot .gridline{stroke:var(--grid);stroke-width:1}
.plot .line{stroke-width:2}.plot .faint{stroke-width:1;opacity:.38}.plot .dot{stroke-width:7}
.y span,.x span{position:absolute;font-size:12px;line-height:1;color:var(--soft);white-space:nowrap}
.y span{right:100%;margin:0 9px -6px 0}
.x span{top:100%;margin-top:9px;transform:translateX(-50%)}.x span:first-child{transform:none}.x .end{transform:translateX(-100%)}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:16px;margin-bottom:16px}
.sample{white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:isolate;margin-top:8px;line-height:1.6}
.prompt{color:var(--soft)}
mark{background:var(--mark);color:inherit;border-radius:3px;padding:1px 0;-webkit-box-decoration-break:clone;box-decoration-break:clone}
.share{display:flex;height:14px;border-radius:7px;overflow:hidden;gap:2px;margin:2px 0 10px}
.share span{min-width:3px}
.panel+.note,.scroll+.note,.grid+.note{margin-top:8px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:14.5px}
th{font-weight:600;color:var(--soft);font-size:13px;text-align:left;vertical-align:bottom}
th,td{padding:7px 18px 7px 0;border-bottom:1px solid var(--rule);vertical-align:top}
tr:last-child td{border-bottom:0}
.named td:first-child{min-width:130px;overflow-wrap:anywhere}
.n{text-align:right}td.n{white-space:nowrap}th:last-child,td:last-child{padding-right:0}
.pairs{max-width:720px}.pairs td:first-child{color:var(--soft);width:38%}.pairs td{overflow-wrap:anywhere}
.best td{font-weight:650;color:var(--held)}
code,pre{font:13px/1.55 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;overflow-wrap:anywhere}
pre{white-space:pre-wrap;margin:6px 0 16px}
pre:last-child{margin-bottom:2px}
details{padding:14px 20px;margin-top:16px}
summary{cursor:pointer;font-weight:600}
details .scroll{margin-top:10px}
a{color:var(--held)}
footer{color:var(--soft);font-size:13px;margin-top:44px}
@media(max-width:720px){main{padding:26px 16px 40px}.card{grid-template-columns:minmax(0,1fr);padding:20px 18px}.grid,.pair{grid-template-columns:minmax(0,1fr)}
.panel{padding:16px 16px 12px}.figures{grid-template-columns:1fr 1fr}.wide .plot{height:190px}table{font-size:13px}th{font-size:12px}th,td{padding-right:10px}.named td:first-child{min-width:110px}h2{margin-top:38px}.pair{gap:10px}}
@media print{body{background:#fff}.card,.panel,details{break-inside:avoid}}
"""


def page(content: Page) -> str:
    """The page as HTML."""
    parts = [
        f'<p class="kind">{_text(content.kind)}</p><h1>{_text(content.title)}</h1><p class="summary">{_text(content.summary)}</p>',
        _card(content),
        _warnings(content.warnings),
        _section("Curves", _charts(content.charts[1:] if content.headline else content.charts)),
        _section("Samples", _samples(content)),
        *(_table(table, content.shares if table.title == "The text" else []) for table in content.tables),
        _section("Run it again", _commands(content.commands)),
        f"<footer>{_text(content.end)}</footer>",
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{_text(content.title)}</title><style>{_STYLE}</style></head>\n<body><main>\n"
        + "\n".join(filter(None, parts))
        + "\n</main></body></html>\n"
    )


def _text(value: str) -> str:
    """Any text as HTML; what no page can hold is a question mark in a diamond."""
    return html.escape(_UNSHOWN.sub("\ufffd", value.replace("\r\n", "\n").replace("\r", "\n")))


def _section(title: str, body: str) -> str:
    return f"<section><h2>{_text(title)}</h2>{body}</section>" if body else ""


def _warnings(lines: list[str]) -> str:
    return f'<ul class="warnings">{"".join(f"<li>{_text(line)}</li>" for line in lines)}</ul>' if lines else ""


def _card(content: Page) -> str:
    """The headline, the first chart and the figures: the part of the page that a picture of it shows."""
    figures = "".join(
        f'<div class="figure"><span class="label">{_text(f.label)}</span><b>{_text(f.value)}</b><small>{_text(f.note)}</small></div>'
        for f in content.figures
    )
    figures = f'<div class="figures">{figures}</div>' if figures else ""
    headline, chart = content.headline, content.charts[0] if content.charts else None
    if headline is None:
        return f'<div class="card alone">{figures}</div>' if figures else ""
    was = f'<span class="was">{_text(headline.before)}</span><span class="to">→</span>' if headline.before else ""
    big = (
        f'<div><p class="label">{_text(headline.label)}</p><p class="big">{was}<span class="now">{_text(headline.after)}</span></p>'
        f'<p class="note">{_text(headline.note)}</p></div>'
    )
    picture = f'<div class="chart">{_drawing(chart)}</div>' if chart else ""
    return f'<div class="card{"" if chart else " alone"}">{big}{picture}{figures}</div>'


def _charts(charts: list[Chart]) -> str:
    wide = len(charts) - 1 if len(charts) % 2 else None  # leaves no hole in the grid
    panels = "".join(
        f'<div class="panel chart{" wide" if index == wide else ""}"><h3>{_text(chart.title)}</h3>{_drawing(chart)}</div>'
        for index, chart in enumerate(charts)
    )
    return f'<div class="grid">{panels}</div>' if panels else ""


def _legend(chart: Chart) -> str:
    """The names of the lines, each with its last value; where there are many, the names of those that have a colour."""
    entries = []
    for series in chart.series:
        if chart.crowded and series.colour == "rest":
            continue
        value = "" if chart.crowded else f" <b>{series.points[-1][1]:{chart.digits}}</b>"
        entries.append(f"<span>{_dot(series.colour)}{_text(series.name)}{value}</span>")
    others = len(chart.series) - len(entries)
    entries += [f"<span>{_dot('rest')}{plural(others, 'other')}</span>"] if others else []
    return f'<div class="legend">{"".join(entries)}</div>'


def _dot(colour: str) -> str:
    return f'<i style="background:var(--{colour})"></i>'


def _drawing(chart: Chart) -> str:
    lost = f'<p class="note">{_text(chart.lost)}</p>' if chart.lost else ""
    return _legend(chart) + svg(chart) + lost


def _samples(content: Page) -> str:
    if not content.pairs:
        return ""
    rows = []
    for pair in content.pairs:
        panels = [
            f'<div class="panel"><span class="label">{_text(title)}</span>{_sample(sample)}</div>'
            for title, sample in zip(content.sample_titles, pair, strict=True)
            if sample is not None
        ]
        rows.append(f'<div class="pair">{"".join(panels)}</div>')
    return "".join(rows) + f'<p class="note">{_text(f"The prompt is grey. {content.sample_note}".strip())}</p>'


def _sample(sample: Sample) -> str:
    parts = "".join(f"<mark>{_text(part)}</mark>" if copied else _text(part) for part, copied in sample.parts)
    prompt = f'<span class="prompt">{_text(sample.prompt)}</span>' if sample.prompt else ""
    return f'<div class="sample" dir="auto">{prompt}{parts}</div>'


def _table(table: Table, shares: list[tuple[str, int]]) -> str:
    named = any(column.strip("#") for column in table.columns)
    classes = [' class="n"' if column.startswith("#") else "" for column in table.columns]
    head = "".join(f"<th{c}>{_text(column.lstrip('#'))}</th>" for c, column in zip(classes, table.columns, strict=True))
    rows = [
        f"<tr{' class=best' if index == table.marked else ''}>"
        + "".join(f"<td{c}>{_cell(cell)}</td>" for c, cell in zip(classes, row, strict=True))
        + "</tr>"
        for index, row in enumerate(table.rows)
    ]
    body = (
        f'<div class="scroll"><table{_class(table)}>{f"<thead><tr>{head}</tr></thead>" if named else ""}'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
    note = f'<p class="note">{_text(table.note)}</p>' if table.note else ""
    if table.folded:
        return f"<details><summary>{_text(table.title)}</summary>{body}{note}</details>"
    return _section(table.title, f'<div class="panel">{_shares(shares)}{body}</div>{note}')


def _class(table: Table) -> str:
    """The class of pairs of names and values, or of a table whose rows have names."""
    if not any(column.strip("#") for column in table.columns):
        return ' class="pairs"'
    return "" if table.columns[0].startswith("#") else ' class="named"'


def _shares(shares: list[tuple[str, int]]) -> str:
    """A bar with the shares of the tokens."""
    if not shares:
        return ""
    colours = {"to train on": "train", "held out": "held", "dropped": "rest"}
    bar = "".join(
        f'<span style="flex:{tokens} 1 0;background:var(--{colours[name]})"></span>' for name, tokens in shares
    )
    names = "".join(f"<span>{_dot(colours[name])}{name} <b>{tokens:,}</b></span>" for name, tokens in shares)
    return f'<div class="share" aria-hidden="true">{bar}</div><div class="legend">{names}</div>'


def _cell(cell) -> str:
    if isinstance(cell, Link):
        return f'{_dot(cell.colour)}<a href="{_text(cell.target)}">{_text(cell.text)}</a>'
    return f"<code>{_text(cell)}</code>" if isinstance(cell, Code) else _text(cell)


def _commands(commands: list[tuple[str, str]]) -> str:
    blocks = "".join(
        f'<span class="label">{_text(name)}</span><pre>{_text(command)}</pre>' for name, command in commands
    )
    return f'<div class="panel">{blocks}</div>' if blocks else ""
