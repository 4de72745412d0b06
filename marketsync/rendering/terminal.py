"""A report on a terminal: 80 columns, plain where it is not one, no more than a screen when all is well."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from marketsync.rendering import words
from marketsync.report import HoleState, Remark, RunReport

if TYPE_CHECKING:
    from collections.abc import Sequence

WIDTH = 80
_SHOWN = 6


def show(report: RunReport, console: Console | None = None) -> None:
    """Print the report; colours and the terminal's width only where there is a terminal."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=WIDTH, no_color=True, highlight=False)
    console.print(renderable(report))


def text(report: RunReport, width: int = WIDTH) -> str:
    """Return the report as plain text (log files, e-mail)."""
    out = io.StringIO()
    Console(file=out, width=width, no_color=True, highlight=False, legacy_windows=False).print(renderable(report))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def renderable(report: RunReport) -> RenderableType:
    """Return the report as a Rich renderable."""
    parts: list[RenderableType] = [_headline(report), _figures(report)]
    if report.datasets:
        parts += [Text(), _datasets(report)]
    for judgement in report.judgements:
        missing = [hole for hole in judgement.holes if hole.state is HoleState.MISSING]
        if missing:
            where = f"{judgement.dataset} in {judgement.store}" if judgement.store else judgement.dataset
            parts += [
                Text(),
                _list(f"missing from {where}", [words.hole(hole) for hole in missing], "red"),
            ]
    other = [words.one_line(finding) for finding in report.findings if " missing of " not in finding]
    if other:
        parts += [Text(), _list("findings", other, "yellow")]
    if report.errors:
        parts += [Text(), _list("errors", _told(report.errors), "red")]
    if report.remarks:
        parts += [Text(), _list("remarks", _told(report.remarks), "yellow", sum(report.left_out.values()))]
    if report.next_steps:
        steps = [Text.assemble((step.command, "bold"), f"\n  {step.why}") for step in report.next_steps]
        parts += [Text(), _list("next", steps, "")]
    return Group(*parts)


def _headline(report: RunReport) -> Text:
    colour = "green" if report.state in words.GOOD else "red" if report.state in words.BAD else "yellow"
    return Text.assemble((words.headline(report), f"bold {colour}"), (f"  run {words.clean(report.run)}", "dim"))


def _figures(report: RunReport) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    rate = f" (success {words.share(report.success_rate)})" if report.success_rate is not None else ""
    table.add_row("  work", Text(words.work(report.work) + rate))
    table.add_row("  requests", Text(f"{words.requests(report)}; {words.size(report.bytes)} received"))
    table.add_row("  rows", Text(words.rows(report.rows)))
    if report.timings:
        told = ", ".join(f"{words.clean(phase)} {words.duration(s)}" for phase, s in report.timings.items())
        table.add_row("  time", Text(told))
    for quota in report.quotas[:4]:
        reset = f", anew {words.instant(quota.reset_at)}" if quota.reset_at else ""
        left = f"{quota.left:,} of {quota.allowed:,} left"
        table.add_row("  quota", Text(f"{words.clean(quota.account)}, {words.clean(quota.limit)}: {left}{reset}"))
    if report.resume_at is not None:
        table.add_row("  resumes", Text(words.instant(report.resume_at), style="bold"))
    return table


def _datasets(report: RunReport) -> RenderableType:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", show_edge=False)
    for name in ("  dataset", "store"):
        table.add_column(name, overflow="fold")
    for name in ("rows", "added", "newest", "complete", "fresh"):
        table.add_column(name, justify="left" if name in ("newest", "fresh") else "right", no_wrap=True)
    for part in report.datasets:
        judgement = part.judgement
        complete = words.share(judgement.completeness) if judgement else "-"
        fresh = words.fresh(judgement.freshness) if judgement else "-"
        good = judgement is None or not judgement.findings
        table.add_row(
            Text("  " + words.clean(part.dataset)),
            Text(words.clean(part.store)),
            f"{part.size.rows:,}" if part.size else "-",
            f"{part.rows.inserted:,}",
            Text(words.newest(part)[:10]),
            Text(complete, style="" if good else "yellow"),
            Text(fresh, style="red" if fresh == "late" else ""),
        )
    down = [
        Padding(
            Text(f"{words.clean(part.dataset)} in {words.clean(part.store)}: {words.one_line(part.state)}", "red"),
            (0, 0, 0, 2),
        )
        for part in report.datasets
        if part.state
    ]
    return Group(table, *down) if down else table


def _told(remarks: Sequence[Remark]) -> list[str]:
    told = []
    for remark in remarks:
        about = (remark.kind.replace("_", " "), words.clean(remark.dataset), words.clean(remark.subject))
        times = f" ({remark.count:,} alike)" if remark.count > 1 else ""
        line = f"{' '.join(word for word in about if word)}: {words.one_line(remark.message, 1000)}{times}"
        if remark.resume_at is not None:
            line += f"; goes on {words.instant(remark.resume_at)}"
        if remark.request:
            line += f"\n{words.one_line(remark.request)}"
        told.append(line)
    return told


def _list(title: str, lines: Sequence[str | Text], colour: str, left_out: int = 0) -> Table:
    table = Table.grid(padding=0)
    table.add_column(overflow="fold")
    table.add_row(Padding(Text(title, style=f"bold {colour}".strip()), (0, 0, 0, 2)))
    for line in lines[:_SHOWN]:
        table.add_row(Padding(line if isinstance(line, Text) else Text(line), (0, 0, 0, 4)))
    more = len(lines) - _SHOWN + left_out if len(lines) > _SHOWN else left_out
    if more > 0:
        table.add_row(Padding(Text(f"and {more:,} more; an HTML or JSON report has them all", "dim"), (0, 0, 0, 4)))
    return table
