"""Rows from one store to another, in bounded memory, to be broken off at any instant and gone on with.

What is to be copied is surveyed first: how many rows, what of them the target cannot keep, and a digest that changes
with any of them. Then it is cut into chunks, by periods of time and by subjects, which go one after the other as
upserts; the digest names the lane, and the lane's `seq` in the target says which chunks are whole there. So a copy that
was broken off goes on at its chunk as long as the source is as it was, and a copy of what is there changes nothing.
At the end both stores are compared by fingerprints: nothing is taken for granted that a store said of its writes. What
the ledger knows of the source it then knows of the target, and no more than that.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from marketsync.coverage import Covered, Interval, merged, minus, within
from marketsync.definition import Dataset, request_hash
from marketsync.errors import ConfigurationError, ForeignTable, SchemaError, StoreError
from marketsync.planning import EVERYTHING, instant
from marketsync.schema import INGESTED_COLUMN, Period, Schema
from storage import admission, evolution
from storage.protocol import Batch, Filter, Mode, Store, Written
from tasks.compare import Difference, compare
from tasks.deliver import answered, begun_copies, bind, frames, inherited, is_known
from tasks.workspace import Workspace, margin, told_apart

if TYPE_CHECKING:
    import polars as pl

ROWS = 200_000  # of a chunk, about, and of a write
_GROUP = 1_000  # subjects of a chunk: stores look that many up by name
_STRIDE = 1_000_000  # chunk n is whole when the lane is at n strides; its writes count up to that
_TOLD = 5  # subjects that differ and are named in a sentence
_DONE = 2**53 - 1  # of the last write: the lane is at its end, and the next copy takes another
_STEPS = {Period.YEAR: "1y", Period.MONTH: "1mo", Period.DAY: "1d"}
_ALWAYS = Interval(datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC))

Item = TypeVar("Item")


@dataclass(frozen=True)
class End:
    """A store that is copied from or to; `store_id` is its name in upstream.yml, None where it was given as a URL."""

    store: Store
    store_id: str | None = None

    @property
    def name(self) -> str:
        return self.store_id or self.store.url


@dataclass
class Copied:
    """What a copy of one dataset did, in rows; a dry run only counts `rows` and `there`."""

    dataset: str
    rows: int = 0  # in the source, of what was asked for
    there: int = 0  # in the target, of what was asked for: at the end, or as it stands for a dry run
    read: int = 0
    inserted: int = 0
    updated: int = 0
    unchanged: int = 0
    resumed: bool = False  # it went on where an earlier copy had been broken off
    covered: int = 0  # subjects whose coverage the target has from the source now
    agree: bool = False  # by their fingerprints: all rows of the source, as it was surveyed, are so in the target
    differences: list[Difference] = field(default_factory=list)  # by subject
    late: int = 0  # rows that came to the source meanwhile, and are for the next copy
    problems: list[str] = field(default_factory=list)  # what did not come out as it should
    remarks: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Survey:
    """What the source holds of one dataset as far as it is asked for."""

    dataset: str
    schema: Schema  # in which the rows are sent: of the source's columns, otherwise the target's
    table: Schema  # which the target's table has, or is given
    span: Filter
    rows: int
    first: date | datetime | None
    last: date | datetime | None
    newest: Mapping[str, datetime | date]  # of each subject, as far as it is within the span
    figures: Mapping[str, Any]  # which change with the rows
    digest: str


def open_end(text: str, workspace: Workspace | None, config: Path) -> End:
    """Open the store of this name in the workspace, or of this URL (`$secret.NAME` in it is looked up)."""
    if "://" not in text:
        assert workspace is not None
        return End(workspace.store(text), text)
    from providers.secrets import Secrets
    from storage.registry import open_store

    secrets = workspace.secrets if workspace is not None else Secrets(config.parent)
    return End(open_store(secrets.fill_url(text)))


def copy(
    source: End,
    target: End,
    datasets: Sequence[str],
    span: Filter,
    *,
    workspace: Workspace | None = None,
    dry_run: bool = False,
    told: Callable[[Copied], None] = lambda _: None,
) -> list[Copied]:
    """Copy datasets (all of the source's when none is named), as far as the span reaches; `told` hears of each write.

    Raises `SchemaError`, before a row is moved, with everything that the target cannot keep or follow; StoreError when
    a store cannot be used, or when another copy of the same rows is under way; ConfigurationError for what the source
    has not, and where both are one store.
    """
    for end in (source, target):
        if not end.store.capabilities.table:
            raise ConfigurationError(
                f"{end.name} is a log of batches, which is neither read nor compared: name it in a plan, and "
                "the plan fills it from a store with tables; what is in it is followed (`marketsync follow`)"
            )
    there = source.store.datasets()
    if missing := [dataset for dataset in datasets if dataset not in there]:
        raise ConfigurationError(
            f"{source.name} has no table of {', '.join(missing)}; it has {', '.join(there) or 'none at all'}"
        )
    chosen = list(dict.fromkeys(datasets)) or there
    if not chosen:
        raise ConfigurationError(f"{source.name} has no table that could be copied; is it the place that was meant?")
    surveys: list[_Survey] = []
    refused: list[str] = []
    for dataset in chosen:
        try:
            if _is_one(source.store, target.store, dataset, dry_run=dry_run):
                raise ConfigurationError(f"{source.name} and {target.name} are one store: both have the same {dataset}")
            surveys.append(_surveyed(source.store, target.store, dataset, span))
        except (SchemaError, ForeignTable) as error:
            refused.append(f"{dataset} cannot be copied from {source.name} to {target.name}: {error}")
    if refused:
        others = [] if datasets or len(refused) == len(chosen) else ["Name the datasets to copy only those."]
        raise SchemaError("\n".join([*refused, *others]))
    told_of = set().union(*(one.newest for one in surveys))
    if all(one.schema.time for one in surveys) and (unknown := set(span.subjects or ()) - told_of):
        raise ConfigurationError(f"{source.name} has no rows of {', '.join(sorted(unknown))}")
    if dry_run:
        return [
            Copied(one.dataset, one.rows, _count(target.store, one)) for one in surveys
        ]  # nothing is made, not even a table
    return [_copied(source, target, one, workspace, told) for one in surveys]


# ---------------------------------------------------------------- before


def _is_one(source: Store, target: Store, dataset: str, *, dry_run: bool) -> bool:
    """Return whether both have the same table: a dump that was restored, or a folder that was copied, has the marker of
    its original, too, but not what is written into that. A dry run writes nothing, and goes by the URLs."""
    import polars as pl

    marker = target.marker(dataset)
    if marker is None or marker != source.marker(dataset) or (schema := target.schema(dataset)) is None:
        return False
    if source.url == target.url:
        return True
    if dry_run:
        return False
    lane = f"copy-look-{uuid.uuid4().hex}"
    target.ensure(dataset, schema)
    none = pl.DataFrame(schema=schema.polars(system=True))
    target.write(Batch(dataset, schema, lane, 1, none, Mode.UPSERT))
    return source.committed(dataset, lane) > 0


def _surveyed(source: Store, target: Store, dataset: str, span: Filter) -> _Survey:
    held = source.schema(dataset)
    if held is None:
        raise StoreError(f"the table of {dataset} is gone from {source.name}")
    evolution.check(dataset, held)
    schema, table = _shapes(dataset, held, target.schema(dataset))
    found = _figures(source, dataset, held.time, span)
    counted = source.count(dataset, span)
    if counted != found["rows"] and _figures(source, dataset, held.time, span) == found:
        raise StoreError(
            f"the table of {dataset} in {source.url} has {counted:,} rows, and gives {found['rows']:,} of them when "
            "it is read: look for a limit in the settings of the server or of its user; nothing was copied"
        )
    must = [name for name in evolution.required(schema) if name not in evolution.required(held)]
    kinds = [kind for kind in admission.unkept_by(target, dataset, table) if kind.column in schema]
    if told := admission.refusals(dataset, source.scan(dataset, span), schema, [*admission.nulls(must), *kinds]):
        raise SchemaError("; ".join(told))
    newest = source.watermarks(dataset) if held.time is not None else {}
    if held.subject is not None and span.subjects is not None:
        newest = {subject: at for subject, at in newest.items() if subject in set(span.subjects)}
    about = [dataset, source.marker(dataset), held.hash(), span, ROWS, found, sorted(newest.items())]
    digest = hashlib.sha256(json.dumps(about, default=str).encode()).hexdigest()[:24]
    ends = found.get("first"), found.get("last")
    return _Survey(dataset, schema, table, span, found["rows"], *ends, newest, found, digest)


def _figures(source: Store, dataset: str, time: str | None, span: Filter) -> dict[str, Any]:
    """Return numbers that are others when rows came, went or were changed."""
    import polars as pl

    wanted = replace(span, system=True, columns=[time] if time else [])
    brought = pl.col(INGESTED_COLUMN).dt.epoch("us")
    figures = [pl.len().alias("rows"), (brought % 4_294_967_291).sum().alias("sum")]
    figures.append(pl.col(INGESTED_COLUMN).max().alias("newest"))
    if time is not None:
        figures += [pl.col(time).min().alias("first"), pl.col(time).max().alias("last")]
    return source.scan(dataset, wanted).select(figures).collect(engine="streaming").row(0, named=True)


def _shapes(dataset: str, held: Schema, there: Schema | None) -> tuple[Schema, Schema]:
    """Return the schema in which rows are sent, and that of the target's table, which keeps the period and the nulls
    that it has; raises `SchemaConflict` when it cannot take the rows."""
    if there is None:
        return held, held
    new = [replace(column, nullable=True) for column in held.columns if column.name not in there]
    kept = [
        held[column.name] if column.name in held and held[column.name].type is not column.type else column
        for column in there.columns
    ]
    table = Schema((*kept, *new), held.key, held.time, held.subject, there.period)
    evolution.added(dataset, there, table)
    sent = replace(table, columns=tuple(table[name] for name in held.names))
    evolution.added(dataset, sent, table)
    return sent, table


def _count(store: Store, survey: _Survey) -> int:
    return store.count(survey.dataset, survey.span) if store.marker(survey.dataset) is not None else 0


# ---------------------------------------------------------------- chunks


def _chunks(survey: _Survey) -> list[Filter]:
    """Return the spans that together hold what was surveyed, of about `ROWS` rows each where time and subjects cut it,
    in an order that is the same for the same survey."""
    slices = _slices(survey)
    groups: list[Sequence[str] | None] = [survey.span.subjects]
    subjects = sorted(survey.newest)
    # subjects are named wherever all of them are known: what asks for times alone, reads all of most servers' tables
    known = {survey.schema.subject, survey.schema.time} <= set(evolution.required(survey.schema))
    if known and len(slices) * len(subjects) > _GROUP:
        groups = [subjects[first : first + _GROUP] for first in range(0, len(subjects), _GROUP)]
    return [
        replace(survey.span, subjects=group, since=since, until=until, system=True)
        for since, until in slices
        for group in groups
    ]


def _slices(survey: _Survey) -> list[tuple[date | datetime | None, date | datetime | None]]:
    """Return (since, until) of as many periods at a time as have about `ROWS` rows; the outer ones are those asked."""
    import polars as pl

    span, schema = survey.span, survey.schema
    bounds: list[date | datetime | None] = [span.since, span.until]
    step = _STEPS.get(schema.period)
    if step and schema.time in evolution.required(schema) and survey.first is not None and survey.last is not None:
        first, last = (at.date() if isinstance(at, datetime) else at for at in (survey.first, survey.last))
        starts = pl.date_range(first, last, "1d", eager=True).dt.truncate(step).unique().sort().to_list()
        size = max(1, ROWS * len(starts) // max(1, survey.rows))
        bounds[1:1] = starts[size::size]
    return list(itertools.pairwise(bounds))


def _pieces(
    source: Store, survey: _Survey, chunks: Sequence[Filter], past: int
) -> Iterator[tuple[int, pl.DataFrame, bool]]:
    """Yield (number of the chunk, rows, whether they are its last) of the chunks after the first `past`."""
    types = survey.schema.polars(system=True)
    for number, chunk in enumerate(chunks[past:], past + 1):
        held = None
        for frame in frames(source, survey.dataset, chunk, types, ROWS):
            if held is not None:
                yield number, held, False
            held = frame
        if held is not None:
            yield number, held, True


def _ahead(items: Iterator[Item]) -> Iterator[Item]:
    """Yield what the iterator gives, read by a thread that is one step ahead: reading and writing go side by side."""
    with ThreadPoolExecutor(1, thread_name_prefix="copy") as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item


# ---------------------------------------------------------------- the copy


def _copied(
    source: End, target: End, survey: _Survey, workspace: Workspace | None, told: Callable[[Copied], None]
) -> Copied:
    import polars as pl

    dataset, store = survey.dataset, target.store
    result = Copied(dataset, survey.rows)
    store.ensure(dataset, survey.table)
    lease = _Coverage.begin(workspace, source, target, survey)
    chunks = _chunks(survey)
    lane, reached = _lane(store, survey)
    past = min(reached // _STRIDE, len(chunks))
    result.resumed = reached > 0
    if survey.rows:
        for number, frame, last in _ahead(_pieces(source.store, survey, chunks, past)):
            end = _DONE if number == len(chunks) else number * _STRIDE
            reached = end if last else max(reached, (number - 1) * _STRIDE) + 1
            written = store.write(Batch(dataset, survey.schema, lane, reached, frame, Mode.UPSERT))
            if written.already:
                raise StoreError(
                    f"another copy of {dataset} from {source.name} to {target.name} is under way; wait for its end"
                )
            result.read += frame.height
            _add(result, written)
            told(result)
    if survey.rows and reached < _DONE:  # the last chunks have no rows
        none = pl.DataFrame(schema=survey.schema.polars(system=True))
        store.write(Batch(dataset, survey.schema, lane, _DONE, none, Mode.UPSERT))
    late = _verify(result, source, target, survey)
    if not result.problems and lease is not None:
        result.covered = lease.end(late)
    return result


def _add(result: Copied, written: Written) -> None:
    result.inserted += written.inserted
    result.updated += written.updated
    result.unchanged += written.unchanged


def _lane(store: Store, survey: _Survey) -> tuple[str, int]:
    """Return the lane of a copy of just this that was broken off, and how far it came; a new one when there is none."""
    for number in itertools.count():
        lane = f"copy-{survey.digest}-{number}"
        reached = store.committed(survey.dataset, lane)
        if reached < _DONE:
            return lane, reached
    raise AssertionError("unreachable")


def _verify(result: Copied, source: End, target: End, survey: _Survey) -> set[str | None]:
    """Compare what is in both stores now, and note what is not as it should be; return the subjects that are not whole,
    since rows of them came to the source meanwhile."""
    known = survey.figures["newest"]
    found = compare(source.store, target.store, survey.dataset, survey.schema, survey.span, known)
    result.there, result.late = found.there, sum(found.late.values())
    result.differences = sorted(found.differences.values(), key=lambda one: one.subject or "")
    result.agree = not result.differences
    wrong = bool(result.differences)
    moved = found.rows != survey.rows or bool(found.late)
    if wrong and not moved:  # rows may have been changed in place
        moved = _figures(source.store, survey.dataset, survey.schema.time, survey.span) != survey.figures
    if moved:
        changed = f"{source.name} changed while it was copied ({survey.rows:,} rows before, {found.rows:,} after)"
        left = f": {result.late:,} rows that came meanwhile are not there yet" if found.late else ""
        remedy = "; run the same copy again" if found.late or wrong else ", and what it has now is there"
        (result.problems if wrong else result.remarks).append(changed + left + remedy)
    if wrong:
        result.problems.append(_told(result.differences, source, target))
    if found.besides:
        result.remarks.append(f"{target.name} has {found.besides:,} rows besides, which {source.name} has not")
    return set(found.late)


def _told(differences: Sequence[Difference], source: End, target: End) -> str:
    """Say what differs, and what to do."""
    lines = []
    for one in differences[:_TOLD]:
        counts = ((one.missing, "missing"), (one.changed, "changed"), (one.unread, "in spans that differ"))
        told = ", ".join(f"{count:,} {what}" for count, what in counts if count)
        if one.first is not None:
            told += f", at {one.first}" if one.first == one.last else f", from {one.first} to {one.last}"
        lines.append(f"{one.subject} ({told}{'; ' + one.example if one.example else ''})")
    if len(differences) > _TOLD:
        lines.append(f"{len(differences) - _TOLD:,} more")
    rows = sum(one.missing + one.changed + one.unread for one in differences)
    return (
        f"{rows:,} rows of {len(differences):,} subjects are not in {target.name} as they are in {source.name}: "
        f"{'; '.join(lines)}. Run the same copy again while nothing else writes to {target.name}; if it says this "
        f"again, do not rely on {target.name}, which does not keep what it is given"
    )


# ---------------------------------------------------------------- coverage


@dataclass
class _Coverage:
    """What the ledger is told of the target: that rows may be there, and at the end what is known of them."""

    workspace: Workspace
    target: str
    dataset: str
    request_hash: str
    theirs: Mapping[str, Sequence[Covered]]  # the source's, as it was before a row was read
    missing: Mapping[str, Sequence[Interval]]

    @classmethod
    def begin(cls, workspace: Workspace | None, source: End, target: End, survey: _Survey) -> _Coverage | None:
        """Note that rows come; None where the ledger has nothing to say of the source's."""
        if workspace is None or target.store_id is None:
            return None
        dataset, store, ledger = survey.dataset, target.store, workspace.ledger
        spec, hashed = _asked(workspace, dataset)
        bound = ledger.marker(target.store_id, dataset) is not None
        known = source.store_id is not None and is_known(source.store_id, source.store, dataset, ledger)
        if spec is None or not known or source.store_id is None:
            if bound:
                ledger.distrust(target.store_id, dataset)
            return None
        marker = store.marker(dataset) or ""
        bind(target.store_id, store, dataset, marker, ledger)
        of_both = ledger.coverage([source.store_id, target.store_id], dataset, hashed)
        theirs, mine = of_both[source.store_id], of_both[target.store_id]
        coming = ledger.on_the_way([target.store_id], dataset)
        reach = _reach(survey, margin(spec))
        apart = told_apart(spec)
        subjects = survey.span.subjects
        if subjects is not None and not apart:
            ledger.distrust(target.store_id, dataset)
            return None
        missing = {
            subject: found
            for subject, pieces in theirs.items()
            if subjects is None or subject in subjects
            if (
                found := within(
                    minus(answered(pieces), [*answered(mine.get(subject, ())), *coming.get(subject, ())]), [reach]
                )
            )
        }
        begun = cls(workspace, target.store_id, dataset, hashed, theirs, missing)
        now = workspace.clock.now()
        ledger.lay(
            target.store_id,
            dataset,
            hashed,
            {subject: begun_copies(spans, now) for subject, spans in missing.items()},
        )
        if not _all_told(survey, theirs, margin(spec), apart=apart):
            ledger.distrust(target.store_id, dataset)
        return begun

    def end(self, late: Collection[str | None]) -> int:
        """Lay the source's coverage, as far as it was missing, of all subjects but the late ones: rows that came before
        the coverage was read may be among those that are left. Return of how many subjects."""
        pieces = {
            subject: inherited(self.theirs[subject], spans)
            for subject, spans in self.missing.items()
            if subject not in late and not (late and subject == EVERYTHING)
        }
        self.workspace.ledger.lay(self.target, self.dataset, self.request_hash, pieces)
        return len(pieces)


def _asked(workspace: Workspace, dataset: str) -> tuple[Dataset | None, str]:
    """Return what the definitions say of the dataset, and the hash of its request; None where they say nothing."""
    upstream, _, name = dataset.partition(".")
    definition = workspace.loaded.definitions.get(upstream)
    if definition is None or name not in definition.datasets:
        return None, ""
    return definition.datasets[name], request_hash(definition, name)


def _reach(survey: _Survey, margin: timedelta) -> Interval:
    """Return the interval whose rows are all copied; rows of a session may be some days beside it."""
    since, until = survey.span.since, survey.span.until
    start = _ALWAYS.start if since is None else instant(since) + margin
    return Interval(start, max(start, _ALWAYS.end if until is None else instant(until) - margin))


def _all_told(survey: _Survey, theirs: Mapping[str, Sequence[Covered]], margin: timedelta, *, apart: bool) -> bool:
    """Return whether every row that is copied is within the source's coverage; when in doubt, that it is not."""
    if survey.first is None or survey.schema.time is None:
        return False
    first = instant(survey.first) + margin
    whole = list(theirs) == [EVERYTHING]
    if not (apart or whole):
        return False
    for subject, at in survey.newest.items():
        last = min(instant(at), instant(survey.last or at)) - margin
        spans = merged(answered(theirs.get(EVERYTHING if whole else subject, ())))
        if first <= last and not any(span.start <= first and last < span.end for span in spans):
            return False
    return True
