"""Results as tables on a terminal, or as plain Markdown tables where the output is piped."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, JustifyMethod
from rich.table import Table

if TYPE_CHECKING:
    from onnxprune.result import (
        CheckReport,
        Cost,
        FrozenRow,
        GroupRow,
        Inspection,
        LayerRow,
        Report,
    )

# Piped tables never wrap: their width must not depend on who reads them.
PIPED_WIDTH = 4000
GROUPS_SHOWN = 20
# Of the axes that are frozen alike at many nodes.
ALIKE_SHOWN = 5
# Metrics that are shares of samples: shown in percent, compared in points.
SHARES = frozenset({"accuracy", "precision", "recall", "f1", "top5", "agreement"})
MEASURES = frozenset({"mse", "cosine"})
STEP_METRICS = ("accuracy", "agreement", "mse")


def stdout_console() -> Console:
    """Standard output: colours and box lines on a terminal (not with NO_COLOR), else plain text."""
    console = Console(file=sys.stdout, markup=False, emoji=False, highlight=False)
    if console.is_terminal:
        return console
    return Console(
        file=sys.stdout,
        markup=False,
        emoji=False,
        highlight=False,
        width=PIPED_WIDTH,
        color_system=None,
    )


def show_report(console: Console, report: Report, *, layers: bool = False) -> None:
    """Print the before/after table, the checks, what each rebuilding step bought, and the notes."""
    if layers:
        show_table(console, layer_table(console, report.layers))
    show_table(console, cost_table(console, report.before, report.after))
    if report.attempts:
        show_table(console, attempt_table(console, report.attempts))
    if report.rebuild:
        show_table(console, rebuild_table(console, report.rebuild))
    for check in report.checks:
        show_check(console, replace(check, metrics={}))  # the table above has them
    for note in report.notes:
        console.print(f"note: {note}")


def show_check(console: Console, check: CheckReport) -> None:
    """Print one check's outcome in a line, and a line for each problem that it found."""
    console.print(f"check {check_summary(check)}", style="green" if check.passed else "bold red")
    for problem in check.problems:
        console.print(f"  problem: {problem}")


def check_summary(check: CheckReport) -> str:
    """A check's outcome and its numbers in one line."""
    facts = ["structure fine" if check.structure else "structure broken"]
    if check.max_error is not None:
        feeds = "1 feed" if check.feeds == 1 else f"{check.feeds} feeds"
        error = f"largest error {check.max_error:.1e} on {feeds}"
        if check.tolerance is not None:
            error += f" (tolerance {check.tolerance:.1e})"
        facts.append(f"{error} against {check.reference}")
    if check.agreement is not None:
        facts.append(f"top-1 agreement {100 * check.agreement:.2f} %")
    others = (item for item in check.metrics.items() if item[0] != "agreement")
    facts += [f"{name} {metric(name, value)}" for name, value in others]
    return f"{'passed' if check.passed else 'FAILED'}: {', '.join(facts)}"


def show_inspection(
    console: Console, inspection: Inspection, *, why: bool = False, layers: bool = False
) -> None:
    """Print what a model costs, what can be pruned, and what is frozen (with `why`, each axis)."""
    table = new_table(console, ("model", ""), left=2)
    for name, value in _facts(inspection):
        table.add_row(name, value)
    show_table(console, table)
    if layers:
        show_table(console, _weights_table(console, inspection.layers))
    _show_groups(console, inspection.groups)
    if inspection.sensitivity:
        show_table(console, sensitivity_table(console, inspection))
    if not inspection.frozen:
        console.print("frozen: nothing")
    elif why:
        show_table(console, frozen_table(console, inspection.frozen))
    else:
        show_table(console, reason_table(console, inspection.frozen))


def cost_table(console: Console, before: Cost, after: Cost) -> Table:
    """What the model costs and how well it does, before and after."""
    table = new_table(console, ("", "before", "after", "after/before"), left=1)
    table.add_row("parameters", *_row(before.params, after.params, "{:,}"))
    table.add_row("MACs", *_row(before.macs, after.macs, "{:,}"))
    size = (bytes_text(before.size_bytes), bytes_text(after.size_bytes))
    table.add_row("file size", *size, ratio(before.size_bytes, after.size_bytes))
    if before.latency_ms is not None and after.latency_ms is not None:
        table.add_row("latency", *_row(before.latency_ms, after.latency_ms, "{:.3f} ms"))
    for name in dict.fromkeys([*before.metrics, *after.metrics]):
        table.add_row(name, *_metric_row(name, before.metrics.get(name), after.metrics.get(name)))
    return table


def rebuild_table(console: Console, steps: Sequence[Mapping[str, object]]) -> Table:
    """How well the model does after each rebuilding step."""
    names = [name for name in STEP_METRICS if any(name in step for step in steps)]
    table = new_table(console, ("rebuilding step", *names, "details"), left=1)
    for step in steps:
        cells = [_step_metric(name, step.get(name)) for name in names]
        known = {"step", "notes", *SHARES, *MEASURES}
        details = (_detail(*item) for item in step.items() if item[0] not in known)
        table.add_row(str(step.get("step", "")), *cells, ", ".join(filter(None, details)))
    return table


def attempt_table(console: Console, attempts: Sequence[Mapping[str, Any]]) -> Table:
    """What was tried until the promise held, in order."""
    metric_name = attempts[0]["metric"] or "metric"
    heads = ("attempt", "budget", "left", "parameters", "MACs", metric_name, "drop", "promise")
    table = new_table(console, heads, left=0)
    for number, row in enumerate(attempts, 1):
        counts = (f"{row['params']:,}", f"{row['macs']:,}")
        shares = (f"{row['budget']:.3f}", f"{row['reached']:.3f}")
        drop = "-" if row["drop"] is None else f"{row['drop']:.2f} points"
        value = _step_metric(metric_name, row["value"])
        held = "kept" if row["passed"] else "missed"
        table.add_row(str(number), *shares, *counts, value, drop, held)
    return table


def layer_table(console: Console, layers: Sequence[LayerRow]) -> Table:
    """Every weighted node with its weight's shape, parameters and MACs, before and after."""
    heads = ("layer", "operator", "shape", "after", "params", "after", "MACs", "after")
    table = new_table(console, heads, left=4)
    for row in layers:
        shapes = (shape_text(row.shape_before), shape_text(row.shape_after))
        counts = (row.params_before, row.params_after, row.macs_before, row.macs_after)
        table.add_row(row.name, row.op_type, *shapes, *(f"{count:,}" for count in counts))
    params = (sum(row.params_before for row in layers), sum(row.params_after for row in layers))
    macs = (sum(row.macs_before for row in layers), sum(row.macs_after for row in layers))
    table.add_row("total", "", "", "", *(f"{count:,}" for count in (*params, *macs)))
    return table


def frozen_table(console: Console, frozen: Iterable[FrozenRow]) -> Table:
    """Each frozen axis with its reason and what it costs, the most costly first.

    Of axes that are frozen alike at many nodes only the first few have rows of their own.
    """
    heads = ("frozen", "axis", "by node", "reason", "parameters", "MACs")
    table = new_table(console, heads, left=4)
    rows: list[FrozenRow] = []
    axes: dict[int, str] = {}
    for kind, alike in by_kind(frozen).items():
        shown = alike if len(alike) <= ALIKE_SHOWN + 1 else alike[:ALIKE_SHOWN]
        rest = alike[len(shown) :]
        axes |= {id(row): str(row.axis) for row in shown}
        rows += [*shown, *([_summary(kind, rest)] if rest else [])]
    for row in sorted(rows, key=_price):
        cells = (row.tensor, axes.get(id(row), ""), row.node, row.reason)
        table.add_row(*cells, f"{row.params:,}", f"{row.macs:,}")
    return table


def by_kind(frozen: Iterable[FrozenRow]) -> dict[str, list[FrozenRow]]:
    """The axes by reason, whichever node it names; in each the most costly first."""
    kinds: dict[str, list[FrozenRow]] = defaultdict(list)
    for row in sorted(frozen, key=_price):
        operator = row.node.partition(" ")[0]
        kinds[row.reason.replace(row.node, operator)].append(row)
    return dict(kinds)


def _summary(kind: str, rows: Sequence[FrozenRow]) -> FrozenRow:
    """One row for many that are frozen alike."""
    return replace(
        rows[0],
        tensor=f"... {len(rows)} more alike (--json lists all)",
        node=f"{len({row.node for row in rows})} nodes",
        reason=kind,
        params=sum(row.params for row in rows),
        macs=sum(row.macs for row in rows),
    )


def reason_table(console: Console, frozen: Iterable[FrozenRow]) -> Table:
    """The reasons for which axes are frozen, the most costly first."""
    heads = ("frozen because (--why lists each)", "axes", "parameters", "MACs")
    table = new_table(console, heads, left=1)
    kinds = [(_summary(kind, rows), len(rows)) for kind, rows in by_kind(frozen).items()]
    for row, count in sorted(kinds, key=lambda k: _price(k[0])):
        table.add_row(row.reason, f"{count:,}", f"{row.params:,}", f"{row.macs:,}")
    return table


def sensitivity_table(console: Console, inspection: Inspection) -> Table:
    """How much the outputs change when a group alone is pruned, the most sensitive first."""
    heads = ("sensitivity of group", "units", "removed", "output change", "parameters", "MACs")
    table = new_table(console, heads, left=1)
    groups = {row.name: row for row in inspection.groups}
    for row in inspection.sensitivity:
        change = "cannot be told" if row.change is None else f"{100 * row.change:.3g} %"
        counts = (f"{row.units:,}", f"{row.removed:,}")
        cost = groups[row.group]
        table.add_row(row.group, *counts, change, f"{cost.params:,}", f"{cost.macs:,}")
    return table


def _show_groups(console: Console, groups: Sequence[GroupRow]) -> None:
    """Print the groups, the most costly first; all but the first few only in JSON."""
    if not groups:
        console.print("groups: nothing can be pruned")
        return
    heads = ("group", "units", "width", "exact", "tensors", "parameters", "MACs")
    table = new_table(console, heads, left=1)
    for row in sorted(groups, key=_price)[:GROUPS_SHOWN]:
        counts = (row.params, row.macs)
        exact = "yes" if row.exact else "no"
        cells = (row.name, f"{row.units:,}", str(row.width), exact, str(len(row.tensors)))
        table.add_row(*cells, *(f"{count:,}" for count in counts))
    show_table(console, table)
    if len(groups) > GROUPS_SHOWN:
        console.print(f"... and {len(groups) - GROUPS_SHOWN} more groups (--json lists all)")


def _weights_table(console: Console, layers: Sequence[LayerRow]) -> Table:
    """Every weighted node of one model."""
    table = new_table(console, ("layer", "operator", "shape", "parameters", "MACs"), left=3)
    for row in layers:
        counts = (f"{row.params_before:,}", f"{row.macs_before:,}")
        table.add_row(row.name, row.op_type, shape_text(row.shape_before), *counts)
    return table


def _facts(inspection: Inspection) -> list[tuple[str, str]]:
    """A model's own facts, by name."""
    cost, groups = inspection.cost, inspection.groups
    exact = sum(group.exact for group in groups)
    facts = [
        ("parameters", f"{cost.params:,}"),
        ("MACs", f"{cost.macs:,}"),
        ("file size", bytes_text(cost.size_bytes)),
        ("opset", str(inspection.opset)),
        ("inputs", ", ".join(inspection.inputs)),
        ("outputs", ", ".join(inspection.outputs)),
        ("groups", f"{len(groups)} ({exact} exact)"),
        ("removable units", f"{sum(group.units for group in groups):,}"),
        ("frozen axes", f"{len(inspection.frozen):,}"),
    ]
    if cost.latency_ms is not None:
        facts.insert(3, ("latency", f"{cost.latency_ms:.3f} ms"))
    return facts


def new_table(console: Console, heads: Sequence[str], *, left: int) -> Table:
    """A table whose first `left` columns hold words and the others numbers."""
    piped = not console.is_terminal
    lines = box.MARKDOWN if piped else box.SIMPLE_HEAD
    table = Table(box=lines, header_style="bold", show_edge=piped)
    for index, head in enumerate(heads):
        words = index < left
        justify: JustifyMethod = "left" if words else "right"
        table.add_column(head, justify=justify, no_wrap=not words, overflow="fold")
    return table


def show_table(console: Console, table: Table) -> None:
    """Print a table with an empty line behind it; piped, without blanks around it."""
    if console.is_terminal:
        console.print(table)
    else:
        with console.capture() as capture:
            console.print(table)
        console.print(capture.get().strip())
    console.print()


def _price(row: FrozenRow | GroupRow) -> tuple[int, int]:
    """Sorting key: most parameters first, then most MACs."""
    return (-row.params, -row.macs)


def _row(before: float, after: float, form: str) -> tuple[str, str, str]:
    """Both values and their ratio."""
    return form.format(before), form.format(after), ratio(before, after)


def _metric_row(name: str, before: float | None, after: float | None) -> tuple[str, str, str]:
    """Both values and how far apart they are: points for shares, else a difference."""
    cells = tuple("-" if value is None else metric(name, value) for value in (before, after))
    if before is None or after is None:
        change = ""
    elif name in SHARES:
        change = f"{100 * (after - before):+.2f} points"
    else:
        change = f"{after - before:+.3g}"
    return cells[0], cells[1], change


def _step_metric(name: str, value: object) -> str:
    """A metric in the table of steps."""
    return metric(name, value) if isinstance(value, float) else "-"


def metric(name: str, value: float) -> str:
    """A metric's value with its unit."""
    return f"{100 * value:.2f} %" if name in SHARES else f"{value:.4g}"


def ratio(before: float, after: float) -> str:
    """`after` as a share of `before`."""
    return f"{after / before:.3f}" if before else ""


def bytes_text(size: int) -> str:
    """A size in bytes with a decimal unit (1 MB = 1,000,000 bytes)."""
    for limit, unit in ((1_000_000_000, "GB"), (1_000_000, "MB"), (1_000, "KB")):
        if size >= limit:
            return f"{size / limit:.2f} {unit}"
    return f"{size} bytes"


def shape_text(shape: Sequence[int]) -> str:
    """A shape as 64x3x7x7."""
    return "x".join(map(str, shape)) or "scalar"


def _detail(name: str, value: object) -> str:
    """One fact about a rebuilding step; empty where there is nothing to say."""
    if isinstance(value, Mapping):
        return f"{name} {len(value)}" if value else ""
    text = f"{value:.3g}" if isinstance(value, float) else str(value)
    return f"{name.replace('_', ' ')} {text}"
