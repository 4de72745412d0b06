"""Fingerprints in SQL: how PostgreSQL, MySQL and ClickHouse write the operations of `fingerprints.Dialect`, and the one
statement that is made of them. What its numbers mean is told in `fingerprints.py`; nothing here talks to a server."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from marketsync.schema import ColumnType, Period
from storage.fingerprints import Plan


@dataclass(frozen=True)
class Sql:
    """One engine's words; `{}` is where an expression goes."""

    columns: Mapping[ColumnType, str]  # a column as the number that its value counts as; itself where none is given
    periods: Mapping[Period, str]  # the number of the period that a time of the time column is in
    whole: str  # a number as an integer of 64 bits with a sign
    integer: str  # a literal of one
    double: str  # a literal of a double
    is_nan: str
    apart: str = ""  # ends a query inside of another one whose columns would be computed again at each use
    unsigned_total: str = "sum({})"
    moments: Mapping[ColumnType, str] = field(default_factory=dict)  # a time of the time column, as `periods` take it
    quoted: Callable[[str | None], str] = str

    def statement(self, plan: Plan, table: str, where: str) -> str:
        """Return the question whose answer has the columns that `fingerprints.finished` takes."""
        subject = [f"{self.quoted(plan.schema.subject)} AS s"] if plan.schema.subject else []
        time = plan.time
        at: list[str] = []
        if time is not None:
            moment = self.moments.get(time.type, "{}").format(self.quoted(time.name))
            at = [f"{self.periods[plan.period].format(moment)} AS d"]
        by = [*(["s"] if subject else []), *(["d"] if at else [])]
        names = [f"v{number}" for number in range(len(plan.columns))]
        values = [f"{value} AS {name}" for name, value in zip(names, plan.values(self), strict=True)]
        mixed = plan.mixed(self, names)
        totals = [
            (self.unsigned_total if column.type is ColumnType.U64 else "sum({})").format(name)
            for column, name in zip(plan.columns, names, strict=True)
        ]
        inner = f"SELECT {', '.join([*subject, *at, *values])} FROM {table} {where}{self.apart}"
        middle = f"SELECT {', '.join([*by, *names])}, {mixed} AS x FROM ({inner}) a{self.apart}"
        found = ["s" if subject else "NULL AS s", "d" if at else "NULL AS d", "count(*) AS n"]
        found += [f"sum(x * x % {self.constant(plan.modulus)}) AS h"]
        found += [f"{total} AS t{number}" for number, total in enumerate(totals)]
        return f"SELECT {', '.join(found)} FROM ({middle}) b{' GROUP BY ' if by else ''}{', '.join(by)}"

    # the operations

    def column(self, name: str, type_: ColumnType) -> str:
        return self.columns.get(type_, "{}").format(self.quoted(name))

    def constant(self, number: int) -> str:
        return self.integer.format(number)

    def scaled(self, x: str, factor: float, add: int) -> str:
        floor = self.whole.format(f"floor({x} * {self._double(factor)} + {self._double(0.5)})")
        return f"{floor} + {self.constant(add)}" if add else floor

    def within(self, x: str, low: float, high: float) -> str:
        return f"{x} BETWEEN {self._double(low)} AND {self._double(high)}"

    def above(self, x: str, bound: float) -> str:
        return f"{x} > {self._double(bound)}"

    def below(self, x: str, bound: float) -> str:
        return f"{x} < {self._double(bound)}"

    def nan(self, x: str) -> str:
        return self.is_nan.format(x)

    def first(self, cases: Sequence[tuple[str, str]]) -> str:
        return f"CASE {' '.join(f'WHEN {case} THEN {value}' for case, value in cases)} END"

    def residue(self, v: str, type_: ColumnType, modulus: int, null: int) -> str:
        rest = f"{v} % {self.constant(modulus)}"
        if type_ is ColumnType.U64:
            rest = self.whole.format(rest)
        return f"COALESCE({rest}, {self.constant(null)})"

    def combined(self, terms: Sequence[tuple[int, str]], modulus: int) -> str:
        total = " + ".join(f"{self.constant(factor)} * {term}" for factor, term in terms)
        return f"({total}) % {self.constant(modulus)}"

    def _double(self, number: float) -> str:
        text = repr(float(number))
        return self.double.format(text if "e" in text else f"{text}e0")


def postgres(quoted: Callable[[str | None], str]) -> Sql:
    """Return the words of PostgreSQL."""
    # beyond what a double counts to the microsecond, by the slow arithmetic of decimals
    micros = (
        "CASE WHEN {0} BETWEEN '1900-01-01 00:00:00+00' AND '2040-01-01 00:00:00+00' "
        "THEN floor(date_part('epoch', {0}) * 1e6::float8 + 0.5::float8)::int8 "
        "ELSE (extract(epoch FROM {0}) * 1000000)::int8 END"
    )
    year, month = (f"date_part('{part}', {{0}})" for part in ("year", "month"))
    return Sql(
        columns={
            ColumnType.STR: "('x' || left(md5(convert_to({}, 'UTF8')), 15))::bit(60)::int8",
            ColumnType.BOOL: "{}::int4::int8",
            ColumnType.I32: "{}::int8",
            ColumnType.F32: "{}::float8",
            ColumnType.DATE: "({} - DATE '1970-01-01')::int8",
            ColumnType.DATETIME: micros,
            ColumnType.DATETIME_NS: f"({micros}) * 1000",
        },
        periods={
            Period.DAY: "{}::date - DATE '1970-01-01'",
            Period.MONTH: f"({year} * 12 + {month} - 1)::int4",
            Period.YEAR: f"({year})::int4",
        },
        whole="({})::int8",
        integer="{}::int8",
        double="'{}'::float8",
        is_nan="{} = 'NaN'::float8",
        apart=" OFFSET 0",
        moments=dict.fromkeys((ColumnType.DATETIME, ColumnType.DATETIME_NS), "({} AT TIME ZONE 'UTC')"),
        quoted=quoted,
    )


def mysql(quoted: Callable[[str | None], str]) -> Sql:
    """Return the words of MySQL and MariaDB. A query inside of another one is computed at each use, which costs less
    than it looks: to keep its rows the engine writes them to a disk."""
    micros = "TIMESTAMPDIFF(MICROSECOND, TIMESTAMP'1970-01-01 00:00:00', {})"
    return Sql(
        columns={
            ColumnType.STR: "CAST(CONV(LEFT(MD5(CONVERT({} USING utf8mb4)), 15), 16, 10) AS SIGNED)",
            ColumnType.DATE: "(TO_DAYS({}) - 719528)",
            ColumnType.DATETIME: micros,
            ColumnType.DATETIME_NS: f"({micros} * 1000)",
        },
        periods={
            Period.DAY: "TO_DAYS({}) - 719528",
            Period.MONTH: "YEAR({0}) * 12 + MONTH({0}) - 1",
            Period.YEAR: "YEAR({})",
        },
        whole="CAST({} AS SIGNED)",
        integer="{}",
        double="{}",
        is_nan="FALSE",
        quoted=quoted,
    )


def clickhouse(quoted: Callable[[str | None], str]) -> Sql:
    """Return the words of ClickHouse, whose sums of integers wrap around."""
    return Sql(
        columns={
            ColumnType.STR: "toInt64(bitShiftRight(reinterpretAsUInt64(reverse(substring(MD5({}), 1, 8))), 4))",
            **dict.fromkeys((ColumnType.BOOL, ColumnType.I32), "toInt64({})"),
            ColumnType.F32: "toFloat64({})",
            ColumnType.DATE: "toInt64(toInt32({}))",
            ColumnType.DATETIME: "toUnixTimestamp64Micro({})",
            ColumnType.DATETIME_NS: "toUnixTimestamp64Nano({})",
        },
        periods={
            Period.DAY: "toInt32(toDate32({}))",
            Period.MONTH: "toInt32(toYear({0})) * 12 + toMonth({0}) - 1",
            Period.YEAR: "toInt32(toYear({}))",
        },
        whole="toInt64({})",
        integer="toInt64({})",
        double="{}",
        is_nan="isNaN({})",
        unsigned_total="reinterpretAsInt64(sum({}))",
        quoted=quoted,
    )
