"""What fingerprints say, computed here by Python's integers from the words of `storage/fingerprints.py`; what differs
between two tables that they must not miss; and what they cost in memory. That every engine gives the same integers is
in the conformance suite."""

from __future__ import annotations

import hashlib
import math
import random
import secrets
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from fractions import Fraction
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stored_frames import BARS, INSTRUMENTS, SESSIONS, START, WIDE, bars, batch, hostile, stamped

from marketsync.errors import ConfigurationError, SchemaError
from marketsync.schema import Column, ColumnType, Period, Schema
from storage.fingerprints import Recipe, of_rows, plan
from storage.parquet import CAPABILITIES as EVERYTHING
from storage.protocol import Mode
from storage.registry import open_store

ROOT = Path(__file__).parents[2]
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def computed(frame: pl.DataFrame, schema: Schema, recipe: Recipe) -> pl.DataFrame:
    """Return the fingerprints of a frame in memory."""
    return of_rows(frame.lazy(), "made.x", schema, recipe)


def counted(value, type_: ColumnType, scale: float) -> int | None:
    """Return what a value of `to_physical` counts as."""
    if value is None:
        return None
    if type_ is ColumnType.STR:
        return int(hashlib.md5(value.encode()).hexdigest()[:15], 16)
    if type_ not in (ColumnType.F32, ColumnType.F64):
        return int(value)
    for step in range(4):
        if math.isfinite(value) and abs(value) <= 9e14 / (scale * 2.0 ** (-20 * step)):
            return math.floor(value * (scale * 2.0 ** (-20 * step)) + 0.5) + step * 2**51
    odd = [math.isnan(value), value == math.inf, value == -math.inf, value > 0, value < 0]
    return 2**60 + odd.index(True)


def by_hand(frame: pl.DataFrame, schema: Schema, recipe: Recipe) -> list[tuple]:
    """Return the rows of the fingerprints, by integers of any size."""
    made = plan("made.x", recipe, schema)
    physical = frame.with_columns(
        pl.col(c.name).to_physical() for c in schema.columns if c.type not in (ColumnType.STR, ColumnType.BOOL)
    )
    groups = defaultdict(list)
    for row, counts in zip(frame.iter_rows(named=True), physical.iter_rows(named=True), strict=True):
        each = zip(made.columns, made.scales, strict=True)
        numbers = [counted(counts[c.name], c.type, scale) for c, scale in each]
        groups[segment_of(row, schema, recipe.period)].append(numbers)
    found = []
    for segment, rows in groups.items():
        hashed = 0
        for row in rows:
            parts = [made.null if v is None else v % made.modulus for v in row]
            line = sum(k * part for k, part in zip(made.keys, parts, strict=True)) % made.modulus
            hashed += line**2 % made.modulus
        sums = [sum(v or 0 for v in column) for column in zip(*rows, strict=True)]
        wrapped = [(total + 2**63) % 2**64 - 2**63 for total in sums]
        found.append((*segment, len(rows), hashed, *wrapped))
    return sorted(found, key=lambda row: (row[0], row[1] or date.min))


def segment_of(row: dict, schema: Schema, period: Period) -> tuple[str, date | None]:
    subject = row[schema.subject] if schema.subject else "*"
    at = row[schema.time] if schema.time else None
    if period is Period.NONE or at is None:
        return subject, None
    return subject, date(at.year, 1 if period is Period.YEAR else at.month, at.day if period is Period.DAY else 1)


@pytest.mark.parametrize("period", list(Period))
def test_fingerprints_are_the_integers_that_their_definition_says(period: Period):
    frame = hostile(EVERYTHING)
    frame = pl.concat([frame, frame.with_columns(day=pl.col("day") + timedelta(days=3), small=pl.lit(7, pl.Int32()))])
    for scales in ({}, {"double": 1.0, "single": 1e15}):
        recipe = Recipe(secrets.token_bytes(16), period, scales=scales)
        found = computed(frame, WIDE, recipe)
        assert found.columns == [
            "subject",
            "segment",
            "rows",
            "hash",
            *(f"sum({n})" for n in WIDE.names if n != "name"),
        ]
        assert found.rows() == by_hand(frame, WIDE, recipe)


def test_tables_without_subject_or_time_have_fingerprints_too():
    recipe = Recipe(b"seed", Period.MONTH)
    instruments = pl.DataFrame({"code": ["a", "b"], "name": ["A", None], "lot": [1, 100]}, INSTRUMENTS.polars())
    assert computed(instruments, INSTRUMENTS, recipe).rows() == by_hand(instruments, INSTRUMENTS, recipe)
    assert computed(instruments, INSTRUMENTS, recipe).select("subject", "segment", "rows").rows() == [("*", None, 2)]
    sessions = pl.DataFrame(
        {"day": [date(1969, 12, 31), date(1970, 1, 1), date(1970, 1, 2)], "open": [True, False, None]},
        SESSIONS.polars(),
    )
    assert computed(sessions, SESSIONS, recipe).rows() == by_hand(sessions, SESSIONS, recipe)
    assert computed(sessions, SESSIONS, recipe)["segment"].to_list() == [date(1969, 12, 1), date(1970, 1, 1)]
    assert computed(sessions.clear(), SESSIONS, recipe).height == 0


def test_more_columns_than_one_sum_of_64_bits_holds():
    names = [f"c{number}" for number in range(40)]
    schema = Schema((Column("code", ColumnType.STR), *(Column(name, ColumnType.I64) for name in names)), ("code",))
    frame = pl.DataFrame({"code": ["a", "b"], **{name: [-(2**63), 2**63 - 1] for name in names}}, schema.polars())
    recipe = Recipe(b"seed", Period.NONE)
    assert computed(frame, schema, recipe).rows() == by_hand(frame, schema, recipe)


def test_the_order_of_rows_and_the_sign_of_zero_do_not_matter():
    recipe = Recipe(b"seed")
    frame = bars().with_columns(close=pl.when(pl.col("volume") % 3 == 0).then(0.0).otherwise(pl.col("close")))
    other = frame.sample(fraction=1, shuffle=True, seed=1).with_columns(
        close=pl.when(pl.col("close") == 0).then(-0.0).otherwise(pl.col("close"))
    )
    assert computed(frame, BARS, recipe).equals(computed(other, BARS, recipe))


FLOATS = st.floats(-1e24, 1e24)


@given(FLOATS, st.one_of(FLOATS, st.floats(-1e-7, 1e-7)), st.booleans())
def test_floats_with_one_fingerprint_differ_by_less_than_was_said(first: float, other: float, near: bool):
    second = first + other if near else other
    one, two = (
        computed(pl.DataFrame({"symbol": ["a"], "ts": [START], "close": [x], "volume": [1]}, BARS.polars()), BARS, R)
        for x in (first, second)
    )
    if one.equals(two):
        assert abs(Fraction(first) - Fraction(second)) < max(
            Fraction(1, 10**8), Fraction(abs(first)) * Fraction("1.2e-9")
        )
    else:
        assert first != second


R = Recipe(b"seed")


@pytest.mark.parametrize(
    ("recipe", "error", "says"),
    [
        (Recipe(b"s", columns=["clse"]), SchemaError, "'clse'.*symbol, ts, close, volume"),
        (Recipe(b"s", scales={"clse": 10}), SchemaError, "'clse'"),
        (Recipe(b"s", scales={"volume": 10}), SchemaError, "'volume' is i64"),
        (Recipe(b"s", scales={"close": 0.01}), ConfigurationError, "0.01.*between 1 and 1e"),
        (Recipe(b"s", scales={"close": math.nan}), ConfigurationError, "nan"),
        (Recipe(b""), ConfigurationError, "seed"),
    ],
)
def test_a_recipe_that_cannot_be_meant_is_refused(recipe: Recipe, error: type[Exception], says: str):
    with pytest.raises(error, match=says):
        computed(bars(), BARS, recipe)


def test_only_the_columns_asked_for_are_compared_with_the_key_and_the_time_always():
    recipe = Recipe(b"seed", columns=["volume"])
    assert computed(bars(), BARS, recipe).columns[4:] == ["sum(ts)", "sum(volume)"]
    assert computed(bars(), BARS, recipe).equals(computed(bars(add=5.0), BARS, recipe))
    assert not computed(bars(), BARS, recipe).equals(computed(bars(first=1), BARS, recipe))


def test_a_larger_scale_tells_what_a_smaller_one_takes_as_equal():
    near = bars().with_columns(close=pl.col("close") + 0.001)
    assert computed(bars(), BARS, Recipe(b"s", scales={"close": 10})).equals(
        computed(near, BARS, Recipe(b"s", scales={"close": 10}))
    )
    assert not computed(bars(), BARS, R).equals(computed(near, BARS, R))


# what must never be missed

NOTED = Schema(
    (
        Column("symbol", ColumnType.STR, nullable=False),
        Column("ts", ColumnType.DATETIME_NS, nullable=False),
        *(Column(name, ColumnType.F64) for name in ("open", "high", "low", "close")),
        Column("volume", ColumnType.I64),
        Column("note", ColumnType.STR),
    ),
    ("symbol", "ts"),
    "ts",
    "symbol",
)
ROWS = 60
TRIALS = 500
Rows = dict[str, list]  # a column each


def series(chance: random.Random) -> Rows:
    """Return the bars of one subject, of one day."""
    start = (START - EPOCH) // timedelta(microseconds=1) * 1000
    price = chance.uniform(1, 500)
    rows: Rows = {name: [] for name in NOTED.names[1:]}
    for minute in range(ROWS):
        price = max(0.01, price + chance.gauss(0, price / 500))
        shown = round(price, 2)
        for name, value in zip(
            rows,
            [start + minute * 60 * 10**9, shown, shown + 0.05, shown - 0.05, round(shown + 0.01, 2), minute * 100, ""],
            strict=True,
        ):
            rows[name].append(value)
    return rows


def one_cell(rows: Rows, chance: random.Random) -> None:
    rows[chance.choice(["open", "high", "low", "close"])][chance.randrange(ROWS)] += chance.choice([0.01, -1e-6, 1e9])


def up_in_one_row_and_down_in_another(rows: Rows, chance: random.Random) -> None:
    a, b = chance.sample(range(ROWS), 2)
    by = chance.choice([1, 1_000, 2**31 - 1, 2**40])
    rows["volume"][a] += by
    rows["volume"][b] -= by


def values_of_two_rows_swapped(rows: Rows, chance: random.Random) -> None:
    a, b = chance.sample(range(ROWS), 2)
    for name in ("open", "high", "low", "close", "volume"):
        rows[name][a], rows[name][b] = rows[name][b], rows[name][a]


def one_column_of_two_rows_swapped(rows: Rows, chance: random.Random) -> None:
    a, b = chance.sample(range(ROWS), 2)
    rows["volume"][a], rows["volume"][b] = rows["volume"][b], rows["volume"][a]


def shifted_by_one_bar(rows: Rows, chance: random.Random) -> None:
    for name in ("open", "high", "low", "close", "volume"):
        rows[name] = rows[name][-1:] + rows[name][:-1]


def a_row_more(rows: Rows, chance: random.Random) -> None:
    for name, values in rows.items():
        values.append(values[-1] if name != "ts" else values[-1] + 60 * 10**9)


def a_row_twice(rows: Rows, chance: random.Random) -> None:
    at = chance.randrange(ROWS)
    for values in rows.values():
        values += [values[at]] * 2


def a_row_less(rows: Rows, chance: random.Random) -> None:
    at = chance.randrange(ROWS)
    for values in rows.values():
        del values[at]


def two_times_moved_within_a_second(rows: Rows, chance: random.Random) -> None:
    a, b = chance.sample(range(ROWS), 2)
    rows["ts"][a] += 1
    rows["ts"][b] -= 1


def null_instead_of_zero(rows: Rows, chance: random.Random) -> None:
    rows["volume"][0] = None


def null_instead_of_no_text(rows: Rows, chance: random.Random) -> None:
    rows["note"][chance.randrange(ROWS)] = None


def nan_instead_of_a_price(rows: Rows, chance: random.Random) -> None:
    rows["close"][chance.randrange(ROWS)] = chance.choice([math.nan, math.inf, -math.inf, None])


CORRUPTIONS = [
    one_cell,
    up_in_one_row_and_down_in_another,
    values_of_two_rows_swapped,
    one_column_of_two_rows_swapped,
    shifted_by_one_bar,
    a_row_more,
    a_row_twice,
    a_row_less,
    two_times_moved_within_a_second,
    null_instead_of_zero,
    null_instead_of_no_text,
    nan_instead_of_a_price,
]


@pytest.mark.parametrize("corrupt", CORRUPTIONS)
def test_no_corruption_is_missed(corrupt: Callable[[Rows, random.Random], None]):
    chance = random.Random(corrupt.__name__)
    before, after = ({name: [] for name in NOTED.names} for _ in range(2))
    for trial in range(TRIALS):
        rows = series(chance)
        add(before, trial, rows)
        corrupt(rows, chance)
        add(after, trial, rows)
    recipe = Recipe(secrets.token_bytes(16), Period.MONTH)
    types = {**NOTED.polars(), "ts": pl.Int64()}
    one, other = (
        computed(pl.DataFrame(each, types).cast({"ts": NOTED.polars()["ts"]}), NOTED, recipe)
        for each in (before, after)
    )
    assert one.height == TRIALS
    assert one.select("subject", "segment").equals(other.select("subject", "segment"))
    # by the hash alone, in which all of this is seen by chance, and most in the counts and sums without fail
    assert one["subject"].filter(one["hash"] == other["hash"]).to_list() == [], recipe.seed


def add(table: Rows, trial: int, rows: Rows) -> None:
    table["symbol"] += [f"S{trial}"] * len(rows["ts"])
    for name, values in rows.items():
        table[name] += values


# what it costs

MEASURED = """
import sys
from marketsync.schema import Period
from storage.fingerprints import Recipe
from storage.registry import open_store
store = open_store(sys.argv[1])
store.scan("made.bars").head(1).collect()
def peak():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
assert store.fingerprints("made.bars", Recipe(b"seed", Period.YEAR)).height
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("scheme", ["csv", "delta", "parquet"])
def test_memory_does_not_grow_with_the_table(tmp_path: Path, scheme: str):
    store = open_store(f"{scheme}://{tmp_path}")
    store.ensure("made.bars", BARS)
    minute = pl.int_range(100_000).cast(pl.Duration("us")) * 60_000_000
    size = 0
    for seq in range(1, 41):
        time = (pl.lit(START) + minute).cast(pl.Datetime("us", "UTC"))
        prices = (pl.int_range(100_000) / 100).alias("close")
        part = stamped(
            pl.select(pl.lit(f"S{seq}").alias("symbol"), time.alias("ts"), prices, volume=prices.cast(pl.Int64))
        )
        size += part.select(BARS.names).estimated_size()
        store.write(batch("made.bars", part, seq, mode=Mode.APPEND))
    store.close()
    command = [sys.executable, "-c", MEASURED, f"{scheme}://{tmp_path}"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(said.stdout) < size
