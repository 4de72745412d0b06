"""Reading answers: what is exact is read fast, what is not is set aside alone, what is no answer is told."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from datetime import UTC, date, datetime
from pathlib import Path

import pytest

import providers.decode as decode
from marketsync.definition import Dataset
from marketsync.gate import Gated, seal
from providers.decode import Decoder, Malformed, Unexpected, unpack, walk

RECORDED = Path(__file__).resolve().parents[3] / "shared" / "data"


def dataset(schema: dict, key: list[str], **response) -> Dataset:
    return Dataset.model_validate({"response": response, "schema": schema, "key": key})


NUMBERS = dataset({"k": "str", "x": "f64", "n": "i64"}, ["k"], rows="rows")


def read(spec: Dataset, body: bytes | str, constants: dict | None = None) -> Gated:
    decoder = Decoder(spec)
    data = body.encode() if isinstance(body, str) else body
    return seal(spec, [decoder.rows(decoder.open(data), constants)])


def rows_of(spec: Dataset, body: bytes | str) -> list[tuple]:
    return read(spec, body).frame.rows()


def recorded(path: str) -> dict:
    file = RECORDED / path
    if not file.exists():
        pytest.skip(f"the recorded answer {path} is not on this machine")
    document = json.loads(file.read_text())
    return document.get("body", document)


# ---------------------------------------------------------------- what a fast parser corrupts in silence


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("2.7", "2.7 is not a whole number"),
        ("true", "true where a number is expected"),
        ("false", "false where a number is expected"),
        ("9223372036854775808", "is not a whole number that fits i64"),
        ('"1.5"', "'1.5' is not a whole number"),
        ('"many"', "'many' is not a whole number"),
        ("[1]", "a list where a number is expected"),
        ('{"a": 1}', "an object where a number is expected"),
        ("1e30", "is not a whole number"),
    ],
)
def test_a_value_that_is_no_whole_number_sets_aside_its_row_only(value: str, reason: str) -> None:
    gated = read(NUMBERS, '{"rows": [{"k": "a", "x": 9, "n": 5}, {"k": "b", "x": 9, "n": ' + value + "}]}")
    assert gated.frame.rows() == [("a", 9.0, 5)]
    assert reason in gated.rejected["reason"][0]
    assert gated.rejected["column"].to_list() == ["n"]


def test_true_is_not_read_as_one_among_numbers() -> None:
    gated = read(NUMBERS, '{"rows": [{"k": "a", "x": true, "n": 2}, {"k": "b", "x": 0.5, "n": 3}]}')
    assert gated.frame.rows() == [("b", 0.5, 3)]


def test_large_whole_numbers_are_exact_alone_and_beside_small_ones() -> None:
    body = '{"rows": [{"k": "a", "n": 9007199254740993}, {"k": "b", "n": 1}, {"k": "c", "n": -9223372036854775808}]}'
    assert [row[2] for row in rows_of(NUMBERS, body)] == [9007199254740993, 1, -9223372036854775808]


def test_unsigned_numbers_and_nanoseconds_beyond_a_float_are_exact_on_every_page() -> None:
    spec = dataset({"id": "u64", "t": {"type": "datetime_ns", "format": "unix_ns"}}, ["id"], rows="rows")
    decoder = Decoder(spec)
    for last in range(3):
        ids = [18446744073709551615 - last, 5]
        rows = [{"id": one, "t": 1704205800123456789 + last} for one in ids]
        frame = seal(spec, [decoder.rows(decoder.open(json.dumps({"rows": rows}).encode()))]).frame
        assert frame["id"].to_list() == ids
        assert frame["t"].dt.nanosecond().to_list() == [123456789 + last] * 2


@pytest.mark.parametrize("rest", ["", ', "note": "]"'])
def test_an_unpaired_surrogate_sets_aside_its_row_instead_of_becoming_nul(rest: str) -> None:
    gated = read(NUMBERS, r'{"rows": [{"k": "a\ud83d", "n": 1}, {"k": "b", "n": 2}]' + rest + "}")
    assert gated.frame["k"].to_list() == ["b"]
    assert r"\ud83d" in gated.rejected["raw"][0]


@pytest.mark.parametrize("rest", ["", ', "note": "]"'])
@pytest.mark.parametrize("number", ["1e400", "NaN", "-Infinity"])
def test_a_number_that_is_not_finite_sets_aside_its_row_unless_it_stands_for_a_missing_value(
    number: str, rest: str
) -> None:
    body = '{"rows": [{"k": "a", "x": ' + number + '}, {"k": "b", "x": 2}]' + rest + "}"
    assert rows_of(NUMBERS, body) == [("b", 2.0, None)]
    told = dataset({"k": "str", "x": {"type": "f64", "nulls": ["NaN"]}}, ["k"], rows="rows")
    assert rows_of(told, body) == ([("a", None)] if number == "NaN" else []) + [("b", 2.0)]


def test_rows_that_are_no_objects_are_set_aside() -> None:
    gated = read(NUMBERS, '{"rows": [null, {"k": "a", "n": 1}, 5, "x", [1]]}')
    assert gated.frame["k"].to_list() == ["a"]
    assert gated.rejected["raw"].to_list() == ["null", "5", '"x"', "[1]"]


def test_a_column_without_its_field_is_null_and_named() -> None:
    decoder = Decoder(NUMBERS)
    batch = decoder.rows(decoder.open(b'{"rows": [{"k": "a", "n": 1}, {"k": "b", "n": 2}]}'))
    assert batch.absent == ("x",)
    batch = decoder.rows(decoder.open(b'{"rows": [{"k": "a", "x": null, "n": 1}]}'))
    assert batch.absent == ()


def test_rows_that_all_lack_a_key_field_are_no_rows_of_this_dataset() -> None:
    with pytest.raises(Unexpected, match="no row of the answer has the field k"):
        read(NUMBERS, '{"rows": [{"symbol": "a", "n": 1}]}')


def test_one_row_that_lacks_a_key_field_is_set_aside() -> None:
    gated = read(NUMBERS, '{"rows": [{"k": "a", "n": 1}, {"n": 1}]}')
    assert (gated.kept, gated.quarantined) == (1, 1)


def test_numbers_in_text_are_learned_and_then_read_fast() -> None:
    decoder = Decoder(NUMBERS)
    body = b'{"rows": [{"k": "a", "x": "1.50", "n": "7"}]}'
    assert seal(NUMBERS, [decoder.rows(decoder.open(body))]).frame.row(0) == ("a", 1.5, 7)
    assert decoder._fast_records(b'[{"k": "a", "x": "1.50", "n": "7"}]') is not None
    assert seal(NUMBERS, [decoder.rows(decoder.open(body.replace(b'"7"', b"8")))]).frame.row(0) == ("a", 1.5, 8)


def test_text_columns_take_numbers_as_they_are_written() -> None:
    assert rows_of(dataset({"cik": "str"}, ["cik"]), '[{"cik": 320193}, {"cik": "0000320193"}]') == [
        ("320193",),
        ("0000320193",),
    ]


# ---------------------------------------------------------------- the envelope


def test_opening_keeps_the_rest_of_the_body_and_does_not_show_the_rows() -> None:
    opened = Decoder(NUMBERS).open(b'{"code": 0, "rows": [{"k": "a"}], "meta": {"next": "x"}}')
    assert opened.document == {"code": 0, "rows": decode.UNREAD, "meta": {"next": "x"}}
    assert walk(opened.document, "rows.0.k") is decode.UNREAD


@pytest.mark.parametrize(
    "body",
    [
        '{"note": "\\"rows\\": [1", "rows": [{"k": "a", "n": 1}], "tags": ["x"]}',
        '{"inner": {"rows": [9]}, "rows": [{"k": "a", "n": 1}]}',
        '{"rows": [{"k": "a", "n": 1}], "inner": {"rows": [[9]]}}',
        '{"rows": [{"k": "a", "n": 1}], "note": "]"}',
        '\n{ "rows" :\t[ {"k": "a", "n": 1} ] }\n',
        '\ufeff{"rows": [{"k": "a", "n": 1}]}',
    ],
)
def test_the_rows_are_found_whatever_else_looks_like_them(body: str) -> None:
    assert rows_of(NUMBERS, body) == [("a", None, 1)]


def test_rows_elsewhere_are_not_taken_for_the_rows() -> None:
    assert read(NUMBERS, '{"inner": {"rows": [{"k": "z", "n": 9}]}, "rows": null}').fetched == 0
    with pytest.raises(Unexpected, match="no 'rows'"):
        read(NUMBERS, '{"inner": {"rows": [{"k": "z", "n": 9}]}}')


@pytest.mark.parametrize("rows", ["[]", '[{"k": "a"}]', '[{"k": 5}]', '[{"k": []}]', "[null]"])
@pytest.mark.parametrize("shape", ["records", "arrays", "keyed"])
def test_what_stands_between_the_rows_and_a_later_list_is_kept(rows: str, shape: str) -> None:
    how = {"records": {"rows": "rows"}, "arrays": {"rows": "rows", "names": ["k"]}, "keyed": {"rows": "rows.*"}}[shape]
    if shape == "keyed":
        rows = '{"x": ' + rows + "}"
    decoder = Decoder(dataset({"k": "str"}, ["k"], **how))
    for after in ('"tags": ["x"]', '"tags": []', '"tags": {"x": [1]}', '"more": [{"k": "z"}]', '"x": {"y": [{}]}'):
        document = decoder.open(('{"rows": ' + rows + ', "code": 7, "next": "t", ' + after + "}").encode()).document
        assert (document["code"], document["next"]) == (7, "t")
        assert len(document) == 4


def test_the_names_of_a_table_can_stand_after_its_rows() -> None:
    spec = dataset({"k": "str", "n": "i64"}, ["k"], rows="t.data", columns="t.columns")
    body = '{"t": {"data": [["a", 1], ["b", 2]], "columns": [{"name": "k"}, {"name": "n"}]}, "meta": {"next": null}}'
    assert rows_of(spec, body) == [("a", 1), ("b", 2)]


@pytest.mark.parametrize("columns_last", [True, False])
def test_a_decoder_learns_where_rows_end_and_never_depends_on_it(columns_last: bool) -> None:
    spec = dataset({"k": "str", "n": "i64"}, ["k"], rows="data", columns="columns")
    decoder = Decoder(spec)
    parts = {"columns": ["k", "n"], "data": [["a", 1], ["b", 2]]}
    usual = json.dumps(dict(reversed(parts.items())) if columns_last else parts).encode()
    odd = json.dumps({"data": [["]]", 1]], "columns": ["k", "n"], "tags": [["x"]]}).encode()
    for body in (usual, usual, odd, usual, odd, odd, usual):
        rows = seal(spec, [decoder.rows(decoder.open(body))]).frame.rows()
        assert rows == ([("a", 1), ("b", 2)] if body is usual else [("]]", 1)])


def test_each_member_of_a_zip_has_its_own_names() -> None:
    spec = dataset({"k": "str", "n": "i64"}, ["k"], rows="items", columns="names")
    body = zipped(
        a=json.dumps({"names": ["k", "n"], "items": [["a", 1]]}),
        b=json.dumps({"names": ["n", "k"], "items": [[2, "b"]]}),
    )
    assert rows_of(spec, body) == [("a", 1), ("b", 2)]


def test_an_answer_that_is_nested_beyond_reason_is_a_broken_answer_and_nothing_worse() -> None:
    with pytest.raises(Malformed, match="not valid JSON"):
        read(NUMBERS, '{"rows": ' + "[" * 100_000 + "]" * 100_000 + "}")


def test_null_for_the_rows_is_nothing_and_no_rows_at_all_is_an_error_with_its_remedy() -> None:
    assert read(NUMBERS, '{"rows": null}').fetched == 0
    told = dataset({"k": {"type": "str", "value": "$symbol"}, "n": "i64"}, ["k"], rows="rows")
    assert read(told, '{"rows": null}', {"k": "IBM"}).fetched == 0
    assert read(NUMBERS, '{"rows": []}').fetched == 0
    with pytest.raises(Unexpected, match=r"when: \{path: \{rows: null\}\}, then: empty"):
        read(NUMBERS, '{"error": "no such thing"}')


def test_an_empty_object_around_the_rows_is_nothing() -> None:
    spec = dataset({"id": "str"}, ["id"], rows="actions.dividends")
    assert read(spec, '{"actions": {}, "next": null}').fetched == 0
    for body in ('{"actions": {"splits": []}}', '{"actions": null}', "{}"):
        with pytest.raises(Unexpected):
            read(spec, body)


def test_a_path_that_is_not_there_is_told_with_the_keys_that_are_and_the_remedy_before_the_answer() -> None:
    spec = dataset({"k": "str"}, ["k"], rows="data.items")
    with pytest.raises(Unexpected) as told:
        read(spec, json.dumps({"data": {"rows": [{"k": "a"}], "count": 1}, "filler": "x" * 500}))
    message = str(told.value)
    assert message.startswith(
        "the answer holds no 'data.items': it has filler, data, and in data: rows, count; name the"
    )
    assert told.value.field == "response.rows"
    assert message.index("then: empty}") < message.index("It begins")


def test_a_whole_body_that_is_no_list_is_told_as_such() -> None:
    whole = dataset({"k": "str"}, ["k"])
    assert rows_of(whole, '[{"k": "a"}]') == [("a",)]
    with pytest.raises(
        Unexpected, match="the answer is not a list of rows, but an object: it has items, next; name the"
    ):
        read(whole, '{"items": [{"k": "a"}], "next": null}')
    with pytest.raises(Unexpected, match="the answer is not a list of rows, but text"):
        read(whole, '"none"')


@pytest.mark.parametrize("body", ['{"rows": {"a": 1}}', '{"rows": "none"}', '{"rows": 5}'])
def test_rows_of_another_kind_are_unexpected(body: str) -> None:
    with pytest.raises(Unexpected, match="rows is not a list"):
        read(NUMBERS, body)


@pytest.mark.parametrize(
    "body",
    ["", "  ", "<html>", '{"rows": [{"k": "a"}', '{"rows": [{"k": "a"}]', '{"rows": [{"k": Na}]}', "{'rows': []}"],
)
def test_a_body_that_is_cut_off_or_no_json_is_malformed(body: str) -> None:
    with pytest.raises(Malformed):
        read(NUMBERS, body)


def test_walking_takes_names_and_positions() -> None:
    document = {"chart": {"result": [{"a": 1}]}, "null": None}
    assert walk(document, "chart.result.0.a") == 1
    assert walk(document, "chart.result.1.a") is None
    assert walk(document, "null.x") is None
    assert walk([{"a": 2}], "0.a") == 2
    assert walk(document, "") == document


# ---------------------------------------------------------------- shapes of real providers


def test_columns_without_a_match_in_the_table_are_told() -> None:
    spec = dataset({"ts_code": "str", "vol": "f64"}, ["ts_code"], rows="data.items", columns="data.fields")
    assert rows_of(spec, '{"data": {"fields": ["vol", "ts_code"], "items": [[1, "a"]]}}') == [("a", 1.0)]
    with pytest.raises(Unexpected, match="no column ts_code; it has vol"):
        read(spec, '{"data": {"fields": ["vol"], "items": [[1]]}}')
    with pytest.raises(Unexpected, match=r"no 'data\.items'"):
        read(spec, '{"code": 40203, "data": null}')


def test_a_table_row_of_another_length_is_set_aside() -> None:
    spec = dataset({"a": "str", "b": "i64"}, ["a"], rows="items", columns="names")
    gated = read(spec, '{"names": ["a", "b"], "items": [["x", 1], ["y"], ["z", 1, 2]]}')
    assert gated.frame.rows() == [("x", 1)]
    assert gated.rejected["reason"].to_list() == ["has 1 values where 2 are named", "has 3 values where 2 are named"]


def test_lists_by_key_pass_over_what_is_no_list() -> None:
    spec = dataset(
        {"pair": "str", "t": {"type": "datetime", "format": "unix_s"}, "o": "f64"},
        ["pair", "t"],
        rows="result.*",
        key_as="pair",
        names=["t", "o"],
    )
    body = '{"error": [], "result": {"XXBTZUSD": [[1704205800, "42000.1", 9], [1704205860, "42001"]], "last": 170}}'
    assert rows_of(spec, body) == [
        ("XXBTZUSD", datetime(2024, 1, 2, 14, 30, tzinfo=UTC), 42000.1),
        ("XXBTZUSD", datetime(2024, 1, 2, 14, 31, tzinfo=UTC), 42001.0),
    ]


def test_long_lists_by_key_are_parsed_apart_and_equal_short_ones() -> None:
    spec = dataset({"s": "str", "n": "i64"}, ["s", "n"], rows="bars.*", key_as="s")
    lists = {f"S{i}": [{"n": n, "pad": "x" * 40} for n in range(2000)] for i in range(3)}
    body = json.dumps({"bars": lists, "next": None}).encode()
    assert len(body) > decode._SPLIT_KEYED_BYTES
    decoder = Decoder(spec)
    opened = decoder.open(body)
    assert decoder._split_keyed(opened.pieces[0].part) is not None
    assert decoder.rows(opened).frame.rows() == [(s, float(n)) for s in lists for n in range(2000)]


def test_nested_fields_are_reached_by_dots() -> None:
    spec = dataset({"sym": "str", "last.price": {"as": "price", "type": "f64"}}, ["sym"], rows="tickers")
    body = '{"tickers": [{"sym": "A", "last": {"price": 1.5}}, {"sym": "B", "last": null}, {"sym": "C"}]}'
    assert rows_of(spec, body) == [("A", 1.5), ("B", None), ("C", None)]
    listed = dataset({"sym": "str", "quotes.0.bid": {"as": "bid", "type": "f64"}}, ["sym"], rows="tickers")
    assert rows_of(listed, '{"tickers": [{"sym": "A", "quotes": [{"bid": 2.5}]}]}') == [("A", 2.5)]


def test_columns_of_different_lengths_are_malformed_and_none_are_nothing() -> None:
    spec = dataset({"t": "i64", "quote.0.o": {"as": "o", "type": "f64"}}, ["t"], rows="result.0", shape="columns")
    with pytest.raises(Malformed, match="differ in length"):
        read(spec, '{"result": [{"t": [1, 2], "quote": [{"o": [1]}]}]}')
    assert read(spec, '{"result": [{"meta": 1, "quote": [{}]}]}').fetched == 0
    with pytest.raises(Unexpected, match="no column t"):
        read(spec, '{"result": [{"quote": [{"o": [1]}]}]}')


def test_constants_fill_the_columns_that_have_a_value() -> None:
    spec = dataset({"symbol": {"type": "str", "value": "$symbol"}, "n": "i64"}, ["symbol", "n"], rows="rows")
    frame = read(spec, '{"rows": [{"n": 1}, {"n": 2}]}', {"symbol": "AAPL"}).frame
    assert frame.rows() == [("AAPL", 1), ("AAPL", 2)]


def test_recorded_yahoo_chart() -> None:
    files = sorted((RECORDED / "yahoo" / "http").glob("*chart*")) if RECORDED.exists() else []
    documents = [json.loads(file.read_text()) for file in files if file.suffix == ".json"]
    bodies = [walk(document, "response.bodyJson") for document in documents]
    results = [body for body in bodies if walk(body, "chart.result.0.indicators.quote.0.close")]
    if not results:
        pytest.skip("no recorded chart is on this machine")
    spec = dataset(
        {
            "timestamp": {"as": "ts", "type": "datetime", "format": "unix_s"},
            "indicators.quote.0.close": {"as": "close", "type": "f64"},
        },
        ["ts"],
        rows="chart.result.0",
        shape="columns",
    )
    for body in results:
        gated = read(spec, json.dumps(body))
        closes = walk(body, "chart.result.0.indicators.quote.0.close")
        assert gated.fetched == len(closes)
        assert gated.quarantined == 0
        assert gated.frame["close"].null_count() >= sum(value is None for value in closes) - gated.duplicates


def test_recorded_alpha_vantage_series_by_numbered_keys() -> None:
    body = recorded("alphavantage/mock_time_series.json")
    spec = dataset(
        {
            "ts": {"type": "datetime", "zone": "America/New_York"},
            "1. open": {"as": "open", "type": "f64"},
            "5. volume": {"as": "volume", "type": "i64"},
        },
        ["ts"],
        rows="Time Series (1min).*",
        key_as="ts",
    )
    gated = read(spec, json.dumps(body))
    assert gated.fetched == len(body["Time Series (1min)"]) == gated.kept
    first = body["Time Series (1min)"]["2017-12-18 14:56:00"]
    row = gated.frame.filter(ts=datetime(2017, 12, 18, 19, 56, tzinfo=UTC)).row(0)
    assert row[1:] == (float(first["1. open"]), int(first["5. volume"]))


def test_recorded_fred_observations_with_dots_for_missing_values() -> None:
    body = recorded("fred/decoded/fred_ameribor_0.json")
    spec = dataset({"date": "date", "value": {"type": "f64", "nulls": ["."]}}, ["date"], rows="observations")
    gated = read(spec, json.dumps(body))
    assert gated.kept == len(body["observations"])
    expected = {date.fromisoformat(one["date"]): one["value"] for one in body["observations"]}
    for day, value in gated.frame.rows():
        assert value == (None if expected[day] == "." else float(expected[day]))


# ---------------------------------------------------------------- CSV

PRICES = dataset(
    {"code": "str", "day": {"type": "date", "format": "%Y%m%d"}, "px": "f64"}, ["code", "day"], format="csv"
)


def test_csv_keeps_leading_zeros_and_the_word_NA_and_reads_columns_by_name() -> None:
    body = "px,code,other,day\n1.5,000001,x,20240102\n2,NA,y,20240103\n"
    assert rows_of(PRICES, body) == [("000001", date(2024, 1, 2), 1.5), ("NA", date(2024, 1, 3), 2.0)]


@pytest.mark.parametrize("value", ["nan", "inf", "1e400", "abc", "1_0", "true"])
def test_a_csv_value_that_is_no_number_sets_aside_its_row_only(value: str) -> None:
    gated = read(PRICES, f"code,day,px\na,20240102,1\nb,20240102,{value}\n")
    assert gated.frame["code"].to_list() == ["a"]
    assert gated.quarantined == 1


def test_blank_lines_are_no_rows_and_short_or_long_lines_are_set_aside() -> None:
    gated = read(PRICES, "code,day,px\na,20240102,1\n\nb,20240102\nc,20240102,1,2\nd,20240102,\n\n")
    assert gated.frame.rows() == [("a", date(2024, 1, 2), 1.0), ("d", date(2024, 1, 2), None)]
    assert gated.rejected["reason"].to_list() == ["has 2 values where 3 are named", "has 4 values where 3 are named"]


def test_a_line_that_ends_early_alone_is_set_aside_and_not_filled_up_with_nulls() -> None:
    gated = read(PRICES, "code,day,px\na,20240102,1\nb,20240102\n")
    assert gated.frame["code"].to_list() == ["a"]
    assert gated.rejected["reason"].to_list() == ["has 2 values where 3 are named"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_blank_line_alone_is_no_row(end: str) -> None:
    gated = read(PRICES, end.join(["code,day,px", "a,20240102,1", "", "b,20240102,1", "", ""]))
    assert (gated.fetched, gated.kept) == (2, 2)


def test_csv_whole_numbers_beyond_a_float_are_exact() -> None:
    spec = dataset({"id": "i64"}, ["id"], format="csv")
    assert rows_of(spec, "id\n9007199254740993\n5\n") == [(9007199254740993,), (5,)]


def test_csv_without_the_key_column_is_unexpected_and_an_empty_one_is_nothing() -> None:
    with pytest.raises(Unexpected, match="no column code, day"):
        read(PRICES, "No data\n")
    assert read(PRICES, "").fetched == 0
    assert read(PRICES, "code,day,px\n").fetched == 0


def test_json_where_csv_is_expected_can_be_judged_and_is_never_rows() -> None:
    decoder = Decoder(PRICES)
    opened = decoder.open(b'{"Information": "our standard rate limit is 25 requests per day"}')
    assert walk(opened.document, "Information").startswith("our standard")
    with pytest.raises(Unexpected, match="JSON where CSV is expected"):
        decoder.rows(opened)


def test_csv_without_header_after_lines_to_skip_in_another_encoding() -> None:
    spec = dataset(
        {"name": "str", "px": "f64"},
        ["name"],
        format="csv",
        header=False,
        names=["name", "px"],
        skip_lines=2,
        delimiter="|",
        encoding="gbk",
    )
    assert rows_of(spec, "a report\n----\n平安银行|1.5\n".encode("gbk")) == [("平安银行", 1.5)]


def test_an_unclosed_quote_is_malformed() -> None:
    with pytest.raises(Malformed):
        read(PRICES, 'code,day,px\n"a,20240102,1\n')


# ---------------------------------------------------------------- packed bodies


def zipped(**files: str) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return packed.getvalue()


def test_every_member_of_a_zip_is_read_in_the_order_of_their_names() -> None:
    body = zipped(**{"b.csv": "code,day,px\nb,20240102,x\n", "a.csv": "code,day,px\na,20240102,1\n", "c.csv": ""})
    gated = read(PRICES, body)
    assert gated.frame["code"].to_list() == ["a"]
    assert gated.quarantined == 1
    assert read(PRICES, zipped()).fetched == 0


def test_a_gzip_inside_a_zip_is_unpacked_too() -> None:
    assert unpack(zipped(**{"a.gz": ""})) == [b""]
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("a.gz", gzip.compress(b"hello"))
    assert unpack(inner.getvalue()) == [b"hello"]


@pytest.mark.parametrize("cut", [12, 20, -9, -1])
def test_a_packed_body_that_is_cut_off_is_malformed(cut: int) -> None:
    with pytest.raises(Malformed):
        unpack(gzip.compress(b"x" * 1000)[:cut])
    with pytest.raises(Malformed):
        unpack(zipped(a="x" * 1000)[:cut])


def test_a_body_that_unpacks_to_too_much_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(decode, "UNPACKED_BYTES_MOST", 1000)
    assert unpack(gzip.compress(b"x" * 1000)) == [b"x" * 1000]
    with pytest.raises(Unexpected, match="more than"):
        unpack(gzip.compress(b"x" * 1001))
    with pytest.raises(Unexpected, match="more than"):
        unpack(zipped(a="x" * 600, b="x" * 600))
