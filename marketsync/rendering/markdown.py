"""A report as Markdown: for a Prefect artifact, a ticket, a chat. Tables are of GitHub's kind."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from marketsync.rendering import words
from marketsync.report import DatasetReport, Remark, RunReport

_HOLES = 50
_REMARKS = 50
_WATERMARKS = 20
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~!&])")


def markdown(report: RunReport) -> str:
    """Return the report as Markdown; what a provider or a store said is escaped and never becomes markup."""
    parts = [f"# {_text(words.headline(report))}", "", f"Run `{_code(report.run)}`, {words.time_span(report)}.", ""]
    if report.resume_at is not None:
        parts += [f"**Goes on {words.instant(report.resume_at)}.**", ""]
    parts += _table(
        ("", ""),
        [
            ("work", words.work(report.work)),
            ("success", words.share(report.success_rate)),
            ("requests", words.requests(report)),
            ("received", words.size(report.bytes)),
            ("rows", words.rows(report.rows)),
        ],
    )
    if report.findings:
        parts += ["## Findings", "", *(f"- {_text(finding)}" for finding in report.findings), ""]
    if report.errors:
        parts += ["## Errors", "", *_remarks(report.errors, 0), ""]
    if report.datasets:
        parts += ["## Data", ""]
        parts += _table(
            ("dataset", "store", "rows", "added", "updated", "newest", "complete", "fresh"),
            [_dataset(part) for part in report.datasets],
        )
        for part in report.datasets:
            parts += _details(part)
    if report.remarks:
        parts += ["## Remarks", "", *_remarks(report.remarks, sum(report.left_out.values())), ""]
    if report.quotas:
        parts += ["## Quotas", ""]
        parts += _table(
            ("account", "limit", "used", "left", "anew"),
            [(q.account, q.limit, f"{q.used:,}", f"{q.left:,}", words.instant(q.reset_at)) for q in report.quotas],
        )
    if report.timings:
        parts += ["## Time", ""]
        parts += _table(("phase", "time"), [(phase, words.duration(s)) for phase, s in report.timings.items()])
    if report.next_steps:
        parts += ["## Next", "", *(f"- `{_code(step.command)}`: {_text(step.why)}" for step in report.next_steps), ""]
    return "\n".join(parts).rstrip() + "\n"


def _dataset(part: DatasetReport) -> tuple[str, ...]:
    judgement = part.judgement
    return (
        part.dataset,
        part.store,
        f"{part.size.rows:,}" if part.size else "-",
        f"{part.rows.inserted:,}",
        f"{part.rows.updated:,}",
        words.newest(part),
        words.share(judgement.completeness) if judgement else "-",
        words.fresh(judgement.freshness) if judgement else "-",
    )


def _details(part: DatasetReport) -> list[str]:
    judgement = part.judgement
    lines = [f"### {_text(part.dataset)} in {_text(part.store)}", ""]
    if part.state:
        lines += [f"**{_text(part.state)}**", ""]
    if part.size or part.log:
        where = part.size.location if part.size else part.store_url
        place = f" in `{_code(where)}`" if where else ""
        lines += [f"{words.standing(part)}{place}.", ""]
    if judgement is not None:
        lines += [f"Judged: {words.scope(judgement)}. {_text(words.coverage(judgement))}", ""]
        if judgement.freshness:
            lines += [_text(words.promise(judgement.freshness)), ""]
        lines += [f"{_text(remark)}." for remark in judgement.remarks] + ([""] if judgement.remarks else [])
        if judgement.holes:
            rows = [
                (
                    words.HOLES[h.state],
                    words.days(h.first, h.last),
                    f"{h.sessions:,}",
                    words.names(h.subjects),
                    h.reason,
                )
                for h in judgement.holes[:_HOLES]
            ]
            lines += _table(("absent", "days", "sessions", "subjects", "why"), rows)
            lines += _more(len(judgement.holes) - _HOLES, "hole")
        if judgement.unexpected:
            rows = [(u.subject, f"{u.day}", f"{u.rows:,}") for u in judgement.unexpected[:_HOLES]]
            lines += _table(("rows on a day without a session", "day", "rows"), rows)
        if judgement.unsound:
            lines += _table(
                ("unsound", "rows", "for example"),
                [(u.rule, f"{u.rows:,}", "; ".join(u.examples[:3])) for u in judgement.unsound],
            )
    if part.watermarks and len(part.watermarks) <= _WATERMARKS:
        lines += _table(
            ("subject", "oldest", "newest"),
            [(mark.subject, mark.oldest or "-", mark.newest or "-") for mark in part.watermarks],
        )
    elif part.watermarks and part.laggard and part.newest:
        lines += [
            f"{words.many(len(part.watermarks), 'subject')}, newest rows from {_text(part.laggard.newest or '')} "
            f"({_text(part.laggard.subject)}) to {_text(part.newest.newest or '')} ({_text(part.newest.subject)}).",
            "",
        ]
    return lines


def _remarks(remarks: Sequence[Remark], left_out: int) -> list[str]:
    lines = []
    for remark in remarks[:_REMARKS]:
        what = " ".join(word for word in (remark.dataset, remark.subject) if word)
        line = f"- **{_text(remark.kind.replace('_', ' '))}**{' ' + _text(what) if what else ''}: "
        line += _text(words.one_line(remark.message, 1000))
        line += f" ({remark.count:,} alike)" if remark.count > 1 else ""
        line += f"; goes on {words.instant(remark.resume_at)}" if remark.resume_at else ""
        line += f" `{_code(words.one_line(remark.request))}`" if remark.request else ""
        lines.append(line)
    return lines + _more(len(remarks) - _REMARKS + left_out if len(remarks) > _REMARKS else left_out, "remark")


def _more(count: int, noun: str) -> list[str]:
    return (
        [f"And {words.many(count, 'more ' + noun)}; the HTML and JSON reports have them all.", ""] if count > 0 else []
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(_text(words.one_line(cell)) for cell in row) + " |" for row in rows]
    return [*lines, ""]


def _text(text: str) -> str:
    return _SPECIAL.sub(r"\\\1", words.clean(text).replace("\n", " "))


def _code(text: str) -> str:
    return words.clean(text).replace("`", "'").replace("\n", " ").replace("|", "\\|")
