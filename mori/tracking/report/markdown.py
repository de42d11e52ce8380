"""A page as Markdown: what GitHub and editors show, with every text escaped."""

import re

from mori.tracking.report.charts import Chart, sparkline
from mori.tracking.report.page import Code, Link, Page, Sample, Table

_CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
# Punctuation that Markdown could read: a backslash makes it a letter, everywhere but in code.
_PUNCTUATION = re.compile(r"([\\`*_{}\[\]<>#|~&$!@^]|:(?=[^\d\s]))")
_BREAKS = re.compile("\r\n|[\r\n\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")


def page(content: Page) -> str:
    """The page as Markdown, in UTF-8."""
    parts = [
        f"# {_text(content.title)}",
        f"*{_text(content.kind)}.* {_text(content.summary)}",
        "\n".join(f"> **Note:** {_text(line)}  " for line in content.warnings),
        _headline(content),
        _charts(content.charts),
        _samples(content),
        *map(_table, content.tables),
        _commands(content.commands),
        _text(content.end),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _text(value: str) -> str:
    """Any text as one line of Markdown that shows it letter by letter."""
    value = _CONTROLS.sub("\ufffd", _BREAKS.sub("\n", value).replace("\t", "    "))
    value = _PUNCTUATION.sub(r"\\\1", value)
    value = re.sub(r"(?i)\bwww\.", lambda match: match[0][:-1] + "\\.", value)  # GitHub makes it a link
    return value.replace("\n", "<br>")


def _code(value: str) -> str:
    """A text in a program's letters, inside a table or a line: no backslash counts there, so HTML it is."""
    return f"<code>{_text(value)}</code>"


def _headline(content: Page) -> str:
    rows = []
    if headline := content.headline:
        arrow = f"{headline.before} → " if headline.before else ""
        rows.append(f"| **{_text(headline.label)}** | **{arrow}{headline.after}** | {_text(headline.note)} |")
    rows += [f"| {_text(f.label)} | {_text(f.value)} | {_text(f.note)} |" for f in content.figures]
    return "\n".join(["|  |  |  |", "| --- | ---: | --- |", *rows]) if rows else ""


def _charts(charts: list[Chart]) -> str:
    """A row for each line: its first and its last value, and its shape in block characters."""
    rows, notes = ["| Curve | First | Last | Shape |", "| --- | ---: | ---: | --- |"], []
    for chart in charts:
        for series in chart.series:
            (first, before), (last, after) = series.points[0], series.points[-1]
            ends = " | ".join(
                f"{value:{chart.digits}} (step {step:,})" for step, value in ((first, before), (last, after))
            )
            name = chart.title if chart.title.lower() == series.name else f"{chart.title}, {series.name}"
            rows.append(f"| {_text(name)} | {ends} | {sparkline(series.points)} |")
        notes += [f"{_text(chart.title)}: {chart.lost}"] if chart.lost else []
    return "\n".join(["## Curves", "", *rows, *(line for note in notes for line in ("", note))]) if charts else ""


def _samples(content: Page) -> str:
    if not content.pairs:
        return ""
    titles = " | ".join(map(_text, content.sample_titles))
    rows = [f"| {' | '.join('' if sample is None else _sample(sample) for sample in pair)} |" for pair in content.pairs]
    return "\n".join(
        [
            "## Samples",
            "",
            f"| {titles} |",
            "| --- | --- |",
            *rows,
            "",
            _text(f"The prompt is in italics. {content.sample_note}".strip()),
        ]
    )


def _sample(sample: Sample) -> str:
    parts = "".join(f"<mark>{_text(part)}</mark>" if copied else _text(part) for part, copied in sample.parts)
    return f"<i>{_text(sample.prompt)}</i>{parts}" if sample.prompt else parts


def _table(table: Table) -> str:
    named = [_text(column.lstrip("#")) for column in table.columns]
    rules = ["---:" if column.startswith("#") else "---" for column in table.columns]
    rows = [[_cell(cell) for cell in row] for row in table.rows]
    if table.marked is not None:
        rows[table.marked] = [f"**{cell}**" for cell in rows[table.marked]]
    lines = [f"| {' | '.join(cells)} |" for cells in [named, rules, *rows]]
    return "\n".join([f"## {_text(table.title)}", "", *lines, *(["", _text(table.note)] if table.note else [])])


def _cell(cell) -> str:
    if isinstance(cell, Link):
        return f"[{_text(cell.text)}]({cell.target})"
    return _code(cell) if isinstance(cell, Code) else _text(cell)


def _commands(commands: list[tuple[str, str]]) -> str:
    blocks = []
    for name, command in commands:
        command = _CONTROLS.sub("\ufffd", command)
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", command)), default=0))
        blocks.append(f"{_text(name)}:\n\n{fence}bash\n{command}\n{fence}")
    return "\n\n".join(["## Run it again", *blocks]) if blocks else ""
