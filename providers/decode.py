"""An answer's bytes become columns: JSON in five shapes, CSV, both perhaps packed in gzip or zip.

`Decoder.open` looks at an answer without reading rows, so that fault rules can judge it first; `Decoder.rows` reads
them. Values stay as wide as the provider wrote them (text, 64-bit floats); `marketsync.gate` gives them their types,
for many pages at once. The common case never builds a Python object per row. What it cannot prove exact is read again
row by row, and only the rows at fault are set aside. Asking, paging and judging are elsewhere.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from itertools import chain
from operator import attrgetter
from typing import Any

import msgspec
import polars as pl

from marketsync.definition import Dataset, Field_, Format, Shape
from marketsync.errors import ProviderError
from marketsync.gate import Batch, rejected_frame
from marketsync.schema import ColumnType

UNPACKED_BYTES_MOST = 2 << 30
"""An answer that unpacks to more than this is refused instead of filling the memory."""

_EXACT = 2**53
_MARK = 7_237_005_577_332_262_213
_ENVELOPE_BYTES_MOST = 65_536
_SPLIT_KEYED_BYTES = 131_072  # from here on, long lists by key are parsed outside the interpreter lock
_SPLIT_KEY_BYTES = 65_536
_SHALLOW_BYTES = 4_096
_REMEMBERED = 256
_KEYS_SHOWN = 12
_MISSING = object()
_COLON = re.compile(rb"\s*:\s*")
_FIRST_VALUE = re.compile(rb'\s*\{\s*"(?:[^"\\]|\\.)*"\s*:\s*(.)', re.DOTALL)
_NESTED = re.compile(r"[^\s.]+(\.[^\s.]+)+")


class Malformed(ProviderError):
    """The bytes are not the format they should be (cut off, broken, HTML): worth asking again."""


class Unexpected(ProviderError):
    """The answer is well formed and not what the definition says: asking again does not help.

    `field` is where the dataset says otherwise, such as response.rows.
    """

    def __init__(self, message: str, field: str = "response"):
        super().__init__(message)
        self.field = field


@dataclass(frozen=True)
class Piece:
    """The rows of one packed member (or of the whole body): their bytes, and the document around them.

    `frame` holds them already where parsing them was the proof that they were cut out rightly; `tried` tells that the
    fast readers have refused these bytes.
    """

    part: bytes
    document: Any = None
    frame: pl.DataFrame | None = None
    tried: bool = False


@dataclass(frozen=True)
class Opened:
    """An answer whose rows are not judged yet.

    `document` is the JSON body with `UNREAD` for its rows (None for CSV, or when the body is the rows); `found` tells
    whether the path to the rows exists (with null it does).
    """

    document: Any
    pieces: tuple[Piece, ...]
    found: bool
    body: bytes


class _Unread:
    """Stands in a document where the rows are: something is there, and nobody looked at it yet."""

    def __repr__(self) -> str:
        return "(rows)"


UNREAD = _Unread()


def walk(document: Any, path: str) -> Any:
    """Return the value at a path of names (or list positions) joined by dots; None where it is absent, `UNREAD` for
    the rows and everything in them."""
    for part in path.split(".") if path else ():
        if document is UNREAD:
            return UNREAD
        if isinstance(document, Mapping):
            document = document.get(part)
        elif isinstance(document, list) and part.isdigit():
            document = document[int(part)] if int(part) < len(document) else None
        else:
            return None
    return document


# ---------------------------------------------------------------- how a column's raw values are written


class _Kind(Enum):
    """How a provider writes a column's values: the polars type for JSON, the msgspec type, for the fast readers."""

    TEXT = "text"
    REAL = "real"
    WHOLE = "whole"
    NUMBER = "number"  # whole or not: Unix times
    EXACT = "exact"  # whole numbers too large for a float
    TRUTH = "truth"
    ANY = "any"  # text and numbers side by side

    @property
    def json_type(self) -> pl.DataType:
        return _JSON_TYPES[self]

    @property
    def strict_type(self) -> Any:
        return _STRICT_TYPES[self]


_JSON_TYPES = {
    _Kind.TEXT: pl.String(),
    _Kind.REAL: pl.Float64(),
    _Kind.WHOLE: pl.Float64(),
    _Kind.NUMBER: pl.Float64(),
    _Kind.EXACT: pl.String(),
    _Kind.TRUTH: pl.Boolean(),
    _Kind.ANY: pl.String(),
}
_STRICT_TYPES: dict[_Kind, Any] = {
    _Kind.TEXT: str | None,
    _Kind.REAL: float | None,
    _Kind.WHOLE: int | None,
    _Kind.NUMBER: int | float | None,
    _Kind.EXACT: int | None,
    _Kind.TRUTH: bool | None,
    _Kind.ANY: str | int | float | None,
}


def _first_kind(spec: Field_) -> _Kind:
    if spec.type is ColumnType.STR:
        return _Kind.TEXT
    if spec.type is ColumnType.BOOL:
        return _Kind.TRUTH
    if spec.type in (ColumnType.F32, ColumnType.F64):
        return _Kind.TEXT if spec.nulls else _Kind.REAL
    if spec.type in (ColumnType.I32, ColumnType.I64, ColumnType.U64):
        return _Kind.TEXT if spec.nulls else _Kind.WHOLE
    if spec.format == "unix_ns":
        return _Kind.EXACT
    return _Kind.NUMBER if (spec.format or "").startswith("unix_") else _Kind.TEXT


def _kind_of(types: set[type], series: pl.Series, kind: _Kind) -> _Kind:
    """Learn how a column is written from the Python types just seen, so that the next page is read fast."""
    types = types - {type(None)}
    if not types:
        return kind
    if types == {str}:
        return _Kind.TEXT
    if types == {bool}:
        return _Kind.TRUTH
    if types == {int}:
        return _Kind.WHOLE if series.dtype == pl.Int64 and _is_small(series) else _Kind.EXACT
    if types <= {int, float} and series.dtype == pl.Float64:
        return kind if kind in (_Kind.REAL, _Kind.NUMBER) else _Kind.NUMBER
    return _Kind.ANY


def _is_small(series: pl.Series) -> bool:
    low, high = series.min(), series.max()
    return low is None or (low > -_EXACT and high < _EXACT)  # type: ignore[operator]


# ---------------------------------------------------------------- the decoder


@dataclass(frozen=True)
class _Column:
    name: str
    raw: str
    path: tuple[str, ...]
    spec: Field_
    needed: bool  # a row without it is set aside


class Decoder:
    """Reads one dataset's answers. Threads may share it: what it learns about how numbers are written is a hint.

    Raises `Malformed` or `Unexpected` from both methods.
    """

    def __init__(self, dataset: Dataset):
        self._response = dataset.response
        self._shape = dataset.response.found_shape
        self._path = [part for part in dataset.response.rows.removesuffix("*").split(".") if part]
        self._order = list(dataset.columns)
        self._constants = {name: spec for name, spec in dataset.columns.items() if spec.value is not None}
        nestable = dataset.response.format is Format.JSON and self._shape not in (Shape.TABLE, Shape.ARRAYS)
        self._columns = [
            _Column(
                name,
                raw,
                tuple(raw.split(".")) if nestable and _NESTED.fullmatch(raw) else (raw,),
                spec,
                spec.required or name in dataset.key,
            )
            for name, spec in dataset.columns.items()
            if spec.value is None
            for raw in (dataset.raw_of[name],)
        ]
        key_as = dataset.response.key_as if self._shape is Shape.KEYED else None
        self._key = next((column for column in self._columns if column.raw == key_as), None)
        self._fields = [column for column in self._columns if column is not self._key]
        self._nested = any(len(column.path) > 1 for column in self._fields)
        self._kinds = {column.name: _first_kind(column.spec) for column in self._columns}
        if self._response.format is Format.CSV:
            self._kinds = {name: _Kind.TEXT if k is _Kind.TRUTH else k for name, k in self._kinds.items()}
        self._compiled: dict[Any, Any] = {}
        self._headers: dict[bytes, tuple[str, ...]] = {}
        self._end: _End | None = _End.LAST
        self._guesses = True

    # -- opening

    def open(self, body: bytes) -> Opened:
        """Unpack, and part the rows from the rest of the body, so that rules can judge it."""
        members = [self._as_utf8(member) for member in unpack(body, self._response.unpack)]
        if self._response.format is Format.CSV:
            first = members[0].lstrip()[:1] if members else b""
            if first in (b"{", b"["):  # providers answer a CSV question with a JSON error
                try:
                    return Opened(msgspec.json.decode(members[0]), (), False, members[0])
                except (msgspec.DecodeError, RecursionError):
                    pass
            return Opened(None, tuple(map(Piece, members)), True, members[0] if members else b"")
        opened = [self._open_json(member) for member in members]
        if len(opened) == 1:
            return opened[0]
        if not opened:
            return Opened(None, (), True, b"")
        pieces = tuple(chain.from_iterable(one.pieces for one in opened))
        return Opened(opened[0].document, pieces, all(one.found for one in opened), opened[0].body)

    def _as_utf8(self, body: bytes) -> bytes:
        if self._response.encoding != "utf-8":
            try:
                return body.decode(self._response.encoding).encode()
            except UnicodeDecodeError as error:
                raise Malformed(f"the answer is not {self._response.encoding} text: {error}") from error
        return body[3:] if body.startswith(b"\xef\xbb\xbf") else body

    def _open_json(self, body: bytes) -> Opened:
        if not body.strip():
            raise Malformed("the answer is empty where JSON is expected")
        if self._shape is Shape.COLUMNS:
            document = _decode(body)
            rows = walk(document, ".".join(self._path))
            pieces = () if rows is None else (Piece(body, document),)
            return Opened(document, pieces, rows is not None or not self._path, body)
        opener = b"{" if self._shape is Shape.KEYED else b"["
        if not self._path:
            return _open_whole(body, opener)
        guess = _cut_by_position(body, self._path, opener, self._end) if self._end is not None else None
        if guess is not None:
            document, part = guess
            frame = self._quick(part, document)
            if frame is not None:
                return Opened(document, (Piece(part, document, frame),), True, body)
        document, rows, found = _cut_exactly(body, self._path)
        tried = guess is not None and guess[1] == rows
        if guess is not None and not tried:
            self._end = _End.FIRST if self._end is _End.LAST else None  # this provider's bodies are not like that
        if rows is None:
            return Opened(document, (), found, body)
        return Opened(document, (Piece(rows, document, None, tried),), found, body)

    # -- reading

    def rows(
        self,
        opened: Opened,
        constants: Mapping[str, str | None] | None = None,
        start: datetime | None = None,
        end: datetime | None = None,
    ) -> Batch:
        """Read the rows. `constants` gives the columns that have a `value`; rows are judged against [start, end)
        later, by the gate."""
        batch = self._read(opened)
        frame = batch.frame
        if not frame.width and not frame.height and self._constants:  # {"rows": null}: not even columns
            frame = self.nothing().frame
        for name in self._constants:
            value = (constants or {}).get(name)
            series = pl.Series(name, [value], dtype=pl.String()).new_from_index(0, frame.height)
            frame = frame.with_columns(series) if frame.width else pl.DataFrame([series])
        if frame.width and frame.columns != self._order:
            frame = frame.select(self._order)
        return Batch(frame, batch.fetched, batch.rejected, start, end, batch.absent)

    def _read(self, opened: Opened) -> Batch:
        if self._response.format is Format.CSV:
            if opened.document is not None:
                raise Unexpected(f"the answer is JSON where CSV is expected: {_shown(opened.body)}", "response.format")
            return _joined([self._read_csv(piece.part) for piece in opened.pieces])
        if not opened.found and len(self._path) > 1 and walk(opened.document, ".".join(self._path[:-1])) == {}:
            return self.nothing()  # {"corporate_actions": {}} has none of any kind
        if not opened.found:
            raise self._no_rows(opened)
        if self._shape is Shape.COLUMNS:
            return _joined([self._read_columns(piece.document) for piece in opened.pieces])
        return _joined([self._read_piece(piece) for piece in opened.pieces])

    def _read_piece(self, piece: Piece) -> Batch:
        part, document = piece.part, piece.document
        _expect(part, b"{" if self._shape is Shape.KEYED else b"[", ".".join(self._path))
        positional = self._shape in (Shape.TABLE, Shape.ARRAYS)
        names = self._checked_names(document) if positional else ()
        frame = piece.frame
        if frame is None and not piece.tried:
            frame = self._quick(part, document)
        if frame is not None:
            absent = self._unnamed(names) if positional else self._absent(frame, part)
            return Batch(frame, frame.height, absent=absent)
        if positional:
            return self._slow_arrays(_decode(part), names, None)
        return self._slow_keyed(part) if self._shape is Shape.KEYED else self._slow_rows(_decode(part), None, part)

    def _quick(self, part: bytes, document: Any) -> pl.DataFrame | None:
        """Read rows without looking at each; None where that is not exact, or these are no rows.

        A frame proves that the bytes are one whole JSON value: every reader here reads to the end.
        """
        if self._shape is Shape.RECORDS:
            frame = self._fast_records(part)
            return self._strict_records(part) if frame is None else frame
        if self._shape is Shape.KEYED:
            return self._quick_keyed(part)
        names = self._names(document)
        return None if names is None else self._strict_arrays(part, names)

    def _names(self, document: Any) -> tuple[str, ...] | None:
        if self._shape is Shape.ARRAYS:
            return self._response.names
        names = walk(document, self._response.columns or "")
        if not isinstance(names, list):
            return None
        return tuple(str(name.get("name")) if isinstance(name, dict) else str(name) for name in names)

    def _no_rows(self, opened: Opened) -> Unexpected:
        """Tell of rows that are not where the definition says; the remedy comes first, should the end be cut off."""
        path, begins = ".".join(self._path), f". It begins with {_shown(opened.body)}"
        if not path:
            wanted = "an object" if self._shape in (Shape.KEYED, Shape.COLUMNS) else "a list"
            has = _keys_along(opened.document, ())
            remedy = f": it has {has}; name the one that holds the rows (response: {{rows: ...}})" if has else ""
            what = f"the answer is not {wanted} of rows, but {_noun(opened.document)}"
            return Unexpected(what + remedy + begins, "response.rows")
        return Unexpected(
            f"the answer holds no {path!r}: it has {_keys_along(opened.document, self._path) or 'no keys'}; name the "
            "path to the rows (empty: the whole body), or, if the provider leaves it out when there is nothing, add "
            "the rule {when: {path: {" + path + ": null}}, then: empty}" + begins,
            "response.rows",
        )

    def _checked_names(self, document: Any) -> tuple[str, ...]:
        names = self._names(document)
        if names is None:
            raise Unexpected(f"the answer holds no list of names at {self._response.columns!r}", "response.columns")
        missing = [column.raw for column in self._fields if column.needed and column.raw not in names]
        if missing:
            raise Unexpected(f"the answer has no column {', '.join(missing)}; it has {', '.join(names)}", "schema")
        return names

    def _unnamed(self, names: Sequence[str]) -> tuple[str, ...]:
        return tuple(column.name for column in self._fields if column.raw not in names)

    # -- records

    def _fast_records(self, part: bytes) -> pl.DataFrame | None:
        """Parse outside Python with wide types; None where a value may not have survived it exactly.

        polars reads true as 1 and an unpaired surrogate as NUL without a word, and whole numbers from 2 ** 53 on are
        not exact in a float.
        """
        schema = self._json_schema()
        if schema is None:
            return None
        try:
            frame = pl.read_json(part, schema=schema)
        except (pl.exceptions.PolarsError, ValueError):
            return None
        if b"\\" in part and (b"\\ud" in part or b"\\uD" in part):
            return None
        if self._nested:
            frame = pl.DataFrame([_nested_series(frame, column) for column in self._fields])
        else:
            frame.columns = [column.name for column in self._fields]
        small = False
        for series, column in zip(frame.get_columns(), self._fields, strict=True):
            kind = self._kinds[column.name]
            if series.dtype != pl.Float64:
                continue
            low = series.min()
            if low is None:
                continue
            small = small or low <= 1  # type: ignore[operator]
            if kind is not _Kind.REAL and not _is_small(series):
                self._kinds[column.name] = _Kind.EXACT
                return None
        if small and (b"true" in part or b"false" in part):
            return None
        return frame

    def _json_schema(self) -> dict[str, pl.DataType] | None:
        kinds = tuple(self._kinds[column.name] for column in self._fields)
        return self._once(("json", kinds), lambda: self._new_json_schema(kinds))

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        """Return what was made for this key before, or make it; another thread may empty the memory at any moment."""
        found = self._compiled.get(key, _MISSING)
        if found is _MISSING:
            if len(self._compiled) >= _REMEMBERED:
                self._compiled.clear()
            found = self._compiled[key] = make()
        return found

    def _new_json_schema(self, kinds: tuple[_Kind, ...]) -> dict[str, pl.DataType] | None:
        tree: dict[str, Any] = {}
        for column, kind in zip(self._fields, kinds, strict=True):
            if any(step.isdigit() for step in column.path[1:]):
                return None  # positions in lists are read row by row
            branch: Any = tree
            for step in column.path[:-1]:
                branch = branch.setdefault(step, {})
                if not isinstance(branch, dict):
                    return None  # a field that is a value here and an object there
            branch[column.path[-1]] = kind.json_type
        return _as_struct(tree)

    def _row_type(self, kinds: tuple[_Kind, ...]) -> Any:
        fields = [(f"f{i}", kind.strict_type, None) for i, kind in enumerate(kinds)]
        rename = {f"f{i}": column.raw for i, column in enumerate(self._fields)}
        return msgspec.defstruct("Row", fields, rename=rename, gc=False)

    def _decoder_of(self, wrap: str) -> tuple[msgspec.json.Decoder, tuple[_Kind, ...]]:
        kinds = tuple(self._kinds[column.name] for column in self._fields)

        def make() -> msgspec.json.Decoder:
            row = self._row_type(kinds)
            types: dict[str, Any] = {"list": list[row], "lists": dict[str, list[row]], "single": dict[str, row]}
            return msgspec.json.Decoder(types[wrap])

        return self._once((wrap, kinds), make), kinds

    def _strict_records(self, part: bytes) -> pl.DataFrame | None:
        """Parse with exact Python types; None where a value has another type than this column usually has."""
        if self._nested:
            return None
        decoder, kinds = self._decoder_of("list")
        try:
            rows = decoder.decode(part)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None
        return self._strict_frame(rows, kinds)

    def _strict_frame(self, rows: Sequence[Any], kinds: tuple[_Kind, ...]) -> pl.DataFrame | None:
        columns = []
        for index, (column, kind) in enumerate(zip(self._fields, kinds, strict=True)):
            series = _strict_series(column.name, list(map(attrgetter(f"f{index}"), rows)), kind)
            if series is None:
                return None
            columns.append(series)
        return pl.DataFrame(columns)

    def _slow_rows(self, rows: Iterable[Any], keys: list[str] | None, part: bytes) -> Batch:
        """Read decoded rows one by one; what does not fit sets aside its row only."""
        rows = list(rows)
        setter = _Aside(rows, keys, self._key.raw if self._key else None)
        for index, row in enumerate(rows):
            if not isinstance(row, dict):
                setter.add(index, None, f"is {_noun(row)} where an object is expected")
        series = []
        if self._key is not None:
            series.append(pl.Series(self._key.name, keys, dtype=pl.String()))
        for column in self._fields:
            getter = _getter(column.path)
            values = [getter(row) if isinstance(row, dict) else None for row in rows]
            series.append(self._coerced(column, values, setter))
        return setter.batch(pl.DataFrame(series), lambda frame: self._absent(frame, part))

    def _coerced(self, column: _Column, values: list[Any], setter: _Aside) -> pl.Series:
        series, bad, types = coerce(column.name, values, column.spec)
        for index, reason in bad.items():
            setter.add(index, column.name, reason)
        if not bad:
            self._kinds[column.name] = _kind_of(types, series, self._kinds[column.name])
        return series

    def _absent(self, frame: pl.DataFrame, part: bytes) -> tuple[str, ...]:
        """Return the columns that no row had; an error when rows cannot be without one."""
        if not frame.height:
            return ()
        gone = [
            column
            for column in self._fields
            if frame[column.name].null_count() == frame.height and json.dumps(column.path[-1]).encode() not in part
        ]
        needed = [column.raw for column in gone if column.needed]
        if needed:
            raise Unexpected(f"no row of the answer has the field {', '.join(needed)}: {_shown(part)}", "schema")
        return tuple(column.name for column in gone)

    # -- records or lists by key

    def _quick_keyed(self, part: bytes) -> pl.DataFrame | None:
        first = _FIRST_VALUE.match(part)
        if first is None or first[1] not in b"[{" or self._nested or self._response.names is not None:
            return None
        if first[1] == b"{":
            return self._strict_keyed(part, "single")
        frame = self._split_keyed(part) if len(part) >= _SPLIT_KEYED_BYTES else None
        return self._strict_keyed(part, "lists") if frame is None else frame

    def _split_keyed(self, part: bytes) -> pl.DataFrame | None:
        """Parse long lists one by one outside the interpreter lock; None where they are short."""
        try:
            lists = msgspec.json.decode(part, type=dict[str, msgspec.Raw])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None
        if len(part) < _SPLIT_KEY_BYTES * len(lists):
            return None
        frames = []
        for key, raw in lists.items():
            slice_ = bytes(raw)
            frame = self._fast_records(slice_) if slice_.startswith(b"[") else None
            if frame is None:
                return None
            frames.append(self._with_key(frame, pl.Series([key], dtype=pl.String()).new_from_index(0, frame.height)))
        return pl.concat(frames)

    def _with_key(self, frame: pl.DataFrame, keys: pl.Series) -> pl.DataFrame:
        if self._key is None:
            return frame
        return frame.insert_column(0, keys.alias(self._key.name))

    def _strict_keyed(self, part: bytes, wrap: str) -> pl.DataFrame | None:
        decoder, kinds = self._decoder_of(wrap)
        try:
            lists = decoder.decode(part)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None
        if wrap == "single":
            rows, keys = list(lists.values()), list(lists)
        else:
            rows = list(chain.from_iterable(lists.values()))
            keys = list(chain.from_iterable([key] * len(values) for key, values in lists.items()))
        frame = self._strict_frame(rows, kinds)
        return None if frame is None else self._with_key(frame, pl.Series(keys, dtype=pl.String()))

    def _slow_keyed(self, part: bytes) -> Batch:
        """Lists, arrays or records by key, row by row; a key that holds a plain value (a cursor) has no rows."""
        rows: list[Any] = []
        keys: list[str] = []
        names = self._response.names
        for key, value in _decode(part).items():
            if isinstance(value, list | dict):
                found = value if isinstance(value, list) else [value]
                rows.extend(found)
                keys.extend([key] * len(found))
        if names is None:
            return self._slow_rows(rows, keys, part)
        return self._slow_arrays(rows, names, keys)

    def nothing(self) -> Batch:
        """Return the batch of an answer without rows."""
        return Batch(pl.DataFrame(schema=dict.fromkeys(self._order, pl.String())), 0)

    # -- arrays by position

    def _strict_arrays(self, part: bytes, names: tuple[str, ...]) -> pl.DataFrame | None:
        kinds = tuple(self._kinds[column.name] for column in self._fields)

        def make() -> msgspec.json.Decoder:
            wanted = {column.raw: kind for column, kind in zip(self._fields, kinds, strict=True)}
            # a table names every value; given names may stop before the last
            exact = self._shape is Shape.TABLE
            last = max((i for i, name in enumerate(names) if name in wanted), default=-1)
            fields = [
                (f"f{i}", wanted[name].strict_type if name in wanted else msgspec.Raw)
                for i, name in enumerate(names if exact else names[: last + 1])
            ]
            row = msgspec.defstruct("Row", fields, array_like=True, gc=False, forbid_unknown_fields=exact)
            return msgspec.json.Decoder(list[row])

        try:
            rows = self._once(("arrays", names, kinds), make).decode(part)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None
        columns = []
        for column, kind in zip(self._fields, kinds, strict=True):
            if column.raw not in names:
                columns.append(_all_null(column.name, len(rows)))
                continue
            values = list(map(attrgetter(f"f{names.index(column.raw)}"), rows))
            series = _strict_series(column.name, values, kind)
            if series is None:
                return None
            columns.append(series)
        return pl.DataFrame(columns)

    def _slow_arrays(self, rows: list[Any], names: Sequence[str], keys: list[str] | None) -> Batch:
        setter = _Aside(rows, keys, self._key.raw if self._key else None)
        exact = self._shape is Shape.TABLE or self._response.format is Format.CSV
        least = 1 + max((i for i, name in enumerate(names) if any(c.raw == name for c in self._fields)), default=-1)
        usable: list[list[Any] | None] = []
        for index, row in enumerate(rows):
            if not isinstance(row, list):
                setter.add(index, None, f"is {_noun(row)} where a list is expected")
            elif len(row) < (len(names) if exact else least) or (exact and len(row) > len(names)):
                setter.add(index, None, f"has {len(row)} values where {len(names)} are named")
            else:
                usable.append(row)
                continue
            usable.append(None)
        series = []
        if self._key is not None:
            series.append(pl.Series(self._key.name, keys, dtype=pl.String()))
        for column in self._fields:
            if column.raw not in names:
                series.append(_all_null(column.name, len(rows)))
                continue
            at = names.index(column.raw)
            series.append(self._coerced(column, [None if row is None else row[at] for row in usable], setter))
        return setter.batch(pl.DataFrame(series), lambda _: self._unnamed(names))

    # -- columns

    def _read_columns(self, document: Any) -> Batch:
        table = walk(document, ".".join(self._path))
        if not isinstance(table, dict):
            raise Unexpected(f"the rows are {_noun(table)} where an object of columns is expected")
        lists: dict[str, list[Any]] = {}
        for column in self._fields:
            value = walk(table, ".".join(column.path)) if len(column.path) > 1 else table.get(column.raw)
            if value is not None and not isinstance(value, list):
                raise Unexpected(f"the column {column.raw} is {_noun(value)} where a list is expected")
            if value is not None:
                lists[column.name] = value
        missing = [column.raw for column in self._fields if column.needed and column.name not in lists]
        if not any(lists.values()):
            return self.nothing()
        if missing:
            raise Unexpected(f"the answer has no column {', '.join(missing)}", "schema")
        heights = {column.raw: len(lists[column.name]) for column in self._fields if column.name in lists}
        if len(set(heights.values())) > 1:
            raise Malformed(f"the columns differ in length: {heights}")
        height = next(iter(heights.values()))
        raws = {column.raw: lists[column.name] for column in self._fields if column.name in lists}
        setter = _Aside(_Transposed(raws, height), None, None)
        series = [
            self._coerced(column, lists[column.name], setter)
            if column.name in lists
            else _all_null(column.name, height)
            for column in self._fields
        ]
        absent = tuple(column.name for column in self._fields if column.name not in lists)
        return setter.batch(pl.DataFrame(series), lambda _: absent)

    # -- CSV

    def _read_csv(self, body: bytes) -> Batch:
        for _ in range(self._response.skip_lines):
            body = body[body.find(b"\n") + 1 :] if b"\n" in body else b""
        names = self._response.names or ()
        if self._response.header:
            body = body.lstrip(b"\r\n")
            end = body.find(b"\n")
            line, body = (body, b"") if end < 0 else (body[:end], body[end + 1 :])
            names = self._header_names(line)
            if not names:
                return self.nothing()
            missing = [column.raw for column in self._fields if column.needed and column.raw not in names]
            if missing:
                raise Unexpected(
                    f"the answer has no column {', '.join(missing)}; its first line is {_shown(line)}", "schema"
                )
        if not body.strip():
            return self.nothing()
        frame = self._fast_csv(body, names)
        if frame is None:
            return self._slow_arrays(list(self._csv_rows(body)), names, None)
        return Batch(frame, frame.height, absent=self._unnamed(names))

    def _header_names(self, line: bytes) -> tuple[str, ...]:
        if line not in self._headers:
            if len(self._headers) >= _REMEMBERED:
                self._headers.clear()
            rows = list(self._csv_rows(line))
            self._headers[line] = tuple(str(name).strip() for name in rows[0]) if rows else ()
        return self._headers[line]

    def _csv_rows(self, body: bytes) -> Iterable[Any]:
        try:
            text = body.decode()
        except UnicodeDecodeError as error:
            raise Malformed(f"the answer is not UTF-8 text: {error}") from error
        quote = self._response.quote
        reader = csv.reader(
            io.StringIO(text, newline=""),
            delimiter=self._response.delimiter,
            quotechar=quote or None,
            quoting=csv.QUOTE_MINIMAL if quote else csv.QUOTE_NONE,
            strict=True,
        )
        try:
            for row in reader:
                if row:
                    yield [value if value != "" else None for value in row]
        except csv.Error as error:
            raise Malformed(f"line {reader.line_num} of the answer is not valid CSV: {error}") from error

    def _fast_csv(self, body: bytes, names: Sequence[str]) -> pl.DataFrame | None:
        """Parse outside Python; None where polars would take a blank or short line for a row of nulls, or a number
        for a nearby one."""
        if body.endswith((b"\n\n", b"\n\r\n")):
            body = body.rstrip(b"\r\n")
        wanted = {column.raw: column for column in self._fields}
        schema: dict[str, pl.DataType] = {}
        for at, name in enumerate(names):
            schema[f"c{at}"] = self._kinds[wanted[name].name].json_type if name in wanted else pl.String()
        last = len(names) - 1
        needed = {column.name: names.index(column.raw) for column in self._fields if column.raw in names}
        try:
            frame = pl.read_csv(
                body,
                has_header=False,
                schema=schema,
                columns=sorted({*needed.values(), last}),
                separator=self._response.delimiter,
                quote_char=self._response.quote or None,
            )
        except (pl.exceptions.PolarsError, ValueError):
            return None
        if frame[f"c{last}"].null_count():  # perhaps a line is blank, or ends early
            return None
        columns = []
        for column in self._fields:
            if column.name not in needed:
                columns.append(_all_null(column.name, frame.height))
                continue
            series = frame[f"c{needed[column.name]}"].alias(column.name)
            if series.dtype == pl.Float64 and self._kinds[column.name] is not _Kind.REAL and not _is_small(series):
                self._kinds[column.name] = _Kind.EXACT
                return None
            if series.dtype == pl.String and self._response.quote and (self._response.quote * 2).encode() in body:
                series = series.set((series == "").fill_null(False), None)
            columns.append(series)
        return pl.DataFrame(columns)


# ---------------------------------------------------------------- unpacking


def unpack(body: bytes, how: str = "auto") -> list[bytes]:
    """Return what is packed in the body: itself, the gzip member, or the zip's files by name."""
    is_gzip, is_zip = body.startswith(b"\x1f\x8b"), body.startswith((b"PK\x03\x04", b"PK\x05\x06"))
    if how == "none" or (how == "auto" and not is_gzip and not is_zip):
        return [body]
    try:
        if is_gzip and how in ("auto", "gzip"):
            with gzip.GzipFile(fileobj=io.BytesIO(body)) as packed:
                return [inner for piece in [_bounded(packed)] for inner in unpack(piece, "auto")]
        if is_zip and how in ("auto", "zip"):
            with zipfile.ZipFile(io.BytesIO(body)) as archive:
                files = sorted(
                    info.filename
                    for info in archive.infolist()
                    if not info.is_dir() and not info.filename.startswith("__MACOSX/")
                )
                members = []
                for name in files:
                    with archive.open(name) as packed:
                        members.append(_bounded(packed, sum(map(len, members))))
                return [inner for member in members for inner in unpack(member, "auto")]
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise Malformed(f"the packed answer cannot be unpacked: {error}") from error
    raise Malformed(f"the answer is not packed as {how}: it begins with {body[:16]!r}")


def _bounded(packed: Any, already: int = 0) -> bytes:
    data = packed.read(UNPACKED_BYTES_MOST - already + 1)
    if already + len(data) > UNPACKED_BYTES_MOST:
        raise Unexpected(f"the packed answer holds more than {UNPACKED_BYTES_MOST >> 20} MB; ask for smaller windows")
    return data


# ---------------------------------------------------------------- cutting the rows out of a JSON body


def _decode(body: bytes) -> Any:
    """Decode strictly, else as Python's own json does: NaN, numbers beyond a float and unpaired surrogates then reach
    the columns, where they set aside their rows."""
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        try:
            return json.loads(body)
        except (ValueError, RecursionError):
            raise Malformed(f"the answer is not valid JSON: {error}; it begins with {_shown(body)}") from error


def _open_whole(body: bytes, opener: bytes) -> Opened:
    first = body.lstrip()[:1]
    if first == b"{" == opener:
        try:
            shallow = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
            document = {
                key: msgspec.json.decode(raw) if len(memoryview(raw)) <= _SHALLOW_BYTES else UNREAD
                for key, raw in shallow.items()
            }
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            document = _decode(body)
        return Opened(document, (Piece(body, document),), True, body)
    if first == opener:
        return Opened(None, (Piece(body),), True, body)
    document = _decode(body)
    return Opened(document, (), document is None, body)


class _End(Enum):
    """Where rows are guessed to end: at the body's last bracket that could close them, which costs nothing to find,
    or, where another list follows, at the first that closes a row and them at once."""

    LAST = "last"
    FIRST = "first"


def _cut_by_position(body: bytes, path: list[str], opener: bytes, end_at: _End) -> tuple[Any, bytes] | None:
    """Cut the rows out from where their name first stands up to a bracket; a guess that is half proven.

    With the rows replaced by a number that nothing else holds, the rest is decoded; when that number then is the
    value at the path, the body is this rest with the rows in its place, provided the rows are one JSON value by
    themselves, which whoever parses them must see. This looks at each byte once less than decoding does.
    """
    name = json.dumps(path[-1], ensure_ascii=False).encode()
    at = body.find(name)
    if at < 0:
        return None
    colon = _COLON.match(body, at + len(name))
    if colon is None or body[colon.end() : colon.end() + 1] != opener:
        return None
    start = colon.end()
    end = _end_of_rows(body, start, opener, end_at)
    if end <= start + 1 or len(body) - (end - start) > _ENVELOPE_BYTES_MOST:
        return None
    try:
        document = msgspec.json.decode(body[:start] + str(_MARK).encode() + body[end:])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    parent = walk(document, ".".join(path[:-1]))
    if not isinstance(parent, dict) or parent.get(path[-1]) != _MARK:
        return None
    parent[path[-1]] = UNREAD
    return document, body[start:end]


def _end_of_rows(body: bytes, start: int, opener: bytes, end_at: _End) -> int:
    if end_at is _End.LAST:
        return body.rfind(b"]") + 1 if opener == b"[" else body.rfind(b"]}") + 2
    inner = b"]}" if opener == b"{" else {b"{": b"}]", b"[": b"]]"}.get(body[start + 1 : start + 2], b"]")
    at = body.find(inner, start)
    return at + len(inner) if at >= 0 else 0


def _cut_exactly(body: bytes, path: list[str]) -> tuple[Any, bytes | None, bool]:
    """Return the document with `UNREAD` for the rows, the rows' bytes (None for null), and whether the path exists."""
    try:
        return _cut_raw(body, path)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        document = _decode(body)
    parent = walk(document, ".".join(path[:-1]))
    step: Any = path[-1]
    if isinstance(parent, list) and step.isdigit() and int(step) < len(parent):
        step = int(step)
    elif not isinstance(parent, dict) or step not in parent:
        return document, None, False
    rows = parent[step]
    if rows is None:
        return document, None, True
    parent[step] = UNREAD
    return document, json.dumps(rows).encode(), True


def _cut_raw(body: bytes, path: list[str]) -> tuple[Any, bytes | None, bool]:
    if not path:
        rows = body.strip()
        return (None, None, True) if rows == b"null" else (UNREAD, rows, True)
    first = body.lstrip()[:1]
    if first == b"{":
        members: dict[Any, msgspec.Raw] = dict(msgspec.json.decode(body, type=dict[str, msgspec.Raw]))
        step: Any = path[0]
    elif first == b"[" and path[0].isdigit():
        members = dict(enumerate(msgspec.json.decode(body, type=list[msgspec.Raw])))
        step = int(path[0])
    else:
        return msgspec.json.decode(body), None, False
    document: Any = {key: msgspec.json.decode(raw) for key, raw in members.items() if key != step}
    rows, found = None, False
    if step in members:
        document[step], rows, found = _cut_raw(bytes(members[step]), path[1:])
    if first == b"[":
        document = [document.get(index) for index in range(len(members))]
    return document, rows, found


def _expect(part: bytes, opener: bytes, path: str) -> None:
    if part.lstrip()[:1] != opener:
        noun = {b"[": "a list", b"{": "an object"}[opener]
        raise Unexpected(f"{path or 'the answer'} is not {noun} of rows: {_shown(part)}", "response.rows")


def _keys_along(document: Any, path: Sequence[str]) -> str:
    """Return the keys that a document has, at its top and on the way along the path as far as it goes."""
    told = []
    for depth in range(len(path) + 1):
        here = walk(document, ".".join(path[:depth])) if depth else document
        if not isinstance(here, dict) or depth == len(path) > 0:
            break
        keys = ", ".join(map(str, list(here)[:_KEYS_SHOWN])) or "nothing"
        more = ", ..." if len(here) > _KEYS_SHOWN else ""
        told.append(f"in {'.'.join(path[:depth])}: {keys}{more}" if depth else keys + more)
    return ", and ".join(told)


def _shown(body: bytes) -> str:
    text = body[:200].decode("utf-8", "replace")
    return repr(text) + ("..." if len(body) > 200 else "")


# ---------------------------------------------------------------- row by row


def _noun(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")


def _getter(path: tuple[str, ...]) -> Callable[[Any], Any]:
    if len(path) == 1:
        name = path[0]
        return lambda row: row.get(name)
    joined = ".".join(path)
    return lambda row: row[joined] if joined in row else walk(row, joined)


class _Transposed:
    """Columns seen as rows, for the few rows that are set aside."""

    def __init__(self, columns: Mapping[str, list[Any]], height: int):
        self._columns, self._height = columns, height

    def __len__(self) -> int:
        return self._height

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: values[index] for name, values in self._columns.items()}


class _Aside:
    """Collects the rows of one part that cannot become columns; the first reason of a row is kept."""

    def __init__(self, rows: Any, keys: list[str] | None, key_name: str | None):
        self._rows, self._keys, self._key_name = rows, keys, key_name
        self._bad: dict[int, tuple[str | None, str]] = {}

    def add(self, index: int, column: str | None, reason: str) -> None:
        self._bad.setdefault(index, (column, reason))

    def batch(self, frame: pl.DataFrame, absent: Callable[[pl.DataFrame], tuple[str, ...]]) -> Batch:
        height = len(self._rows)
        if not self._bad:
            return Batch(frame, height, absent=absent(frame))
        rows = [(column, reason, self._text(index)) for index, (column, reason) in sorted(self._bad.items())]
        keep = pl.Series([index not in self._bad for index in range(height)])
        frame = frame.filter(keep) if frame.width else frame
        return Batch(frame, height, rejected_frame(rows), absent=absent(frame))

    def _text(self, index: int) -> str:
        row = self._rows[index]
        if self._keys is not None and isinstance(row, dict):
            row = {self._key_name or "key": self._keys[index], **row}
        return json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()


def coerce(name: str, values: list[Any], spec: Field_) -> tuple[pl.Series, dict[int, str], set[type]]:
    """Return a column of decoded JSON values as a series, the positions that cannot be in it with the reason, and
    the Python types seen. Text and numbers side by side become text, which loses nothing."""
    types = set(map(type, values))
    if str in types:
        values, bad = _encodable(values)
    else:
        bad = {}
    plain = {str, int, float, type(None)} | ({bool} if spec.type in (ColumnType.BOOL, ColumnType.STR) else set())
    if not types <= plain:
        for index, value in enumerate(values):
            if type(value) not in plain and index not in bad:
                shown = "true" if value is True else "false" if value is False else _noun(value)
                bad[index] = f"{shown} where {_wanted(spec)} is expected"
        values = [None if index in bad else value for index, value in enumerate(values)]
    seen = types & plain - {type(None)}
    if seen <= {str}:
        return pl.Series(name, values, dtype=pl.String()), bad, types
    if seen == {bool}:
        return pl.Series(name, values, dtype=pl.Boolean()), bad, types
    if seen == {int}:
        series = _integers(name, values)
        return series, bad, types
    if seen == {float} or (
        seen == {int, float} and not any(type(value) is int and abs(value) >= _EXACT for value in values)
    ):
        return pl.Series(name, values, dtype=pl.Float64(), strict=False), bad, types
    return pl.Series(name, [_as_text(value) for value in values], dtype=pl.String()), bad, types


def _encodable(values: list[Any]) -> tuple[list[Any], dict[int, str]]:
    """Return the values without texts that are no Unicode, and where those were."""
    try:
        "".join(value for value in values if type(value) is str).encode()
        return values, {}
    except UnicodeEncodeError:
        pass
    bad = {}
    for index, value in enumerate(values):
        if type(value) is str:
            try:
                value.encode()
            except UnicodeEncodeError:
                bad[index] = "the text holds an unpaired surrogate, which is no character"
    return [None if index in bad else value for index, value in enumerate(values)], bad


def _wanted(spec: Field_) -> str:
    if spec.type is ColumnType.STR:
        return "text"
    if spec.type is ColumnType.BOOL:
        return "true or false"
    if spec.type in (ColumnType.DATE, ColumnType.DATETIME, ColumnType.DATETIME_NS):
        return "a date" if spec.type is ColumnType.DATE else "a time"
    return "a number"


def _as_text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(int(value)) if isinstance(value, float) and value.is_integer() and abs(value) < _EXACT else str(value)


def _integers(name: str, values: list[int | None]) -> pl.Series:
    try:
        return pl.Series(name, values, dtype=pl.Int64())
    except (OverflowError, TypeError, pl.exceptions.PolarsError):
        return pl.Series(name, [None if value is None else str(value) for value in values], dtype=pl.String())


def _strict_series(name: str, values: list[Any], kind: _Kind) -> pl.Series | None:
    if kind is _Kind.TEXT:
        return pl.Series(name, values, dtype=pl.String())
    if kind is _Kind.REAL:
        return pl.Series(name, values, dtype=pl.Float64())
    if kind is _Kind.TRUTH:
        return pl.Series(name, values, dtype=pl.Boolean())
    if kind in (_Kind.WHOLE, _Kind.EXACT):
        return _integers(name, values)
    types = set(map(type, values)) - {type(None)}
    if types <= {int}:
        return _integers(name, values)
    if types <= {float}:
        return pl.Series(name, values, dtype=pl.Float64())
    if types <= {str}:
        return pl.Series(name, values, dtype=pl.String())
    return pl.Series(name, [_as_text(value) for value in values], dtype=pl.String())


def _all_null(name: str, height: int) -> pl.Series:
    return pl.Series(name, [None], dtype=pl.String()).new_from_index(0, height)


def _nested_series(frame: pl.DataFrame, column: _Column) -> pl.Series:
    series = frame[column.path[0]]
    for step in column.path[1:]:
        series = series.struct.field(step)
    return series.alias(column.name)


def _as_struct(tree: dict[str, Any]) -> dict[str, pl.DataType]:
    return {
        name: pl.Struct([pl.Field(n, t) for n, t in _as_struct(value).items()]) if isinstance(value, dict) else value
        for name, value in tree.items()
    }


def _joined(batches: list[Batch]) -> Batch:
    """Put the parts of one answer together; columns whose parts were written differently become text."""
    if len(batches) == 1:
        return batches[0]
    filled = [batch for batch in batches if batch.frame.height]
    if not filled:
        rejected = [batch.rejected for batch in batches]
        frame = batches[0].frame if batches else pl.DataFrame()
        return Batch(frame, sum(b.fetched for b in batches), pl.concat(rejected) if rejected else rejected_frame())
    frames = [batch.frame for batch in filled]
    for name in frames[0].columns:
        if len({frame.schema[name] for frame in frames}) > 1:
            frames = [frame.with_columns(_texts_of(frame[name])) for frame in frames]
    absent = set(filled[0].absent).intersection(*(batch.absent for batch in filled))
    return Batch(
        pl.concat(frames),
        sum(batch.fetched for batch in batches),
        pl.concat([batch.rejected for batch in batches]),
        absent=tuple(sorted(absent)),
    )


def _texts_of(series: pl.Series) -> pl.Series:
    if series.dtype == pl.String:
        return series
    return pl.Series(series.name, [_as_text(value) for value in series.to_list()], dtype=pl.String())
