"""The drawings of the HTML report as inline SVG: coverage by subject and month, rows over time. Pure text.

Colours are CSS classes, so that light, dark and print decide them; what a colour says, a title says too.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from html import escape
from itertools import groupby

from marketsync.rendering import words
from marketsync.report import MonthCoverage

WIDTH = 960
GUTTER = 112
LINE, WIDE_LINE = 15, 22  # the wide one while there are few subjects
_FEW_LINES = 12
MOST_LINES = 120
MOST_COLUMNS = 480
_LABEL_LETTERS = 15

LEGEND = (
    ("full", "complete"),
    ("few", "under 10 % missing"),
    ("some", "under half missing"),
    ("most", "half or more missing"),
    ("excused", "explained or answered empty"),
    ("none", "not expected"),
)


@dataclass(frozen=True)
class _Line:
    name: str
    expected: list[int]
    present: list[int]
    explained: list[int]

    @property
    def missing(self) -> int:
        return sum(self.expected) - sum(self.present) - sum(self.explained)


def shown(coverage: MonthCoverage) -> tuple[MonthCoverage, int]:
    """Return the coverage with at most `MOST_LINES` lines and `MOST_COLUMNS` columns, and how many subjects its last
    line sums up: those with the fewest missing sessions. Months become years when there are too many."""
    lines = [
        _Line(name, list(e), list(p), list(x))
        for name, e, p, x in zip(
            coverage.subjects, coverage.expected, coverage.present, coverage.explained, strict=True
        )
    ]
    months, rows, others = list(coverage.months), list(coverage.rows), coverage.others
    if len(months) > MOST_COLUMNS:
        months, rows, lines = _yearly(months, rows, lines)
    if len(lines) > MOST_LINES:
        rest = lines[-1:] if others else []
        own = lines[:-1] if others else lines
        worst = {line.name for line in sorted(own, key=lambda line: -line.missing)[: MOST_LINES - 1]}
        rest += [line for line in own if line.name not in worst]
        others = (others or 1) + len(rest) - 1
        lines = [line for line in own if line.name in worst]
        lines.append(
            _Line(
                "all others",
                [sum(column) for column in zip(*(line.expected for line in rest), strict=True)],
                [sum(column) for column in zip(*(line.present for line in rest), strict=True)],
                [sum(column) for column in zip(*(line.explained for line in rest), strict=True)],
            )
        )
    cut = MonthCoverage(
        months=tuple(months),
        subjects=tuple(line.name for line in lines),
        expected=tuple(tuple(line.expected) for line in lines),
        present=tuple(tuple(line.present) for line in lines),
        explained=tuple(tuple(line.explained) for line in lines),
        rows=tuple(rows),
        others=others,
    )
    return cut, others


def _yearly(months: list[str], rows: list[int], lines: list[_Line]) -> tuple[list[str], list[int], list[_Line]]:
    years = sorted({month[:4] for month in months})

    def by_year(values: list[int]) -> list[int]:
        sums: Counter[str] = Counter()
        for month, value in zip(months, values, strict=True):
            sums[month[:4]] += value
        return [sums[year] for year in years]

    yearly = [_Line(line.name, *map(by_year, (line.expected, line.present, line.explained))) for line in lines]
    return years, by_year(rows), yearly


def cell(expected: int, present: int, explained: int) -> str:
    """Return the class of a cell: full, few, some, most, excused or none."""
    if not expected:
        return "none"
    missing = expected - present - explained
    if missing <= 0:
        return "excused" if explained else "full"
    part = missing / expected
    return "few" if part < 0.1 else "some" if part < 0.5 else "most"


def heat_map(coverage: MonthCoverage, name: str, identity: str) -> str:
    """Return the coverage of a dataset as one SVG; equal neighbours are one rectangle, which keeps it small."""
    coverage, _ = shown(coverage)
    columns = len(coverage.months)
    if not columns or not coverage.subjects:
        return ""
    step = (WIDTH - GUTTER) / columns
    line = WIDE_LINE if len(coverage.subjects) <= _FEW_LINES else LINE
    height = line * len(coverage.subjects) + 24
    expected = sum(map(sum, coverage.expected))
    absent = expected - sum(map(sum, coverage.present)) - sum(map(sum, coverage.explained))
    described = (
        f"{words.many(len(coverage.subjects), 'line')} by {columns} columns from {coverage.months[0]} to "
        f"{coverage.months[-1]}; {absent:,} of {expected:,} expected sessions are missing."
    )
    parts = [_open(f"Coverage of {name}", described, identity, height)]
    parts.append(_years(coverage.months, step, height - 20, 14))
    for at, subject in enumerate(coverage.subjects):
        y = at * line
        told = words.clean(subject)
        label = told if len(told) <= _LABEL_LETTERS else told[: _LABEL_LETTERS - 1] + "…"
        parts.append(
            f'<text class="label" x="{GUTTER - 8}" y="{y + line / 2 + 4:g}" text-anchor="end">{escape(label)}</text>'
        )
        cells = list(zip(coverage.expected[at], coverage.present[at], coverage.explained[at], strict=True))
        place = 0
        for kind, group in groupby(cells, key=lambda values: cell(*values)):
            run = list(group)
            if kind != "none":
                e, p, x = (sum(values) for values in zip(*run, strict=True))
                last = coverage.months[place + len(run) - 1]
                when = coverage.months[place] if len(run) == 1 else f"{coverage.months[place]} to {last}"
                said = f"{told} {when}: {p:,} of {e:,} sessions"
                said += f", {e - p - x:,} missing" if e - p - x > 0 else ""
                said += f", {x:,} explained or empty" if x else ""
                parts.append(
                    f'<rect class="{kind}" x="{GUTTER + place * step:.1f}" y="{y + 1}" '
                    f'width="{max(len(run) * step, 1.5):.1f}" height="{line - 2}"><title>{escape(said)}</title></rect>'
                )
            place += len(run)
    parts.append("</svg>")
    return "".join(parts)


def rows_plot(coverage: MonthCoverage, name: str, identity: str) -> str:
    """Return the rows of a dataset by month (or year) as bars, on the axis of the heat map."""
    coverage, _ = shown(coverage)
    top = max(coverage.rows, default=0)
    if not top:
        return ""
    step = (WIDTH - GUTTER) / len(coverage.months)
    tall = 84
    most = _round_up(top)
    described = f"{sum(coverage.rows):,} rows in {len(coverage.months)} columns, at most {top:,} in one."
    parts = [_open(f"Rows of {name} over time", described, identity, tall + 34)]
    parts.append(_years(coverage.months, step, tall + 10, 18, 10))
    for value in (most, most // 2):
        y = 10 + tall * (1 - value / most)
        parts.append(f'<line class="grid" x1="{GUTTER}" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="label" x="{GUTTER - 8}" y="{y + 4:.1f}" text-anchor="end">{value:,}</text>')
    gap = 1.0 if step > 4 else 0.0
    for at, (month, value) in enumerate(zip(coverage.months, coverage.rows, strict=True)):
        if value:
            high = tall * value / most
            parts.append(
                f'<rect class="bar" x="{GUTTER + at * step:.1f}" y="{10 + tall - high:.1f}" '
                f'width="{step - gap:.1f}" height="{high:.1f}">'
                f"<title>{escape(month)}: {words.many(value, 'row')}</title></rect>"
            )
    parts.append(f'<line class="axis" x1="{GUTTER}" x2="{WIDTH}" y1="{10 + tall}" y2="{10 + tall}"/></svg>')
    return "".join(parts)


def _open(title: str, described: str, identity: str, height: int) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="{identity}-t {identity}-d">'
        f'<title id="{identity}-t">{escape(words.clean(title))}</title>'
        f'<desc id="{identity}-d">{escape(described)}</desc>'
    )


def _years(months: tuple[str, ...], step: float, bottom: float, below: float, top: float = 0) -> str:
    """Ticks where a year begins, as many as there is room for; within two years the months themselves."""
    marks = [(at, month[:4]) for at, month in enumerate(months) if at == 0 or month[:4] != months[at - 1][:4]]
    if len(marks) <= 2:
        marks = list(enumerate(months))
    # The first year is rarely whole: its label would run into the next one's.
    if len(marks) > 2 and (marks[1][0] - marks[0][0]) * step < 34:
        marks = marks[1:]
    room = 34 if len(marks[0][1]) == 4 else 56
    kept: list[tuple[int, str]] = []
    for at, label in marks:
        if (not kept or (at - kept[-1][0]) * step >= room) and WIDTH - GUTTER - at * step >= room - 6:
            kept.append((at, label))
    parts = []
    for at, label in kept:
        x = GUTTER + at * step
        parts.append(f'<line class="tick" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom + 4}"/>')
        parts.append(f'<text class="label" x="{x + 2:.1f}" y="{bottom + below}">{escape(label)}</text>')
    return "".join(parts)


def _round_up(value: int) -> int:
    """The next even figure of two digits and zeros: 120, 160, 200, 300 ... 1,000."""
    factor = 1
    while True:
        for digits in (2, 4, 6, 8, 10, 12, 16):
            if value <= digits * factor:
                return digits * factor
        factor *= 10
