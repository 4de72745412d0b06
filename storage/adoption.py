"""Taking over a table that somebody else made: what is wished, what came of it, what all engines judge alike (names,
and values on their way to a column's type). How an engine does it is in `<engine>_adoption.py` or `adoption_copies.py`.

A refusal names every reason with its remedy, and comes before anything was changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Protocol

from marketsync.document import closest
from marketsync.errors import AdoptionRefused, ForeignTable
from marketsync.schema import INGESTED_COLUMN, SEGMENT_COLUMN, SYSTEM_COLUMNS, Column, ColumnType, Schema, polars_type
from storage import evolution
from storage.evolution import PERIOD_COLUMN

if TYPE_CHECKING:
    import polars as pl

EVERY_SUBJECT = "*"
# stands for a column where each file is one symbol's: --rename _file=symbol
FILE_COLUMN = "_file"
_OURS = (*SYSTEM_COLUMNS, PERIOD_COLUMN, "_version", "_deleted")
WHOLE = {
    ColumnType.I32: (-(2**31), 2**31 - 1),
    ColumnType.I64: (-(2**63), 2**63 - 1),
    ColumnType.U64: (0, 2**64 - 1),
}
NO_ZONE = "its times say no zone: give the one that they are in, --zone UTC or --zone America/New_York"
SINGLE = (
    "has 7 digits: each value stays the number that it was (0.1 is 0.10000000149011612), until it is asked again "
    "(sync --refetch)"
)


@dataclass(frozen=True)
class Wish:
    """What is asked of a store: the table (None: that of the dataset's own name), columns under other names (theirs to
    ours), the zone of times that say none, the `_segment` and `_ingested_at` of the rows, and how fine the times of the
    counts are to be (None: as they are). `dry` changes nothing."""

    segment: str
    at: datetime
    table: str | None = None
    rename: Mapping[str, str] = field(default_factory=dict)
    zone: str | None = None
    every: timedelta | None = None
    dry: bool = False


@dataclass(frozen=True)
class Adoption:
    """What came of it, or would. `counts` has the columns subject, at (date or UTC datetime) and n; `kept` says where
    the original stays when the rows were copied; `already`: the table was ours, and nothing was changed."""

    table: str
    marker: str | None
    counts: pl.DataFrame
    done: Sequence[str] = ()
    notes: Sequence[str] = ()
    extra: Sequence[str] = ()
    kept: str = ""
    already: bool = False

    @property
    def rows(self) -> int:
        """How many rows the table has."""
        return int(self.counts["n"].sum())


class Adopts(Protocol):
    """A store that can take over a table. Raises `AdoptionRefused` with every reason, and `StoreError`."""

    def adopt(self, dataset: str, schema: Schema, wish: Wish) -> Adoption:
        """Make the table that is there the dataset's, with all of its rows; a table of ours is only counted."""
        ...


@dataclass(frozen=True)
class Names:
    """Which of their columns is which of ours, which of ours they lack, and which are theirs alone."""

    theirs: Mapping[str, str]  # ours: theirs
    absent: Sequence[Column]
    extra: Sequence[str]


def remedy(dataset: str) -> str:
    """Return what to do about a table that stands where the dataset's should be."""
    return f"`marketsync adopt {dataset}` takes it over with its rows"


def refuse_copy(place: object, of: str, dataset: str, what_to_do: str = "") -> None:
    """Raise `ForeignTable` when the table of another dataset stands where the dataset's should be, copied or moved."""
    if of != dataset:
        raise ForeignTable(
            f"{place} is the table of {of}, copied or moved to where that of {dataset} belongs; "
            f"{what_to_do or remedy(dataset)}; or move it elsewhere, and {dataset} will be made and filled"
        )


def matched(schema: Schema, found: Sequence[str], wish: Wish, reasons: list[str]) -> Names:
    """Pair their columns with ours by name and by `wish.rename`; what does not fit is added to the reasons."""
    named = {ours: theirs for theirs, ours in wish.rename.items()}
    for theirs, ours in wish.rename.items():
        if theirs not in found:
            near = closest(theirs, list(found))
            hint = f"did you mean {near}? " if near else ""
            reasons.append(f"--rename {theirs}={ours}: there is no column {theirs!r}; {hint}it has {', '.join(found)}")
        if ours not in schema:
            reasons.append(f"--rename {theirs}={ours}: the dataset has no column {ours!r}: {', '.join(schema.names)}")
    theirs = {name: named.get(name, name) for name in schema.names if named.get(name, name) in found}
    free = [name for name in found if name not in theirs.values() and name not in _OURS]
    must = evolution.required(schema)
    absent = []
    for column in schema.columns:
        if column.name in theirs or column.name in named:
            continue
        alike = next((name for name in free if name.lower() == column.name.lower()), None)
        if alike is not None:
            reasons.append(
                f"column {alike!r} differs from the dataset's {column.name!r} by its case only, and names are told "
                f"apart by it: add --rename {alike}={column.name}"
            )
        elif column.name in must:
            near = closest(column.name, [name for name in free if name != FILE_COLUMN])
            hint = f"--rename {near or 'THEIRS'}={column.name} when it has another name"
            if FILE_COLUMN in found and column.name == schema.subject:
                hint += f", --rename {FILE_COLUMN}={column.name} when each file is one symbol's"
            role = "key column" if column.name in schema.key else "column that may not be null,"
            reasons.append(f"the {role} {column.name!r} is missing: {hint}; it has {', '.join(found)}")
        else:
            absent.append(column)
    return Names(theirs, absent, [name for name in free if name != FILE_COLUMN])


def lossy(column: str, of: str, type_: ColumnType, count: int, example: object, what: str, then: str = "") -> str:
    """Return the reason for values that would not be the same in the column's type."""
    rows = "1 row" if count == 1 else f"{count:,} rows"
    last = f"; {then}" if then else ""
    return f"column {column!r} ({of}) cannot become {type_}: values that {what}, in {rows}, such as {example}{last}"


def has_nulls(column: str, schema: Schema, count: int) -> str:
    """Return the reason for nulls where none may be."""
    role = "key column" if column in schema.key else "column that may not be null,"
    rows = "1 row" if count == 1 else f"{count:,} rows"
    return f"the {role} {column!r} is null in {rows}: fill them in, or delete those rows"


def has_twins(schema: Schema, keys: int, rows: int, example: Sequence[object]) -> str:
    """Return the reason for keys that several rows have."""
    one = ", ".join(f"{name}={value}" for name, value in zip(schema.key, example, strict=True))
    what = "1 key is" if keys == 1 else f"{keys:,} keys are"
    return f"{what} there more than once ({rows:,} rows; the first: {one}): delete all but one row of each"


STAYS = "which stay as they are, and which nothing of ours reads or writes"
LEFT = "which stay in the original only"


def sentences(names: Names, extra: str) -> list[str]:
    """Return what is worth knowing of the columns; `extra` says what becomes of those that only they have."""
    found = []
    if names.absent:
        found.append(
            f"not in the table, so without a value in its rows: {', '.join(column.name for column in names.absent)}"
        )
    if names.extra:
        found.append(f"columns of yours, {extra}: {', '.join(names.extra)}")
    return found


def empty_counts(schema: Schema) -> pl.DataFrame:
    """Return counts of no rows, with the types that counts have."""
    import polars as pl

    dated = schema.time is None or schema[schema.time].type is ColumnType.DATE
    return pl.DataFrame(
        schema={"subject": pl.String(), "at": pl.Date() if dated else pl.Datetime("us", "UTC"), "n": pl.Int64()}
    )


def counted(rows: pl.LazyFrame, schema: Schema, every: timedelta | None) -> pl.DataFrame:
    """Return how many rows each subject has at each time, by polars; `rows` has the schema's types."""
    import polars as pl

    types = empty_counts(schema).schema
    at = pl.lit(None, pl.Date()) if schema.time is None else pl.col(schema.time).cast(types["at"])
    if every is not None and schema.time is not None and types["at"] != pl.Date():
        at = at.dt.truncate(every)
    subject = pl.lit(EVERY_SUBJECT) if schema.subject is None else pl.col(schema.subject)
    found = rows.group_by(subject.alias("subject"), at.alias("at")).agg(pl.len().cast(pl.Int64).alias("n"))
    return found.collect(engine="streaming").select(list(types)).cast(dict(types))  # pyright: ignore[reportArgumentType]


# ---------------------------------------------------------------- values, where rows are copied

_OFFSET = r"(?:Z|[+-]\d\d:?\d\d)$"
_ISO = r"^\d{4}-\d\d-\d\d(?:[T ](?:[01]\d|2[0-3]):[0-5]\d(?::[0-5]\d(?:\.\d{1,DIGITS}0*)?)?)?(?:Z|[+-]\d\d:?\d\d)?$"


@dataclass
class Conversion:
    """Their frames to ours, batch by batch: counts what would be lost (`problems`), and twins by hashes of keys.

    `rows` of a batch are only to be kept when there is no problem at the end.
    """

    schema: Schema
    names: Names
    wish: Wish
    counts: list[pl.DataFrame] = field(default_factory=list)
    notes: dict[str, None] = field(default_factory=dict)
    _lost: dict[tuple[str, str, str], tuple[int, object]] = field(default_factory=dict)
    _nulls: dict[str, int] = field(default_factory=dict)
    _hashes: list[pl.Series] = field(default_factory=list)

    def of(self, frame: pl.DataFrame) -> pl.DataFrame:
        """Return the batch with the schema's columns and types, without system columns."""
        import polars as pl

        columns = []
        types = self.schema.polars()
        for column in self.schema.columns:
            if (theirs := self.names.theirs.get(column.name)) is None:
                columns.append(pl.Series(column.name, [None], types[column.name]).new_from_index(0, frame.height))
                continue
            values = frame[theirs].alias(column.name)
            made, wrong, what = _converted(values, column.type, self.wish.zone, self.notes)
            if count := int(wrong.sum()):
                key = (column.name, str(values.dtype), what)
                before, example = self._lost.get(key, (0, values.filter(wrong)[0]))
                self._lost[key] = before + count, example
            if column.name in evolution.required(self.schema) and (count := values.null_count()):
                self._nulls[column.name] = self._nulls.get(column.name, 0) + count
            columns.append(made)
        return pl.DataFrame(columns)

    def look(self, frames: Iterable[pl.DataFrame]) -> list[str]:
        """Take every batch in for a first look; return the reasons against them."""
        import polars as pl

        for frame in frames:
            rows = self.of(frame)
            self.counts.append(counted(rows.lazy(), self.schema, self.wish.every))
            self._hashes.append(rows.select(pl.struct(self.schema.key).hash().alias("hash")).to_series())
        reasons = [
            lossy(name, of, self.schema[name].type, count, example, what)
            for (name, of, what), (count, example) in self._lost.items()
        ]
        return reasons + [has_nulls(name, self.schema, count) for name, count in self._nulls.items()]

    def twins(self, frames: Iterable[pl.DataFrame]) -> list[str]:
        """Return the reason for keys that are there more than once; the rows are read again only where hashes meet."""
        import polars as pl

        if not self._hashes:
            return []
        hashes = pl.concat(self._hashes)
        often = hashes.filter(hashes.is_duplicated()).unique()
        if often.is_empty():
            return []
        key = list(self.schema.key)
        parts = [
            rows.filter(rows.select(pl.struct(key).hash().is_in(often.implode())).to_series())
            for rows in (self.of(frame).select(key) for frame in frames)
        ]
        groups = pl.concat(parts).group_by(key).agg(pl.len().alias("n")).filter(pl.col("n") > 1).sort(key)
        if groups.is_empty():
            return []
        return [has_twins(self.schema, groups.height, int(groups["n"].sum()), groups.select(key).row(0))]

    def counted(self) -> pl.DataFrame:
        """Return the counts of all batches together."""
        import polars as pl

        whole = pl.concat([empty_counts(self.schema), *self.counts])
        return whole.group_by("subject", "at").agg(pl.col("n").sum()).select(whole.columns)

    def stamped(self, frames: Iterable[pl.DataFrame]) -> Iterator[pl.DataFrame]:
        """Yield the batches as they are delivered, with the system columns."""
        import polars as pl

        for frame in frames:
            if frame.height:
                yield self.of(frame).with_columns(
                    pl.lit(self.wish.segment).alias(SEGMENT_COLUMN),
                    pl.lit(self.wish.at).cast(pl.Datetime("us", "UTC")).alias(INGESTED_COLUMN),
                )


def refuse(table: str, reasons: Sequence[str]) -> None:
    """Raise `AdoptionRefused` when there is a reason."""
    if reasons:
        raise AdoptionRefused(table, reasons)


def _converted(
    values: pl.Series, type_: ColumnType, zone: str | None, notes: dict[str, None]
) -> tuple[pl.Series, pl.Series, str]:
    """Return the values in the type, which of them would be lost by it, and why in words."""
    import polars as pl

    target = polars_type(type_)
    of = values.dtype
    if isinstance(of, pl.Categorical | pl.Enum):
        values, of = values.cast(pl.String), pl.String()
    if of == target or of == pl.Null:
        return values.cast(target), pl.repeat(False, len(values), eager=True), ""
    if type_ is ColumnType.STR:
        made, what = None, "hold no text (a symbol such as 000001 may have lost its zeros): make it text"
    elif type_ is ColumnType.BOOL:
        made, what = _truth(values), "are neither true nor false (nor 1 or 0)"
    elif type_ in WHOLE:
        made, what = _whole(values, target), f"are no whole numbers that fit into {type_}"
    elif type_ in (ColumnType.F32, ColumnType.F64):
        if of == pl.Float32:
            notes[f"column {values.name!r} {SINGLE}"] = None
        made, what = _float(values, target), f"are no numbers that {type_} can hold"
    elif type_ is ColumnType.DATE:
        made, what = _day(values, zone), "are no days (YYYY-MM-DD, YYYYMMDD, or a time at midnight)"
    else:
        made, what = _instant(values, target, zone)
    if made is None:
        made = pl.Series(values.name, [None], target).new_from_index(0, len(values))
    return made.alias(values.name), made.is_null() & values.is_not_null(), what


def _truth(values: pl.Series) -> pl.Series | None:
    import polars as pl

    if not (values.dtype.is_integer() or values.dtype == pl.String):
        return None
    text = values.cast(pl.String).str.to_lowercase()
    return text.replace_strict(
        {"true": True, "1": True, "false": False, "0": False}, default=None, return_dtype=pl.Boolean
    )


def _whole(values: pl.Series, target: pl.DataType) -> pl.Series | None:
    import polars as pl

    if values.dtype == pl.String:
        made = values.cast(target, strict=False)
        # what other tools write for whole numbers in a column that has nulls: 100.0
        plain = values.str.strip_suffix(".0") if made.null_count() > values.null_count() else values
        return plain.cast(target, strict=False)
    if not values.dtype.is_numeric():
        return None
    made = values.cast(target, strict=False)
    if values.dtype.is_integer():
        return made
    return _where(made, made.cast(values.dtype, strict=False).eq_missing(values))


def _float(values: pl.Series, target: pl.DataType) -> pl.Series | None:
    import polars as pl

    if not (values.dtype.is_numeric() or values.dtype == pl.String):
        return None
    made = values.cast(target, strict=False)
    if values.dtype == pl.String:
        fits = ~made.is_infinite() | values.str.contains("(?i)inf")
        if target == pl.Float32:  # 0.1 is what the nearest number that it has is written as
            double = values.cast(pl.Float64, strict=False)
            fits &= (made.cast(pl.Float64) == double) | (made.cast(pl.String).cast(pl.Float64) == double)
        return _where(made, fits)
    if values.dtype.is_decimal():
        return _where(made, made.cast(values.dtype, strict=False).eq_missing(values))
    back = made.cast(pl.Float64) if values.dtype.is_float() else made.cast(pl.Int128, strict=False)
    return _where(made, back.eq_missing(values.cast(back.dtype)))


def _day(values: pl.Series, zone: str | None) -> pl.Series | None:
    import polars as pl

    of = values.dtype
    if isinstance(of, pl.Datetime):
        local = (
            values if of.time_zone is None else values.dt.convert_time_zone(zone or "UTC").dt.replace_time_zone(None)
        )
        return _where(local.dt.date(), local.dt.truncate("1d").eq_missing(local))
    if of.is_integer():
        values, of = values.cast(pl.String), pl.String()
    if of != pl.String:
        return None
    made = values.str.to_date("%Y-%m-%d", strict=False)
    if made.null_count() > values.null_count():
        made = made.zip_with(made.is_not_null(), values.str.to_date("%Y%m%d", strict=False))
    if made.null_count() > values.null_count():  # a day that another tool wrote as a time
        made = made.zip_with(
            made.is_not_null(), values.str.strip_suffix(" 00:00:00").str.to_date("%Y-%m-%d", strict=False)
        )
    return made


def _instant(values: pl.Series, target: pl.DataType, zone: str | None) -> tuple[pl.Series | None, str]:
    import polars as pl

    of = values.dtype
    if isinstance(of, pl.Datetime) and of.time_zone is not None:
        moved = values.dt.convert_time_zone("UTC")
        made = moved.cast(target)
        return _where(made, made.cast(moved.dtype).eq_missing(moved)), "are finer than the column's type"
    if isinstance(of, pl.Datetime) or of == pl.Date:
        if zone is None:
            return None, f"have no zone ({NO_ZONE})"
        local = values.cast(pl.Datetime("ns" if getattr(of, "time_unit", "") == "ns" else "us"))
        moved = _zoned(local, zone)
        made = moved.cast(target)
        made = _where(made, made.cast(moved.dtype).eq_missing(moved))
        return made, f"are no times in {zone} (a clock was set forward or back), or finer than the column's type"
    if of != pl.String:
        return None, "hold no times; make it a time with a zone first, since a number does not say its unit"
    fine = values.str.replace("T", " ", literal=True).str.replace(r"Z$", "+00:00")
    fine = fine.str.replace(r"([+-]\d\d)(\d\d)$", "$1:$2")
    unit = target.time_unit if isinstance(target, pl.Datetime) else "us"
    good = values.str.contains(_ISO.replace("DIGITS", "9" if unit == "ns" else "6"))
    zoned = values.str.contains(_OFFSET) & (values.str.len_chars() > 10)
    with_zone, without = (_parsed(fine.to_frame("text"), suffix, unit) for suffix in ("%:z", ""))
    if zone is None:
        lacking = good & ~zoned
        made = _where(with_zone, zoned & good)
        what = f"have no zone ({NO_ZONE})" if lacking.any() else "are no times in ISO 8601 (2024-03-01T14:30:00Z)"
        return made, what
    local = _zoned(without, zone).cast(target)
    return _where(
        with_zone.zip_with(zoned.fill_null(False), local), good
    ), "are no times in ISO 8601 (2024-03-01T14:30:00)"


def _parsed(texts: pl.DataFrame, suffix: str, unit: str) -> pl.Series:
    """Return ISO texts as instants (with a suffix for the zone) or as local times; null where they are neither."""
    import polars as pl

    def one(form: str) -> pl.Expr:
        time = pl.col("text").str.to_datetime(form + suffix, time_unit=unit, strict=False)  # pyright: ignore[reportArgumentType]
        return time.dt.convert_time_zone("UTC") if suffix else time

    forms = ("%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%d %H:%M") + (() if suffix else ("%Y-%m-%d",))
    return texts.select(pl.coalesce(one(form) for form in forms)).to_series()


def _zoned(local: pl.Series, zone: str) -> pl.Series:
    moved = local.dt.replace_time_zone(zone, ambiguous="null", non_existent="null")
    return moved.dt.convert_time_zone("UTC")


def _where(values: pl.Series, kept: pl.Series) -> pl.Series:
    """Return the values where `kept` is true, and null elsewhere."""
    import polars as pl

    return values.zip_with(kept.fill_null(False), pl.Series([None], dtype=values.dtype).new_from_index(0, len(values)))
