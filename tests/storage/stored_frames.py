"""Schemas and frames that the tests of the stores write: small bars, and a table with every type and hostile values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta

import polars as pl

from marketsync.schema import Column, ColumnType, Period, Schema
from storage.protocol import Batch, Capabilities, Mode

BARS = Schema(
    (
        Column("symbol", ColumnType.STR, nullable=False),
        Column("ts", ColumnType.DATETIME, nullable=False),
        Column("close", ColumnType.F64, description="unadjusted"),
        Column("volume", ColumnType.I64),
    ),
    key=("symbol", "ts"),
    time="ts",
    subject="symbol",
    period=Period.MONTH,
)
INSTRUMENTS = Schema(
    (Column("code", ColumnType.STR), Column("name", ColumnType.STR), Column("lot", ColumnType.I32, nullable=False)),
    key=("code",),
)
SESSIONS = Schema(
    (Column("day", ColumnType.DATE), Column("open", ColumnType.BOOL)), key=("day",), time="day", period=Period.YEAR
)
WIDE = Schema(
    (
        Column("name", ColumnType.STR),
        Column("day", ColumnType.DATE),
        Column("text", ColumnType.STR),
        Column("flag", ColumnType.BOOL),
        Column("small", ColumnType.I32),
        Column("large", ColumnType.I64),
        Column("huge", ColumnType.U64),
        Column("single", ColumnType.F32),
        Column("double", ColumnType.F64),
        Column("date", ColumnType.DATE),
        Column("at", ColumnType.DATETIME),
        Column("at_ns", ColumnType.DATETIME_NS),
    ),
    key=("name", "day"),
    time="day",
    subject="name",
    period=Period.YEAR,
)
START = datetime(2001, 1, 30, 9, 30, tzinfo=UTC)
HOSTILE_TEXT = (
    "",
    " ",
    "NA",
    "null",
    "NULL",
    "\\N",
    "nan",
    "000001",
    "1e5",
    "true",
    "2001-02-03",
    "中文 ✓ \U0001f4c8",
    'quote " and "" two',
    "it's, with; commas\tand tabs",
    "line\nbreak\r\nand return\r",
    "back\\slash \\n",
    "-",
    "=1+1",
    "#comment",
    "a" * 3000,
)


def bars(
    subjects: Sequence[str] = ("000001", "NA"), first: int = 0, rows: int = 48, *, add: float = 0.0, segment: str = "s1"
) -> pl.DataFrame:
    """Return hourly bars from `first` on; every value follows from the subject's place and the hour."""
    frames = [
        pl.DataFrame(
            {
                "symbol": [subject] * rows,
                "ts": [START + timedelta(hours=first + hour) for hour in range(rows)],
                "close": [round(place * 100 + (first + hour) / 10 + add, 4) for hour in range(rows)],
                "volume": [place * 1000 + first + hour for hour in range(rows)],
            },
            schema=BARS.polars(),
        )
        for place, subject in enumerate(subjects)
    ]
    return stamped(pl.concat(frames), segment)


def stamped(frame: pl.DataFrame, segment: str = "s1") -> pl.DataFrame:
    """Return the frame with the system columns."""
    at = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
    return frame.with_columns(
        pl.lit(segment).alias("_segment"), pl.lit(at).cast(pl.Datetime("us", "UTC")).alias("_ingested_at")
    )


def batch(
    dataset: str,
    frame: pl.DataFrame,
    seq: int = 1,
    *,
    lane: str = "lane",
    mode: Mode = Mode.UPSERT,
    schema: Schema = BARS,
) -> Batch:
    """Return the batch, with the defaults that most tests want."""
    return Batch(dataset, schema, lane, seq, frame, mode)


def hostile_keys(capabilities: Capabilities) -> list[str]:
    """Return the hostile texts, as long as a text in a key may be; tame ones where they name folders."""
    if capabilities.subjects is not None:
        tame = ["".join(one for one in text if one.isascii() and one.isalnum()) for text in HOSTILE_TEXT]
        return [f"{text[:50]}{place}" for place, text in enumerate(tame)]
    return [text[: capabilities.longest_key] for text in hostile_text(capabilities)]


def hostile_text(capabilities: Capabilities) -> list[str]:
    """Return the hostile texts, as far as this store promises to keep them."""
    texts = [text if capabilities.final_return else text.removesuffix("\r") for text in HOSTILE_TEXT]
    return [text[: capabilities.longest_text] or ("" if capabilities.empty_text else "none") for text in texts]


def storable_day(capabilities: Capabilities, day: date) -> date:
    """Return the day, or one like it that the engine keeps in a table of days."""
    if capabilities.earliest is not None and day <= capabilities.earliest.date():
        day = day.replace(year=1970 + (1970 - day.year) % 30 + 1)
    return day if capabilities.new_year or (day.month, day.day) != (1, 1) else day.replace(day=2)


def hostile(capabilities: Capabilities) -> pl.DataFrame:
    """Return rows of `WIDE` with the values that engines are known to change, as far as this one promises to keep."""
    rows = len(HOSTILE_TEXT)
    doubles = [0.0, -0.0, 0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -1e-300, 123456789.123456789, None]
    singles = [0.0, -0.0, 0.1, 3.4028234663852886e38, 1.401298464324817e-45, 16777217.0, None]
    if capabilities.nan:
        doubles += [math.nan, math.inf, -math.inf]
        singles += [math.nan, math.inf, -math.inf]
    if not capabilities.negative_zero:
        doubles, singles = ([0.0 if one == 0 else one for one in each] for each in (doubles, singles))
    huge = [0, 2**63 - 1, None, *([2**64 - 1, 2**63] if capabilities.unsigned_64 else [])]
    instants = [
        datetime(1969, 12, 31, 23, 59, 59, 999999, tzinfo=UTC),
        datetime(1905, 3, 4, 5, 6, 7, 8, tzinfo=UTC),
        datetime(2262, 1, 1, tzinfo=UTC),
        datetime(2001, 9, 9, 1, 46, 40, 1, tzinfo=UTC),
        datetime(1974, 5, 1, 0, 0, 1, 3000, tzinfo=UTC),  # in seconds a double that is a little less
        None,
    ]
    nanos = pl.Series([-1_000, 1_234_567_890_123_456_000, 0, None], dtype=pl.Int64)
    if capabilities.nanoseconds:
        nanos = pl.Series([-1, 1_234_567_890_123_456_789, 1, None], dtype=pl.Int64)

    def turn(values: Sequence) -> list:
        return [values[index % len(values)] for index in range(rows)]

    days = [date(1969, 12, 31), date(1901, 1, 1), date(2001, 2, 28), date(2100, 12, 31), date(1970, 1, 1)]
    lowest = int(not capabilities.least)
    frame = pl.DataFrame(
        {
            "name": hostile_keys(capabilities),
            "day": [storable_day(capabilities, day) for day in turn(days)],
            "text": [None, *hostile_text(capabilities)[:0:-1]],
            "flag": turn([True, False, None]),
            "small": turn([0, 2**31 - 1, -(2**31) + lowest, None]),
            "large": turn([0, 2**63 - 1, -(2**63) + lowest, None, 2**53 + 1]),
            "huge": turn(huge),
            "single": turn(singles),
            "double": turn(doubles),
            "date": turn([date(1969, 12, 31), None, date(1901, 1, 1), date(2100, 1, 1)]),
            "at": turn(instants),
            "at_ns": turn(nanos.to_list()),
        },
        schema={**WIDE.polars(), "at_ns": pl.Int64()},
        strict=True,
    )
    return stamped(frame.with_columns(pl.col("at_ns").cast(pl.Datetime("ns", "UTC"))))


def differences(left: pl.DataFrame, right: pl.DataFrame, key: Sequence[str]) -> list[str]:
    """Return what differs, in words: shape, types, and values down to the sign of zero; none when all is equal."""
    if left.schema != right.schema:
        return [f"{left.schema} is not {right.schema}"]
    if left.height != right.height:
        return [f"{left.height} rows are not {right.height}"]
    left, right = left.sort(key), right.sort(key)
    found = []
    for name in left.columns:
        a, b = left[name], right[name]
        same = a.eq_missing(b)
        if a.dtype.is_float():
            same = same & (a.ne_missing(pl.Series([0.0] * len(a), dtype=a.dtype)) | (1 / a).eq_missing(1 / b))
        for row in same.not_().arg_true():
            found.append(f"{name}: {a[row]!r} is not {b[row]!r}")
    return found
