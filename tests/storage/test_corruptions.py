"""What engines are known to do to values without a word, one by one: none of our stores does it. A value comes back as
it went, down to its bits, or the whole batch is refused with `SchemaError` and the table is as it was."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

import polars as pl
import pytest
from conftest import needs
from hostile_frames import Row, days, frame_of, micros, plain, rows_of, tame_text
from stored_frames import BARS, START, bars, batch, stamped

from marketsync.errors import SchemaError
from marketsync.schema import Column, ColumnType, Period, Schema
from storage.protocol import Capabilities, Filter, Mode, Store, Written

T = ColumnType
HOURS = micros(*(f"2001-02-0{day}T09:30" for day in range(1, 10)))


@dataclass(frozen=True)
class Corruption:
    """What some engine does, and values to which it does it. Every store must keep them unless `flag` names
    a capability, without which they are refused; "some" stores keep them, or "none" does."""

    what: str
    type: ColumnType
    values: tuple
    flag: str | None = None


KNOWN = (
    Corruption("the greatest whole number without a sign becomes -1", T.U64, (2**64 - 1, 2**63, 0), "unsigned_64"),
    Corruption("whole numbers beyond 2**53 are rounded as floats", T.I64, (2**53 + 1, 2**63 - 1, -(2**63))),
    Corruption("null becomes 0.0", T.F64, (None, 0.0, 1.5)),
    Corruption("null becomes 0, false, the year 0 or the empty text", T.I32, (None, 0, -1)),
    Corruption("null becomes false", T.BOOL, (None, False, True)),
    Corruption("null becomes 1970-01-01 or 0000-00-00", T.DATE, (None, 0)),
    Corruption("NaN becomes 0.0 or null", T.F64, (math.nan, 0.0, None), "nan"),
    Corruption("NaN becomes 0.0 or null in 32 bits", T.F32, (math.nan, 0.0, None), "nan"),
    Corruption("infinities become numbers or null", T.F64, (math.inf, -math.inf, 1.7976931348623157e308), "nan"),
    Corruption("-0.0 becomes 0.0", T.F64, (-0.0, 0.0), "negative_zero"),
    Corruption("the last of 17 digits are lost", T.F64, (0.1 + 0.2, 1 / 3, 123456789.12345679, 1e23, 9.5e-7)),
    Corruption("numbers below the normal ones become 0", T.F64, (5e-324, -5e-324, 2.2250738585072011e-308)),
    Corruption("a float of 32 bits is shown with six digits", T.F32, (16777217.0 - 1, 0.10000000149011612, 3.4e38)),
    Corruption("a bad or far day becomes 0000-00-00", T.DATE, days("0001-01-01", "9999-12-31", "1582-10-10"), "some"),
    Corruption("days before 1970 or after 2149-06-06 become others", T.DATE, days("1969-12-31", "2149-06-07")),
    Corruption(
        "times after 2038-01-19 become others",
        T.DATETIME,
        micros("2038-01-19T03:14:08", "2106-02-07T06:28:16"),
    ),
    Corruption(
        "times before 1970 lose a microsecond",
        T.DATETIME,
        micros("1969-12-31T23:59:59.999999", "1905-01-01"),
    ),
    Corruption(
        "times beyond 64 bits of nanoseconds wrap around",
        T.DATETIME,
        micros("2262-04-12", "1677-09-20", "0001-01-01"),
        "some",
    ),
    Corruption(
        "microseconds are cut to milliseconds",
        T.DATETIME,
        micros("2024-01-02T03:04:05.678901", "2024-01-02T03:04:05.000001"),
    ),
    Corruption(
        "times in the hour that clocks skip or repeat are moved",
        T.DATETIME,
        micros("2024-03-10T02:30", "2024-11-03T01:30"),
    ),
    Corruption(
        "nanoseconds are cut or rounded up",
        T.DATETIME_NS,
        (1_234_567_890_123_456_789, 999, -1),
        "nanoseconds",
    ),
    Corruption("nanoseconds at the ends of 64 bits overflow", T.DATETIME_NS, (2**63 - 1, -(2**63) + 1), "none"),
    Corruption("characters that latin1 has not become ?", T.STR, ("中文", "\U0001f4c8", "e\u0301", "\U0010ffff", "€")),
    Corruption("the empty text becomes null, or null the empty text", T.STR, ("", None, " ")),
    Corruption("texts that stand for null in files become null", T.STR, ("NULL", "\\N", "NA", "nan", "null", "None")),
    Corruption("blanks at the end are cut", T.STR, ("abc ", "abc", "abc\t", "abc\u00a0", " ")),
    Corruption(
        "a backslash, a quotation mark or a line end is lost",
        T.STR,
        ("\\", "a\\'b", '"', "'", "\r\n", "\r", "\\n"),
    ),
    Corruption("a text ends at its NUL", T.STR, ("a\0b", "\0", "abc\0"), "nul"),
    Corruption("a long text is cut", T.STR, ("x" * 5_000, "\U0001f4c8" * 5_000)),
    Corruption("a longer text is cut", T.STR, ("x" * 70_000, "\U0001f4c8" * 20_000), "some"),
    Corruption("a text that looks like a number becomes one", T.STR, ("000001", "1e5", "0x10", "1.0", "-0", "TRUE")),
)


@pytest.mark.parametrize("mode", list(Mode))
def test_no_store_changes_a_value_silently(store: Store, subtests: pytest.Subtests, mode: Mode):
    """All that the store says it keeps in one batch, a column each; the rest by itself, exact or refused."""
    kept = [known for known in KNOWN if is_kept(known, store.capabilities)]
    columns = {known.what: Column(f"v{number}", known.type) for number, known in enumerate(kept)}
    schema = by_time(*columns.values())
    store.ensure("known.kept", schema)
    rows: list[Row] = [{"at": HOURS[n], **dict.fromkeys(column.name for column in columns.values())} for n in range(9)]
    for known in kept:
        for row, value in zip(rows, known.values, strict=False):
            row[columns[known.what].name] = value
    frame = frame_of(rows, schema, "s")
    store.write(batch("known.kept", frame, 1, mode=mode, schema=schema))
    assert store.write(batch("known.kept", frame, 2, schema=schema)) == Written(unchanged=9)
    wanted = rows_of(frame, schema)
    found = sorted(rows_of(store.scan("known.kept").collect(), schema), key=lambda row: str(row["at"]))
    for known in KNOWN:
        with subtests.test(known.what):
            if known in kept:
                name = columns[known.what].name
                assert [row[name] for row in found] == [row[name] for row in wanted]
            else:
                alone = by_time(Column("v", known.type))
                put_exactly(store, f"known.v{KNOWN.index(known)}", alone, known.values, mode)


@pytest.mark.slow
def test_nor_does_it_in_a_key(store: Store, subtests: pytest.Subtests):
    needs(store, any_key=True)
    for number, known in enumerate(KNOWN):
        values = [value for value in known.values if value is not None and (value, known.type) != (0.0, T.F64)]
        with subtests.test(known.what):
            schema = Schema((Column("at", T.DATETIME), Column("v", known.type)), ("v",))
            put_exactly(store, f"known.k{number}", schema, values, Mode.UPSERT)


def test_a_number_that_equals_nothing_is_no_key(store: Store):
    schema = Schema((Column("strike", T.F64), Column("n", T.I64)), ("strike",))
    needs(store, any_key=True)
    try:
        store.ensure("known.strikes", schema)
    except SchemaError:
        return  # where no number of this type can be a key
    frame = stamped(pl.DataFrame({"strike": [1.5, math.nan], "n": [1, 2]}))
    with pytest.raises(SchemaError, match="NaN"):
        store.write(batch("known.strikes", frame, schema=schema))
    assert store.write(batch("known.strikes", frame.head(1), schema=schema)) == Written(inserted=1)
    zeros = frame.with_columns(strike=pl.Series([-0.0, 2.0]))
    assert store.write(batch("known.strikes", zeros, 2, schema=schema)) == Written(inserted=2)
    other = zeros.with_columns(strike=pl.Series([0.0, 2.0]))
    assert store.write(batch("known.strikes", other, 3, schema=schema)) == Written(unchanged=2)
    assert store.count("known.strikes") == 3


def is_kept(known: Corruption, able: Capabilities) -> bool:
    """Tell whether the store says that it keeps all of these values."""
    texts = [value for value in known.values if isinstance(value, str)]
    return (
        (known.flag is None or getattr(able, known.flag, False))
        and all(text == tame_text(text, able) for text in texts)
        and (able.least or -(2**63) not in known.values)
    )


def by_time(*columns: Column) -> Schema:
    """Return a schema that every store can keep, with these columns."""
    return Schema((Column("at", T.DATETIME), *columns), ("at",), "at")


def put_exactly(store: Store, dataset: str, schema: Schema, values: Sequence, mode: Mode) -> int:
    """Write the values together or, where they are refused, one by one; return how many were kept. They are written
    twice, since the second time they must be found equal."""
    try:
        store.ensure(dataset, schema)
    except SchemaError:
        return 0  # of a type that is no key there
    rows: list[Row] = [{"at": at, "v": value} for at, value in zip(HOURS, values, strict=False)]
    parts, seq, kept = [rows], 0, []
    while parts:
        part = parts.pop(0)
        frame = frame_of(part, schema, "s")
        seq += 1
        try:
            store.write(batch(dataset, frame, seq, mode=mode, schema=schema))
        except SchemaError:
            seq -= 1
            assert store.committed(dataset, "lane") == seq
            parts += [[row] for row in part] if len(part) > 1 else []
        else:
            kept += rows_of(frame.select(schema.names), schema)
            seq += 1
            assert store.write(batch(dataset, frame, seq, schema=schema)) == Written(unchanged=len(part))
    found = rows_of(store.scan(dataset).collect(), schema)
    for row in (*kept, *found):
        row["v"] = plain(row["v"], store.capabilities, in_key="v" in schema.key)
    assert sorted(found, key=lambda row: str(row["at"])) == sorted(kept, key=lambda row: str(row["at"]))
    return len(kept)


def test_texts_that_differ_by_case_accent_or_blanks_are_different_keys(store: Store):
    symbols = ("abc", "ABC", "abc ", " abc", "ábc", "a\u0301bc", "äbc", "ａbc", "ß", "ss", "I", "ı", "abc\u00a0")
    needs(store, subjects=None)
    store.ensure("known.keys", BARS)
    frame = bars(symbols, rows=2)
    assert store.write(batch("known.keys", frame)) == Written(inserted=2 * len(symbols))
    assert store.write(batch("known.keys", frame, 2)) == Written(unchanged=2 * len(symbols))
    assert set(store.watermarks("known.keys")) == set(symbols)
    for symbol in symbols:
        assert store.count("known.keys", Filter([symbol])) == 2, symbol
    assert store.delete("known.keys", Filter(["abc "])) == 2
    assert store.count("known.keys", Filter(["abc", "ABC", " abc"])) == 6


@pytest.mark.parametrize("mode", list(Mode))
def test_of_two_rows_with_one_key_in_a_batch_neither_the_first_nor_both_are_kept(store: Store, mode: Mode):
    store.ensure("known.twice", BARS)
    twice = pl.concat([bars(("A",), rows=1), bars(("A",), rows=1, add=1.0)])
    with pytest.raises(SchemaError, match="share a key"):
        store.write(batch("known.twice", twice, mode=mode))
    with pytest.raises(SchemaError, match="share a key"):
        store.replace("known.twice", BARS, twice, Filter())
    assert store.count("known.twice") == store.committed("known.twice", "lane") == 0


@pytest.mark.parametrize("name", ["n" * 63 + "1234567", "é" * 35, "n" * 300])
def test_a_long_name_is_kept_whole_or_refused_and_never_cut(store: Store, name: str):
    """Two columns whose names begin with the same 69 characters would become one."""
    names = (name, name[:-1] + "x")
    schema = by_time(*(Column(each, T.I64) for each in names))
    dataset = f"known.long{len(name)}"
    try:
        store.ensure(dataset, schema)
    except SchemaError:
        with pytest.raises(SchemaError, match=f"{name[:-1]}"):
            store.ensure(dataset, schema)
        assert store.marker(dataset) is None
        return
    frame = pl.DataFrame({"at": [START], **{each: [number] for number, each in enumerate(names)}}, schema.polars())
    store.write(batch(dataset, stamped(frame), schema=schema))
    assert store.scan(dataset).collect().rows(named=True) == frame.rows(named=True)


def test_a_long_name_of_a_dataset_is_kept_whole_or_refused_and_never_cut(store: Store):
    long, longer = "known." + "d" * 80 + "1", "known." + "d" * 80 + "2"
    made = []
    for number, dataset in enumerate((long, longer)):
        try:
            store.ensure(dataset, BARS)
        except SchemaError:
            continue
        made.append(dataset)
        store.write(batch(dataset, bars(rows=number + 1)))
    assert [store.count(dataset) for dataset in made] == [2, 4][: len(made)]
    assert [each for each in store.datasets() if each.startswith("known.ddd")] == made
    assert made in ([], [long, longer])


def test_names_that_differ_only_by_case_are_refused(store: Store):
    schema = Schema((*BARS.columns, Column("Close", T.F64)), BARS.key, "ts", "symbol", Period.MONTH)
    with pytest.raises(SchemaError, match="differ only by case"):
        store.ensure("known.case", schema)
    assert store.marker("known.case") is None


def test_columns_go_by_name_where_their_types_would_let_them_go_by_position(store: Store):
    names = ("open", "high", "low", "close")
    columns = tuple(Column(name, T.F64) for name in names)
    schema = by_time(*columns)
    store.ensure("known.places", schema)
    hours = [START + timedelta(hours=hour) for hour in range(3)]
    frames = [
        stamped(pl.DataFrame({"at": [at], "open": [1.0], "high": [2.0], "low": [3.0], "close": [4.0]}, schema.polars()))
        for at in hours
    ]
    store.write(batch("known.places", frames[0].select(sorted(frames[0].columns)), schema=schema))
    if not store.capabilities.evolve:
        assert store.scan("known.places").select(names).collect().rows() == [(1.0, 2.0, 3.0, 4.0)]
        return
    # a column comes in between, and others change places, before a batch that was made before arrives
    turned = replace(schema, columns=(columns[3], Column("vwap", T.F64), columns[0], schema["at"], *columns[1:3]))
    store.ensure("known.places", turned)
    store.write(batch("known.places", frames[1], 2, schema=schema))
    store.write(batch("known.places", frames[2].with_columns(vwap=9.0), 3, schema=turned))
    found = store.scan("known.places").collect().sort("at")
    assert found.select(*names, "vwap").rows() == [
        (1.0, 2.0, 3.0, 4.0, None),
        (1.0, 2.0, 3.0, 4.0, None),
        (1.0, 2.0, 3.0, 4.0, 9.0),
    ]


@pytest.mark.parametrize("zone", [None, "Asia/Shanghai"])
def test_a_time_without_a_zone_or_in_another_one_is_refused_and_not_taken_for_utc(store: Store, zone: str | None):
    store.ensure("known.naive", BARS)
    frame = bars().with_columns(pl.col("ts").dt.replace_time_zone(zone))
    with pytest.raises(SchemaError, match="'ts'"):
        store.write(batch("known.naive", frame))
    with pytest.raises(SchemaError, match="time zone"):
        store.delete("known.naive", Filter(until=START.replace(tzinfo=None)))
    assert store.count("known.naive") == 0


def test_a_null_where_none_may_be_is_refused_and_does_not_become_a_zero(store: Store):
    strict = by_time(Column("price", T.F64), Column("lot", T.I32, nullable=False))
    store.ensure("known.lots", strict)
    frame = stamped(pl.DataFrame({"at": [START], "price": [None], "lot": [None]}, strict.polars()))
    for mode in Mode:
        with pytest.raises(SchemaError, match=r"'lot'.*null in 1"):
            store.write(batch("known.lots", frame, mode=mode, schema=strict))
    assert store.count("known.lots") == 0
    loose = by_time(Column("price", T.F64), Column("lot", T.I32))
    store.ensure("known.loose", loose)
    store.write(batch("known.loose", frame, schema=loose))
    assert store.scan("known.loose").collect().rows() == [(START, None, None)]


def test_whole_columns_without_a_value_and_frames_without_a_row_keep_their_types(store: Store):
    schema = by_time(*(Column(f"c{number}", type_) for number, type_ in enumerate(T)))
    store.ensure("known.empty", schema)
    frame = stamped(pl.DataFrame({"at": [START], **dict.fromkeys(schema.names[1:])}, schema=schema.polars()))
    assert store.write(batch("known.empty", frame.clear(), 1, schema=schema)) == Written()
    assert store.scan("known.empty").collect().schema == pl.Schema(schema.polars())
    assert store.write(batch("known.empty", frame, 2, schema=schema)) == Written(inserted=1)
    assert store.write(batch("known.empty", frame, 3, schema=schema)) == Written(unchanged=1)
    assert store.scan("known.empty").collect().equals(frame.select(schema.names))
