"""What SQL engines do alike when a table is adopted: look at its columns, keys and values by the server, and count its
rows. How a type of theirs becomes one of ours (`Fit`), and the statements that do it, are each engine's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from marketsync.schema import Column, Schema
from storage import adoption, evolution
from storage.adoption import Adoption, Names, Wish

if TYPE_CHECKING:
    import polars as pl

MOST_EXACT = 2**53  # the last whole number up to which doubles have all
DAY_TEXT = "^[0-9]{4}-?[0-9]{2}-?[0-9]{2}( 00:00:00)?$"
OFFSET = "(Z|[+-][0-9]{2}(:?[0-9]{2})?)"
TIME_TEXT = "^[0-9]{4}-[0-9]{2}-[0-9]{2}([T ]([01][0-9]|2[0-3]):[0-5][0-9](:[0-5][0-9]([.][0-9]{1,6})?)?)"
WHOLE_WORDS = "hold no whole number that fits"
NUMBER_WORDS = "would not be the same number"
DAY_WORDS = "are no days"


@dataclass(frozen=True)
class Theirs:
    """One column as it is: `shown` is its type as DDL has it, `of` the bare one, `size` what the engine says of it."""

    name: str
    shown: str
    of: str
    size: int | None = None
    collation: str | None = None
    required: bool = False
    filled: bool = False  # a default, an identity
    generated: bool = False  # nobody else may give it a value
    moving: bool = False  # a change of the row sets it
    fresh: bool = False  # a new row has null in it, or a number that no other has


@dataclass(frozen=True)
class Fit:
    """How a column becomes ours: the values as ours, the type to alter it to (None: it is), which rows would lose.

    Nulls are never lost, so `loses` need not speak of them. `then` says what to do about rows that would."""

    value: str
    type: str | None = None
    loses: str | None = None
    what: str = ""
    note: str = ""
    refusal: str = ""
    then: str = ""


@dataclass(frozen=True)
class Index:
    """A unique index; `plain` when it holds all rows by their columns, and can say which row is there already."""

    name: str
    primary: bool
    plain: bool
    columns: Sequence[str]


@dataclass(frozen=True)
class Dialect:
    """How an engine says what is asked: names, texts, and the remedies that a person would type."""

    quoted: Callable[[str], str]
    text: Callable[[str], str]  # an expression as text
    bucket: Callable[[str, int], str]  # a time, cut to so many seconds
    ask: Callable[[str], list[Any]]  # the rows of a SELECT
    fit: Callable[[Column, Theirs], Fit]
    nullable: str  # remedies, with {} for the column's or the index's name
    ungenerated: str
    unindexed: str


@dataclass
class Look:
    """One table that is looked at: `refuse` finds every reason against it. `overwrites`: the engine's upserts
    take a row for another by any unique index, whatever the key is."""

    schema: Schema
    wish: Wish
    table: str  # quoted
    columns: dict[str, Theirs]
    indexes: Sequence[Index]
    dialect: Dialect
    rows: str = ""  # what to select from, where that is more than the table's name
    overwrites: bool = False
    names: Names = field(default_factory=lambda: Names({}, (), ()))
    fits: dict[str, Fit] = field(default_factory=dict)
    against: Sequence[str] = ()  # reasons that the engine has found in the table as a whole

    def __post_init__(self) -> None:
        self.rows = self.rows or self.table

    def refuse(self) -> None:
        """Raise `AdoptionRefused` with every reason there is."""
        reasons = [*self.against]
        quoted = self.dialect.quoted
        self.names = adoption.matched(self.schema, list(self.columns), self.wish, reasons)
        for ours, theirs in self.names.theirs.items():
            column = self.columns[theirs]
            fit = self.fits[ours] = self.dialect.fit(self.schema[ours], column)
            if fit.refusal:
                reasons.append(fit.refusal)
            if column.generated:
                remedy = self.dialect.ungenerated.format(quoted(theirs))
                reasons.append(f"column {theirs!r} is generated, and nobody else may give it a value: {remedy}")
        for name in self.names.extra:
            column = self.columns[name]
            if column.required and not column.filled and not column.generated:
                reasons.append(
                    f"your column {name!r} may not be null and has no default, so no row could be added: "
                    f"{self.dialect.nullable.format(quoted(name))}"
                )
        ours_of = {theirs: ours for ours, theirs in self.names.theirs.items()}
        for index in self.indexes:
            known = [ours_of[name] for name in index.columns if name in ours_of]
            more = [self.columns[name] for name in index.columns if name in self.columns and name not in ours_of]
            strict = not any(each.fresh for each in more) if self.overwrites else len(known) == len(index.columns) > 0
            if strict and not set(self.schema.key) <= set(known):
                reasons.append(
                    f"the unique index {index.name!r} over {', '.join(index.columns)} would refuse rows that the key "
                    f"({', '.join(self.schema.key)}) tells apart: {self.dialect.unindexed.format(quoted(index.name))}"
                )
        reasons += self._lost()
        adoption.refuse(self.table, reasons)
        adoption.refuse(self.table, self._twins())

    def keyed(self) -> Index | None:
        """Return the index that shows that keys are unique."""
        key = {self.names.theirs[name] for name in self.schema.key}
        return next((index for index in self.indexes if index.plain and set(index.columns) == key), None)

    def notes(self, extra: str) -> list[str]:
        """Return what is worth knowing; `extra` says what becomes of columns that only they have."""
        found = adoption.sentences(self.names, extra)
        return found + [fit.note for fit in self.fits.values() if fit.note]

    def counts(self) -> pl.DataFrame:
        """Return how many rows each subject has at each time, as the server counts them."""
        return counted(self.dialect, self.rows, self.schema, self.wish, {n: fit.value for n, fit in self.fits.items()})

    def _lost(self) -> list[str]:
        """Ask, in one reading of the table, for values that would be lost and for nulls where none may be."""
        must = evolution.required(self.schema)
        asked: list[str] = []
        told: list[Callable[[int, Any], str]] = []
        for ours, fit in self.fits.items():
            theirs = self.columns[self.names.theirs[ours]]
            name, text = self.dialect.quoted(theirs.name), self.dialect.text
            if fit.loses and not fit.refusal:
                when = f"CASE WHEN {name} IS NOT NULL AND ({fit.loses}) THEN"
                asked += [f"SUM({when} 1 ELSE 0 END)", f"MIN({when} {text(name)} END)"]
                told.append(
                    lambda count, example, theirs=theirs, type_=self.schema[ours].type, fit=fit: adoption.lossy(
                        theirs.name, theirs.shown, type_, count, example, fit.what, fit.then
                    )
                )
            if ours in must:
                asked += [f"SUM(CASE WHEN {name} IS NULL THEN 1 ELSE 0 END)", "0"]
                told.append(lambda count, _, ours=ours: adoption.has_nulls(ours, self.schema, count))
        if not asked:
            return []
        named = ", ".join(f"{each} AS c{at}" for at, each in enumerate(asked))
        found = self.dialect.ask(f"SELECT {named} FROM {self.rows}")[0]
        pairs = zip(found[::2], found[1::2], strict=True)
        return [tell(int(count), example) for tell, (count, example) in zip(told, pairs, strict=True) if count]

    def _twins(self) -> list[str]:
        """Ask for keys that are there more than once; an index that is unique has said that there are none."""
        if self.keyed() is not None and all(self.fits[name].type is None for name in self.schema.key):
            return []
        key = [f"{self.fits[name].value} AS k{at}" for at, name in enumerate(self.schema.key)]
        names = [f"k{at}" for at in range(len(key))]
        groups = (
            f"SELECT {', '.join(names)}, COUNT(*) AS n FROM (SELECT {', '.join(key)} FROM {self.rows}) t "
            f"GROUP BY {', '.join(names)} HAVING COUNT(*) > 1"
        )
        count, rows = self.dialect.ask(f"SELECT COUNT(*), SUM(n) FROM ({groups}) g")[0]
        if not count:
            return []
        first = self.dialect.ask(f"{groups} ORDER BY {', '.join(names)} LIMIT 1")[0]
        return [adoption.has_twins(self.schema, int(count), int(rows), [str(each) for each in first[:-1]])]


def already(
    dialect: Dialect, table: str, dataset: str, schema: Schema, wish: Wish, marker: str, stored: Schema, rows: str = ""
) -> Adoption:
    """Return what is in a table of ours; `rows` is what to select from, where that is more than the table's name."""
    evolution.added(dataset, stored, schema)
    values = {name: dialect.quoted(name) for name in schema.names}
    return Adoption(table, marker, counted(dialect, rows or table, schema, wish, values), already=True)


def counted(dialect: Dialect, table: str, schema: Schema, wish: Wish, values: dict[str, str]) -> pl.DataFrame:
    """Count the rows by subject and time; `values` are the columns as the schema has them."""
    import polars as pl

    none = adoption.empty_counts(schema)
    subject = f"'{adoption.EVERY_SUBJECT}'" if schema.subject is None else values[schema.subject]
    at = "0" if schema.time is None else values[schema.time]
    if schema.time is not None and wish.every is not None and none.schema["at"] != pl.Date():
        at = dialect.bucket(at, int(wish.every.total_seconds()))
    rows = dialect.ask(f"SELECT s, at, COUNT(*) FROM (SELECT {subject} AS s, {at} AS at FROM {table}) t GROUP BY s, at")
    subjects, times, counts = zip(*rows, strict=True) if rows else ((), (), ())
    found = pl.DataFrame({"subject": subjects, "at": times, "n": counts}, strict=False)
    if schema.time is None:
        found = found.with_columns(pl.lit(None, pl.Date()).alias("at"))
    elif found["at"].dtype == pl.Datetime("us"):  # a driver that has no zones, and gives UTC
        found = found.with_columns(pl.col("at").dt.replace_time_zone("UTC"))
    return found.cast(dict(none.schema))  # pyright: ignore[reportArgumentType]
