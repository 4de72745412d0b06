"""The gate every row passes before it is ours: exact types, no null where none may be, inside the window asked for,
one row a key. What does not pass is set aside with the reason, and the counts add up.

Decoding a provider's bytes is in `providers/decode.py`, which hands over columns as wide as the provider wrote them
(text, or numbers as 64-bit floats); turning them into the schema's types is done here, for many pages at once, since
a call into polars costs more than the thousand rows of one page. Nothing here does I/O.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from itertools import groupby, pairwise
from typing import Any

import polars as pl

from marketsync.definition import Dataset, Field_
from marketsync.schema import ColumnType, Schema, polars_type

REJECTED = {"column": pl.String(), "reason": pl.String(), "raw": pl.String()}
"""Columns of a frame of rows set aside: the column at fault (null: the row), why, and the raw row as JSON text."""

OUTSIDE = "outside the window asked for"
_EXACT = 2**53  # below this, every whole number is exact in a 64-bit float
_FIRST_SECOND, _END_SECOND = -62_135_596_800, 253_402_300_800  # years 1 to 9999, in Unix seconds
_FIRST_NANO_SECOND, _END_NANO_SECOND = -9_214_560_000, 9_214_646_400  # years 1678 to 2261
_TEMPORAL = (ColumnType.DATE, ColumnType.DATETIME, ColumnType.DATETIME_NS)
_WHOLE = (ColumnType.I32, ColumnType.I64, ColumnType.U64)
_REAL = (ColumnType.F32, ColumnType.F64)
_UNIX = {"unix_s": 1, "unix_ms": 1_000, "unix_us": 1_000_000, "unix_ns": 1_000_000_000}
_TIME_OF_DAY = re.compile(r"%[-_0#]?[HIMSTRkls.f+XcDrp]")


def rejected_frame(rows: Sequence[tuple[str | None, str, str]] = ()) -> pl.DataFrame:
    """Return a frame of `REJECTED` columns from (column, reason, raw row as JSON text) triples."""
    return pl.DataFrame(list(rows), schema=REJECTED, orient="row")


@dataclass(frozen=True)
class Batch:
    """The rows of one answer, decoded and not yet judged.

    `frame` has the schema's column names with values as wide as the provider wrote them; `rejected` (columns as in
    `REJECTED`) holds what could not even be put into a column; `fetched` counts both. Rows whose time is outside
    [`start`, `end`) are not what was asked for. `absent` names columns that no row of the answer had.
    """

    frame: pl.DataFrame
    fetched: int
    rejected: pl.DataFrame = field(default_factory=rejected_frame)
    start: datetime | None = None
    end: datetime | None = None
    absent: tuple[str, ...] = ()


@dataclass(frozen=True)
class Gated:
    """What came through (`frame`: exactly the schema's columns and types) and what did not; fetched = kept +
    duplicates + quarantined. `rejected` has the columns of `REJECTED`."""

    frame: pl.DataFrame
    rejected: pl.DataFrame
    duplicates: int
    fetched: int

    @property
    def kept(self) -> int:
        """Rows in `frame`."""
        return self.frame.height

    @property
    def quarantined(self) -> int:
        """Rows in `rejected`."""
        return self.rejected.height


def seal(dataset: Dataset, pages: Sequence[Batch]) -> Gated:
    """Judge the pages of a segment together, in their order (of two rows with one key the later one is kept)."""
    return _judge(dataset.stored(), dataset.columns, dataset.raw_of, pages)


def gate(
    schema: Schema,
    frame: pl.DataFrame,
    *,
    start: datetime | None = None,
    end: datetime | None = None,
    fields: Mapping[str, Field_] | None = None,
) -> Gated:
    """Judge one frame against a schema. Times without a zone are UTC and text is read as ISO 8601 unless `fields`
    (by column) says otherwise; columns the schema does not have are left out."""
    known = dict(fields or {})
    for column in schema.columns:
        known.setdefault(column.name, Field_(type=column.type))
    return _judge(schema, known, {}, [Batch(frame, frame.height, start=start, end=end)])


# ---------------------------------------------------------------- judging


def _judge(schema: Schema, fields: Mapping[str, Field_], raw_of: Mapping[str, str], pages: Sequence[Batch]) -> Gated:
    typed: list[pl.DataFrame] = []
    rejected = [page.rejected for page in pages if page.rejected.height]
    filled = [page for page in pages if page.frame.height]
    for _, run in groupby(filled, key=lambda page: page.frame.schema):
        kept, bad = _judge_run(schema, fields, raw_of, list(run))
        typed.append(kept)
        if bad is not None:
            rejected.append(bad)
    frame = pl.concat(typed) if typed else pl.DataFrame(schema=schema.polars())
    before = frame.height
    if _may_repeat(frame, schema):
        frame = frame.unique(subset=list(schema.key), keep="last", maintain_order=True)
    return Gated(
        frame,
        pl.concat(rejected) if rejected else rejected_frame(),
        before - frame.height,
        sum(page.fetched for page in pages),
    )


def _judge_run(
    schema: Schema, fields: Mapping[str, Field_], raw_of: Mapping[str, str], pages: list[Batch]
) -> tuple[pl.DataFrame, pl.DataFrame | None]:
    wide = pages[0].frame if len(pages) == 1 else pl.concat([page.frame for page in pages], rechunk=True)
    present = set(wide.columns)
    columns: list[pl.Series] = []
    bad: list[tuple[str, pl.Series, str]] = []  # column, mask, reason ("" where it is told row by row)
    for column in schema.columns:
        type_ = polars_type(column.type)
        if column.name in present:
            raw = wide[column.name]
            series = read_column(raw, fields[column.name])
            nulls = series.null_count()
            # what is null now and was not before could not be read; texts that stand for null are null before
            if nulls and nulls > raw.null_count():
                missing = _missing(raw, fields[column.name])
                unread = series.is_null() & ~missing
                if unread.any():
                    bad.append((column.name, unread, ""))
        else:
            series = pl.Series(column.name, [None], dtype=type_).new_from_index(0, wide.height)
            nulls = wide.height
        if nulls and not column.nullable:
            bad.append((column.name, series.is_null(), "has no value, and a row without it cannot be kept"))
        columns.append(series)
    frame = pl.DataFrame(columns)
    bad.extend(_outside(schema, frame, pages))
    if not bad:
        return frame, None
    first = pl.Series([len(bad)], dtype=pl.UInt32).new_from_index(0, wide.height)
    for index in range(len(bad) - 1, -1, -1):
        first = pl.Series([index], dtype=pl.UInt32).new_from_index(0, wide.height).zip_with(bad[index][1], first)
    mask = first != len(bad)
    rows = []
    for row, index in zip(wide.filter(mask).iter_rows(named=True), first.filter(mask), strict=True):
        name, _, reason = bad[index]
        rows.append((name, reason or _unread(row[name], fields[name]), _raw_text(row, raw_of, fields)))
    return frame.filter(~mask), rejected_frame(rows)


def _outside(schema: Schema, frame: pl.DataFrame, pages: list[Batch]) -> list[tuple[str, pl.Series, str]]:
    if schema.time is None or all(page.start is None and page.end is None for page in pages):
        return []
    times, masks, offset, found = frame[schema.time], [], 0, False
    for page in pages:
        part = times.slice(offset, page.frame.height)
        offset += page.frame.height
        low, high = part.min(), part.max()
        start, end = _bound(page.start, times.dtype), _bound(page.end, times.dtype)
        # one comparison of the extremes a page; rows are looked at only when an extreme is outside
        early = low is not None and start is not None and low < start  # type: ignore[operator]
        late = high is not None and end is not None and high >= end  # type: ignore[operator]
        if early or late:
            mask = pl.Series([False]).new_from_index(0, part.len())
            if early:
                mask = mask | (part < start).fill_null(False)
            if late:
                mask = mask | (part >= end).fill_null(False)
            found = True
        else:
            mask = pl.Series([False]).new_from_index(0, part.len())
        masks.append(mask)
    return [(schema.time, pl.concat(masks), OUTSIDE)] if found else []


def _bound(instant: datetime | None, dtype: pl.DataType) -> date | datetime | None:
    """Bring a bound to the column's type: a date column is compared by days, an end within a day includes it."""
    if instant is None or dtype != pl.Date:
        return instant
    instant = instant.astimezone(UTC)
    day = instant.date()
    whole = instant == datetime(day.year, day.month, day.day, tzinfo=UTC)
    return day if whole else date.fromordinal(day.toordinal() + 1)


def _may_repeat(frame: pl.DataFrame, schema: Schema) -> bool:
    """Return whether two rows may share a key: false at once where the order of the rows already proves it."""
    if frame.height < 2:
        return False
    others = [name for name in schema.key if name != schema.time]
    if schema.time in schema.key and len(others) <= 1:
        times = frame[schema.time].to_physical()
        earlier, later = times.slice(0, times.len() - 1), times.slice(1)
        up, down = later > earlier, later < earlier
        if not others:
            return not (up.all() or down.all())
        subject = frame[others[0]]
        changed = subject.slice(1) != subject.slice(0, subject.len() - 1)
        # sorting the runs costs more than hashing the rows where runs are short (a session's rows, share by share)
        if changed.sum() * 8 < frame.height and ((up | changed).all() or (down | changed).all()):
            return _runs_meet(subject, times, changed)
    return bool(frame.select(pl.struct(schema.key).is_duplicated().any()).item())


def _runs_meet(subject: pl.Series, times: pl.Series, changed: pl.Series) -> bool:
    """Return whether two runs (rows of one subject in a row, in the order of time) may share a key: pages of several
    chains lie one after the other in a segment, and only their ends need to be compared."""
    breaks = changed.arg_true()
    first = pl.concat([pl.Series([0], dtype=breaks.dtype), breaks + 1])
    last = pl.concat([breaks, pl.Series([times.len() - 1], dtype=breaks.dtype)])
    # few values: plain Python is done before a query of polars has begun
    starts, ends = times.gather(first).to_list(), times.gather(last).to_list()
    runs = sorted(
        (name, min(start, end), max(start, end))
        for name, start, end in zip(subject.gather(first).to_list(), starts, ends, strict=True)
    )
    return any(one[0] == other[0] and other[1] <= one[2] for one, other in pairwise(runs))


# ---------------------------------------------------------------- what is told about a row


def _raw_text(row: dict[str, Any], raw_of: Mapping[str, str], fields: Mapping[str, Field_]) -> str:
    plain = {}
    for name, value in row.items():
        if isinstance(value, float) and name in fields and fields[name].type not in _REAL:
            value = int(value) if value.is_integer() and abs(value) < _EXACT else value
        plain[raw_of.get(name, name)] = value
    return json.dumps(plain, ensure_ascii=False, default=str)


def _unread(value: Any, spec: Field_) -> str:
    shown = repr(value) if isinstance(value, str) else str(value)
    if len(shown) > 80:
        shown = shown[:77] + "..."
    if spec.type in _WHOLE:
        return f"{shown} is not a whole number that fits {spec.type}"
    if spec.type in _REAL:
        return f"{shown} is not a finite number that fits {spec.type}"
    if spec.type is ColumnType.BOOL:
        return f"{shown} is neither true nor false"
    if spec.type in _TEMPORAL:
        kind = "date" if spec.type is ColumnType.DATE else "time"
        zone = f", or does not exist or comes twice in {spec.zone} when its clocks change" if spec.zone != "UTC" else ""
        return f"{shown} is not a {kind} written as {spec.format or 'iso'}{zone}"
    return f"{shown} is not text"


# ---------------------------------------------------------------- wide to typed


def _missing(raw: pl.Series, spec: Field_) -> pl.Series:
    """Return the mask of values that stand for a missing one, as they came."""
    missing = raw.is_null()
    if raw.dtype == pl.String:
        if spec.nulls:
            missing = missing | raw.is_in(list(spec.nulls)).fill_null(False)
        if spec.type is not ColumnType.STR:
            missing = missing | (raw.str.strip_chars() == "").fill_null(False)
    elif spec.nulls and raw.dtype.is_numeric():
        numbers = [number for text in spec.nulls if (number := _number(text)) is not None]
        if numbers:
            reals = raw.cast(pl.Float64, strict=False)
            missing = missing | reals.is_in([number for number in numbers if number == number]).fill_null(False)
            if any(number != number for number in numbers):
                missing = missing | reals.is_nan().fill_null(False)
    return missing


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def read_column(raw: pl.Series, spec: Field_) -> pl.Series:
    """Return the values in the field's type; null where a value is missing or cannot be read exactly.

    `raw` is text, numbers, booleans, dates or times. A whole number is read from a float only when it is one and is
    exact; text that stands for a missing value (`nulls`, and the empty text in all but text columns) becomes null.
    A time column of microseconds drops what is finer.
    """
    if spec.nulls:
        raw = raw.set(_missing(raw, spec), None)
    if spec.type is ColumnType.STR:
        return _texts(raw)
    if raw.dtype == pl.Null:
        return raw.cast(polars_type(spec.type))
    if spec.type is ColumnType.BOOL:
        return _booleans(raw)
    if spec.type in _TEMPORAL:
        return _temporals(raw, spec)
    series = _numbers(raw, spec)
    return series.alias(raw.name)


def _texts(raw: pl.Series) -> pl.Series:
    if raw.dtype == pl.String:
        return raw
    if raw.dtype.is_float():
        whole = raw.cast(pl.Int64, strict=False)
        exact = (whole.cast(pl.Float64) == raw).fill_null(False)
        return whole.cast(pl.String).zip_with(exact, raw.cast(pl.String)).alias(raw.name)
    return raw.cast(pl.String)


def _booleans(raw: pl.Series) -> pl.Series:
    if raw.dtype == pl.Boolean:
        return raw
    text = raw.str.strip_chars().str.to_lowercase() if raw.dtype == pl.String else _texts(raw)
    true, false = text.is_in(["true", "1"]), text.is_in(["false", "0"])
    return true.set(~(true | false), None)


def _numbers(raw: pl.Series, spec: Field_) -> pl.Series:
    if raw.dtype == pl.Boolean or raw.dtype.is_temporal():
        return pl.Series(raw.name, [None], dtype=polars_type(spec.type)).new_from_index(0, raw.len())
    whole = spec.type in _WHOLE
    if whole and spec.scale is None:
        return _wholes(raw, polars_type(spec.type))
    reals = _reals(raw)
    if spec.scale is not None:
        # 12345 / 10000 is the nearest float to 1.2345; 12345 * 0.0001 is not, which is also how polars divides by a
        # single number
        inverse = 1 / spec.scale
        if abs(inverse - round(inverse)) < 1e-9 * inverse:
            reals = reals / pl.Series([float(round(inverse))]).new_from_index(0, reals.len())
        else:
            reals = reals * spec.scale
    if whole:
        return _wholes(reals, polars_type(spec.type))
    if spec.type is ColumnType.F32:
        reals = reals.cast(pl.Float32)
    return _finite(reals)


def _finite(series: pl.Series) -> pl.Series:
    # a sum is finite only if every value is; it costs a fiftieth of a mask
    total = series.sum()
    if total is not None and abs(total) < 1e300:
        return series
    return series.set(~series.is_finite(), None)


def _reals(raw: pl.Series) -> pl.Series:
    if raw.dtype != pl.String:
        return raw if raw.dtype == pl.Float64 else raw.cast(pl.Float64, strict=False)
    reals = raw.cast(pl.Float64, strict=False)
    if reals.null_count() > raw.null_count():
        reals = raw.str.strip_chars().cast(pl.Float64, strict=False)
    return reals


def _wholes(raw: pl.Series, type_: pl.DataType) -> pl.Series:
    if raw.dtype.is_float():
        whole = raw.cast(type_, strict=False)
        high = raw.abs().max()
        if not (whole.cast(pl.Float64) == raw).all() or (high is not None and high >= _EXACT):  # type: ignore[operator]
            inexact = (whole.cast(pl.Float64) != raw) | ~raw.is_finite() | (raw.abs() >= _EXACT)
            whole = whole.set(inexact.fill_null(False), None)
        return whole
    whole = raw.cast(type_, strict=False)
    if raw.dtype == pl.String and whole.null_count() > raw.null_count():
        stripped = raw.str.strip_chars()
        whole = stripped.cast(type_, strict=False)
        rest = whole.is_null() & stripped.is_not_null()
        if rest.any():  # "100.0" and "1e3" are whole numbers too
            whole = whole.zip_with(~rest, _wholes(stripped.cast(pl.Float64, strict=False), type_))
    return whole


def _temporals(raw: pl.Series, spec: Field_) -> pl.Series:
    form = spec.format or "iso"
    name = raw.name
    if raw.dtype == pl.Boolean:
        return pl.Series(name, [None], dtype=polars_type(spec.type)).new_from_index(0, raw.len())
    if raw.dtype.is_temporal():
        return _from_temporal(raw, spec)
    if form == "unix_auto" or form in _UNIX:
        return _from_unix(raw, form, spec).alias(name)
    if raw.dtype != pl.String:
        raw = _texts(raw)  # 20240102 as a number
    if form == "iso":
        return _from_iso(raw, spec).alias(name)
    return _from_pattern(raw, form, spec).alias(name)


def _unit(spec: Field_) -> str:
    return "ns" if spec.type is ColumnType.DATETIME_NS else "us"


def _from_temporal(raw: pl.Series, spec: Field_) -> pl.Series:
    if raw.dtype == pl.Date:
        if spec.type is ColumnType.DATE:
            return raw
        raw = raw.cast(pl.Datetime("us"))
    if not isinstance(raw.dtype, pl.Datetime):
        return pl.Series(raw.name, [None], dtype=polars_type(spec.type)).new_from_index(0, raw.len())
    if raw.dtype.time_zone is None and spec.type is ColumnType.DATE:
        return raw.dt.date()
    return _settled(raw, spec)


def _settled(times: pl.Series, spec: Field_) -> pl.Series:
    """Bring times, with a zone or not, to the field's type; local times in a gap or an overlap become null."""
    assert isinstance(times.dtype, pl.Datetime)
    if times.dtype.time_zone is None:
        if spec.type is ColumnType.DATE:
            return times.dt.date()
        zone = spec.zone
        times = times.dt.replace_time_zone(zone, ambiguous="null", non_existent="null")
    if spec.type is ColumnType.DATE:
        return times.dt.convert_time_zone(spec.zone).dt.date()
    if times.dtype.time_zone != "UTC":  # type: ignore[union-attr]
        times = times.dt.convert_time_zone("UTC")
    return _as_unit(times, _unit(spec))


def _as_unit(times: pl.Series, unit: str) -> pl.Series:
    dtype = times.dtype
    assert isinstance(dtype, pl.Datetime)
    if dtype.time_unit == unit:
        return times
    if unit == "ns":  # years 1678 to 2261 fit; the rest would wrap around
        bad = ~times.dt.year().is_between(1678, 2261)
        times = times.set(bad.fill_null(False), None)
    return times.cast(pl.Datetime(unit, dtype.time_zone))  # type: ignore[arg-type]


def _strptime(raw: pl.Series, pattern: str, unit: str) -> pl.Series:
    """Parse, null where it fails. Nanoseconds wrap around silently outside 1678 to 2261, so they are bounded."""
    parsed = raw.str.to_datetime(pattern, time_unit=unit, strict=False, cache=False)  # type: ignore[arg-type]
    if unit == "ns" and parsed.null_count() < parsed.len():
        coarse = raw.str.to_datetime(pattern, time_unit="us", strict=False, cache=False)
        bad = ~coarse.dt.year().is_between(1678, 2261)
        if bad.any():
            parsed = parsed.set(bad.fill_null(False), None)
    return parsed


def _from_pattern(raw: pl.Series, pattern: str, spec: Field_) -> pl.Series:
    def parse(series: pl.Series) -> pl.Series:
        if not _TIME_OF_DAY.search(pattern):
            days = series.str.to_date(pattern, strict=False, cache=False)
            return days if spec.type is ColumnType.DATE else _settled(days.cast(pl.Datetime("us")), spec)
        return _settled(_strptime(series, pattern, _unit(spec)), spec)

    parsed = parse(raw)
    if parsed.null_count() > raw.null_count():
        stripped = raw.str.strip_chars()
        if not (stripped == raw).all():
            parsed = parse(stripped)
    return parsed


_ISO = re.compile(
    r"(?P<day>\d{4}-\d{2}-\d{2})(?:(?P<sep>[T ])(?P<clock>\d{2}:\d{2})(?P<seconds>:\d{2})?(?P<fraction>\.\d+)?"
    r"(?P<zone>Z|[+-]\d{2}(?::?\d{2})?)?)?"
)


def _iso_pattern(sample: str) -> str | None:
    """Return the strptime pattern of one ISO 8601 text; None when it is none."""
    found = _ISO.fullmatch(sample)
    if found is None:
        return None
    if found["sep"] is None:
        return "%Y-%m-%d"
    seconds = ":%S" if found["seconds"] else ""
    fraction = "%.f" if found["fraction"] else ""
    zone = {None: "", "Z": "Z"}.get(found["zone"], "%#z")
    return f"%Y-%m-%d{found['sep']}%H:%M{seconds}{fraction}{zone}"


_ISO_PATTERNS = (
    *(f"%Y-%m-%d{sep}%H:%M{rest}{zone}" for rest in (":%S", ":%S%.f", "") for zone in ("Z", "", "%#z") for sep in "T "),
    "%Y-%m-%d",
)


def _from_iso(raw: pl.Series, spec: Field_) -> pl.Series:
    """Parse with the pattern of the first text; what is left is tried with every other pattern."""
    first = raw.first(ignore_nulls=True)
    if first is None:
        return raw.cast(pl.String).str.to_date(strict=False).cast(polars_type(spec.type))
    chosen = _iso_pattern(str(first))
    out = _iso_with(raw, chosen, spec) if chosen else None
    if out is not None and out.null_count() == raw.null_count():
        return out
    if out is None:
        out = pl.Series(raw.name, [None], dtype=polars_type(spec.type)).new_from_index(0, raw.len())
    text = raw.str.strip_chars()
    for pattern in _ISO_PATTERNS:
        rest = (out.is_null() & text.is_not_null()).arg_true()
        if rest.is_empty():
            break
        part = _iso_with(text.gather(rest), pattern, spec)
        if part.null_count() < part.len():
            out = out.to_physical().scatter(rest, part.to_physical()).cast(out.dtype)
    return out


def _iso_with(raw: pl.Series, pattern: str, spec: Field_) -> pl.Series:
    if pattern == "%Y-%m-%d":
        days = raw.str.to_date(pattern, strict=False, cache=False)
        return days if spec.type is ColumnType.DATE else _settled(days.cast(pl.Datetime("us")), spec)
    parsed = _strptime(raw, pattern, _unit(spec))
    if pattern.endswith("Z"):
        parsed = parsed.dt.replace_time_zone("UTC")
    return _settled(parsed, spec)


def _from_unix(raw: pl.Series, form: str, spec: Field_) -> pl.Series:
    if raw.dtype == pl.String:
        whole = raw.cast(pl.Int64, strict=False)
        if whole.null_count() > raw.null_count():
            stripped = raw.str.strip_chars()
            whole = stripped.cast(pl.Int64, strict=False)
            if whole.null_count() > raw.null_count():  # fractions of a second, exact to the nanosecond
                return _from_fractions(stripped, whole, form, spec)
        raw = whole
    if form == "unix_auto":
        return _from_magnitude(raw, spec)
    return _scaled_time(raw, _UNIX[form], spec)


def _scaled_time(raw: pl.Series, per_second: int, spec: Field_) -> pl.Series:
    """Return times of numbers counted `per_second`; floats are rounded to the column's unit."""
    nanos = spec.type is ColumnType.DATETIME_NS
    first, end = (_FIRST_NANO_SECOND, _END_NANO_SECOND) if nanos else (_FIRST_SECOND, _END_SECOND)
    least = max(first * per_second, -(2**63) + 1)
    most = min(end * per_second, 2**63 - 1)
    inside = (raw >= least) & (raw < most)
    if not inside.all():
        raw = raw.set(~inside.fill_null(True), None)
    wanted = 1_000_000_000 if spec.type is ColumnType.DATETIME_NS else 1_000_000
    if raw.dtype.is_float():
        whole = raw.cast(pl.Int64, strict=False)
        if (whole.cast(pl.Float64) == raw).all():
            raw = whole
        else:
            ticks = (raw * (wanted / per_second)).round(0).cast(pl.Int64, strict=False)
            return _instants(ticks, spec)
    else:
        raw = raw.cast(pl.Int64, strict=False)
    if wanted >= per_second:
        return _instants(raw * (wanted // per_second), spec)
    return _instants(raw // (per_second // wanted), spec)


def _instants(ticks: pl.Series, spec: Field_) -> pl.Series:
    return _settled(ticks.cast(pl.Datetime(_unit(spec), "UTC")), spec)  # type: ignore[arg-type]


def _from_magnitude(raw: pl.Series, spec: Field_) -> pl.Series:
    """Take the unit from the size: seconds below 1e11 (the year 5138), then milliseconds, microseconds, nanoseconds."""
    size = raw.abs()
    edges = [(1, 0, 1e11), (1_000, 1e11, 1e14), (1_000_000, 1e14, 1e17), (1_000_000_000, 1e17, float("inf"))]
    low, high = size.min(), size.max()
    for per_second, start, end in edges:
        if low is None or (low >= start and high < end):  # type: ignore[operator]
            return _scaled_time(raw, per_second, spec)
    out = pl.Series(raw.name, [None], dtype=polars_type(spec.type)).new_from_index(0, raw.len())
    for per_second, start, end in edges:
        mask = ((size >= start) & (size < end)).fill_null(False)
        if mask.any():
            out = _scaled_time(raw.set(~mask, None), per_second, spec).zip_with(mask, out)
    return out


def _from_fractions(text: pl.Series, whole: pl.Series, form: str, spec: Field_) -> pl.Series:
    unit = _UNIX.get(form, 1)
    plain = text.set(~text.str.contains(r"^[+-]?\d{1,12}(\.\d{1,15})?$").fill_null(True), None)
    exact = plain.cast(pl.Decimal(38, 15), strict=False) * (1_000_000_000 // unit)
    parts = _scaled_time(exact.cast(pl.Decimal(38, 0), strict=False).cast(pl.Int64, strict=False), 1_000_000_000, spec)
    integers = _from_magnitude(whole, spec) if form == "unix_auto" else _scaled_time(whole, unit, spec)
    return integers.zip_with(whole.is_not_null(), parts)
