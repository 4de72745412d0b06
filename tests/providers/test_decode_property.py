"""Whatever rows a provider holds, in whatever shape it writes them, the same rows come out of decoder and gate."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zipfile
from datetime import UTC, datetime, timedelta

import polars as pl
from hypothesis import given, settings
from hypothesis import strategies as st

from marketsync.definition import Dataset
from marketsync.gate import seal
from providers.decode import Decoder

SCHEMA = {
    "s": {"as": "symbol", "type": "str"},
    "t": {"as": "ts", "type": "datetime"},
    "o": {"as": "open", "type": "f64"},
    "v": {"as": "volume", "type": "i64"},
    "b": {"as": "halted", "type": "bool"},
    "n": {"as": "note", "type": "str"},
}
RAW = list(SCHEMA)
KEY = ["symbol", "ts"]
EPOCH = datetime(2000, 1, 1, tzinfo=UTC)

# What breaks readers that look for brackets, separators, words or escapes in the bytes.
hostile = st.sampled_from(
    [
        '"',
        "\\",
        "},{",
        '"rows":[1]',
        "]}",
        "[",
        "]",
        "true",
        "false",
        "null",
        "NA",
        "007",
        "\n",
        ",",
        "é",
        "中文",
        "😀",
        "\u2028",
    ]
)
texts = st.lists(hostile | st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=5), max_size=4).map("".join)
symbols = texts.filter(bool)
times = st.integers(0, 10**9).map(lambda seconds: EPOCH + timedelta(seconds=seconds))
floats = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False),
    st.integers(-(2**53) + 1, 2**53 - 1).map(float),
    st.sampled_from([0.0, 1.0, -0.0, 5e-324, 1.7976931348623157e308]),
)
wholes = st.integers(-(2**63), 2**63 - 1) | st.sampled_from([0, 1, 2**53, 2**53 + 1, -(2**53) - 1])


@st.composite
def rows(draw) -> list[tuple]:
    keys = draw(st.lists(st.tuples(symbols, times), unique=True, max_size=12))
    return [
        (
            symbol,
            moment,
            draw(st.none() | floats),
            draw(st.none() | wholes),
            draw(st.none() | st.booleans()),
            draw(st.none() | texts),
        )
        for symbol, moment in keys
    ]


def written(rows: list[tuple]) -> list[dict]:
    return [
        {**dict(zip(RAW, row, strict=True)), "t": row[1].strftime("%Y-%m-%dT%H:%M:%SZ"), "unused": [1, {"x": True}]}
        for row in rows
    ]


def dataset(**response) -> Dataset:
    return Dataset.model_validate({"response": response, "schema": SCHEMA, "key": KEY})


def read(spec: Dataset, body: bytes) -> list[tuple]:
    decoder = Decoder(spec)
    first = seal(spec, [decoder.rows(decoder.open(body))])
    again = seal(spec, [decoder.rows(decoder.open(body))])  # with what the decoder has learned
    assert first.quarantined == 0, first.rejected.to_dicts()
    assert first.duplicates == 0
    assert again.frame.equals(first.frame)
    return first.frame.rows()


def same(found: list[tuple], expected: list[tuple]) -> None:
    assert sorted(found, key=repr) == sorted(expected, key=repr)


spacing = st.sampled_from([{"separators": (",", ":")}, {}, {"indent": 1}])
ascii_only = st.booleans()


@given(rows(), spacing, ascii_only, st.booleans())
@settings(max_examples=75)
def test_records(rows: list[tuple], spaced: dict, ascii_: bool, after: bool) -> None:
    envelope = {"status": "OK", "data": {"rows": written(rows), "tags": ["]", "x"]}, "next": None}
    if after:
        envelope["links"] = [{"rows": [1]}]
    body = json.dumps(envelope, ensure_ascii=ascii_, **spaced).encode()
    same(read(dataset(rows="data.rows"), body), rows)


@given(rows(), spacing)
@settings(max_examples=30)
def test_records_that_are_the_whole_body(rows: list[tuple], spaced: dict) -> None:
    same(read(dataset(), json.dumps(written(rows), **spaced).encode()), rows)


@given(rows(), spacing, st.permutations(RAW), st.booleans(), st.booleans())
@settings(max_examples=50)
def test_a_table_is_read_by_name_whatever_the_order_of_its_columns(
    rows: list[tuple], spaced: dict, order: list[str], objects: bool, names_first: bool
) -> None:
    names = [{"name": name, "type": "?"} for name in order] if objects else order
    items = [[record[name] for name in order] for record in written(rows)]
    parts = {"items": items, "has_more": False, "fields": names}
    if names_first:
        parts = dict(reversed(parts.items()))
    body = json.dumps({"data": parts}, **spaced).encode()
    same(read(dataset(rows="data.items", columns="data.fields"), body), rows)


@given(rows(), spacing, st.integers(0, 2))
@settings(max_examples=40)
def test_arrays_by_position_may_hold_more_than_is_named(rows: list[tuple], spaced: dict, extra: int) -> None:
    names = ["skipped", *RAW]
    items = [[{"x": 1}, *(record[name] for name in RAW), *[[]] * extra] for record in written(rows)]
    body = json.dumps({"result": items}, **spaced).encode()
    same(read(dataset(rows="result", names=names), body), rows)


@given(rows(), spacing, st.booleans())
@settings(max_examples=50)
def test_lists_and_records_by_key(rows: list[tuple], spaced: dict, single: bool) -> None:
    keyed: dict[str, object] = {}
    if single:
        rows = list({row[0]: row for row in rows}.values())
    for record in written(rows):
        name = record.pop("s")
        if single:
            keyed[name] = record
        else:
            keyed.setdefault(name, []).append(record)  # type: ignore[attr-defined]
    body = json.dumps({"bars": keyed, "next_page_token": "]}"}, **spaced).encode()
    same(read(dataset(rows="bars.*", key_as="s"), body), rows)
    same(read(dataset(rows="*", key_as="s"), json.dumps(keyed, **spaced).encode()), rows)


@given(rows(), spacing)
@settings(max_examples=40)
def test_columns_with_nulls(rows: list[tuple], spaced: dict) -> None:
    columns = {name: [record[name] for record in written(rows)] for name in RAW}
    body = json.dumps({"chart": {"result": [columns], "error": None}}, **spaced).encode()
    same(read(dataset(rows="chart.result.0", shape="columns"), body), rows)


@given(rows(), st.sampled_from([",", ";", "|", "\t"]), st.booleans(), st.sampled_from(["\n", "\r\n"]), st.booleans())
@settings(max_examples=75)
def test_csv(rows: list[tuple], delimiter: str, header: bool, line_end: str, quoted: bool) -> None:
    # an empty field is a missing value: CSV cannot tell it from an empty text
    rows = [(*row[:5], row[5] or None) for row in rows]
    out = io.StringIO(newline="")
    quoting = csv.QUOTE_ALL if quoted else csv.QUOTE_MINIMAL
    writer = csv.writer(out, delimiter=delimiter, lineterminator=line_end, quoting=quoting)
    if header:
        writer.writerow(RAW)
    for record in written(rows):
        writer.writerow(["" if record[name] is None else record[name] for name in RAW])
    response = {"format": "csv", "delimiter": delimiter, "header": header, **({} if header else {"names": RAW})}
    same(read(dataset(**response), out.getvalue().encode()), rows)


@given(rows())
@settings(max_examples=25)
def test_numbers_written_as_text_are_the_same_numbers(rows: list[tuple]) -> None:
    def quoted(value: object) -> str | None:
        return None if value is None else repr(value)

    records = [{**record, "o": quoted(record["o"]), "v": quoted(record["v"])} for record in written(rows)]
    same(read(dataset(rows="rows"), json.dumps({"rows": records}).encode()), rows)


@given(rows(), st.lists(st.integers(0, 11), max_size=3))
@settings(max_examples=30)
def test_packed_bodies_of_one_or_several_members(rows: list[tuple], cuts: list[int]) -> None:
    whole = json.dumps({"rows": written(rows)}).encode()
    same(read(dataset(rows="rows"), gzip.compress(whole)), rows)
    edges = sorted({0, len(rows), *(cut for cut in cuts if cut < len(rows))})
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for number, (start, end) in enumerate(zip(edges, edges[1:] or [0], strict=False)):
            archive.writestr(f"{number}.json", json.dumps({"rows": written(rows[start:end])}))
    same(read(dataset(rows="rows"), packed.getvalue()), rows)


junk = st.sampled_from([True, False, 2.7, 1e300, "x", [1], {"a": 1}, 10**30])


@given(rows(), st.data())
@settings(max_examples=60)
def test_one_bad_value_sets_aside_its_row_and_no_other(rows: list[tuple], data: st.DataObject) -> None:
    records = written(rows)
    bad = data.draw(st.sets(st.integers(0, max(0, len(rows) - 1)), max_size=3)) if rows else set()
    for index in bad:
        records[index]["v"] = data.draw(junk)
    spec = dataset(rows="rows")
    decoder = Decoder(spec)
    for _ in range(2):
        gated = seal(spec, [decoder.rows(decoder.open(json.dumps({"rows": records}).encode()))])
        assert gated.quarantined == len(bad)
        assert gated.fetched == len(rows) == gated.kept + gated.quarantined
        same(gated.frame.rows(), [row for index, row in enumerate(rows) if index not in bad])
        raws = [json.loads(raw) for raw in gated.rejected["raw"]]
        assert {(raw["s"], raw["t"]) for raw in raws} == {(records[i]["s"], records[i]["t"]) for i in bad}
        assert gated.rejected["column"].to_list() == ["volume"] * len(bad)


def test_two_thousand_rows_take_the_fast_path_and_equal_the_slow_one(monkeypatch) -> None:
    start = datetime(2024, 1, 1, tzinfo=UTC)
    rows = [(f"S{i % 7}", start + timedelta(minutes=i), i / 8, i, i % 3 == 0, f"n{i}") for i in range(2000)]
    spec = dataset(rows="rows")
    body = json.dumps({"rows": written(rows)}).encode()
    fast = Decoder(spec)
    taken = seal(spec, [fast.rows(fast.open(body))]).frame
    monkeypatch.setattr(Decoder, "_fast_records", lambda *_: None)
    monkeypatch.setattr(Decoder, "_strict_records", lambda *_: None)
    slow = Decoder(spec)
    assert taken.equals(seal(spec, [slow.rows(slow.open(body))]).frame)
    assert taken.height == 2000
    assert isinstance(taken, pl.DataFrame)
