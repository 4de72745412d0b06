"""A run of a plan, described once for every runner: prepare, fetch, judge each dataset; then the report.

`describe` strings the steps together on whatever `Runner` it is given; `sync` is the whole of it for one process
without an orchestrator, with `--wait` and the user's word heard.
"""

from __future__ import annotations

import json
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, datetime, timedelta
from pathlib import Path

from marketsync.coverage import Interval, merged
from marketsync.definition import Verdict
from marketsync.errors import ExitCode, MarketSyncError, StoreError, gravest
from marketsync.ledger import Desired, RunRow
from marketsync.report import (
    DatasetReport,
    QuotaLeft,
    Remark,
    RequestCounts,
    RowCounts,
    RunReport,
    RunState,
    TableSize,
    WorkCounts,
    state_after,
    suggested,
    watermarks_of,
)
from storage.files import write_whole
from storage.lazyframes import reading, watermarks
from storage.protocol import Filter, Store, Written
from tasks import quarantine
from tasks.fetch import Fetched
from tasks.runner import AIR_SECONDS, Pending, Runner, ThreadRunner
from tasks.steps import Prepared, Task, fetch, forget_progress, prepare, sweep
from tasks.tally import Counts, Note
from tasks.watch import Stop, Sync, Watch
from tasks.workspace import Options, Scope, Workspace, open_workspace

log = logging.getLogger(__name__)

ERRORS = ("failed", "stopped", "store")
SHOWN_WATERMARKS = 1000
CHORES_EVERY = timedelta(days=7)
FORGET_AFTER = timedelta(days=90)
FULL_BELOW = 200_000  # rows; smaller tables are judged from end to end every time
WATERMARKS_BELOW = 2_000_000  # rows; the newest times of smaller tables are read every time


@dataclass
class Outcome:
    """What the steps of one dataset gave."""

    dataset: str
    prepared: Prepared | None = None
    fetched: list[Fetched] = field(default_factory=list)
    judged: list[DatasetReport] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)  # seconds by phase


def begin(config: str, plan: str) -> tuple[RunRow, RunState | None]:
    """Open a run in the ledger; the state is given when it must not start (the plan is paused, or maintenance)."""
    workspace = open_workspace(config)
    control = workspace.ledger.control(plan)
    if control.desired is Desired.PAUSE:
        return workspace.ledger.open_run(plan), RunState.PAUSED
    if control.desired is Desired.CANCEL:
        # A cancellation was for the run it met; this is a new one.
        workspace.ledger.set_control(plan, Desired.RUN)
    if workspace.in_maintenance() or workspace.loaded.configuration.maintenance:
        return workspace.ledger.open_run(plan), RunState.PAUSED
    return workspace.ledger.open_run(plan, workspace_hash(workspace, plan)), None


def workspace_hash(workspace: Workspace, plan: str) -> str:
    """Return the hash of a plan as it stands, kept with its runs."""
    import hashlib

    return hashlib.sha256(workspace.plan(plan).model_dump_json().encode()).hexdigest()[:16]


def describe(
    config: str,
    plan: str,
    run: RunRow,
    options: Options,
    runner: Runner,
    *,
    seconds: float | None = None,
    judge_step: Callable[[Task], list[DatasetReport]] | None = None,
) -> list[Outcome]:
    """Run the steps of a plan: each dataset is prepared, fetched in steps of about `seconds` (None: one step), judged.

    Datasets go side by side, except that one whose subjects are another's rows comes after it.
    """
    workspace = open_workspace(config)
    options = _told(workspace, plan, options)
    judge_step = judge_step or judge
    outcomes = {dataset: Outcome(dataset) for dataset in workspace.plan(plan).datasets}
    tasks = {name: Task(config, plan, name, run.run_id, run.started, options) for name in outcomes}
    threads: list[threading.Thread] = []
    ended = {name: threading.Event() for name in outcomes}
    failures: list[BaseException] = []

    def one(name: str) -> None:
        try:
            for parent in _parents(workspace, name):
                if parent in ended:
                    ended[parent].wait()
            task = tasks[name]
            outcome = outcomes[name]
            began = workspace.clock.timestamp()
            first = runner.submit(prepare, task, name=f"prepare {name}")
            outcome.prepared = first.result()
            outcome.timings["prepare"] = workspace.clock.timestamp() - began
            began = workspace.clock.timestamp()
            last: Pending = first
            more = True
            while more:
                last = runner.submit(fetch, task, seconds, after=[last], name=f"fetch {name}")
                done: Fetched = last.result()
                outcome.fetched.append(done)
                more = done.more
            outcome.timings["fetch and deliver"] = workspace.clock.timestamp() - began
            began = workspace.clock.timestamp()
            outcome.judged = runner.submit(judge_step, task, after=[last], name=f"judge {name}").result()
            outcome.timings["judge"] = workspace.clock.timestamp() - began
        except BaseException as error:  # noqa: BLE001 - raised again below, when all have ended
            failures.append(error)
        finally:
            ended[name].set()

    if len(outcomes) == 1:
        one(next(iter(outcomes)))
    else:
        threads = [threading.Thread(target=one, args=(name,), name=f"dataset-{name}") for name in outcomes]
        for thread in threads:
            thread.start()
        for event in ended.values():
            while not event.wait(AIR_SECONDS):  # see `tasks.runner.Step.result`: Ctrl-C must be heard
                continue
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]
    return list(outcomes.values())


def _parents(workspace: Workspace, dataset: str) -> list[str]:
    upstream, _, name = dataset.partition(".")
    spec = workspace.definition(upstream).datasets[name]
    return [subjects.rows for subjects in spec.over.subjects.values() if subjects.rows is not None]


def _told(workspace: Workspace, plan: str, options: Options) -> Options:
    if options.retry_failed:
        for dataset in workspace.plan(plan).datasets:
            for subject in options.only or (None,):
                workspace.ledger.retry(plan, dataset, subject)
    return options


def judge(task: Task, full_below: int = FULL_BELOW) -> list[DatasetReport]:
    """Judge one dataset in each store of the plan: all of it while the table has fewer rows than `full_below`, then
    only what the run touched (and freshness), so that a nightly run does not pay for the history."""
    from tasks.judge import open_spans

    scope = task.scope()
    result = []
    touched = scope.ledger.touched(task.dataset, task.run_id)
    before = last_report(scope.workspace, task.plan)
    for target in scope.targets:
        left_open = [
            span
            for part in (before.datasets if before else ())
            if part.dataset == task.dataset and part.store == target.store_id and part.judgement is not None
            for span in open_spans(part.judgement)
        ]
        try:
            spans = merged([*touched, *left_open])
            result.append(_judged(scope, target.store_id, target.store, spans, full_below, reopen=True))
        except StoreError as error:
            result.append(DatasetReport(dataset=task.dataset, store=target.store_id, state=str(error)))
    return result


def full(workspace: Workspace, report: RunReport) -> RunReport:
    """Return a report with every dataset judged from end to end, as the data stand now."""
    parts = []
    for dataset in dict.fromkeys(part.dataset for part in report.datasets):
        scope = Scope(workspace, report.plan, dataset, report.run, workspace.clock.now())
        before = {part.store: part for part in report.datasets if part.dataset == dataset}
        for target in scope.targets:
            try:
                part = _judged(scope, target.store_id, target.store, [], 1 << 62)
            except StoreError as error:
                part = DatasetReport(dataset=dataset, store=target.store_id, state=str(error))
                parts.append(part)
                continue
            known = before.get(target.store_id)
            parts.append(part if known is None else replace(part, rows=known.rows, state=known.state))
    return replace(report, datasets=tuple(parts), findings=())


def _judged(
    scope: Scope, store_id: str, store: Store, touched: Sequence[Interval], full_below: int, *, reopen: bool = False
) -> DatasetReport:
    from tasks.judge import KnownHoles, read_known_holes, reopened
    from tasks.judge import judge as ask

    if not store.capabilities.table:
        return DatasetReport(dataset=scope.dataset, store=store_id, store_url=store.url, log=True)
    there = store.marker(scope.dataset) is not None
    part = DatasetReport(dataset=scope.dataset, store=store_id, store_url=store.url)
    if there:
        part = table_report(scope.dataset, store_id, store)
    rows = part.size.rows if part.size is not None else 0
    small = rows < full_below
    wanted = scope.wanted
    if not wanted or scope.schema.time is None:
        return part
    subjects = [subject.name for subject in scope.subjects]
    coverage = scope.ledger.coverage([store_id], scope.dataset, scope.request_hash, subjects)[store_id]
    holes = scope.plan.judge.known_holes
    known = read_known_holes(scope.workspace.base / holes) if holes else KnownHoles()
    with reading(f"the table of {scope.dataset}", "/".join((store.url.rstrip("/"), *scope.dataset.split(".")))):
        judgement = ask(
            scope.dataset,
            scope.spec,
            store,
            subjects,
            timing=scope.timing,
            since=wanted[0].start.date(),
            until=(wanted[-1].end - timedelta(microseconds=1)).date() + timedelta(days=1),
            now=scope.clock.now(),
            coverage=coverage,
            refused=scope.refused(),
            fresh_by=scope.plan.fresh_by if scope.plan.until is None else None,
            allowed_missing=scope.plan.judge.missing,
            spans=None if small else list(touched),
            known=known,
            set_aside=any(scope.spool.quarantined(scope.dataset, of) for of in ("", store_id)),
        )
    if reopen and (late := reopened(judgement, coverage, scope.timing)):
        scope.ledger.lay(store_id, scope.dataset, scope.request_hash, late)
    marks = _newest(scope, store, small or rows < WATERMARKS_BELOW, touched) if there else {}
    return replace(part, judgement=judgement, watermarks=watermarks_of(judgement, marks)[:SHOWN_WATERMARKS])


def _newest(scope: Scope, store: Store, whole: bool, touched: Sequence[Interval]) -> Mapping[str, datetime | date]:
    """Return the newest time of each subject, of the `whole` table or as far as the run touched it."""
    if whole:
        return store.watermarks(scope.dataset)
    if not touched:
        return {}
    span = Filter(since=min(touched).start, until=max(one.end for one in touched))
    return watermarks(store.scan(scope.dataset, span), scope.dataset, scope.schema)


def finish(
    config: str, plan: str, run: RunRow, outcomes: Sequence[Outcome], orchestrator: str = "threads"
) -> RunReport:
    """Put the report together, keep it, and close the run in the ledger."""
    workspace = open_workspace(config)
    tidy(workspace, plan)
    report = reported(workspace, plan, run, outcomes, orchestrator)
    keep(workspace, report)
    workspace.ledger.close_run(
        run.run_id,
        str(report.state),
        {
            "requests": report.requests.sent,
            "rows": report.rows.fetched,
            "inserted": report.rows.inserted,
            "seconds": report.seconds,
            "resume_at": report.resume_at.isoformat() if report.resume_at else None,
        },
    )
    forget_progress(run.run_id)
    return report


def tidy(workspace: Workspace, plan: str) -> None:
    """Once a week: compact and vacuum the plan's tables, and forget finished work older than 90 days."""
    if workspace.ledger.due("forget", CHORES_EVERY):
        workspace.ledger.forget(FORGET_AFTER)
    for dataset in workspace.plan(plan).datasets:
        for store_id in workspace.plan(plan).stores:
            if not workspace.ledger.due(f"maintain:{store_id}:{dataset}", CHORES_EVERY):
                continue
            try:
                store = workspace.store(store_id)
                if store.marker(dataset) is not None:
                    log.info("%s in %s: %s", dataset, store_id, store.maintain(dataset))
            except StoreError as error:
                log.warning("%s in %s was not compacted: %s", dataset, store_id, error)


def keep(workspace: Workspace, report: RunReport) -> Path:
    """Keep a report beside the ledger; `marketsync report` reads it from there."""
    folder = workspace.state / "reports"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{report.run}.json"
    # whole or not at all: a run that is killed here leaves no half of a report
    write_whole(path, report.to_json().encode())
    return path


def last_report(workspace: Workspace, plan: str) -> RunReport | None:
    """Return the report of the last run of a plan that has one."""
    for run in workspace.ledger.runs(plan, limit=5):
        try:
            found = kept(workspace, run.run_id)
        except MarketSyncError as error:
            log.warning("%s", error)
            continue
        if found is not None:
            return found
    return None


def kept(workspace: Workspace, run_id: str | None = None) -> RunReport | None:
    """Return a kept report: that of a run, or the last one; None when there is none. MarketSyncError: its file is
    damaged."""
    folder = workspace.state / "reports"
    if run_id is not None:
        path = folder / f"{run_id}.json"
    else:
        path = max(folder.glob("*.json"), key=lambda file: file.stat().st_mtime, default=folder / "none")
    try:
        return RunReport.from_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise MarketSyncError(
            f"the report {path} cannot be read: {error}; delete the file, no row depends on it"
        ) from None


def reported(workspace: Workspace, plan: str, run: RunRow, outcomes: Sequence[Outcome], orchestrator: str) -> RunReport:
    """Put together what the steps gave."""
    counts = Counts()
    notes: list[Note] = []
    left_out: Counter[str] = Counter()
    down: dict[str, str] = {}
    halts = []
    stopped: set[str] = set()
    for outcome in outcomes:
        if outcome.prepared is not None:
            counts = counts.plus(outcome.prepared.counts)
            notes.extend(outcome.prepared.notes)
            down.update(outcome.prepared.stores_down)
        for part in outcome.fetched:
            counts = counts.plus(part.counts)
            notes.extend(part.notes)
            left_out.update(part.left_out)
            down.update(part.stores_down)
            if part.halt is not None:
                halts.append(part.halt)
            if part.stopped is not None:
                stopped.add(part.stopped)
    now = workspace.clock.now()
    resume = [halt.resume_at for halt in halts if halt.resume_at is not None]
    resume.extend(note.resume_at for note in notes if note.resume_at is not None)
    if counts.not_yet and not resume:
        resume.append(now + timedelta(hours=1))
    first_store = workspace.loaded.with_tables(workspace.plan(plan).stores)[0]
    written = Written()
    judged: list[DatasetReport] = []
    for outcome in outcomes:
        of_dataset, of_store = _rows_of(outcome)
        written += of_store.get(first_store, Written())
        for part in outcome.judged:
            one = of_store.get(part.store, Written())
            rows = replace(of_dataset, inserted=one.inserted, updated=one.updated, unchanged=one.unchanged)
            rows = replace(rows, quarantined=rows.quarantined + one.refused)
            judged.append(replace(part, rows=rows, state=down.get(part.store, part.state)))
    aside = [one for outcome in outcomes for one in _set_aside(workspace, plan, run, outcome)]
    findings = bool(aside) or any(part.judgement is not None and part.judgement.findings for part in judged)
    work = WorkCounts(
        units=counts.units,
        done=counts.done - counts.empty - counts.not_yet,
        empty=counts.empty,
        not_yet=counts.not_yet,
        waiting=counts.waiting,
        dropped=counts.dropped,
        failed=counts.failed,
        cancelled=counts.cancelled,
    )
    state = state_after(
        work,
        findings=findings,
        stopped=bool(down)
        or any(part.state for part in judged)
        or any(halt.verdict is not Verdict.QUOTA for halt in halts),
        waits_for_quota=any(halt.verdict is Verdict.QUOTA for halt in halts),
        waits_for_publication=bool(counts.not_yet),
        paused=bool(stopped - {"cancelled"}),
        cancelled="cancelled" in stopped,
        still_dropped=any(note.kind == "still_dropped" for note in notes),
    )
    if state is RunState.CANCELLED:
        workspace.ledger.cancel_work(plan)
    remarks = [
        Remark(
            kind=note.kind,
            dataset=note.dataset,
            subject=note.subject,
            message=note.message,
            request=note.request,
            resume_at=note.resume_at,
        )
        for note in dict.fromkeys(notes)
    ]
    told = {note.message for note in notes}
    remarks.extend(
        # found when the rows were judged, after every step of the run
        Remark(kind="store", dataset=part.dataset, subject=part.store, message=part.state)
        for outcome in outcomes
        for part in outcome.judged
        if part.state and part.store not in down and part.state not in told
    )
    remarks.extend(_why_stopped(plan, workspace.path, reason) for reason in sorted(stopped))
    remarks.extend(aside)
    for outcome in outcomes:
        if outcome.prepared is not None and outcome.prepared.new_columns:
            names = ", ".join(outcome.prepared.new_columns)
            remarks.append(
                Remark(
                    kind="schema",
                    dataset=outcome.dataset,
                    message=f"new in the definition: {names}; older rows are null there: `marketsync sync {plan} "
                    "--refetch` fills them all, with `--since DAY` those from a day on",
                )
            )
        silent = sorted(
            {
                one.subject
                for part in outcome.judged
                if part.judgement is not None and part.judgement.full and part.judgement.frequency != "irregular"
                for one in part.judgement.subjects
                if not one.rows and one.empty
            }
        )
        if silent:
            shown = ", ".join(silent[:5]) + (f" and {len(silent) - 5} more" if len(silent) > 5 else "")
            message = (
                f"never a row of {shown}: the provider was asked and had none; is the symbol spelt as it spells it?"
            )
            remarks.append(Remark(kind="no_rows", dataset=outcome.dataset, subject=shown, message=message))
        if outcome.prepared is not None and outcome.prepared.copied:
            message = f"{outcome.prepared.copied:,} rows copied from a sibling store, at no request"
            remarks.append(Remark(kind="copied", dataset=outcome.dataset, message=message))
        if outcome.prepared is not None and outcome.prepared.drained:
            message = f"{outcome.prepared.drained:,} rows delivered that an earlier run had left in the spool"
            remarks.append(Remark(kind="drained", dataset=outcome.dataset, message=message))
        if outcome.prepared is not None and outcome.prepared.void:
            remarks.append(
                Remark(
                    kind="void",
                    dataset=outcome.dataset,
                    message=f"the table in {', '.join(outcome.prepared.void)} is not the one known (dropped, swapped "
                    "or made anew), or lacks what it had acknowledged (restored from a backup): it is filled again",
                )
            )
    waits = state in (RunState.WAITING_FOR_QUOTA, RunState.WAITING_FOR_PUBLICATION)
    report = RunReport(
        run=run.run_id,
        plan=plan,
        state=state,
        seconds=round((now - run.started).total_seconds(), 3),
        work=work,
        requests=RequestCounts(sent=counts.sent, retried=counts.retried, cool_downs=counts.cool_downs),
        rows=RowCounts(
            fetched=counts.fetched,
            inserted=written.inserted,
            updated=written.updated,
            unchanged=written.unchanged,
            duplicates=counts.duplicates,
            quarantined=counts.quarantined + written.refused,
        ),
        bytes=counts.bytes,
        resume_at=min(resume) if resume and waits else None,
        errors=tuple(remark for remark in remarks if remark.kind in ERRORS),
        started=run.started,
        ended=now,
        remarks=tuple(remark for remark in remarks if remark.kind not in ERRORS),
        left_out=dict(left_out),
        datasets=tuple(judged),
        timings={
            phase: round(sum(outcome.timings.get(phase, 0.0) for outcome in outcomes), 3)
            for phase in dict.fromkeys(phase for outcome in outcomes for phase in outcome.timings)
        },
        quotas=quotas_left(workspace, [outcome.dataset for outcome in outcomes]),
        orchestrator=orchestrator,
    )
    return replace(report, next_steps=suggested(report))


def _set_aside(workspace: Workspace, plan: str, run: RunRow, outcome: Outcome) -> Iterator[Remark]:
    """Yield what is said of rows of a dataset that were set aside by this run, or by earlier ones where nothing else
    tells that they are not there: without a calendar no row is expected."""
    scope = Scope(workspace, plan, outcome.dataset, run.run_id, run.started)
    refused = {store_id: written.refused for store_id, written in _rows_of(outcome)[1].items()}
    unjudged = {
        part.store: part for part in outcome.judged if part.judgement is None or part.judgement.calendar is None
    }
    if rows := sum(part.counts.quarantined for part in outcome.fetched):
        yield quarantine.remark(scope, rows)
    elif any(not part.log for part in unjudged.values()) and (remark := quarantine.standing(scope)):
        yield remark
    for store_id in dict.fromkeys([*refused, *unjudged]):
        if rows := refused.get(store_id, 0):
            yield quarantine.remark(scope, rows, store_id)
        elif store_id in unjudged and (remark := quarantine.standing(scope, store_id)):
            yield remark


def _rows_of(outcome: Outcome) -> tuple[RowCounts, dict[str, Written]]:
    """Return what was fetched of a dataset, and what each store made of what it was given."""
    rows = RowCounts()
    stores: dict[str, Written] = {}
    parts = [part for part in (outcome.prepared, *outcome.fetched) if part is not None]
    for part in parts:
        rows = RowCounts(
            fetched=rows.fetched + part.counts.fetched,
            duplicates=rows.duplicates + part.counts.duplicates,
            quarantined=rows.quarantined + part.counts.quarantined,
        )
        for store_id, written in part.stores.items():
            stores[store_id] = stores.get(store_id, Written()) + written
    return rows, stores


def quotas_left(workspace: Workspace, datasets: Iterable[str]) -> tuple[QuotaLeft, ...]:
    """Return how the limits of the datasets' upstreams stand."""
    result = []
    for upstream in dict.fromkeys(dataset.partition(".")[0] for dataset in datasets):
        for state in workspace.limiter(upstream).state():
            result.append(
                QuotaLeft(
                    account=workspace.upstream(upstream).account or upstream,
                    limit=state.name,
                    allowed=state.limit,
                    used=state.used,
                    reset_at=state.resets_at,
                )
            )
    return tuple(result)


def table_report(dataset: str, store_id: str, store: Store) -> DatasetReport:
    """Return the size of one dataset in one store; no watermarks, no judgement."""
    info = store.info(dataset)
    return DatasetReport(
        dataset=dataset,
        store=store_id,
        store_url=store.url,
        size=TableSize(
            rows=info.rows, bytes=info.bytes, files=info.files, commits=info.commits, location=info.location
        ),
    )


def sync(
    config: str | Path,
    plans: Sequence[str] = (),
    options: Options = Options(),
    *,
    wait: bool = False,
    told: Callable[[str], None] = lambda _: None,
    begun: Callable[[RunRow], None] = lambda _: None,
    workers: int = 4,
) -> list[RunReport]:
    """Sync plans one after the other in this process (all of upstream.yml's when none is named), those of greater
    priority first.

    With `wait`, a plan that waits for a quota or publication is slept through and continued. `told` gets sentences
    for people, `begun` every run as it begins.
    """
    path = str(Path(config).resolve())
    workspace = open_workspace(path)
    names = list(plans) or sorted(workspace.loaded.configuration.plans, key=lambda name: -workspace.plan(name).priority)
    for name in names:
        workspace.plan(name)
    sweep(path)
    reports: list[RunReport] = []
    with Sync() as syncing:
        for name in names:
            now, refetched_since = options, None
            while True:
                report = run_once(path, name, now, begun=begun, workers=workers, refetched_since=refetched_since)
                waiting = report.state in (RunState.WAITING_FOR_QUOTA, RunState.WAITING_FOR_PUBLICATION)
                if not (wait and waiting and report.resume_at is not None):
                    break
                seconds = max(1.0, (report.resume_at - workspace.clock.now()).total_seconds() + 1.0)
                told(f"{name}: waiting until {report.resume_at:%Y-%m-%d %H:%M:%S} UTC, then going on")
                if (stop := _sleep(workspace, name, seconds)) is not None:
                    report = _ended_waiting(workspace, report, stop)
                    break
                # What the runs before have asked again, or what was refused again, is not to be asked once more.
                refetched_since = refetched_since or report.started
                now = replace(options, retry_failed=False)
            reports.append(report)
            if syncing.interrupted:
                break
    return reports


def _sleep(workspace: Workspace, plan: str, seconds: float) -> Stop | None:
    """Sleep through a quota, hearing the user's word; return it when it was to stop."""
    with Watch(workspace.ledger, plan, workspace.owner, workspace.clock) as watch:
        workspace.clock.sleep(seconds, watch.wake)
        return watch.stop


def _ended_waiting(workspace: Workspace, report: RunReport, stop: Stop) -> RunReport:
    """Return the report of a run that was told to stop while it slept, and keep it so."""
    state = RunState.CANCELLED if stop is Stop.CANCEL else RunState.PAUSED
    if state is RunState.CANCELLED:
        workspace.ledger.cancel_work(report.plan)
    remarks = (*report.remarks, _why_stopped(report.plan, workspace.path, stop))
    report = replace(report, state=state, remarks=remarks, resume_at=None, ended=workspace.clock.now())
    report = replace(report, next_steps=suggested(report))
    keep(workspace, report)
    workspace.ledger.close_run(report.run, str(state), {"requests": report.requests.sent, "rows": report.rows.fetched})
    return report


def run_once(
    config: str,
    plan: str,
    options: Options,
    *,
    begun: Callable[[RunRow], None] = lambda _: None,
    workers: int = 4,
    refetched_since: datetime | None = None,
) -> RunReport:
    """Run one plan once on threads of this process. With `refetched_since`, what was asked since then is not asked
    again by a run that fetches again: it goes on with one that had to wait."""
    run, state = begin(config, plan)
    if options.refetch and refetched_since is not None:
        run = replace(run, started=refetched_since)
    try:
        begun(run)
        if state is not None:
            return not_started(config, plan, run, state)
        with ThreadRunner(workers) as runner:
            outcomes = describe(config, plan, run, options, runner)
        return finish(config, plan, run, outcomes)
    except BaseException as error:
        broken_off(config, run, error)
        raise


def not_started(config: str, plan: str, run: RunRow, state: RunState) -> RunReport:
    """Close a run that must not start and report why."""
    workspace = open_workspace(config)
    paused = workspace.ledger.control(plan).desired is Desired.PAUSE
    reason = Stop.PAUSE if paused else Stop.MAINTENANCE
    workspace.ledger.close_run(run.run_id, str(state), {})
    report = RunReport(
        run=run.run_id,
        plan=plan,
        state=state,
        started=run.started,
        ended=workspace.clock.now(),
        remarks=(_why_stopped(plan, workspace.path, reason),),
    )
    return replace(report, next_steps=suggested(report))


def _why_stopped(plan: str, path: Path, reason: str) -> Remark:
    """Return why a run stopped, or did not begin, and how it goes on; `reason` is a `Stop`."""
    message = {
        Stop.PAUSE: f"plan {plan} is paused by hand; `marketsync resume {plan}` lets it run again",
        Stop.CANCEL: f"plan {plan} was cancelled by hand; what waited is forgotten, and the next sync plans anew",
        Stop.MAINTENANCE: f"{path} says `maintenance: true`; runs go on when it no longer does",
        Stop.SIGNAL: "a signal (Ctrl-C, SIGTERM) ended it; what was fetched is kept, and the next sync goes on from "
        "there",
    }[Stop(reason)]
    return Remark(kind=reason, message=message)


def broken_off(config: str, run: RunRow, error: BaseException) -> None:
    """Note in the ledger that a run broke off."""
    open_workspace(config).ledger.close_run(
        run.run_id, str(RunState.FAILED), {"error": f"{type(error).__name__}: {error}"}
    )


def exit_code(reports: Iterable[RunReport]) -> ExitCode:
    """Return the gravest exit code of some runs."""
    return gravest(*(report.state.exit_code for report in reports))


def as_json(reports: Sequence[RunReport]) -> str:
    """Return the one object that `--json` prints: the report of one run, or the runs of several plans."""
    if len(reports) == 1:
        return reports[0].to_json()
    return json.dumps({"runs": [json.loads(report.to_json()) for report in reports]}, indent=2)
