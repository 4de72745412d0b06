"""Schemas, rows and names that engines are known to change, drawn at random from one number, and a dictionary that does
with them what a store must do. Nothing here opens a store.

Values are kept as they are counted (days, microseconds, nanoseconds) and compared as bits, so that no two of them that
a person could tell apart are taken for equal.
"""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta

import polars as pl
from stored_frames import HOSTILE_TEXT, stamped

from marketsync.schema import Column, ColumnType, Period, Schema
from storage.protocol import Capabilities, Filter, Written

T = ColumnType
TIMES = (T.DATE, T.DATETIME, T.DATETIME_NS)
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

# names that every store must take, however much they look like something else
AWKWARD = (
    *("select", "table", "order", "group", "from", "index", "key", "user", "desc", "limit", "when", "end", "null"),
    *("len", "count", "literal", "only", "n", "id", "by", "newest", "row", "share", "subject", "marker", "lane", "seq"),
    *("period", "version", "last", "size", "rows", "text", "s", "t", "put", "fresh", "max", "name", "path", "bytes"),
    *("Close", "VWAP", "camelCase", "0", "1e5", "nan", "NaN", "true", "None", "-1", "x-y", "a:b", "a/b", "50%", "%s"),
    *("it's", 'quo"te', "back`tick", "back\\slash", "a[0]", "a|b", "a?b", "a!", "#1", "@at", "~", "^a", "a*b", "a&b"),
    *("é", "名前", "цена", "café", "e\u0301", "ﬁ", "z" * 63, "é" * 31),
)
# names that a store takes, or refuses before it makes anything
DOUBTFUL = (
    *("*", "^a$", "^.*$", "", " ", "a b", "a ", "a,b", "a;b", "a\nb", "a\tb", "a\rb", "a=b", "{}", "a.b", "close.null"),
    *("$a", "_id", "_period", "_segment", "_ingested_at", "_version", "_deleted", "_part", "_partition_id", "_rowid"),
    *("__there", "__same", "__old_n", "__part", "__file", "__start", "__key", "n__ns", "id__ns", "ctid", "xmin", "oid"),
    *("z" * 64, "z" * 65, "z" * 70, "z" * 300, "é" * 32, "é" * 64, "名" * 22),
    *("\U0001f4c8", "a\0b", "\ufeff", "a\u00a0b"),
)
# pairs of which an engine may take one for the other
ALIKE = (("close", "Close"), ("a", "á"), ("é", "É"), ("e\u0301", "é"), ("straße", "STRASSE"), ("i", "İ"), ("ǆ", "ǅ"))

TEXTS = (
    *HOSTILE_TEXT,
    *("abc", "ABC", "abc ", "ábc", "a\u0301bc", " abc", "abc\t", "abc\u00a0", "ABC ", "aBc", "ß", "ss", "ẞ"),
    *(
        "I",
        "i",
        "ı",
        "NaN",
        "None",
        "inf",
        "-0",
        "0",
        "1",
        "*",
        "\\",
        "\\\\",
        "\\0",
        "'",
        "''",
        '"',
        '""',
        "`",
        "%",
        "%s",
    ),
    *("{}", "$a", "!", "\r", "\n", "\r\n", "\n\n", "\t", "\x01", "\x1a", "\x7f", "\u0085", "\u2028", "\ufeff"),
    *("\uffff", "\U0010ffff", "\U0001f468\u200d\U0001f469", "\U0001d11e" * 40, "--", "/*", "*/", "a,b", ",", ";", "!0"),
    *(
        "a b",
        "a!b",
        "z" * 255,
        "é" * 255,
        "\U0001d11e" * 255,
        "0000-00-00",
        "1970-01-01T00:00:00Z",
        "=cmd|' /C calc'!A0",
    ),
)
LONG_TEXTS = ("z" * 256, "long \\ ' \" \n " * 500, "\U0001f4c8" * 20_000, "x" * 70_000)
NUL_TEXTS = ("\0", "a\0b", "end\0", "abc\0")
NUMBERS = {
    T.I32: (0, 1, -1, 2**31 - 1, -(2**31)),
    T.I64: (0, 1, -1, 2**31, 2**53 + 1, -(2**53) - 1, 2**63 - 1, -(2**63), 10**18 + 1),
    T.U64: (0, 1, 2**53 + 1, 2**63 - 1),
}
FLOATS = (
    *(0.0, 1.0, -1.0, 0.1, 0.1 + 0.2, 1 / 3, 100.0, 123456789.123456789, 2.0**53, 2.0**53 + 2, 1e15, 1e16, 1e17, 1e22),
    *(1e23, 5e-324, -5e-324, 2.225073858507201e-308, 2.2250738585072014e-308, 1e308, -1e308, 1.7976931348623157e308),
)
SINGLE_MAX = 3.4028234663852886e38


def days(*written: str) -> tuple[int, ...]:
    """Return ISO dates as a column of days counts them."""
    return tuple((date.fromisoformat(each) - EPOCH.date()).days for each in written)


def micros(*written: str) -> tuple[int, ...]:
    """Return ISO times in UTC as a column of microseconds counts them."""
    moments = (datetime.fromisoformat(each).replace(tzinfo=UTC) for each in written)
    return tuple((at - EPOCH) // datetime.resolution for at in moments)


DAYS = (
    *days("1905-01-01", "1969-12-31", "1970-01-01", "1999-12-31", "2000-02-29", "2024-02-29", "2024-03-10"),
    *days("2038-01-19", "2038-01-20", "2100-02-28", "2149-06-06", "2149-06-07"),
)
FAR_DAYS = (
    *days("0001-01-01", "0001-12-31", "0099-06-01", "0999-12-31", "1582-10-10", "1677-09-20", "1899-12-31"),
    *days("1900-01-01", "2262-04-12", "2299-12-31", "2300-01-01", "9999-12-31"),
)
MOMENTS = (
    *micros("1969-12-31T23:59:59.999999", "1970-01-01", "2001-09-09T01:46:40.000001", "1905-03-04T05:06:07.000008"),
    # where clocks of New York and of Paris are set forward and back
    *micros(
        "2024-03-10T06:59:59.999999", "2024-03-10T07:00", "2024-11-03T05:30", "2024-11-03T06:30", "2024-03-31T01:00"
    ),
    *micros("2038-01-19T03:14:07.999999", "2038-01-19T03:14:08", "2106-02-07T06:28:16"),
)
FAR_MOMENTS = (
    *micros("0001-01-01", "0001-01-01T00:00:00.000001", "1000-01-01", "1582-10-10", "1899-12-31T23:59:59"),
    *micros("1900-01-01", "2262-04-11T23:47:16.854776", "2299-12-31T23:59:59.999999", "2300-01-01"),
    *micros("9999-12-31T23:59:59.999999"),
)
NANOS = (-1, 0, 1, 999, 1_000, 1_001, -1_000, -999, 1_234_567_890_123_456_789, -1_234_567_890_123_456_789, 10**18 + 500)
FAR_NANOS = (-9_214_560_000_000_000_000, 9_214_646_399_999_999_999, -2_208_988_800_000_000_000 - 1, 2**62 + 1)
WILD_NANOS = (-(2**63) + 1, 2**63 - 1, 9_223_286_400_000_000_000, 9_214_646_400_000_000_000, -9_214_560_000_000_000_001)

Row = dict[str, object]
ZERO, MINUS_ZERO = (struct.pack(">d", zero) for zero in (0.0, -0.0))


def bits(value: object, type_: ColumnType) -> object:
    """Return the value as it is compared: floats by their bytes, any NaN as one."""
    if value is None or type_ not in (T.F32, T.F64):
        return value
    assert isinstance(value, float)
    return "nan" if math.isnan(value) else struct.pack(">d", value)


def rows_of(frame: pl.DataFrame, schema: Schema) -> list[Row]:
    """Return the frame's rows, values as they are compared."""
    columns = {}
    for name in frame.columns:
        series = frame[name]
        series = series.to_physical() if series.dtype.is_temporal() else series
        type_ = schema[name].type if name in schema else T.STR
        columns[name] = [bits(value, type_) for value in series.to_list()]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def frame_of(rows: Sequence[Row], schema: Schema, segment: str) -> pl.DataFrame:
    """Return rows of values as they are counted as a frame that a store is given."""
    columns = []
    for column, type_ in zip(schema.columns, schema.polars().values(), strict=True):
        values = [row[column.name] for row in rows]
        counted = pl.Int32() if column.type is T.DATE else pl.Int64() if column.type in TIMES else type_
        columns.append(pl.Series(column.name, values, counted, strict=True).cast(type_))
    return stamped(pl.DataFrame(columns), segment)


def plain(value: object, able: Capabilities, *, in_key: bool = False) -> object:
    """Return bits as the store keeps them: in a key, and where it tells no -0.0 from 0.0, that is 0.0."""
    return ZERO if value == MINUS_ZERO and (in_key or not able.negative_zero) else value


@dataclass
class Table:
    """What a store must have: a dictionary of rows by their key."""

    schema: Schema
    able: Capabilities
    rows: dict[tuple, Row] = field(default_factory=dict)

    def taken(self, frame: pl.DataFrame, sent: Schema) -> dict[tuple, Row]:
        """Return the frame's rows by key, as this engine says that it keeps them."""
        found = {}
        for row in rows_of(frame.drop("_ingested_at"), sent):
            row = {name: plain(value, self.able, in_key=name in sent.key) for name, value in row.items()}
            found[tuple(row[name] for name in sent.key)] = row
        return found

    def upsert(self, frame: pl.DataFrame, sent: Schema) -> Written:
        """Put the rows in; return what a store must say of it."""
        inserted = updated = unchanged = 0
        for key, row in self.taken(frame, sent).items():
            old = self.rows.get(key)
            if old is None:
                inserted += 1
                self.rows[key] = {name: None for name in self.schema.names} | row
            elif all(old[name] == row[name] for name in sent.names):
                unchanged += 1
            else:
                updated += 1
                self.rows[key] = old | row
        return Written(inserted, updated, unchanged)

    def evolve(self, schema: Schema) -> None:
        """Take new columns, which are null in the rows that are there."""
        self.schema = schema
        self.rows = {key: {name: None for name in schema.names} | row for key, row in self.rows.items()}

    def within(self, filter: Filter) -> dict[tuple, Row]:
        """Return the rows of the filter."""
        found = {}
        for key, row in self.rows.items():
            if filter.subjects is not None and row[self.schema.subject or ""] not in filter.subjects:
                continue
            if filter.since is not None or filter.until is not None:
                time = self.schema.time or ""
                at, type_ = row[time], self.schema[time].type
                if at is None:
                    continue
                assert isinstance(at, int)
                if filter.since is not None and at < counted(filter.since, type_):
                    continue
                if filter.until is not None and at >= counted(filter.until, type_):
                    continue
            found[key] = row
        return found

    def replace(self, frame: pl.DataFrame, span: Filter) -> Written:
        """Make the rows of the span those of the frame; return what a store must say of it."""
        put = self.taken(frame, self.schema)
        gone = [key for key in self.within(span) if key not in put]
        for key in gone:
            del self.rows[key]
        return self.upsert(frame, self.schema) + Written(deleted=len(gone))

    def delete(self, filter: Filter) -> int:
        """Delete the rows of the filter; return how many they were."""
        gone = list(self.within(filter))
        for key in gone:
            del self.rows[key]
        return len(gone)

    def newest(self) -> dict[str, int]:
        """Return the newest time of each subject, as it is counted."""
        newest: dict[str, int] = {}
        for row in self.rows.values():
            subject = "*" if self.schema.subject is None else row[self.schema.subject]
            at = row[self.schema.time or ""]
            if isinstance(subject, str) and isinstance(at, int):
                newest[subject] = max(at, newest.get(subject, at))
        return newest


def counted(moment: date | datetime, type_: ColumnType) -> int:
    """Return a moment as a column of this type counts it; a column of days begins with the first whole one."""
    at = moment if isinstance(moment, datetime) else datetime(moment.year, moment.month, moment.day, tzinfo=UTC)
    micros = (at - EPOCH) // timedelta(microseconds=1)
    if type_ is T.DATE:
        return -(-micros // 86_400_000_000)
    return micros * (1_000 if type_ is T.DATETIME_NS else 1)


def moment(count: int, type_: ColumnType) -> date | datetime:
    """Return what is counted so as Python has it, nanoseconds cut."""
    if type_ is T.DATE:
        return EPOCH.date() + timedelta(days=count)
    return EPOCH + timedelta(microseconds=count // 1_000 if type_ is T.DATETIME_NS else count)


@dataclass
class Maker:
    """Draws everything of one case from one number.

    `wild` values are any that a column's type has; else they are those that the engine says it keeps, and, unless
    `far`, of times those that every engine keeps.
    """

    seed: int
    able: Capabilities
    wild: bool = False
    far: bool = True

    def __post_init__(self) -> None:
        self.chance = random.Random(self.seed)

    def schema(self) -> Schema:
        """Return a schema of 2 to 14 columns, with awkward names and any type in any role."""
        chance = self.chance
        count = chance.choice((2, 3, 5, 8, 14))
        names = chance.sample(AWKWARD, count)
        if chance.random() < 0.3:
            names[chance.randrange(count)] = chance.choice(DOUBTFUL)
        if chance.random() < 0.1:
            names[:2] = chance.choice(ALIKE)
        kinds = [chance.choice(list(T)) for _ in names]
        time = subject = None
        if chance.random() < 0.8:
            time, kinds[0] = names[0], chance.choice(TIMES)
        if chance.random() < 0.7:
            subject, kinds[1] = names[1], T.STR
        key = [name for name in (subject, time) if name is not None and chance.random() < 0.85]
        if not key or chance.random() < 0.3:
            free = [name for name in names if name not in key]
            key += chance.sample(free, 1) if free else []
        if chance.random() < 0.3:
            chance.shuffle(key)
        columns = [Column(n, k, nullable=chance.random() < 0.8) for n, k in zip(names, kinds, strict=True)]
        chance.shuffle(columns)
        period = chance.choice(list(Period)) if time is not None else Period.NONE
        return Schema(tuple(dict.fromkeys(columns)), tuple(dict.fromkeys(key)), time, subject, period)

    def wider(self, schema: Schema) -> Schema:
        """Return the schema with one to three more columns in any place."""
        chance = self.chance
        columns = list(schema.columns)
        taken = {name.lower() for name in schema.names}
        free = [name for name in AWKWARD if name.lower() not in taken]
        for name in chance.sample(free, chance.randint(1, 3)):
            if name.lower() not in taken:
                taken.add(name.lower())
                columns.insert(chance.randint(0, len(columns)), Column(name, chance.choice(list(T))))
        if chance.random() < 0.3:
            chance.shuffle(columns)
        return replace(schema, columns=tuple(columns))

    def rows(self, schema: Schema, count: int) -> list[Row]:
        """Return rows whose keys differ."""
        found: dict[tuple, Row] = {}
        empty = {c.name for c in schema.columns if self.chance.random() < 0.1}  # whole columns without a value
        for _ in range(count):
            row = {c.name: self.value(c, schema, c.name in empty) for c in schema.columns}
            found.setdefault(tuple(_same(row[name]) for name in schema.key), row)
        return list(found.values())

    def changed(self, rows: Iterable[Row], schema: Schema) -> list[Row]:
        """Return rows of these keys in which some values are others."""
        found = []
        for row in rows:
            names = [c for c in schema.columns if c.name not in schema.key and self.chance.random() < 0.4]
            found.append(row | {c.name: self.value(c, schema) for c in names})
        return found

    def value(self, column: Column, schema: Schema, empty: bool = False) -> object:
        chance, able = self.chance, self.able
        in_key = column.name in schema.key
        must = not column.nullable or in_key or (schema.period is not Period.NONE and column.name == schema.time)
        if not must and (empty or chance.random() < 0.15):
            return None
        values: Sequence = ()
        if column.type is T.STR:
            values = TEXTS if chance.random() < 0.9 else LONG_TEXTS if self.far else LONG_TEXTS[:2]
            if (self.wild or able.nul) and chance.random() < 0.1:
                values = NUL_TEXTS
            text = chance.choice(values)
            return text if self.wild else tame_text(text, able, in_key=in_key)
        if column.type is T.BOOL:
            return chance.random() < 0.5
        if column.type in NUMBERS:
            values = NUMBERS[column.type]
            if column.type is T.U64 and (self.wild or able.unsigned_64):
                values = (*values, 2**63, 2**64 - 1, 10**19)
            value = chance.choice(values)
            return value if self.wild or able.least or value not in (-(2**31), -(2**63)) else 0
        if column.type in (T.F32, T.F64):
            value = self._float(column.type)
            if not self.wild and not able.least and value in (-SINGLE_MAX, -1.7976931348623157e308):
                return 0.5
            return 0.5 if in_key and math.isnan(value) and not self.wild else value
        far = (self.wild or self.far) and chance.random() < 0.2
        if column.type is T.DATE:
            return chance.choice(FAR_DAYS if far else DAYS)
        if column.type is T.DATETIME:
            return chance.choice(FAR_MOMENTS if far else MOMENTS)
        nano = chance.choice(FAR_NANOS if far else (*NANOS, chance.randint(-(2**60), 2**60)))
        if self.wild and chance.random() < 0.03:
            nano = chance.choice(WILD_NANOS)
        return nano if self.wild or able.nanoseconds else nano // 1_000 * 1_000

    def _float(self, type_: ColumnType) -> float:
        chance = self.chance
        form, size = (">f", 4) if type_ is T.F32 else (">d", 8)
        drawn = chance.random()
        if drawn < 0.15:
            value = chance.choice((math.nan, math.inf, -math.inf))
            return value if self.wild or self.able.nan else 0.5
        if drawn < 0.25:
            return -0.0
        if drawn < 0.6:  # any bits: most of these need all of their digits
            value = struct.unpack(form, chance.randbytes(size))[0]
            return value if math.isfinite(value) else 1.5
        value = chance.choice(FLOATS)
        if type_ is T.F32:
            if abs(value) > SINGLE_MAX:
                return SINGLE_MAX
            return struct.unpack(form, struct.pack(form, value))[0]
        return value

    def span(self, table: Table) -> Filter:
        """Return a filter that means some of the table's rows."""
        chance, schema = self.chance, table.schema
        subjects = since = until = None
        if schema.subject is not None and chance.random() < 0.6:
            there = sorted({row[schema.subject] for row in table.rows.values()} - {None})  # pyright: ignore
            subjects = chance.sample(there, min(len(there), chance.randint(1, 3)))
        if schema.time is not None:
            type_ = schema[schema.time].type
            there = sorted({row[schema.time] for row in table.rows.values()} - {None})  # pyright: ignore
            if there and chance.random() < 0.6:
                since = moment(chance.choice(there), type_)  # pyright: ignore
            if there and chance.random() < 0.6:
                until = moment(chance.choice(there), type_)  # pyright: ignore
        return Filter(subjects, since, until)


def tame_text(text: str, able: Capabilities, *, in_key: bool = False) -> str:
    """Return the text as far as the store keeps it."""
    if able.longest_text is not None:
        text = text[: able.longest_text // 2]  # some characters count twice
    if in_key:  # for one key of several texts an index has less room
        text = text[: min(able.longest_key or 4_000, 80)]
    text = text if able.final_return else text.rstrip("\r")
    return text or ("" if able.empty_text else "none")


def _same(value: object) -> object:
    if isinstance(value, float):
        return "nan" if math.isnan(value) else value + 0.0
    return value
