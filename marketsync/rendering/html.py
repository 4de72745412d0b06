"""A report as one HTML file: nothing is loaded from elsewhere, no script, light and dark, made to be printed too.

Everything that comes from a provider, a store or a file is escaped. Long lists are cut with a note that says so (the
JSON report has them whole), so that 5,000 symbols make a page that opens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from marketsync.rendering import drawings, words
from marketsync.report import DatasetReport, FreshState, HoleState, Judgement, Remark, RunReport

MOST_ROWS = 500
_OPEN_ROWS = 12


def html(report: RunReport) -> str:
    """Return the page."""
    tone = "good" if report.state in words.GOOD else "bad" if report.state in words.BAD else "warn"
    title = f"{words.clean(report.plan)}: {words.STATES[report.state]}"
    body = [
        f'<header><p class="eyebrow">MarketSync run {_t(report.run)}</p>'
        f'<h1>{_t(report.plan)} <span class="state {tone}">{_t(words.STATES[report.state])}</span></h1>'
        f"<p>{_t(words.time_span(report))}"
        + (f", by {_t(report.orchestrator)}" if report.orchestrator else "")
        + (f", version {_t(report.version)}" if report.version else "")
        + "</p></header>",
        _cards(report),
        _attention(report),
    ]
    body += [_dataset(part, f"d{at}") for at, part in enumerate(report.datasets)]
    body += [_remarks(report), _quotas(report), _timings(report)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{_t(title)}</title><style>{_STYLE}</style></head>\n'
        f"<body><main>{_PATTERN}{''.join(body)}</main></body></html>\n"
    )


# ---------------------------------------------------------------- the run


def _cards(report: RunReport) -> str:
    rows = report.rows
    cards = [
        ("success", words.share(report.success_rate), words.work(report.work)),
        ("rows added", f"{rows.inserted:,}", words.rows(rows)),
        ("requests", f"{report.requests.sent:,}", words.requests(report)),
        ("received", words.size(report.bytes), "from the providers"),
        ("time", words.duration(report.seconds), "wall clock"),
    ]
    complete = [j for j in report.judgements if j.completeness is not None]
    if complete:
        due = sum(j.expected - j.not_yet for j in complete)
        missing = sum(j.missing for j in complete)
        share = (due - missing) / due
        cards.insert(
            0, ("complete", words.share(share), f"{missing:,} of {words.many(due, 'expected session')} missing")
        )
    inner = "".join(
        f'<div class="card"><h2>{_t(name)}</h2><p class="figure">{_t(figure)}</p><p>{_t(said)}</p></div>'
        for name, figure, said in cards
    )
    return f'<section class="cards" aria-label="The run in figures">{inner}</section>'


def _attention(report: RunReport) -> str:
    parts = []
    if report.resume_at is not None:
        parts.append(f"<p><strong>Goes on {_t(words.instant(report.resume_at))}.</strong></p>")
    if report.findings:
        parts.append("<h2>Findings</h2>" + _list(report.findings))
    if report.errors:
        parts.append(f"<h2>Errors</h2>{_remark_table(report.errors, 0)}")
    if report.next_steps:
        steps = "".join(f"<li><code>{_t(s.command)}</code> {_t(s.why)}</li>" for s in report.next_steps)
        parts.append(f"<h2>What to do next</h2><ul>{steps}</ul>")
    return f'<section class="attention">{"".join(parts)}</section>' if parts else ""


def _remarks(report: RunReport) -> str:
    left_out = sum(report.left_out.values())
    if not report.remarks and not left_out:
        return ""
    return f"<section><h2>Dropped, set aside, waiting</h2>{_remark_table(report.remarks, left_out)}</section>"


def _remark_table(remarks: Sequence[Remark], left_out: int) -> str:
    rows = [
        (
            _t(remark.kind.replace("_", " ")) + (f" &times;{remark.count:,}" if remark.count > 1 else ""),
            _t(" ".join(word for word in (remark.dataset, remark.subject) if word)),
            _t(words.one_line(remark.message, 1000))
            + (f"<br><strong>goes on {_t(words.instant(remark.resume_at))}</strong>" if remark.resume_at else "")
            + (f"<br><code>{_t(words.one_line(remark.request, 1000))}</code>" if remark.request else ""),
        )
        for remark in remarks
    ]
    return _table(("what", "of", "why"), rows, left_out=left_out)


def _quotas(report: RunReport) -> str:
    if not report.quotas:
        return ""
    rows = [
        (
            _t(q.account),
            _t(q.limit),
            _meter(q.used / max(1, q.allowed), "meter"),
            f"{q.used:,}",
            f"{q.left:,}",
            _t(words.instant(q.reset_at)),
        )
        for q in report.quotas
    ]
    return (
        f"<section><h2>Quotas</h2>{_table(('account', 'limit', '', '#used', '#left', 'begins anew'), rows)}</section>"
    )


def _timings(report: RunReport) -> str:
    if not report.timings:
        return ""
    most = max(max(report.timings.values()), 1e-9)
    rows = [
        (
            _t(phase),
            _meter(seconds / most, "meter calm"),
            _t(words.duration(seconds)),
        )
        for phase, seconds in report.timings.items()
    ]
    return f"<section><h2>Where the time went</h2>{_table(('phase', '', '#time'), rows)}</section>"


# ---------------------------------------------------------------- a dataset


def _dataset(part: DatasetReport, identity: str) -> str:
    judgement = part.judgement
    place = _t(part.store_url or (part.size.location if part.size else ""))
    parts = [
        f'<h2>{_t(part.dataset)} <span class="quiet">in {_t(part.store)}</span> {_badges(judgement)}</h2>',
        f'<p class="quiet">{_t(words.standing(part))}{f" &middot; {place}" if place else ""}</p>',
    ]
    if part.state:
        parts.append(f'<p class="bad-text">{_t(part.state)}</p>')
    if part.rows.fetched or part.rows.inserted:
        parts.append(f"<p>This run: {_t(words.rows(part.rows))}.</p>")
    if judgement is not None:
        parts += _judged(judgement, part.dataset, identity)
    if part.watermarks:
        parts.append(_watermarks(part))
    return f'<section class="dataset">{"".join(parts)}</section>'


def _badges(judgement: Judgement | None) -> str:
    if judgement is None:
        return ""
    badges = []
    if judgement.completeness is not None:
        tone = "good" if not judgement.missing else "warn"
        badges.append(f'<span class="state {tone}">{_t(words.share(judgement.completeness))} complete</span>')
    if judgement.freshness is not None:
        tone = {FreshState.LATE: "bad", FreshState.ON_TIME: "good"}.get(judgement.freshness.state, "calm")
        badges.append(f'<span class="state {tone}">{_t(words.fresh(judgement.freshness))}</span>')
    return " ".join(badges)


def _judged(judgement: Judgement, name: str, identity: str) -> list[str]:
    parts = [f"<p>{_t(words.coverage(judgement))} Judged: {_t(words.scope(judgement))}.</p>"]
    if judgement.freshness is not None:
        parts.append(f"<p>{_t(words.promise(judgement.freshness))}</p>")
    parts += [f'<p class="quiet">{_t(remark)}.</p>' for remark in judgement.remarks]
    if judgement.months is not None and judgement.months.months:
        parts.append(_figure(judgement, name, identity))
    if judgement.holes:
        rows = [
            (
                f'<span class="key {_HOLE_CLASS[hole.state]}"></span>{_t(words.HOLES[hole.state])}',
                _t(words.days(hole.first, hole.last)),
                f"{hole.sessions:,}",
                _t(words.names(hole.subjects, 12)),
                _t(words.one_line(hole.reason)),
            )
            for hole in judgement.holes[:MOST_ROWS]
        ]
        left_out = len(judgement.holes) - len(rows)
        table = _table(("absent", "days", "#sessions", "subjects", "why"), rows, left_out=left_out)
        parts.append(_folded("Absent sessions", len(judgement.holes), table))
    if judgement.unexpected:
        rows = [(_t(u.subject), f"{u.day}", f"{u.rows:,}") for u in judgement.unexpected[:MOST_ROWS]]
        left_out = judgement.unexpected_rows - sum(u.rows for u in judgement.unexpected[:MOST_ROWS])
        table = _table(("subject", "day", "#rows"), rows, left_out=left_out, noun="row")
        parts.append(_folded("Rows on days without a session", len(rows), table))
    if judgement.unsound:
        rows = [(_t(u.rule), f"{u.rows:,}", _t("; ".join(u.examples))) for u in judgement.unsound]
        parts.append(_folded("Unsound rows", len(rows), _table(("rule", "#rows", "for example"), rows)))
    return parts


_HOLE_CLASS = {
    HoleState.MISSING: "most",
    HoleState.NOT_YET: "none",
    HoleState.EMPTY: "excused",
    HoleState.EXPLAINED: "excused",
}


def _figure(judgement: Judgement, name: str, identity: str) -> str:
    assert judgement.months is not None
    cut, others = drawings.shown(judgement.months)
    note = ""
    if others:
        note = (
            f'<p class="quiet">A line each for the {len(cut.subjects) - 1} subjects with the most missing sessions; '
            f"the last line sums up the other {others:,}.</p>"
        )
    if cut.months and len(cut.months[0]) == 4 and len(judgement.months.months[0]) > 4:
        note += '<p class="quiet">A column is a year.</p>'
    legend = "".join(
        '<li><svg class="key" viewBox="0 0 14 14" aria-hidden="true">'
        f'<rect class="{kind}" width="14" height="14"/></svg>{_t(said)}</li>'
        for kind, said in drawings.LEGEND
    )
    plot = drawings.rows_plot(judgement.months, name, f"{identity}-rows")
    return (
        f"<figure>{drawings.heat_map(judgement.months, name, f'{identity}-heat')}"
        f'<ul class="legend" aria-label="Legend">{legend}</ul>{note}</figure>'
        + (f"<figure><figcaption>Rows by month</figcaption>{plot}</figure>" if plot else "")
    )


def _watermarks(part: DatasetReport) -> str:
    judged = {subject.subject: subject for subject in part.judgement.subjects} if part.judgement else {}
    worst = sorted(
        part.watermarks, key=lambda m: (-(judged[m.subject].missing if m.subject in judged else 0), m.newest or "")
    )
    chosen = worst[:MOST_ROWS]
    if len(part.watermarks) <= MOST_ROWS:
        chosen = list(part.watermarks)
    rows = []
    for mark in chosen:
        subject = judged.get(mark.subject)
        rows.append(
            (
                _t(mark.subject),
                _t(_moment(mark.oldest)),
                _t(_moment(mark.newest)),
                f"{subject.expected:,}" if subject else "-",
                f"{subject.present:,}" if subject else "-",
                f"{subject.missing:,}" if subject else "-",
                _t(subject.note) if subject else "",
            )
        )
    head = ("subject", "oldest", "newest", "#expected", "#there", "#missing", "")
    table = _table(head, rows, left_out=len(part.watermarks) - len(rows))
    return _folded("Subjects", len(part.watermarks), table)


def _moment(text: str | None) -> str:
    return "-" if text is None else text[:16].replace("T", " ")


# ---------------------------------------------------------------- pieces


def _t(text: str) -> str:
    return escape(words.clean(text), quote=True)


def _list(lines: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{_t(line)}</li>" for line in lines) + "</ul>"


def _folded(title: str, count: int, inner: str) -> str:
    return (
        f"<details{' open' if count <= _OPEN_ROWS else ''}><summary>{_t(title)} "
        f'<span class="quiet">{count:,}</span></summary>{inner}</details>'
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, left_out: int = 0, noun: str = "line") -> str:
    """Cells are HTML already; a heading that begins with # is of numbers."""
    kinds = [' class="n"' if name.startswith("#") else ' class="day"' if name in _DAYS else "" for name in head]
    top = "".join(f"<th{kind}>{_t(name.lstrip('#'))}</th>" for name, kind in zip(head, kinds, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{cell}</td>" for cell, kind in zip(row, kinds, strict=True)) + "</tr>"
        for row in rows
    )
    note = (
        f'<p class="quiet">{words.many(left_out, noun)} more: the JSON report has them all.</p>' if left_out > 0 else ""
    )
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>{note}'


def _meter(part: float, kind: str) -> str:
    return f'<span class="{kind}"><span style="width:{100 * min(1.0, part):.0f}%"></span></span>'


_DAYS = frozenset({"oldest", "newest", "days", "day", "begins anew"})

_PATTERN = (
    '<svg width="0" height="0" class="away" aria-hidden="true"><defs><pattern id="hatch" width="5" height="5" '
    'patternUnits="userSpaceOnUse" patternTransform="rotate(45)"><rect width="5" height="5" class="hatch-ground"/>'
    '<rect width="2" height="5" class="hatch-line"/></pattern></defs></svg>'
)

_STYLE = """
:root{color-scheme:light dark;--ground:#f6f7f9;--card:#fff;--ink:#17202a;--quiet:#5c6875;--line:#dde2e8;
--full:#8fcfbb;--few:#f2d16b;--some:#ec8f3c;--most:#b3203a;--none:#eceff3;--hatch:#b9c2cd;--bar:#4d7fb8;
--good:#116149;--good-ground:#d9f2e8;--warn:#7a4b00;--warn-ground:#fdecc8;--bad:#8e1328;--bad-ground:#fadde2;
--calm:#37475a;--calm-ground:#e4e9f0}
@media(prefers-color-scheme:dark){:root{--ground:#12161b;--card:#1a2027;--ink:#e7ecf1;--quiet:#98a5b3;--line:#2c353f;
--full:#2f7d68;--few:#c9a227;--some:#df7a2a;--most:#ff5d74;--none:#222a33;--hatch:#536170;--bar:#6ea3df;
--good:#8fe3c4;--good-ground:#17382e;--warn:#f6cf85;--warn-ground:#40300f;--bad:#ff9dac;--bad-ground:#4a1822;
--calm:#c3cfdb;--calm-ground:#29323c}}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;-webkit-text-size-adjust:100%}
main{max-width:1080px;margin:0 auto;padding:28px 24px 60px}
h1{font-size:30px;line-height:1.2;margin:2px 0 6px;letter-spacing:-.01em}
h2{font-size:18px;margin:0 0 6px}
p{margin:0 0 8px}
header p{color:var(--quiet)}
.eyebrow{font-size:12px;letter-spacing:.06em;text-transform:uppercase;margin:0}
.quiet{color:var(--quiet);font-weight:400}
.bad-text{color:var(--bad);font-weight:600}
.state{display:inline-block;font-size:13px;font-weight:600;line-height:1;padding:6px 10px;border-radius:99px;
vertical-align:middle;letter-spacing:0;white-space:nowrap}
.state.good{color:var(--good);background:var(--good-ground)}.state.warn{color:var(--warn);background:var(--warn-ground)}
.state.bad{color:var(--bad);background:var(--bad-ground)}.state.calm{color:var(--calm);background:var(--calm-ground)}
section{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:18px 20px;margin:16px 0}
section.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;padding:0;border:0;
background:none}
.card{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:14px 16px}
.card h2{font-size:12px;font-weight:600;color:var(--quiet);text-transform:uppercase;letter-spacing:.05em;margin:0}
.card p{font-size:12.5px;color:var(--quiet);margin:0;line-height:1.4}
.card .figure{font-size:24px;font-weight:650;color:var(--ink);line-height:1.3;font-variant-numeric:tabular-nums}
.attention{border-left:4px solid var(--some)}
.attention h2:not(:first-child){margin-top:14px}
ul{margin:0;padding-left:20px}li{margin:2px 0}
code{font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;background:var(--calm-ground);
color:var(--calm);border-radius:5px;padding:1px 6px;overflow-wrap:anywhere}
figure{margin:14px 0 4px;overflow-x:auto}figure>svg{min-width:640px}
figcaption{font-size:12px;font-weight:600;color:var(--quiet);margin-bottom:2px}
svg{display:block;width:100%;height:auto}svg.away{position:absolute;width:0;height:0}
svg .label{font-size:11px;fill:var(--quiet);font-variant-numeric:tabular-nums}
.tick{stroke:var(--line);stroke-width:1}.grid{stroke:var(--line);stroke-dasharray:2 3}.axis{stroke:var(--quiet)}
rect.full{fill:var(--full)}rect.few{fill:var(--few)}rect.some{fill:var(--some)}rect.most{fill:var(--most)}
rect.none{fill:var(--none)}rect.excused{fill:url(#hatch)}rect.bar{fill:var(--bar)}
.hatch-ground{fill:var(--none)}.hatch-line{fill:var(--hatch)}
.legend{list-style:none;padding:0;margin:6px 0 8px;display:flex;flex-wrap:wrap;gap:4px 18px;font-size:12px;
color:var(--quiet)}
.legend li{display:flex;align-items:center;gap:6px}
.legend svg.key{width:12px;height:12px;border-radius:3px;outline:1px solid var(--line)}
span.key{display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:7px;background:var(--none)}
span.key.most{background:var(--most)}
span.key.excused{background:repeating-linear-gradient(45deg,var(--hatch) 0 2px,var(--none) 2px 5px)}
details{border-top:1px solid var(--line);padding-top:8px;margin-top:10px}
summary{cursor:pointer;font-weight:600;padding:2px 0}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:13.5px;margin:4px 0}
th{font-size:12px;font-weight:600;color:var(--quiet);text-align:left;border-bottom:1px solid var(--line)}
.day{white-space:nowrap}th,td{padding:5px 14px 5px 0;vertical-align:top}tr+tr td{border-top:1px solid var(--line)}
td:last-child,th:last-child{padding-right:0;overflow-wrap:anywhere;min-width:9em}
.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.meter{display:inline-block;width:160px;height:8px;border-radius:9px;background:var(--none);overflow:hidden;
vertical-align:middle}
.meter span{display:block;height:100%;background:var(--some)}.meter.calm span{background:var(--bar)}
@media print{figure>svg{min-width:0}
:root{--ground:#fff;--card:#fff;--ink:#000;--line:#ccc}body{font-size:11px;print-color-adjust:exact;
-webkit-print-color-adjust:exact}main{max-width:none;padding:0}section,.card{break-inside:avoid-page;border-radius:6px}
section.dataset{break-inside:auto}figure,tr{break-inside:avoid}details>summary{list-style:none}}
"""
