"""Which rows of one store another one has not, or has with other values: found by fingerprints, named by rows.

First the fingerprints of each subject, of both stores at once; of the subjects that differ those of their years, months
and days, as long as there are many rows in them; and of what then differs the rows, in bounded memory. So what is equal
costs one look at each table and moves nothing, and what differs costs as much as there is of it. Rows that only the
other store has are counted and are no difference. What a difference means is for others to say; nothing is changed.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import MAXYEAR, date, datetime, timedelta
from typing import TYPE_CHECKING, Any

from marketsync.planning import instant
from marketsync.schema import INGESTED_COLUMN, Period, Schema
from storage import fingerprints
from storage.admission import shown
from storage.fingerprints import Plan, Recipe
from storage.lazyframes import EVERY_SUBJECT
from storage.protocol import Filter, Store

if TYPE_CHECKING:
    import polars as pl

ROWS = 100_000  # that are read of each store at a time
ENOUGH = 1_000  # rows that differ: of what is left then, only the segments are told
FEW = 1_000  # rows of a segment that is not cut further
_GROUP_ROWS = 2_000_000  # of the subjects whose segments are asked for at a time
_GROUP = 500  # subjects, of these
_WITHIN = {Period.YEAR: "", Period.MONTH: "1y", Period.DAY: "1mo"}  # what each is a part of
_PRIME = 1_000_003  # by the remainders rows are told apart that are too many for one read

Subject = str | None
Time = date | datetime


@dataclass
class Difference:
    """What differs of one subject (`*`: of a table without subjects), in rows of the first store: those that the second
    has not, and those that it has with other values. Of `unread` rows it is only known that their segments differ.
    `first` and `last` are times that all of them are between; None where they have none."""

    subject: Subject
    missing: int = 0
    changed: int = 0
    unread: int = 0
    first: Time | None = None
    last: Time | None = None
    example: str = ""

    def reach(self, first: Time | None, last: Time | None) -> None:
        """Let it be between these times too."""
        self.first = min((at for at in (self.first, first) if at is not None), default=None, key=instant)
        self.last = max((at for at in (self.last, last) if at is not None), default=None, key=instant)


@dataclass
class Comparison:
    """How two tables compare: the rows of both, what differs by subject, how many rows only the second one has (None:
    not known, since not all was read that differs), and of which subjects rows came to the first one too late."""

    rows: int = 0
    there: int = 0
    differences: dict[Subject, Difference] = field(default_factory=dict)
    besides: int | None = 0
    late: dict[Subject, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Sides:
    """What is compared, and how."""

    stores: tuple[Store, Store]
    dataset: str
    schema: Schema
    span: Filter
    recipe: Recipe
    plan: Plan
    pool: ThreadPoolExecutor

    def fingerprints(self, period: Period, filter: Filter) -> list[pl.DataFrame]:
        recipe = replace(self.recipe, period=period)
        asked = [self.pool.submit(store.fingerprints, self.dataset, recipe, filter) for store in self.stores]
        return [each.result() for each in asked]


@dataclass(frozen=True)
class _Read:
    """Rows to be read: of these subjects, each with how many the first store has, from `since` up to `until` (None: as
    far as is compared); `most` is how many either store has in all."""

    subjects: Mapping[Subject, int]
    most: int
    since: date | None = None
    until: date | None = None
    timeless: bool = False  # only those without a time


def compare(
    source: Store, target: Store, dataset: str, schema: Schema, span: Filter, known: datetime | None
) -> Comparison:
    """Compare what both stores have of the span in the columns of the schema, by keys that are drawn anew.

    Rows that the source got after `known` (None: all of them) and the target has not, or with other values, are late
    and no difference. Floats are equal where fingerprints do not tell them apart. Raises StoreError when a store cannot
    be read.
    """
    recipe = Recipe(secrets.token_bytes(16), Period.NONE, schema.names)
    plan = fingerprints.plan(dataset, recipe, schema)
    span = replace(span, columns=None, system=False)
    with ThreadPoolExecutor(2, thread_name_prefix="compare") as pool:
        sides = _Sides((source, target), dataset, schema, span, recipe, plan, pool)
        ours, theirs = sides.fingerprints(Period.NONE, span)
        seen = Comparison(int(ours["rows"].sum()), int(theirs["rows"].sum()))
        absent = found = 0
        unread = False
        for group in _groups(_unlike(ours, theirs)):
            for read in _reads(sides, group):
                if found >= ENOUGH:
                    unread = True
                    _leave(seen, read)
                    continue
                for pairs in _pairs(sides, read):
                    absent += int(pairs["missing"].sum())
                    found += _note(seen, sides, pairs, known)
        seen.besides = None if unread else max(0, seen.there - seen.rows + absent)
        return seen


# ---------------------------------------------------------------- what is to be read


def _unlike(ours: pl.DataFrame, theirs: pl.DataFrame) -> pl.DataFrame:
    """Return (subject, segment, rows, most) of our fingerprints that are not among theirs."""
    import polars as pl

    at = ["subject", "segment"]
    same = [name for name in ours.columns if name not in at]
    both = ours.join(theirs.select(ours.columns), on=at, how="left", suffix=" there", nulls_equal=True)
    differ = pl.any_horizontal(pl.col(name).ne_missing(pl.col(f"{name} there")) for name in same)
    return both.filter(differ).select(*at, "rows", most=pl.max_horizontal("rows", "rows there")).sort(at)


def _groups(unlike: pl.DataFrame) -> Iterator[pl.DataFrame]:
    """Yield subjects that differ, as many at a time as have a bounded number of segments."""
    import polars as pl

    nameless = pl.col("subject").is_null()  # which no filter selects
    yield from _parts(unlike.filter(~nameless), _GROUP_ROWS)
    yield from _parts(unlike.filter(nameless), _GROUP_ROWS)


def _parts(unlike: pl.DataFrame, rows: int) -> Iterator[pl.DataFrame]:
    """Yield so much at a time of what differs as has that many rows, or at least one line of it."""
    begin = taken = 0
    for number, most in enumerate(unlike["most"].to_list()):
        if number > begin and (taken + most > rows or number - begin >= _GROUP):
            yield unlike[begin:number]
            begin, taken = number, 0
        taken += most
    if begin < unlike.height:
        yield unlike[begin:]


def _reads(sides: _Sides, group: pl.DataFrame) -> Iterator[_Read]:
    """Yield what has to be read of some subjects that differ."""
    import polars as pl

    asked = whole = _read(group)
    if sides.schema.time is None or None in whole.subjects or whole.most <= FEW:
        yield whole
        return
    above: pl.DataFrame | None = None
    for period, within in _WITHIN.items():
        unlike = _unlike(*sides.fingerprints(period, _filter(sides, asked)))
        for timeless in unlike.filter(pl.col("segment").is_null()).iter_slices(1):
            yield replace(_read(timeless), timeless=True)
        unlike = unlike.drop_nulls("segment")
        if above is not None:
            parents = pl.col("segment").dt.truncate(within)
            unlike = unlike.join(above, left_on=["subject", parents], right_on=["subject", "segment"], how="semi")
        many = (pl.col("most") > FEW) & (period is not Period.DAY)
        yield from _merged(unlike.filter(~many), period)
        above = unlike.filter(many)
        if above.is_empty():
            return
        first, last = above.select(first=pl.col("segment").min(), last=pl.col("segment").max()).row(0)
        asked = replace(whole, since=first, until=_end(last, period))


def _read(unlike: pl.DataFrame) -> _Read:
    return _Read(dict(unlike.select("subject", "rows").iter_rows()), int(unlike["most"].sum()))


def _merged(unlike: pl.DataFrame, period: Period) -> Iterator[_Read]:
    """Yield reads of segments, several of a time or of a run of times at once."""
    last: _Read | None = None
    for segment in unlike.sort("segment", "subject").partition_by("segment", maintain_order=True):
        start = segment["segment"][0]
        for part in _parts(segment, ROWS):
            read = replace(_read(part), since=start, until=_end(start, period))
            if last is not None and _follows(last, read):
                rows = {subject: last.subjects[subject] + count for subject, count in read.subjects.items()}
                last = replace(last, subjects=rows, most=last.most + read.most, until=read.until)
                continue
            if last is not None:
                yield last
            last = read
    if last is not None:
        yield last


def _follows(last: _Read, read: _Read) -> bool:
    same = last.subjects.keys() == read.subjects.keys()
    return same and last.until == read.since and last.most + read.most <= ROWS


def _end(start: date, period: Period) -> date | None:
    """Return the first day after the period; None after the last year."""
    if period is Period.DAY:
        return None if start == date.max else start + timedelta(days=1)
    months = start.year * 12 + start.month - 1 + (12 if period is Period.YEAR else 1)
    return None if months // 12 > MAXYEAR else date(months // 12, months % 12 + 1, 1)


def _filter(sides: _Sides, read: _Read) -> Filter:
    """Return the filter of what is read, no further than what is compared."""
    span = sides.span
    named = sides.schema.subject is not None and None not in read.subjects
    subjects = [subject for subject in read.subjects if subject is not None] if named else span.subjects
    since = max((at for at in (span.since, read.since) if at is not None), default=None, key=instant)
    until = min((at for at in (span.until, read.until) if at is not None), default=None, key=instant)
    return replace(span, subjects=subjects, since=since, until=until)


# ---------------------------------------------------------------- rows


def _pairs(sides: _Sides, read: _Read) -> Iterator[pl.DataFrame]:
    """Yield the rows of the first store, each beside that of the second one with its key, with `missing` and `changed`;
    `k` are the columns of the key, `r` the values that are compared, and `v` the numbers that they count as."""
    import polars as pl

    schema, plan = sides.schema, sides.plan
    keys = [f"k{number}" for number in range(len(schema.key))]
    subject = pl.lit(EVERY_SUBJECT) if schema.subject is None else pl.col(schema.subject)
    shown = [subject.alias("subject"), pl.col(INGESTED_COLUMN).alias("at")]
    shown.append(pl.lit(None).alias("time") if schema.time is None else pl.col(schema.time).alias("time"))
    shown += [pl.col(name).alias(key) for key, name in zip(keys, schema.key, strict=True)]
    shown += [pl.col(column.name).alias(f"r{number}") for number, column in enumerate(plan.columns)]
    filter = replace(_filter(sides, read), columns=schema.names, system=True)
    parts = [pl.col(f"v{number}") for number, column in enumerate(plan.columns) if column.name in schema.key]
    pieces = -(-read.most // ROWS) if parts else 1
    which = pl.sum_horizontal((part % _PRIME).cast(pl.Int64) for part in parts) % pieces if parts else pl.lit(0)

    def rows(store: Store, piece: int) -> pl.DataFrame:
        found = store.scan(sides.dataset, filter)
        if None in read.subjects and schema.subject is not None:
            found = found.filter(pl.col(schema.subject).is_null())
        if read.timeless and schema.time is not None:
            found = found.filter(pl.col(schema.time).is_null())
        found = found.select(*shown, *fingerprints.numbers(plan))
        return (found if pieces == 1 else found.filter(which == piece)).collect(engine="streaming")

    missing = pl.col("present").is_null()
    numbers = [f"v{number}" for number in range(len(plan.columns))]
    other = pl.any_horizontal(pl.col(name).ne_missing(pl.col(f"{name} there")) for name in numbers)
    for piece in range(pieces):
        asked = [sides.pool.submit(rows, store, piece) for store in sides.stores]
        ours, theirs = (each.result() for each in asked)
        theirs = theirs.with_columns(present=True)
        both = ours.join(theirs, on=keys, how="left", suffix=" there")
        yield both.with_columns(missing=missing, changed=other & ~missing)


def _note(seen: Comparison, sides: _Sides, pairs: pl.DataFrame, known: datetime | None) -> int:
    """Add what differs in the pairs to what was seen; return how many rows it is, without the late ones."""
    import polars as pl

    wrong = pairs.filter(pl.col("missing") | pl.col("changed"))
    late = pl.lit(True) if known is None else pl.col("at") > known
    for subject, count in wrong.filter(late).group_by("subject").len().iter_rows():
        seen.late[subject] = seen.late.get(subject, 0) + count
    wrong = wrong.filter(~late)
    for (subject,), rows in wrong.partition_by("subject", as_dict=True, maintain_order=True).items():
        one = seen.differences.setdefault(subject, Difference(subject))
        one.missing += int(rows["missing"].sum())
        one.changed += int(rows["changed"].sum())
        one.reach(*rows.select(first=pl.col("time").min(), last=pl.col("time").max()).row(0))
        one.example = one.example or _example(sides, rows.row(0, named=True))
    return wrong.height


def _example(sides: _Sides, pair: dict[str, Any]) -> str:
    """Say of one row where it is and what of it differs."""
    named = list(enumerate(sides.schema.key))
    place = ", ".join(f"{name} {shown(pair[f'k{at}'])}" for at, name in named if name != sides.schema.subject)
    place = place or ", ".join(f"{name} {shown(pair[f'k{at}'])}" for at, name in named)
    if pair["missing"]:
        return f"{place}: not there"
    for at, column in enumerate(sides.plan.columns):
        if pair[f"v{at}"] != pair[f"v{at} there"]:
            return f"{place}: {column.name} is {shown(pair[f'r{at} there'])} there, and {shown(pair[f'r{at}'])} here"
    raise AssertionError("unreachable")


def _leave(seen: Comparison, read: _Read) -> None:
    """Note rows that are not looked into."""
    last = None if read.until is None else read.until - timedelta(days=1)
    for subject, rows in read.subjects.items():
        one = seen.differences.setdefault(subject, Difference(subject))
        one.unread += rows
        one.reach(read.since, last)
