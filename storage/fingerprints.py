"""Fingerprints of rows by (subject, period): what two stores are compared by without moving their rows.

A fingerprint is the same integers in every engine for equal rows: the number of rows, the sum of each column, and a
hash that sees which values stand in one row. Here are the arithmetic, written once over the operations of a `Dialect`,
and its form in polars, for stores made of files and for whatever an engine cannot compute itself. How servers write
the operations is in `fingerprint_sql.py` and `fingerprint_documents.py`.

A value becomes a whole number `v`:

- an integer or a boolean is what it is, a date days and a time micro- or nanoseconds since 1970 in UTC;
- a float is `floor(x * scale + 0.5)`, to which IEEE 754 leaves one answer (-0.0 has that of 0.0). Where that is beyond
  9e14, it is counted in 2^20, 2^40 or 2^60 of these. Floats with one `v` differ by less than 1 / scale or, if that is
  more, 1.2e-9 of themselves; floats with two may still be that near, on either side of a boundary. Of what is larger
  yet (1e25 at the default scale) only the sign is compared. NaN, inf and -inf are a number each;
- a text is the first 60 bits of the MD5 of its UTF-8;
- null is none of these in the hash, and is left out of the sum.

`sum` is the sum of `v` in 64 bits that wrap around: exact where it fits. With a prime `p` between 2^30 and 2^31 and a
key `k` below 2^28 for each column, `hash = sum((sum(k * (v mod p)) mod p)^2 mod p)`. All products fit 64 bits with a
sign, and squares forget which of its two signs an engine gives to a remainder. It is a sum and no XOR, which does not
see a row that is there twice more. Prime, keys and what null stands for follow from the seed, to be drawn anew for each
comparison: segments that differ have one hash for about one seed in ten million, whatever differs, as long as not all
second moments of their numbers agree.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from marketsync.errors import ConfigurationError, SchemaError
from marketsync.schema import Column, ColumnType, Period, Schema
from storage import lazyframes
from storage.protocol import Filter, Store

if TYPE_CHECKING:
    import polars as pl

E = TypeVar("E")

DEFAULT_SCALE = 1e8  # the finest tick that is traded
_LIMIT = 9e14  # what floor(x * scale + 0.5) may be: far within what a double counts in ones
_STEPS = 4  # of 2^20 each
_STEP = 2.0**-20
_BAND = 2**51  # between the numbers of one step and those of the next
_ODD = 2**60  # where NaN, infinities and what is too large begin
_LARGEST = 1.7976931348623157e308
_KEYS = 2**28
_TERMS = 15  # whose sum fits 64 bits, each below 2^28 * 2^31
_FLOATS = (ColumnType.F32, ColumnType.F64)
_SCALES = (1, 1e15)  # one engine calls it an error when a product of tiny numbers becomes 0
_TEXT_BITS = 60


@dataclass(frozen=True)
class Recipe:
    """What fingerprints are made of; those of two stores can be compared when they have one recipe.

    `seed` is any bytes, new ones for each comparison (`secrets.token_bytes(16)`); `period` cuts each subject's rows by
    the time column in UTC (`NONE`: not cut); `columns` (None: all) are compared, and those of the key and the time in
    any case; `scales` gives a float column another scale than 1e8, the reciprocal of the difference that matters.
    """

    seed: bytes
    period: Period = Period.DAY
    columns: Sequence[str] | None = None
    scales: Mapping[str, float] = field(default_factory=dict)


class Dialect(Protocol[E]):
    """The operations that the arithmetic is made of; `E` is an expression of the engine."""

    def column(self, name: str, type_: ColumnType) -> E:
        """The column's value: floats as doubles, all else as the whole number it counts as; null where it is null."""
        ...

    def constant(self, number: int) -> E: ...

    def scaled(self, x: E, factor: float, add: int) -> E:
        """floor(x * factor + 0.5) + add, as a whole number."""
        ...

    def within(self, x: E, low: float, high: float) -> E: ...

    def above(self, x: E, bound: float) -> E: ...

    def below(self, x: E, bound: float) -> E: ...

    def nan(self, x: E) -> E: ...

    def first(self, cases: Sequence[tuple[E, E]]) -> E:
        """The value of the first case that holds; null when none does."""
        ...

    def residue(self, v: E, type_: ColumnType, modulus: int, null: int) -> E:
        """v mod modulus, signed in any way, or `null` for null; `type_` is the column's."""
        ...

    def combined(self, terms: Sequence[tuple[int, E]], modulus: int) -> E:
        """The sum of factor * term, mod modulus, signed in any way; it fits 64 bits."""
        ...


@dataclass(frozen=True)
class Plan:
    """A recipe for one schema: the columns in order, each with its scale and key, the prime and what null counts."""

    schema: Schema
    period: Period
    columns: tuple[Column, ...]
    scales: tuple[float, ...]
    keys: tuple[int, ...]
    modulus: int
    null: int

    @property
    def time(self) -> Column | None:
        """The column that cuts the rows; None when they are not cut."""
        return None if self.schema.time is None or self.period is Period.NONE else self.schema[self.schema.time]

    def values(self, dialect: Dialect[E]) -> list[E]:
        """Return the number that each column's value counts as, null for null."""
        return [_value(dialect, *each) for each in zip(self.columns, self.scales, strict=True)]

    def mixed(self, dialect: Dialect[E], values: Sequence[E]) -> E:
        """Return what the hash squares, of one row whose numbers are `values`."""
        terms = [
            (key, dialect.residue(value, column.type, self.modulus, self.null))
            for column, key, value in zip(self.columns, self.keys, values, strict=True)
        ]
        while len(terms) > _TERMS:
            parts = [terms[start : start + _TERMS] for start in range(0, len(terms), _TERMS)]
            terms = [(1, dialect.combined(part, self.modulus)) for part in parts]
        return dialect.combined(terms, self.modulus)


def plan(dataset: str, recipe: Recipe, schema: Schema) -> Plan:
    """Return the recipe as it is for a schema; raises `SchemaError` for a column that the schema does not have, or a
    scale for one that is no float, and `ConfigurationError` for a scale or a seed that cannot be meant."""
    wanted = schema.names if recipe.columns is None else [*recipe.columns]
    if unknown := [name for name in [*wanted, *recipe.scales] if name not in schema]:
        raise SchemaError(f"{dataset} has no column {unknown[0]!r} to compare; it has {', '.join(schema.names)}")
    always = {*schema.key, schema.time}
    columns = tuple(c for c in schema.columns if (c.name in wanted or c.name in always) and c.name != schema.subject)
    for name, scale in recipe.scales.items():
        if schema[name].type not in _FLOATS:
            raise SchemaError(f"{dataset}: a scale is for floats, and {name!r} is {schema[name].type}")
        if not _SCALES[0] <= scale <= _SCALES[1]:
            raise ConfigurationError(
                f"{dataset}: the scale {scale!r} of {name!r} is not between {_SCALES[0]:g} and {_SCALES[1]:g}; it is 1 "
                "divided by the smallest difference that matters"
            )
    if not recipe.seed:
        raise ConfigurationError("fingerprints need a seed: bytes drawn anew for each comparison")

    def drawn(what: str, below: int) -> int:
        digest = hashlib.sha256(recipe.seed + b"\0" + what.encode()).digest()
        return 1 + int.from_bytes(digest[:16], "big") % (below - 1)

    modulus = 2**30 + drawn("prime", 2**30 - 2**10)
    while not _prime(modulus):
        modulus += 1
    return Plan(
        schema,
        recipe.period,
        columns,
        tuple(float(recipe.scales.get(column.name, DEFAULT_SCALE)) for column in columns),
        tuple(drawn(f"column {column.name}", _KEYS) for column in columns),
        modulus,
        drawn("null", modulus),
    )


def _prime(number: int) -> bool:
    """Tell whether a number below 2^31 is prime (Miller-Rabin with the bases that suffice for it)."""
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in (2, 3, 5, 7):
        power = pow(base, odd, number)
        if power != 1 and all(pow(power, 2**i, number) != number - 1 for i in range(twos)):
            return False
    return True


def _value(dialect: Dialect[E], column: Column, scale: float) -> E:
    x = dialect.column(column.name, column.type)
    if column.type not in _FLOATS:
        return x
    cases: list[tuple[E, E]] = []
    for step in range(_STEPS):
        factor = scale * _STEP**step
        limit = _LIMIT / factor
        cases.append((dialect.within(x, -limit, limit), dialect.scaled(x, factor, step * _BAND)))
    # NaN first: to some engines it is greater than all numbers, to others smaller
    odd = [dialect.nan(x), dialect.above(x, _LARGEST), dialect.below(x, -_LARGEST), dialect.above(x, 0)]
    odd.append(dialect.below(x, 0))
    cases += [(case, dialect.constant(_ODD + number)) for number, case in enumerate(odd)]
    return dialect.first(cases)


def names(plan: Plan) -> list[str]:
    """Return the columns of fingerprints: `subject` (`*` where rows have none), `segment` (the first day of the period;
    null where rows are not cut, or have no time), `rows`, `hash`, and `sum(<column>)` for each column compared."""
    return ["subject", "segment", "rows", "hash", *(f"sum({column.name})" for column in plan.columns)]


def finished(plan: Plan, rows: pl.DataFrame) -> pl.DataFrame:
    """Return fingerprints, sorted, from what an engine has computed: the columns of `names` in order, in which a
    segment is the number of its day since 1970, of its month (`year * 12 + month - 1`) or its year, and sums need not
    have wrapped around."""
    import polars as pl

    named = names(plan)
    rows = rows.rename(dict(zip(rows.columns, named, strict=True)))
    number = pl.col("segment").cast(pl.Int32)
    if plan.period is Period.DAY:
        segment = number.cast(pl.Date)
    elif plan.period is Period.NONE:
        segment = pl.lit(None, pl.Date())
    else:
        months = number if plan.period is Period.MONTH else number * 12
        segment = pl.date(months // 12, months % 12 + 1, 1)
    subject = pl.lit(lazyframes.EVERY_SUBJECT) if plan.schema.subject is None else pl.col("subject")
    sums = pl.col(named[2:]).cast(pl.Int128).cast(pl.Int64, wrap_numerical=True).fill_null(0)
    rows = rows.select(subject.cast(pl.String).alias("subject"), segment.alias("segment"), sums)
    return rows.filter(pl.col("rows") > 0).sort("subject", "segment")


class _Polars:
    """The operations as polars expressions."""

    def column(self, name: str, type_: ColumnType) -> pl.Expr:
        import polars as pl

        x = pl.col(name)
        if type_ in _FLOATS:
            return x.cast(pl.Float64)
        if type_ is ColumnType.STR:
            return x.map_batches(_texts, return_dtype=pl.Int64(), is_elementwise=True)
        if type_ is ColumnType.DATE:
            return x.to_physical().cast(pl.Int64)
        if type_ is ColumnType.U64:
            return x
        return x.cast(pl.Int64)

    def constant(self, number: int) -> pl.Expr:
        import polars as pl

        return pl.lit(number, pl.Int64())

    def scaled(self, x: pl.Expr, factor: float, add: int) -> pl.Expr:
        import polars as pl

        number = (x * factor + 0.5).floor().cast(pl.Int64, strict=False)
        return number + add if add else number

    def within(self, x: pl.Expr, low: float, high: float) -> pl.Expr:
        return x.is_between(low, high)

    def above(self, x: pl.Expr, bound: float) -> pl.Expr:
        return x > bound

    def below(self, x: pl.Expr, bound: float) -> pl.Expr:
        return x < bound

    def nan(self, x: pl.Expr) -> pl.Expr:
        return x.is_nan()

    def first(self, cases: Sequence[tuple[pl.Expr, pl.Expr]]) -> pl.Expr:
        import polars as pl

        found: Any = pl
        for case, value in cases:
            found = found.when(case).then(value)
        return found.otherwise(None)

    def residue(self, v: pl.Expr, type_: ColumnType, modulus: int, null: int) -> pl.Expr:
        import polars as pl

        return (v % modulus).cast(pl.Int64).fill_null(null)

    def combined(self, terms: Sequence[tuple[int, pl.Expr]], modulus: int) -> pl.Expr:
        key, term = terms[0]
        total = term * key
        for key, term in terms[1:]:
            total = total + term * key
        return total % modulus


def _texts(values: pl.Series) -> pl.Series:
    """Return what texts count as, each different one hashed once."""
    import polars as pl

    different = values.unique().drop_nulls()
    hashed = [
        int.from_bytes(hashlib.md5(text.encode(), usedforsecurity=False).digest()[:8], "big") >> (64 - _TEXT_BITS)
        for text in different
    ]
    return values.replace_strict(different, hashed, default=None, return_dtype=pl.Int64())


def by_scan(store: Store, dataset: str, recipe: Recipe, filter: Filter) -> pl.DataFrame:
    """Return the fingerprints of a store's rows as they come out of it, by polars, in bounded memory."""
    rows = store.scan(dataset, replace(filter, columns=None))
    schema = store.schema(dataset)
    assert schema is not None  # else there was nothing to scan
    return of_rows(rows, dataset, schema, recipe)


def of_rows(rows: pl.LazyFrame, dataset: str, schema: Schema, recipe: Recipe) -> pl.DataFrame:
    """Return the fingerprints of rows with the columns of the schema."""
    import polars as pl

    made = plan(dataset, recipe, schema)
    subject = pl.lit(lazyframes.EVERY_SUBJECT) if schema.subject is None else pl.col(schema.subject)
    segment = pl.lit(None, pl.Int32()) if made.time is None else _segment(pl.col(made.time.name), made.period)
    values = [f"v{number}" for number in range(len(made.columns))]
    mixed = made.mixed(_Polars(), [pl.col(name) for name in values]).alias("x")
    square = (pl.col("x") * pl.col("x") % made.modulus).sum().alias("hash")
    totals = [pl.col(name).cast(pl.Int64, wrap_numerical=True).sum() for name in values]
    found = (
        rows.select(subject.alias("subject"), segment.alias("segment"), *numbers(made))
        .with_columns(mixed)
        .group_by("subject", "segment")
        .agg(pl.len().alias("rows"), square, *totals)
    )
    return finished(made, found.collect(engine="streaming"))


def numbers(plan: Plan) -> list[pl.Expr]:
    """Return the number that each compared column's value counts as, by polars: `v0`, `v1` and so on, null for null."""
    return [value.alias(f"v{number}") for number, value in enumerate(plan.values(_Polars()))]


def _segment(at: pl.Expr, period: Period) -> pl.Expr:
    import polars as pl

    if period is Period.DAY:
        return at.cast(pl.Date).to_physical()
    year = at.dt.year()
    return year if period is Period.YEAR else year * 12 + at.dt.month().cast(pl.Int32) - 1
