"""Rows in an .xlsx workbook and back, exactly: what a cell holds for each type. Which table a workbook is: `excel.py`.

Numbers are numbers, times are Excel's dates (in UTC), truth values are TRUE and FALSE, a null is an empty cell. Where
such a cell would not give the same value back it holds text: whole numbers of more than 15 digits, which Excel would
show with zeros at their end; nan, inf, -0.0 and what is nearer to 0 than Excel counts; times before 1900-03-01, where
its calendar has a day too many, and those that a day-fraction does not give back, in ISO 8601. A text that is empty,
that XML cannot carry or that is in quotes itself is a JSON string, in quotes. Rows go on in another sheet where one is
full.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marketsync.errors import SchemaError, StoreError
from marketsync.schema import INGESTED_COLUMN, SEGMENT_COLUMN, ColumnType, Schema
from storage.admission import Unkept

if TYPE_CHECKING:
    import polars as pl

SHEET_ROWS = 1_048_575  # under the header
LONGEST_TEXT = 32_767  # UTF-16 units
_WIDEST = 12  # characters of a cell that one of a text can take: two that XML cannot carry
_AT_ONCE_ROWS = 16_384
_NARROWEST, _WIDEST_COLUMN = 9.0, 60.0  # of a column of texts, in letters
_DIGITS_11 = 10**11
_DIGITS_15 = 10**15
_LEAST_DOUBLE = 2.2250738585072014e-308
_EPOCH_DAY = 25_569  # 1970-01-01 in Excel's count
_FIRST_DAY = 61  # 1900-03-01: the day before it is a 29 February that never was
_DAY_US = 86_400_000_000
_SAVED_WITHIN_US = 5  # of a whole millisecond: programs that save a workbook again keep as few as 15 digits
_NOT_IN_XML = r"[\x00-\x08\x0b-\x1f\x{FFFE}\x{FFFF}]"  # with \r, which XML turns into \n
_ASTRAL = r"[\x{10000}-\x{10FFFF}]"


def write(path: Path, frame: pl.DataFrame) -> None:
    """Write the frame as a workbook with a frozen header, over whatever is at `path`; its columns have the types that
    `Schema.polars` gives. Raises `SchemaError` for a text that no cell can hold, and `StoreError`."""
    import polars as pl
    import rustpy_xlsxwriter as xlsx

    names = sheet_names(frame.height)
    cells = [_cells(column) for column in frame.iter_columns()]
    plain = pl.DataFrame([column for column, _ in cells])
    texts = pl.DataFrame([text for _, text in cells if text is not None])
    parts = [(start, SHEET_ROWS) for start in range(0, len(names) * SHEET_ROWS, SHEET_ROWS)]
    look, widths = _look(frame)
    notes: dict[str, Any] = {
        column: {"author": "MarketSync", "text": "in UTC"} for column, code in look.items() if "hh" in code
    }
    try:
        xlsx.write_worksheets(
            [(name, _sheet(plain.slice(*part), texts.slice(*part))) for name, part in zip(names, parts, strict=True)],
            str(path),
            freeze_panes={"general": {"row": 1, "col": 0}},
            autofilter={"general": True},
            header_format={name: xlsx.Format().set_bold() for name in names},
            column_formats={
                name: {column: xlsx.Format().set_num_format(code) for column, code in look.items()} for name in names
            },
            column_widths={name: widths for name in names},
            notes={name: notes for name in names},
            ignore_errors={"general": list(look)},  # the green corner of a number that is text on purpose
        )
    except (RuntimeError, OSError) as error:
        raise StoreError(f"{path} could not be written: {error}") from error


def read(content: bytes, types: Mapping[str, pl.DataType], rows: int, columns: Sequence[str]) -> Iterator[pl.DataFrame]:
    """Yield the rows of each sheet, as `write` wrote them or as a spreadsheet has saved them again, with `columns`.

    Raises `ValueError` for what is not a workbook of `rows` rows with the columns of `types`, and for cells whose
    values are not of their column's type.
    """
    import fastexcel
    import polars as pl

    # The reader rounds what is formatted as a time to milliseconds. Without the styles, which it looks for by name, it
    # gives the numbers as they are.
    content = content.replace(b"xl/styles.xml", b"xl/_tyles.xml")
    try:
        book = fastexcel.read_excel(content)
        if book.sheet_names != sheet_names(rows):
            raise ValueError(f"its sheets are {', '.join(book.sheet_names)}, not {', '.join(sheet_names(rows))}")
        for name in book.sheet_names:
            cells = book.load_sheet(
                name, use_columns=list(columns), dtypes={each: _kind(types[each]) for each in columns}
            )
            found = [column.name for column in cells.available_columns()]
            if sorted(found) != sorted(types):
                raise ValueError(f"the columns of its sheet {name} are {', '.join(found)}, not {', '.join(types)}")
            part = cells.to_polars()
            texts = _texts(
                book, name, [each for each in columns if types[each].is_temporal() and part[each].has_nulls()]
            )
            yield pl.DataFrame([_values(part[each], types[each], texts.get(each)) for each in columns])
    except (fastexcel.FastExcelError, pl.exceptions.PolarsError) as error:
        raise ValueError(" ".join(str(error).split())) from error


def sheet_names(rows: int) -> list[str]:
    """Return the names of the sheets that so many rows take."""
    sheets = max(1, -(-rows // SHEET_ROWS))
    return ["rows", *(f"rows {number}" for number in range(2, sheets + 1))]


def _sheet(plain: pl.DataFrame, texts: pl.DataFrame) -> Any:
    """Return the cells of a sheet as the writer takes them: as columns; as rows, which take twice the time, where the
    cells of a column are of several kinds."""
    import polars as pl

    if plain.is_empty():
        return pl.DataFrame(schema=dict.fromkeys(plain.columns, pl.String()))
    texts = texts.select(text for text in texts.iter_columns() if text.null_count() < plain.height)
    whole = [text for text in texts.iter_columns() if text.null_count() == plain[text.name].null_count()]
    plain, texts = plain.with_columns(whole), texts.drop(text.name for text in whole)
    return _records(plain, texts) if texts.columns else plain


def _records(plain: pl.DataFrame, texts: pl.DataFrame) -> Iterator[dict[str, Any]]:
    for start in range(0, plain.height, _AT_ONCE_ROWS):
        columns = plain.slice(start, _AT_ONCE_ROWS).to_dict(as_series=False)
        for text in texts.slice(start, _AT_ONCE_ROWS).iter_columns():
            for row in text.is_not_null().arg_true():
                columns[text.name][row] = text[row]
        for row in zip(*columns.values(), strict=True):
            yield dict(zip(plain.columns, row, strict=True))


def _look(frame: pl.DataFrame) -> tuple[dict[str, str], dict[str, float]]:
    """Return the number format and the width of the columns that need one: each cell with a format costs time."""
    import polars as pl

    formats, widths = {}, {}
    for name, type_ in frame.schema.items():
        if type_ == pl.String:
            if name != SEGMENT_COLUMN:  # or Excel makes a number of 000001 when somebody edits the cell
                formats[name] = "@"
            some = pl.col(name).head(_AT_ONCE_ROWS).str
            letters = (some.len_chars() + some.len_bytes()) / 2  # a Chinese character is as wide as two
            longest = frame.select(letters.max().fill_null(0)).item()
            widths[name] = min(max(_NARROWEST, len(name) + 3.0, longest + 1), _WIDEST_COLUMN)  # 3: the filter's button
        elif type_.is_integer():
            widths[name] = 14.0
            if (frame[name].cast(pl.Int128).abs() >= _DIGITS_11).any():
                formats[name] = "0"  # or they show as powers of ten
        elif type_ == pl.Date:
            formats[name], widths[name] = "yyyy-mm-dd", 12.0
        elif type_.is_temporal():
            whole = not (frame[name].dt.microsecond() != 0).any()
            formats[name] = "yyyy-mm-dd hh:mm:ss" if whole else "yyyy-mm-dd hh:mm:ss.000"
            widths[name] = 20.0 if whole else 24.0
    return formats, widths


# from values to cells


def _cells(values: pl.Series) -> tuple[pl.Series, pl.Series | None]:
    """Return what the cells of a column hold, numbers, truth values or texts, and the texts, null elsewhere, that some
    of them hold instead, where a plain one would not give the value back."""
    import polars as pl

    if values.dtype == pl.String:
        _refuse_long(values)
        quoted = values.str.starts_with('"') & values.str.ends_with('"')
        return _exchanged(values, (values == "") | values.str.contains(_NOT_IN_XML) | quoted, _literal), None
    if values.dtype == pl.Boolean:
        return values, None
    if values.dtype.is_integer():
        return values, _texts_of(values, values.cast(pl.Int128).abs() > _DIGITS_15, lambda each: each.cast(pl.String))
    if values.dtype.is_float():
        double = values.cast(pl.Float64)
        near_zero = (double.abs() < _LEAST_DOUBLE) & ((double != 0) | (1 / double < 0))
        return _shortest(values), _texts_of(double, near_zero | ~double.is_finite(), lambda each: map(repr, each))
    if values.dtype == pl.Date:
        days = values.to_physical().cast(pl.Int64) + _EPOCH_DAY
        return days, _texts_of(values, days < _FIRST_DAY, lambda each: each.dt.strftime("%Y-%m-%d"))
    nanos = values.dtype == pl.Datetime("ns", "UTC")
    count = values.to_physical()
    micros = count // 1000 if nanos else count
    day = micros // _DAY_US
    serial = (day + _EPOCH_DAY).cast(pl.Float64) + (micros - day * _DAY_US) / _DAY_US
    inexact = (serial < _FIRST_DAY) | (_micros(serial) != micros)
    if nanos:
        inexact = inexact | (count % 1000 != 0)
    iso = f"%Y-%m-%dT%H:%M:%S%.{9 if nanos else 6}fZ"
    return serial, _texts_of(values, inexact, lambda each: each.dt.strftime(iso))


def _texts_of(values: pl.Series, where: pl.Series, text: Callable[[pl.Series], Iterable[str]]) -> pl.Series | None:
    import polars as pl

    rows = where.arg_true()
    if rows.is_empty():
        return None
    none = pl.Series(values.name, [None], pl.String).new_from_index(0, len(values))
    return none.scatter(rows, pl.Series(text(values.gather(rows)), dtype=pl.String))


def _exchanged(texts: pl.Series, where: pl.Series, other: Callable[[str], str]) -> pl.Series:
    rows = where.arg_true()
    return texts if rows.is_empty() else texts.scatter(rows, list(map(other, texts.gather(rows))))


def _literal(value: str) -> str:
    text = json.dumps(value)
    if len(text) > LONGEST_TEXT:
        raise SchemaError(
            f"a text of {len(value)} characters is empty, in quotes or has characters that XML cannot carry, and is "
            f"{len(text)} characters when written without them; a cell takes {LONGEST_TEXT}: have the provider's data "
            "corrected, or use another store"
        )
    return text


def unkept(schema: Schema) -> list[Unkept]:
    """Return the kinds of texts that no cell holds in the way that they have to be written."""
    import polars as pl

    what = f"longer than the {LONGEST_TEXT} characters that a cell of a workbook takes, in the way that it is written"
    remedy = "have the provider's data corrected, or use another store"
    return [
        Unkept(
            column.name,
            pl.col(column.name).map_batches(_no_cells, return_dtype=pl.Boolean(), is_elementwise=True),
            what,
            remedy,
        )
        for column in schema.columns
        if column.type is ColumnType.STR
    ]


def _no_cells(values: pl.Series) -> pl.Series:
    import polars as pl

    wrong = pl.repeat(False, len(values), dtype=pl.Boolean(), eager=True)
    near = (values.str.len_chars() > LONGEST_TEXT // _WIDEST).arg_true()
    return wrong.scatter(near.filter(pl.Series([_no_cell(values[row]) for row in near], dtype=pl.Boolean())), True)


def _no_cell(text: str) -> bool:
    import polars as pl

    try:
        _cells(pl.Series("text", [text]))
    except SchemaError:
        return True
    return False


def _refuse_long(values: pl.Series) -> None:
    if not (values.str.len_bytes() > LONGEST_TEXT).any():  # no text has more UTF-16 units than bytes of UTF-8
        return
    lengths = values.str.len_chars() + values.str.count_matches(_ASTRAL)
    if count := int((lengths > LONGEST_TEXT).sum()):
        raise SchemaError(
            f"column {values.name!r} has {count} texts of up to {lengths.max()} characters, and a cell of a workbook "
            f"takes {LONGEST_TEXT}; leave the column out, or use another store or format"
        )


def _shortest(values: pl.Series) -> pl.Series:
    """Return a single as the double that a person reads in it (0.1, not 0.10000000149), if that leads back to it."""
    import polars as pl

    if values.dtype == pl.Float64:
        return values
    read = values.cast(pl.String).cast(pl.Float64)
    return read.zip_with(read.cast(pl.Float32).eq_missing(values), values.cast(pl.Float64))


# from cells to values


def _kind(type_: pl.DataType) -> Any:
    # text is the one kind that loses nothing of a whole number, and lets a value of another kind be seen
    return "float" if type_.is_float() or type_.is_temporal() else "string"


def _texts(book: Any, sheet: str, columns: list[str]) -> Mapping[str, pl.Series]:
    """Return the columns as text, once more, for times that are no number."""
    if not columns:
        return {}
    cells = book.load_sheet(sheet, use_columns=columns, dtypes=dict.fromkeys(columns, "string"))
    return cells.to_polars().to_dict()


def _values(cells: pl.Series, type_: pl.DataType, texts: pl.Series | None) -> pl.Series:
    import polars as pl

    if type_ == pl.String:
        quoted = cells.str.starts_with('"') & cells.str.ends_with('"') & (cells.str.len_chars() > 1)
        return _exchanged(cells, quoted, json.loads)
    if type_ == pl.Boolean:
        return cells.replace_strict(["true", "false"], [True, False], return_dtype=pl.Boolean)
    if not type_.is_temporal():
        return cells.cast(type_)
    if type_ == pl.Date:
        if (cells % 1 != 0).any():
            raise ValueError(f"column {cells.name} has times of day, not days")
        found = (cells.cast(pl.Int32) - _EPOCH_DAY).cast(type_)
        return (
            found if texts is None else found.zip_with(cells.is_not_null(), texts.str.to_date("%Y-%m-%d", strict=False))
        )
    nanos = type_ == pl.Datetime("ns", "UTC")
    found = (_micros(cells) * (1000 if nanos else 1)).cast(type_)
    if texts is None:
        return found
    iso = texts.str.strip_suffix("Z").str.to_datetime(
        "%Y-%m-%dT%H:%M:%S%.f", time_unit="ns" if nanos else "us", strict=False
    )
    return found.zip_with(cells.is_not_null(), iso.dt.replace_time_zone("UTC"))


def _micros(serial: pl.Series) -> pl.Series:
    """Return the microseconds since 1970 of Excel's days and fractions of one."""
    import polars as pl

    day = serial.floor()
    micros = (day.cast(pl.Int64) - _EPOCH_DAY) * _DAY_US + ((serial - day) * _DAY_US).round().cast(pl.Int64)
    if serial.name == INGESTED_COLUMN:  # it is compared with nothing, so it need not outlive other programs
        return micros
    whole = (micros + 500) // 1000 * 1000
    return whole.zip_with((micros - whole).abs() <= _SAVED_WITHIN_US, micros)
