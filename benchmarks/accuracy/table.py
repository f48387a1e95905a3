"""The rows as a table and as a picture."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.accuracy.stages import Row
from benchmarks.accuracy.subjects import SUBJECTS

STAGES = ("pruned", "repaired without data", "repaired", "fine-tuned")
COLOURS = {"onnxprune": "#1f6f8b", "torch-pruning": "#d1741f"}
WIDTH, BAR, HEAD = 760, 16, 30
#: Columns of the table in the README: heading, tool, stage.
COLUMNS = (
    ("pruned", "onnxprune", "pruned"),
    ("repaired, no data", "onnxprune", "repaired without data"),
    ("repaired", "onnxprune", "repaired"),
    ("fine-tuned", "onnxprune", "fine-tuned"),
    ("Torch-Pruning: pruned", "torch-pruning", "pruned"),
    ("repaired", "torch-pruning", "repaired"),
    ("fine-tuned", "torch-pruning", "fine-tuned"),
)
BEGIN, END = "<!-- accuracy:begin -->\n", "<!-- accuracy:end -->"


def show(rows: Sequence[Row]) -> None:
    """Print accuracy after each stage, both tools side by side."""
    from rich.console import Console
    from rich.table import Table

    table = Table("model", "budget", "tool", "original", *STAGES, "CPU s", "MACs left")
    for model, budget, tool in _runs(rows):
        own = {r.stage: r for r in rows if (r.model, r.budget, r.tool) == (model, budget, tool)}
        shown = [f"{own[s].accuracy:.2%}" if s in own else "-" for s in STAGES]
        seconds = " / ".join(f"{own[s].cpu_s:.0f}" if s in own else "-" for s in STAGES)
        share = own[max(own, key=STAGES.index)].macs
        start = f"{_original(rows, model):.2%}"
        table.add_row(model, f"{budget:.0%}", tool, start, *shown, seconds, f"{share:.0%}")
    Console().print(table)


def markdown(rows: Sequence[Row]) -> str:
    """One line for each network: percent at each budget, the largest first."""
    budgets = sorted({row.budget for row in rows if row.tool}, reverse=True)
    found = {(r.model, r.budget, r.tool, r.stage): f"{100 * r.accuracy:.1f}" for r in rows}
    lines = [
        f"| model (its accuracy) | {' | '.join(heading for heading, _, _ in COLUMNS)} |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for model in dict.fromkeys(row.model for row in rows):
        cells = [f"{SUBJECTS[model].title} ({100 * _original(rows, model):.1f})"]
        for _, tool, stage in COLUMNS:
            numbers = [found.get((model, budget, tool, stage), "-") for budget in budgets]
            cells.append("-" if set(numbers) == {"-"} else " / ".join(numbers))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def insert(page: str, rows: Sequence[Row]) -> str:
    """A page with the table between its two marks."""
    before, _, rest = page.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise ValueError(f"the page lacks the lines {BEGIN.strip()} and {END}")
    return f"{before}{BEGIN}{markdown(rows)}{END}{after}"


def picture(rows: Sequence[Row]) -> str:
    """An SVG of horizontal bars: one group for each network and budget, one bar for each stage."""
    parts: list[str] = []
    y = HEAD
    for model, budget in dict.fromkeys((m, b) for m, b, _ in _runs(rows)):
        y += BAR
        original = _original(rows, model)
        parts.append(_text(10, y, f"{model}, {budget:.0%} of the MACs", bold=True))
        top = y + 4
        for stage in STAGES:
            for tool in COLOURS:
                found = [
                    r
                    for r in rows
                    if (r.model, r.budget, r.tool, r.stage) == (model, budget, tool, stage)
                ]
                if found:
                    y += BAR
                    parts += _bar(y, stage, tool, found[0].accuracy)
        x = 270 + 4 * 100 * original
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{y + 3}" stroke="#444"/>')
        y += BAR // 2
    legend = "".join(
        _text(320 + 120 * i, 18, tool, colour=colour)
        for i, (tool, colour) in enumerate(COLOURS.items())
    )
    title = _text(10, 18, "held-out accuracy (line: the original)", bold=True)
    size = f'width="{WIDTH}" height="{y + HEAD}"'
    style = 'font-family="sans-serif" font-size="12"'
    paper = '<rect width="100%" height="100%" fill="#fff"/>'
    body = "\n".join([paper, title, legend, *parts])
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n{body}\n</svg>\n'


def _bar(y: int, stage: str, tool: str, accuracy: float) -> list[str]:
    width = 4 * 100 * accuracy
    box = f'x="270" y="{y - BAR + 5}" width="{width:.1f}" height="{BAR - 4}"'
    return [
        _text(30, y, f"{stage}, {tool}"),
        f'<rect {box} fill="{COLOURS[tool]}"/>',
        _text(276 + int(width), y, f"{accuracy:.1%}"),
    ]


def _text(x: int, y: int, text: str, *, bold: bool = False, colour: str = "#222") -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x}" y="{y}" fill="{colour}"{weight}>{text}</text>'


def _runs(rows: Sequence[Row]) -> list[tuple[str, float, str]]:
    return list(dict.fromkeys((r.model, r.budget, r.tool) for r in rows if r.tool))


def _original(rows: Sequence[Row], model: str) -> float:
    return next(r.accuracy for r in rows if r.model == model and r.stage == "original")
