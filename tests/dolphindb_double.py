"""A double of DolphinDB for tests, at the seam of its client: no server can be had without a licence.

It stands in for `dolphindb.Session` and `dolphindb.TableAppender`, understands exactly the scripts that
`storage/dolphindb.py` sends, and refuses any other. Values pass through the real client's own serialiser both ways.
What the real engine is known to do to careless clients it does too: columns go by position and must have the table's
types, an empty text and the least number of a type are null, null is less than anything, rows outside of the
partitions are left out, the last row of a sort key wins within its partition only, a partition that another
transaction has is refused at once, a session that has unread blocks answers nothing else.

Tables are files in the folder that MARKETSYNC_DOLPHINDB_DOUBLE names, so that several processes share one server.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import dolphindb
import numpy as np
import pandas as pd
import polars as pl
from dolphindb.io import dumps, loads
from filelock import FileLock, Timeout

FOLDER = "MARKETSYNC_DOLPHINDB_DOUBLE"
HOST, PORT, USER, PASSWORD = "127.0.0.1", 8848, "market", "p@ss/w:rd"
_TYPES: dict[str, pl.DataType] = {
    "STRING": pl.String(),
    "BOOL": pl.Boolean(),
    "INT": pl.Int32(),
    "LONG": pl.Int64(),
    "FLOAT": pl.Float32(),
    "DOUBLE": pl.Float64(),
    "DATE": pl.Date(),
    "NANOTIMESTAMP": pl.Datetime("ns"),
}
_NULLS = {
    "INT": -(2**31),
    "LONG": -(2**63),
    "FLOAT": -3.4028234663852886e38,
    "DOUBLE": -1.7976931348623157e308,
    "STRING": "",
}
_TABLE = r'loadTable\("(?P<path>[^"]+)", "(?P<name>[^"]+)"\)'
_CREATION = re.compile(
    r'if\(!existsDatabase\("(?P<path>[^"]+)"\)\) \{ database\(directory="(?P=path)", (?P<scheme>.+), '
    r'engine="TSDB", atomic="TRANS"\) \}\n'
    r'marketsync_made = createPartitionedTable\(dbHandle=database\("(?P=path)"\), '
    r'table=table\(1:0, \[(?P<columns>[^\]]+)\], \[(?P<types>[^\]]+)\]\), tableName="(?P<name>\w+)", '
    r"partitionColumns=\[(?P<by>[^\]]+)\], sortColumns=\[(?P<sort>[^\]]+)\], keepDuplicates=LAST, softDelete=true\)\n"
    r"setTableComment\(marketsync_made, (?P<comment>\w+)\)"
)
_MOST_PARTITIONS = 65_536
_NAME = re.compile(r"[A-Za-z]\w*")
_INSTANT = re.compile(r"(\d{4})\.(\d\d)\.(\d\d)(?:T(\d\d:\d\d:\d\d)\.(\d{9}))?")


def install() -> None:
    """Put the double in the client's place, for this process."""
    dolphindb.Session = Session  # pyright: ignore[reportAttributeAccessIssue]
    dolphindb.TableAppender = TableAppender  # pyright: ignore[reportAttributeAccessIssue]


def drop(path: str) -> None:
    """Drop the tables of a database, as any client could; the database stays."""
    for table in _folder(path).iterdir():
        if table.is_dir():
            shutil.rmtree(table)


class _Quiet:
    def disable_stdout_sink(self) -> None: ...


class _Blocks:
    """The rows of a question, a block at a time."""

    def __init__(self, session: Session, frame: pl.DataFrame, rows: int):
        if rows < 8192:
            raise RuntimeError("fetchSize must be greater than 8192")
        self._session = session
        self._left = list(frame.iter_slices(rows))
        session.reading = bool(self._left)

    @property
    def has_next(self) -> bool:
        return bool(self._left)

    def read(self) -> pd.DataFrame:
        found = self._left.pop(0)
        self._session.reading = bool(self._left)
        return _seen(found)


class Session:
    """A session, which must be connected before it is asked anything."""

    def __init__(self, *, enableSSL: bool, compress: bool, show_output: bool):
        self.msg_logger = _Quiet()
        self.is_closed = True
        self.reading = False
        self._values: dict[str, Any] = {}

    def connect(
        self,
        host: str,
        port: int,
        userid: str,
        password: str,
        *,
        netTimeout: timedelta,
        timeout: timedelta | None = None,
    ) -> bool:
        if (host, port) != (HOST, PORT) or not Path(os.environ[FOLDER]).is_dir():
            return False
        if (userid, password) != (USER, PASSWORD):
            raise RuntimeError("<Exception> in login: The user name or password is incorrect. RefId: S04005")
        self.is_closed = False
        return True

    def close(self) -> None:
        self.is_closed = True

    def upload(self, values: dict[str, Any]) -> None:
        self._ready()
        for name, value in values.items():
            self._values[name] = loads(dumps(value))

    def run(self, script: str, fetchSize: int | None = None) -> Any:
        self._ready()
        for form, act in _FORMS:
            if found := form.fullmatch(script):
                answer = act(found.groupdict(), self._values)
                if fetchSize is not None:
                    return _Blocks(self, answer, fetchSize)
                return _seen(answer) if isinstance(answer, pl.DataFrame) else answer
        raise RuntimeError(f"<Exception> in run: Syntax Error: the double does not know {script!r}")

    def _ready(self) -> None:
        if self.is_closed:
            raise RuntimeError("<Exception> in exec: the connection has been closed")
        if self.reading:
            raise RuntimeError("Cannot execute other commands when fetching data in blocks.")


class TableAppender:
    """Appends by position; says how many rows the table took."""

    def __init__(self, *, db_path: str, table_name: str, conn: Session):
        self._table = _Table(db_path, table_name)
        self._session = conn

    def append(self, frame: pd.DataFrame) -> int:
        self._session._ready()
        meta = self._table.meta()
        if len(frame.columns) != len(meta["columns"]):
            raise RuntimeError("<Exception> in append: The number of columns of the table does not match")
        dumps(frame)  # raises for what the client cannot send
        given = pl.DataFrame(pl.from_pandas(frame))
        columns = []
        for sent, name, type_ in zip(given.get_columns(), meta["columns"], meta["types"], strict=True):
            if sent.dtype != _TYPES[type_]:
                raise RuntimeError(f"<Exception> in append: column {name} is {type_}, and was sent as {sent.dtype}")
            columns.append(_kept(sent.alias(name), type_))
        with self._table.transaction() as rows:
            put = pl.DataFrame(columns).filter(_inside(meta))
            together = pl.concat([rows, put]).with_columns(_partition(meta))
            last = together.unique([*meta["sort"], "__partition"], keep="last", maintain_order=True)
            self._table.write(last.drop("__partition"))
        return put.height


class _Table:
    """A table in its files."""

    def __init__(self, path: str, name: str):
        self.path = path
        self.folder = _folder(path) / name

    def meta(self) -> dict[str, Any]:
        try:
            return json.loads((self.folder / "meta.json").read_text())
        except FileNotFoundError:
            raise RuntimeError(
                f"<Exception> in run: getFileBlocksMeta on path '{self.path}' failed, not exist"
            ) from None

    def set_meta(self, meta: dict[str, Any]) -> None:
        _replace(self.folder / "meta.json", json.dumps(meta).encode())

    def read(self) -> pl.DataFrame:
        meta = self.meta()
        types = {name: _TYPES[type_] for name, type_ in zip(meta["columns"], meta["types"], strict=True)}
        file = self.folder / "rows.arrow"
        if not file.exists():
            return pl.DataFrame(schema=types)
        rows = pl.read_ipc(file.read_bytes())
        return rows.with_columns(pl.lit(None, type_).alias(n) for n, type_ in types.items() if n not in rows.columns)

    def write(self, rows: pl.DataFrame) -> None:
        _replace(self.folder / "rows.arrow", rows.write_ipc(None).getvalue())

    @contextmanager
    def transaction(self) -> Iterator[pl.DataFrame]:
        try:
            with FileLock(self.folder / "rows.lock", timeout=0):
                yield self.read()
        except Timeout:
            raise RuntimeError(
                f"<ChunkInTransaction>filepath '{self.path}' has been owned by transaction 27 RefId: S00002"
            ) from None


def _folder(path: str) -> Path:
    if not re.fullmatch(r"dfs://\w+", path):
        raise RuntimeError(f"<Exception> in database: {path} is no path of a database")
    return Path(os.environ[FOLDER]) / path.removeprefix("dfs://")


def _replace(file: Path, content: bytes) -> None:
    part = file.with_name(f"{file.name}.{os.getpid()}.{np.random.default_rng().integers(1 << 60)}")
    part.write_bytes(content)
    part.replace(file)


def _seen(frame: pl.DataFrame) -> pd.DataFrame:
    """Return a table as the client reads it: with the losses that it has."""
    return loads(dumps(frame.to_pandas(use_pyarrow_extension_array=True)))


def _kept(values: pl.Series, type_: str) -> pl.Series:
    if type_ in ("FLOAT", "DOUBLE"):
        values = values.fill_nan(None)
    return values if type_ not in _NULLS else values.set(values == _NULLS[type_], None)


# partitions


def _levels(meta: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (kind, scheme) for each column that the table is cut by."""
    compound = re.fullmatch(r"partitionType=COMPO, partitionScheme=\[(.+)\]", meta["scheme"])
    if compound is None:
        plain = re.fullmatch(r"partitionType=(\w+), partitionScheme=(.+)", meta["scheme"])
        assert plain is not None, meta["scheme"]
        return [(plain[1], plain[2])]
    return re.findall(r'database\("", (\w+), (.+?)\)(?=, database|$)', compound[1])


def _cuts(scheme: str) -> list[int]:
    """Return the months, counted from the year 0, between which the partitions are."""
    found = re.fullmatch(r"\((\d+)\.01M join \((\d+)\.01M \+ (\d+) \* \(0\.\.(\d+)\)\)\) join (\d+)\.01M", scheme)
    assert found is not None, scheme
    first, begin, step, count, last = map(int, found.groups())
    cuts = [12 * first, *(12 * begin + step * number for number in range(count + 1)), 12 * last]
    assert cuts == sorted(set(cuts)), scheme
    return cuts


def _bucket(column: str, scheme: str) -> pl.Expr:
    month = pl.col(column).dt.year() * 12 + pl.col(column).dt.month().cast(pl.Int32) - 1
    return month.map_batches(
        lambda months: pl.Series(np.searchsorted(_cuts(scheme), months.to_numpy(), side="right") - 1), pl.Int64
    )


def _inside(meta: dict[str, Any]) -> pl.Expr:
    inside = pl.lit(True)
    for (kind, scheme), column in zip(_levels(meta), meta["by"], strict=True):
        if kind == "RANGE":
            inside = inside & _bucket(column, scheme).is_between(0, len(_cuts(scheme)) - 2)
    return inside


def _refuse_many(meta: dict[str, Any], where: str | None) -> None:
    """Refuse what concerns more partitions than a question may, whether or not there are rows in them."""
    count = 1
    for (kind, scheme), column in zip(_levels(meta), meta["by"], strict=True):
        if not re.search(rf"\b{column} ", where or ""):
            count *= len(_cuts(scheme)) - 1 if kind == "RANGE" else _buckets(scheme)
    if count > _MOST_PARTITIONS:
        raise RuntimeError(
            f"<Exception> in run: The number of partitions [{count}] relevant to the query is too large. Please add "
            "more specific filtering conditions on partition columns in WHERE clause, or consider changing the value "
            "of the configuration parameter maxPartitionNumPerQuery. RefId:S02039"
        )


def _buckets(scheme: str) -> int:
    return int(scheme.rstrip("]").split(", ")[1])


def _partition(meta: dict[str, Any]) -> pl.Expr:
    parts = []
    for (kind, scheme), column in zip(_levels(meta), meta["by"], strict=True):
        if kind == "RANGE":
            parts.append(_bucket(column, scheme).cast(pl.String))
        else:
            assert kind == "HASH"
            parts.append((pl.col(column).hash() % _buckets(scheme)).cast(pl.String))
    return pl.concat_str(parts, separator="/").alias("__partition")


# scripts


def _create(said: dict[str, str], values: dict[str, Any]) -> None:
    database = _folder(said["path"])
    database.mkdir(exist_ok=True)
    table = _Table(said["path"], said["name"])
    columns, by, sort = ([n.strip('"') for n in said[part].split(", ")] for part in ("columns", "by", "sort"))
    types = said["types"].split(", ")
    kinds = dict(zip(columns, types, strict=True))
    wrong = [name for name in columns if not _NAME.fullmatch(name)]
    if wrong or len(set(columns)) != len(columns) or not set(types) <= _TYPES.keys() or not set(by) <= set(columns):
        raise RuntimeError(f"<Exception> in createPartitionedTable: columns {wrong or columns}")
    before, last = sort[:-1], sort[-1]
    bad = [n for n in before if kinds[n] not in ("STRING", "INT", "LONG", "DATE")] if before else []
    if bad or (before and kinds[last] not in ("INT", "LONG", "DATE", "NANOTIMESTAMP")):
        raise RuntimeError(f"<Exception> in createPartitionedTable: cannot sort by {sort}")
    if kinds[last] in ("FLOAT", "DOUBLE", "BOOL") or (not before and kinds[last] == "NANOTIMESTAMP"):
        raise RuntimeError(f"<Exception> in createPartitionedTable: cannot sort by {last}")
    meta = {"columns": columns, "types": types, "sort": sort, "by": by, "scheme": said["scheme"], "comment": ""}
    assert len(_levels(meta)) == len(by)
    try:
        table.folder.mkdir()
    except FileExistsError:
        raise RuntimeError(f"<Exception> in createPartitionedTable: The table {said['name']} already exists") from None
    table.set_meta({**meta, "comment": values[said["comment"]]})


def _set_comment(said: dict[str, str], values: dict[str, Any]) -> None:
    table = _Table(said["path"], said["name"])
    comment = values[said["comment"]]
    if len(comment.encode()) > 4096:
        raise RuntimeError("<Exception> in setTableComment: the comment is longer than 4096 bytes")
    table.set_meta({**table.meta(), "comment": comment})


def _add_column(said: dict[str, str], values: dict[str, Any]) -> None:
    table = _Table(said["path"], said["name"])
    meta = table.meta()
    if said["column"] in meta["columns"]:
        raise RuntimeError(f"<Exception> in addColumn: {said['column']} is there")
    meta["columns"].append(said["column"])
    meta["types"].append(said["type"])
    table.set_meta(meta)


def _exists(said: dict[str, str], values: dict[str, Any]) -> bool:
    return (_Table(said["path"], said["name"]).folder / "meta.json").exists()


def _select(said: dict[str, str], values: dict[str, Any]) -> pl.DataFrame:
    rows = _rows(said, values)
    named = [part.partition(" as ")[::2] for part in re.split(r", (?![^()]*\))", said["listed"])]
    found = rows.select(_value(said_as).alias(name or said_as) for said_as, name in named)
    return found.head(int(said["limit"])) if said["limit"] else found


def _column(said: dict[str, str], values: dict[str, Any]) -> np.ndarray:
    found = _seen(_rows(said, values).select(said["column"]))
    return found[said["column"]].to_numpy()


def _newest(said: dict[str, str], values: dict[str, Any]) -> pl.DataFrame:
    newest = pl.col(said["time"]).max()
    rows = _rows(said, values)
    found = rows.group_by(said["by"]).agg(newest) if said["by"] else rows.select(newest)
    named = [part.partition(" as ")[::2] for part in re.split(r", (?![^()]*\))", said["listed"])]
    return found.select(_value(said_as).alias(name or said_as) for said_as, name in named)


def _delete(said: dict[str, str], values: dict[str, Any]) -> None:
    table = _Table(said["path"], said["name"])
    with table.transaction() as rows:
        table.write(rows.filter(~_conditions(said["where"], values, rows)))


def _rows(said: dict[str, str], values: dict[str, Any]) -> pl.DataFrame:
    table = _Table(said["path"], said["name"])
    _refuse_many(table.meta(), said.get("where"))
    rows = table.read()
    return rows.filter(_conditions(said.get("where"), values, rows))


def _value(said: str) -> pl.Expr:
    if found := re.fullmatch(r"nullFill\((.+), 0l\)", said):
        return _value(found[1]).fill_null(0)
    if found := re.fullmatch(r"isNull\((\w+)\)", said):
        return pl.col(found[1]).is_null()
    if found := re.fullmatch(r"long\((.+)\)", said):
        return _value(found[1]).to_physical().cast(pl.Int64)
    if found := re.fullmatch(r"int\((\w+)\)", said):
        return pl.col(found[1]).to_physical().cast(pl.Int32)
    assert _NAME.fullmatch(said), said
    return pl.col(said)


def _conditions(said: str | None, values: dict[str, Any], rows: pl.DataFrame) -> pl.Expr:
    met = pl.lit(True)
    for each in said.split(" and ") if said else []:
        if each == "1 = 0":
            met = pl.lit(False)
        elif valid := re.fullmatch(r"isValid\((\w+)\)", each):
            met = met & pl.col(valid[1]).is_not_null()
        else:
            compared = re.fullmatch(r"(\w+) (in|=|>=|<=|<) (\S+)", each)
            assert compared is not None, each
            name, how, right = compared.groups()
            met = met & _compared(pl.col(name), how, _operand(right, values, rows.schema[name]))
    return met


def _compared(left: pl.Expr, how: str, right: Any) -> pl.Expr:
    if how == "in":
        return left.is_in(right).fill_null(False)
    if how == "=":
        return (left == right).fill_null(False)
    if how == ">=":
        return (left >= right).fill_null(False)
    return ((left < right) if how == "<" else (left <= right)).fill_null(True)  # null is less than anything


def _operand(said: str, values: dict[str, Any], type_: pl.DataType) -> Any:
    if instant := _INSTANT.fullmatch(said):
        year, month, day, clock, nanos = instant.groups()
        text = f"{year}-{month}-{day}"
        if clock is None:
            assert type_ == pl.Date
            return pl.lit(text).str.to_date(strict=True)
        assert isinstance(type_, pl.Datetime)
        return pl.lit(f"{text}T{clock}.{nanos}").str.to_datetime(time_unit="ns", strict=True)
    if re.fullmatch(r"-?\d+l?", said):
        assert type_ == (pl.Int64 if said.endswith("l") else pl.Int32)
        return pl.lit(int(said.rstrip("l")), type_)
    value = values[said]
    if isinstance(value, str):
        return pl.lit(value)
    listed = pl.Series(value.tolist() if value.dtype == object else value)
    if type_ == pl.Date:
        listed = listed.cast(pl.Date)
    if listed.dtype != type_:
        raise RuntimeError(f"<Exception> in run: {said} is {listed.dtype}, and is compared with {type_}")
    return listed.implode()


def _measured(said: dict[str, str], values: dict[str, Any]) -> pl.DataFrame:
    files = [file for file in _folder(f"dfs://{said['database']}").glob("*/rows.arrow")]
    sizes = pl.Series("diskUsage", [file.stat().st_size for file in files], pl.Int64)
    return pl.DataFrame([pl.Series("chunkId", [str(n) for n in range(len(files))], pl.String), sizes])


_WHERE = r"(?: where (?P<where>.+?))?"
_FORMS = [
    (_CREATION, _create),
    (re.compile(rf"setTableComment\({_TABLE}, (?P<comment>\w+)\)"), _set_comment),
    (re.compile(rf'addColumn\({_TABLE}, "(?P<column>\w+)", (?P<type>\w+)\)'), _add_column),
    (re.compile(r'existsTable\("(?P<path>[^"]+)", "(?P<name>\w+)"\)'), _exists),
    (
        re.compile(rf'schema\({_TABLE}\)\["tableComment"\]'),
        lambda said, _: _Table(said["path"], said["name"]).meta()["comment"],
    ),
    (
        re.compile(rf"exec name from schema\({_TABLE}\)\.colDefs"),
        lambda said, _: np.array(_Table(said["path"], said["name"]).meta()["columns"], dtype=object),
    ),
    (
        re.compile(rf"exec count\(\*\) from {_TABLE}{_WHERE}"),
        lambda said, values: _rows(said, values).height,
    ),
    (
        re.compile(
            rf"select (?P<listed>.+) from \(select max\((?P<time>\w+)\) as (?P=time) from {_TABLE}"
            r"(?: group by (?P<by>\w+))?\)"
        ),
        _newest,
    ),
    (re.compile(rf"exec (?P<column>\w+) from {_TABLE}{_WHERE}"), _column),
    (re.compile(rf"select (?P<listed>.+) from {_TABLE}{_WHERE}(?: limit (?P<limit>\d+))?"), _select),
    (re.compile(rf"delete from {_TABLE}{_WHERE}"), _delete),
    (re.compile(r'getTabletsMeta\("/(?P<database>\w+)/%", "%", true, -1\)'), _measured),
    (
        re.compile(r'exec chunkId from getChunksMeta\("/(?P<database>\w+)/%", -1\) where type=1'),
        lambda said, values: np.array(_measured(said, values)["chunkId"].to_list(), dtype=object),
    ),
    (re.compile(r"flushTSDBCache\(\)"), lambda said, values: None),
    (re.compile(r"triggerTSDBCompaction\((?P<chunk>\w+)\)"), lambda said, values: str(values[said["chunk"]]) and None),
    (re.compile(r"version\(\)"), lambda said, values: "3.00.4 2026.01.01"),
]
