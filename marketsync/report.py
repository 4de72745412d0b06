"""One model of what a run did and of how the data stand after it; every report is a rendering of it.

The engine fills it; `rendering/` turns it into text for a terminal, Markdown or HTML; `RunReport.to_json` is what
`--json` prints and what is kept beside the ledger, from where `RunReport.from_json` brings it back. Nothing here reads
a store or the ledger: how a `Judgement` comes about is in `tasks/judge.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import date, datetime
from enum import StrEnum
from typing import TYPE_CHECKING

from marketsync.errors import ExitCode

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class RunState(StrEnum):
    """How a run ended."""

    COMPLETED = "completed"
    COMPLETED_WITH_FINDINGS = "completed_with_findings"
    WAITING_FOR_QUOTA = "waiting_for_quota"
    WAITING_FOR_PUBLICATION = "waiting_for_publication"
    PAUSED = "paused"
    CANCELLED = "cancelled"
    FAILED = "failed"

    @property
    def exit_code(self) -> ExitCode:
        """What a command whose run ended so ends with."""
        return {
            RunState.COMPLETED: ExitCode.DONE,
            RunState.COMPLETED_WITH_FINDINGS: ExitCode.FINDINGS,
            RunState.WAITING_FOR_QUOTA: ExitCode.WAITING,
            RunState.WAITING_FOR_PUBLICATION: ExitCode.WAITING,
            RunState.PAUSED: ExitCode.PAUSED,
            RunState.CANCELLED: ExitCode.PAUSED,
            RunState.FAILED: ExitCode.FAILED,
        }[self]


# ---------------------------------------------------------------- what the run did


@dataclass(frozen=True, kw_only=True)
class WorkCounts:
    """Work units by how they ended; from the run's tally."""

    units: int = 0
    done: int = 0
    empty: int = 0
    not_yet: int = 0
    waiting: int = 0
    dropped: int = 0
    failed: int = 0
    cancelled: int = 0

    @property
    def success_rate(self) -> float | None:
        """The share of units with an answer (rows or empty) among those that came to an end; None when none did."""
        ended = self.done + self.empty + self.dropped + self.failed
        return (self.done + self.empty) / ended if ended else None


@dataclass(frozen=True, kw_only=True)
class RequestCounts:
    """Requests: `sent` counts every try; `cool_downs` the waits that a provider asked for."""

    sent: int = 0
    retried: int = 0
    cool_downs: int = 0


@dataclass(frozen=True, kw_only=True)
class RowCounts:
    """Rows of a run in the first store of its plan (each store's own are in `datasets`), summed over the segments: in
    each segment and store fetched = inserted + updated + unchanged + duplicates + quarantined."""

    fetched: int = 0
    inserted: int = 0
    updated: int = 0
    unchanged: int = 0
    duplicates: int = 0
    quarantined: int = 0


@dataclass(frozen=True, kw_only=True)
class Remark:
    """Something a person must be told: a unit that was dropped, failed or waits, a store that was down, and why.

    `message` holds the provider's or store's own words, `request` the request with its secrets redacted; `count` says
    how many alike it stands for.
    """

    # failed, stopped, store; dropped, still_dropped, quarantined, still_set_aside, waiting, not_yet, cool_down
    kind: str
    dataset: str = ""
    subject: str = ""
    message: str = ""
    request: str = ""
    resume_at: datetime | None = None
    count: int = 1


@dataclass(frozen=True, kw_only=True)
class QuotaLeft:
    """How one limit of an account stands at the end of the run; from the limits' book."""

    account: str
    limit: str  # as a person says it: 500 per day
    allowed: int
    used: int
    reset_at: datetime | None = None

    @property
    def left(self) -> int:
        """What is left, never below 0."""
        return max(0, self.allowed - self.used)


@dataclass(frozen=True, kw_only=True)
class NextStep:
    """A command worth typing now, and why."""

    command: str
    why: str


# ---------------------------------------------------------------- how the data stand


class HoleState(StrEnum):
    """What the absence of a session's row means."""

    MISSING = "missing"  # it should be there
    EMPTY = "empty"  # asked, and the provider said for good that there is nothing
    NOT_YET = "not_yet"  # not published, or within the grace period
    EXPLAINED = "explained"  # listed in the plan's file of known holes


@dataclass(frozen=True, kw_only=True)
class Hole:
    """Sessions without rows: the same range of consecutive sessions, for these subjects, in the same state."""

    state: HoleState
    first: date
    last: date  # included
    sessions: int  # of each subject
    subjects: tuple[str, ...]
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class SubjectCoverage:
    """One subject against the calendar: sessions in the judged range, by what became of them.

    `first` and `last` are the dates of its oldest and newest row in the store; sessions before `first` are not
    expected unless a known hole says when the subject was listed: they are counted in `before_first`, and `note` holds
    what is known about them.
    """

    subject: str
    first: date | None = None
    last: date | None = None
    expected: int = 0
    present: int = 0
    missing: int = 0
    empty: int = 0
    not_yet: int = 0
    explained: int = 0
    before_first: int = 0
    rows: int = 0
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Unexpected:
    """A row on a day without a session."""

    subject: str
    day: date
    rows: int = 1


@dataclass(frozen=True, kw_only=True)
class Unsound:
    """A rule that rows break, such as high >= low: how many, and a few of them as text."""

    rule: str
    rows: int
    examples: tuple[str, ...] = ()


class FreshState(StrEnum):
    """How a promise stands."""

    ON_TIME = "on_time"
    LATE = "late"
    NOT_DUE = "not_due"


@dataclass(frozen=True, kw_only=True)
class Freshness:
    """The promise `fresh_by` for the newest session it was due for, against the newest row of each subject."""

    promise: str
    state: FreshState
    session: date | None = None  # the session that should be there
    due: datetime | None = None
    next_due: datetime | None = None
    newest: date | None = None
    behind: tuple[str, ...] = ()  # subjects whose newest row is older than `session`
    late_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class MonthCoverage:
    """The heat map: for each subject and month the sessions expected and there; months as 2024-03, oldest first.

    `expected[i][j]` and `present[i][j]` belong to `subjects[i]` and `months[j]`; `explained` counts expected sessions
    whose absence is explained, or that were answered empty; `rows[j]` is the rows of all subjects in a month. Where
    there would be too many cells, the subjects with the most missing sessions have a line each, and the last line is
    the sum of the others (`others` of them).
    """

    months: tuple[str, ...] = ()
    subjects: tuple[str, ...] = ()
    expected: tuple[tuple[int, ...], ...] = ()
    present: tuple[tuple[int, ...], ...] = ()
    explained: tuple[tuple[int, ...], ...] = ()
    rows: tuple[int, ...] = ()
    others: int = 0


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """One dataset in one store against its calendar; made by `tasks.judge.judge`.

    Counts are of (subject, session) pairs. `since` is the first day judged, `until` the first day no more judged;
    `full` says that this is all that the plan wants, otherwise only the spans that the run touched.
    """

    dataset: str
    store: str = ""
    calendar: str | None = None
    frequency: str = "irregular"
    since: date | None = None
    until: date | None = None
    full: bool = True
    allowed_missing: float = 0.0
    sessions: int = 0  # of the calendar, in the judged range
    holidays: tuple[date, ...] = ()  # Mondays to Fridays without a session, in the judged range
    expected: int = 0
    present: int = 0
    missing: int = 0
    empty: int = 0
    not_yet: int = 0
    explained: int = 0
    before_first: int = 0
    rows: int = 0
    subjects: tuple[SubjectCoverage, ...] = ()
    holes: tuple[Hole, ...] = ()
    unexpected: tuple[Unexpected, ...] = ()
    unexpected_rows: int = 0  # `unexpected` shows the first of them
    unsound: tuple[Unsound, ...] = ()
    freshness: Freshness | None = None
    months: MonthCoverage | None = None
    remarks: tuple[str, ...] = ()  # what could not be judged, and why

    @property
    def completeness(self) -> float | None:
        """The share of expected sessions that are there or whose absence is understood; None when none is expected."""
        due = self.expected - self.not_yet
        if self.nothing_at_all:
            return 0.0
        return (due - self.missing) / due if due else None

    @property
    def nothing_at_all(self) -> bool:
        """Whether every subject was answered empty for every session: more likely a wrong question than an answer."""
        return self.full and self.empty > 0 and not (self.present or self.rows)

    @property
    def findings(self) -> list[str]:
        """What is wrong, a sentence each; empty when nothing is."""
        found = []
        due = self.expected - self.not_yet
        if self.nothing_at_all:
            found.append(
                f"{self.dataset}: not one row of {_many(len(self.subjects), 'subject')}: the provider answered that "
                "there is nothing; are symbols, dates and request what it expects?"
            )
        if self.missing and self.missing > self.allowed_missing * due:
            found.append(f"{self.dataset}: {_many(self.missing, 'session')} missing of {due:,} expected")
        if self.unexpected_rows:
            found.append(f"{self.dataset}: {_many(self.unexpected_rows, 'row')} on days without a session")
        for rule in self.unsound:
            such_as = f", such as {rule.examples[0]}" if rule.examples else ""
            found.append(f"{self.dataset}: {_many(rule.rows, 'row')} with {rule.rule}{such_as}")
        if self.freshness is not None and self.freshness.state is FreshState.LATE:
            behind = _many(len(self.freshness.behind), "subject")
            found.append(f"{self.dataset}: {behind} without {self.freshness.session}, due {self.freshness.promise}")
        return found


@dataclass(frozen=True, kw_only=True)
class Watermark:
    """One subject's oldest and newest time in a store (text: a date or an instant in ISO 8601)."""

    subject: str
    oldest: str | None = None
    newest: str | None = None
    rows: int | None = None


@dataclass(frozen=True, kw_only=True)
class TableSize:
    """One table as it stands; from `Store.info`."""

    rows: int = 0
    bytes: int = 0
    files: int = 0
    commits: int | None = None
    location: str = ""


@dataclass(frozen=True, kw_only=True)
class DatasetReport:
    """One dataset in one store: what the run did to it and how it stands.

    `rows` is this run's; `watermarks` come from `Store.watermarks` (and the judgement's first dates), sorted by
    subject; `size` from `Store.info`; `state` is a sentence when the store could not be reached; `log` says that it is
    one of batches, which has no table to measure or judge.
    """

    dataset: str
    store: str
    store_url: str = ""
    rows: RowCounts = RowCounts()
    size: TableSize | None = None
    watermarks: tuple[Watermark, ...] = ()
    judgement: Judgement | None = None
    state: str = ""
    log: bool = False

    @property
    def newest(self) -> Watermark | None:
        """The subject that is furthest; None when there is no row."""
        return max((w for w in self.watermarks if w.newest), key=lambda w: w.newest or "", default=None)

    @property
    def laggard(self) -> Watermark | None:
        """The subject whose newest row is the oldest; None when there is no row."""
        return min((w for w in self.watermarks if w.newest), key=lambda w: w.newest or "", default=None)


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """A run: the first ten fields are the stable part of `--json`, in this order; fields are added, never renamed.

    `errors` are the remarks that made the run fail or stop (failed, stopped, store); `remarks` the others. Counts come
    from the run's tally, `started` and `ended` from the ledger's run, `datasets` are one for each dataset and store,
    `quotas` come from the limits' book, `timings` are seconds by phase (plan, fetch, deliver, judge, report ...).
    """

    run: str
    plan: str  # several: joined by a comma
    state: RunState = RunState.COMPLETED
    seconds: float = 0.0
    work: WorkCounts = WorkCounts()
    requests: RequestCounts = RequestCounts()
    rows: RowCounts = RowCounts()
    bytes: int = 0
    resume_at: datetime | None = None
    errors: tuple[Remark, ...] = ()
    started: datetime | None = None
    ended: datetime | None = None
    success_rate: float | None = field(default=None)
    remarks: tuple[Remark, ...] = ()
    left_out: dict[str, int] = field(default_factory=dict)  # remarks by kind that there was no room for
    datasets: tuple[DatasetReport, ...] = ()
    quotas: tuple[QuotaLeft, ...] = ()
    timings: dict[str, float] = field(default_factory=dict)
    findings: tuple[str, ...] = ()
    next_steps: tuple[NextStep, ...] = ()
    orchestrator: str = "threads"  # or prefect
    version: str = ""

    def __post_init__(self) -> None:
        """Fill what follows from the rest: the success rate and the findings of the judgements."""
        if self.success_rate is None:
            object.__setattr__(self, "success_rate", self.work.success_rate)
        if not self.findings:
            found = [f for d in self.datasets if d.judgement is not None for f in _in_store(d, self.datasets)]
            object.__setattr__(self, "findings", tuple(found))

    @property
    def judgements(self) -> list[Judgement]:
        """The judgements, in the order of the datasets."""
        return [part.judgement for part in self.datasets if part.judgement is not None]

    def to_json(self, *, indent: int = 2) -> str:
        """Return the whole report as JSON; times are ISO 8601 with Z, dates YYYY-MM-DD, absent values null."""
        import msgspec

        text = msgspec.json.encode(self)
        return (msgspec.json.format(text, indent=indent) if indent else text).decode()

    @classmethod
    def from_json(cls, text: str | bytes) -> RunReport:
        """Return the report that `to_json` wrote; ValueError when the text is none."""
        import msgspec

        try:
            return msgspec.json.decode(text, type=cls)
        except msgspec.DecodeError as error:
            raise ValueError(f"this is not a run's report: {error}") from None


def watermarks_of(judgement: Judgement | None, newest: Mapping[str, date | datetime]) -> tuple[Watermark, ...]:
    """Return the watermarks of a table: `newest` from `Store.watermarks`, oldest days and rows as far as a full
    judgement read them."""
    judged = {c.subject: c for c in judgement.subjects} if judgement is not None and judgement.full else {}
    marks = []
    for subject in sorted({*newest, *(name for name, c in judged.items() if c.first)}):
        seen = judged.get(subject)
        last = newest.get(subject) or (seen.last if seen else None)
        marks.append(
            Watermark(
                subject=subject,
                oldest=seen.first.isoformat() if seen and seen.first else None,
                newest=last.isoformat() if last else None,
                rows=seen.rows if seen else None,
            )
        )
    return tuple(marks)


def _in_store(part: DatasetReport, parts: Sequence[DatasetReport]) -> list[str]:
    """Name the store only where the dataset goes to several."""
    assert part.judgement is not None
    several = sum(other.dataset == part.dataset for other in parts) > 1
    return [f"{found} ({part.store})" if several else found for found in part.judgement.findings]


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def state_after(
    work: WorkCounts,
    *,
    findings: bool = False,
    stopped: bool = False,
    waits_for_quota: bool = False,
    waits_for_publication: bool = False,
    paused: bool = False,
    cancelled: bool = False,
    still_dropped: bool = False,
) -> RunState:
    """Return the state of a run from what happened; the gravest wins, as exit codes do (failed, cancelled, paused,
    waiting, findings). A dropped unit is a finding, and stays one (`still_dropped`) until it is asked again; `stopped`
    says that a provider or store refused altogether."""
    if work.failed or stopped:
        return RunState.FAILED
    if cancelled:
        return RunState.CANCELLED
    if paused:
        return RunState.PAUSED
    if waits_for_quota or work.waiting:
        return RunState.WAITING_FOR_QUOTA
    if waits_for_publication:
        return RunState.WAITING_FOR_PUBLICATION
    if findings or work.dropped or still_dropped:
        return RunState.COMPLETED_WITH_FINDINGS
    return RunState.COMPLETED


def suggested(report: RunReport) -> tuple[NextStep, ...]:
    """Return the commands that are worth typing after this run, the most urgent first."""
    steps: list[NextStep] = []
    plan = report.plan
    again = f"marketsync sync {plan.replace(',', ' ')}".replace("  ", " ")
    if report.state in (RunState.WAITING_FOR_QUOTA, RunState.WAITING_FOR_PUBLICATION):
        when = f"after {report.resume_at:%Y-%m-%d %H:%M} UTC" if report.resume_at else "later"
        steps.append(NextStep(command=again, why=f"{when}: goes on where this run stopped, nothing is fetched twice"))
    elif report.state is RunState.PAUSED and any(remark.kind == "paused" for remark in report.remarks):
        steps.append(NextStep(command=f"marketsync resume {plan}", why=f"lets it run again; then: {again}"))
    elif report.state in (RunState.PAUSED, RunState.CANCELLED):
        steps.append(NextStep(command=again, why="goes on where this run stopped"))
    elif report.work.failed:
        steps.append(
            NextStep(
                command=again,
                why=f"asks again for {_many(report.work.failed, 'failed unit')}, once what is told above is mended",
            )
        )
    stores = sorted({part.store for part in report.datasets if part.state})
    if stores:
        steps.append(NextStep(command=again, why=f"delivers what {', '.join(stores)} could not take, without fetching"))
    if report.work.dropped or any(remark.kind == "still_dropped" for remark in report.remarks):
        steps.append(
            NextStep(
                command=f"{again} --retry-failed",
                why="asks again for what was refused as a wrong request, once its cause is mended (a misspelt symbol: "
                "take it out of the plan)",
            )
        )
    if any(judgement.missing for judgement in report.judgements):
        steps.append(
            NextStep(command=f"marketsync report {report.run} --html report.html", why="shows every hole on its day")
        )
    return tuple(steps)
