"""One way of getting rows into one engine: python -m benchmarks.store_ways WAY ENGINE URL DATASET STEP DATA LIMIT.

WAY is `store` (ours), `raw` (what a careful person would write by hand for this engine alone), `polars`
(`write_database`) or `core` (SQLAlchemy's executemany); STEP is `make`, `append`, `upsert`, `history`, `settle`,
`small` or `check`. The rows are Arrow files of one batch each; at most LIMIT rows are taken. Prints, as JSON, what the
writing itself cost this process, or what is in the table. Who runs this how often, and what is asked of the figures, is
in `stores.py`.

On a server every way writes into a table that our store has made, so that types, key and durability are the same.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import unquote, urlsplit

import polars as pl

from benchmarks.store_sizes import SCHEMA as PLAIN
from marketsync.schema import Period, Schema
from storage.protocol import Batch, Mode
from storage.registry import open_store

SCHEMA = Schema(PLAIN.columns, PLAIN.key, PLAIN.time, PLAIN.subject, Period.MONTH)
KEY = list(SCHEMA.key)
NAMES = [*SCHEMA.names, "_segment", "_ingested_at"]
VALUES = [name for name in NAMES if name not in KEY]
COPIED_ROWS = 50_000
Write = Callable[[pl.DataFrame, int, bool], None]  # rows, number of the batch, whether keys may be there


def main(way: str, engine: str, url: str, dataset: str, step: str, data: Path, limit: int) -> dict[str, float]:
    if step == "check":
        return check(way, engine, url, dataset)
    if step == "make":
        store = open_store(url)
        store.ensure(dataset, SCHEMA)
        store.close()
        return {}
    if step == "settle":
        open_store(url).maintain(dataset)
        return {}
    write = WAYS[way, engine](url, dataset)
    costs = []
    for number, frame in enumerate(batches(data / step, limit)):
        began, spent = time.perf_counter(), time.process_time()
        write(frame, number, step in ("upsert", "small"))
        costs.append((time.perf_counter() - began, time.process_time() - spent, frame.height))
    if step == "small":  # one batch of them; the first one also loads what it needs
        seconds, cpu, rows = (median(column) for column in zip(*costs[1:], strict=True))
    else:
        seconds, cpu, rows = (sum(column) for column in zip(*costs, strict=True))
    return {"seconds": seconds, "cpu": cpu, "rows": rows, "batches": len(costs)}


def batches(folder: Path, limit: int) -> Iterator[pl.DataFrame]:
    for file in sorted(folder.glob("*.arrow")):
        frame = pl.read_ipc(file.read_bytes()).head(limit)
        limit -= frame.height
        if frame.height:
            yield frame


def check(way: str, engine: str, url: str, dataset: str) -> dict[str, float]:
    """Return rows and sums of what is in the table."""
    if way in ("raw", "dlt-arrow", "dlt-rows") and engine in ("parquet", "delta", "csv"):
        folder = folder_of(url, dataset)
        if engine == "delta":
            rows = pl.scan_delta(str(folder))
        elif engine == "parquet":
            rows = pl.scan_parquet(f"{folder}/**/*.parquet")
        else:
            rows = pl.scan_csv(f"{folder}/*.csv*")
    elif way.startswith("dlt-"):
        import sqlalchemy as sa

        driver = url.replace("mysql://", "mysql+pymysql://").replace("postgresql://", "postgresql+psycopg://")
        rows = pl.read_database(f"SELECT volume, close FROM {dataset}", sa.create_engine(driver)).lazy()
    elif way == "raw" and engine == "mongodb":
        import pymongo

        with pymongo.MongoClient(url) as client:
            rows = pl.LazyFrame(list(client.get_database()[dataset].find({}, {"volume": 1, "close": 1, "_id": 0})))
    elif way == "raw" and engine == "excel":
        rows = pl.read_excel(f"{folder_of(url, dataset)}.xlsx").lazy()
    else:
        rows = open_store(url).scan(dataset)
    found = rows.select(pl.len(), pl.col("volume").cast(pl.Int64).sum(), pl.col("close").sum()).collect()
    count, volume, close = found.row(0)
    return {"rows": count, "volume": volume, "close": round(close, 2)}


def folder_of(url: str, dataset: str) -> Path:
    return Path(url.partition("://")[2]) / dataset


# ours


def store(url: str, dataset: str) -> Write:
    opened = open_store(url)
    opened.ensure(dataset, SCHEMA)
    first = opened.committed(dataset, "bench")

    def write(frame: pl.DataFrame, number: int, there: bool) -> None:
        mode = Mode.UPSERT if there else Mode.APPEND
        written = opened.write(Batch(dataset, SCHEMA, "bench", first + number + 1, frame, mode))
        assert written.inserted + written.updated + written.unchanged == frame.height

    return write


# files


def raw_delta(url: str, dataset: str) -> Write:
    from deltalake import DeltaTable, write_deltalake

    folder = folder_of(url, dataset)
    period = pl.col("ts").dt.strftime("%Y-%m").alias("_period")

    def write(frame: pl.DataFrame, number: int, there: bool) -> None:
        rows = frame.with_columns(period)
        if not there:
            write_deltalake(folder, rows.to_arrow(), mode="append", partition_by=["_period"])
            return
        periods = ", ".join(f"'{each}'" for each in rows["_period"].unique())
        same = " AND ".join(f"t.{name} = s.{name}" for name in (*KEY, "_period"))
        merger = DeltaTable(folder).merge(
            rows.to_arrow(), f"{same} AND t._period IN ({periods})", source_alias="s", target_alias="t"
        )
        merger.when_matched_update_all().when_not_matched_insert_all().execute()

    return write


def raw_parquet(url: str, dataset: str) -> Write:
    folder = folder_of(url, dataset)

    def write(frame: pl.DataFrame, number: int, there: bool) -> None:
        cut = frame.with_columns(pl.col("ts").dt.strftime("%Y-%m").alias("_period"))
        for (period,), part in cut.partition_by("_period", include_key=False, as_dict=True).items():
            place = folder / f"_period={period}"
            place.mkdir(parents=True, exist_ok=True)
            old = sorted(place.glob("*.parquet")) if there else []
            if old:
                before = pl.read_parquet(old, hive_partitioning=False)
                part = pl.concat([before, part]).unique(KEY, keep="last").sort(KEY)
            _put(place / f"{os.getpid()}-{number}.parquet", lambda file, part=part: part.write_parquet(file))
            for each in old:
                each.unlink()

    return write


def raw_csv(url: str, dataset: str) -> Write:
    folder = folder_of(url, dataset)
    types = {**SCHEMA.polars(system=True)}

    def write(frame: pl.DataFrame, number: int, there: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for (symbol,), part in frame.partition_by("symbol", as_dict=True).items():
            file = folder / f"{symbol}.csv"
            if there and file.exists():
                before = pl.read_csv(file, schema_overrides=types)
                part = pl.concat([before, part]).unique(KEY, keep="last").sort(KEY)
            if there:
                _put(file, part.write_csv)
                continue
            new = not file.exists()
            with file.open("ab") as out:
                part.write_csv(out, include_header=new)

    return write


def raw_excel(url: str, dataset: str) -> Write:
    from rustpy_xlsxwriter import Format, write_worksheet

    file = folder_of(url, dataset).with_name(f"{dataset}.xlsx")
    times = ["ts", "_ingested_at"]
    # given as times, the writer would cut them to whole seconds
    serial = pl.col(times).to_physical() / 86_400_000_000 + 25_569
    look = {name: Format().set_num_format("yyyy-mm-dd hh:mm:ss.000") for name in times}

    def write(frame: pl.DataFrame, number: int, there: bool) -> None:
        rows = frame.with_columns(pl.col(times).dt.replace_time_zone(None))
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists():
            before = pl.read_excel(file).cast(rows.schema)  # pyright: ignore[reportArgumentType]
            rows = pl.concat([before, rows]).unique(KEY, keep="last").sort(KEY)
        write_worksheet(rows.with_columns(serial), str(file), column_formats=look)

    return write


def _put(file: Path, fill: Callable[[Any], Any]) -> None:
    part = file.with_suffix(".part")
    fill(part)
    part.replace(file)


# ClickHouse


def raw_clickhouse(url: str, dataset: str) -> Write:
    import clickhouse_connect

    if url.startswith("chdb"):
        client = clickhouse_connect.get_client(interface="chdb", path=url.partition("://")[2])
    else:
        parts = urlsplit(url)
        client = clickhouse_connect.get_client(host=parts.hostname or "", port=parts.port or 8123)
    database, _, table = dataset.partition(".")

    def write(frame: pl.DataFrame, number: int, there: bool) -> None:
        rows = frame.with_columns(
            pl.lit(time.time_ns() // 1000, pl.UInt64).alias("_version"), pl.lit(0, pl.UInt8).alias("_deleted")
        )
        client.insert_arrow(table, rows.to_arrow(compat_level=pl.CompatLevel.oldest()), database=database)

    return write


# PostgreSQL


def raw_postgresql(url: str, dataset: str) -> Write:
    import psycopg

    connection: Any = psycopg.connect(url)
    table = _quoted(dataset)
    listed = ", ".join(NAMES)
    changes = ", ".join(f"{name} = EXCLUDED.{name}" for name in VALUES)

    def copy(cursor: Any, into: str, frame: pl.DataFrame) -> None:
        with cursor.copy(f"COPY {into} ({listed}) FROM STDIN (FORMAT csv)") as sent:
            for part in frame.iter_slices(COPIED_ROWS):
                sent.write(part.write_csv(include_header=False).encode())

    def write(frame: pl.DataFrame, number: int, there: bool) -> None:
        with connection.transaction(), connection.cursor() as cursor:
            if not there:
                copy(cursor, table, frame)
                return
            cursor.execute(f"CREATE TEMP TABLE stage (LIKE {table}) ON COMMIT DROP")
            copy(cursor, "stage", frame)
            cursor.execute(
                f"INSERT INTO {table} ({listed}) SELECT {listed} FROM stage "
                f"ON CONFLICT ({', '.join(KEY)}) DO UPDATE SET {changes}"
            )

    return write


def polars_postgresql(url: str, dataset: str) -> Write:
    import psycopg

    schema, _, table = dataset.partition(".")
    listed = ", ".join(NAMES)
    changes = ", ".join(f"{name} = EXCLUDED.{name}" for name in VALUES)

    def write(frame: pl.DataFrame, number: int, there: bool) -> None:
        if not there:
            frame.write_database(f"{schema}.{table}", url, if_table_exists="append", engine="adbc")
            return
        frame.write_database(f"{schema}.stage", url, if_table_exists="replace", engine="adbc")
        with psycopg.connect(url) as connection:
            said = (
                f"INSERT INTO {_quoted(dataset)} ({listed}) SELECT {listed} FROM {schema}.stage "
                f"ON CONFLICT ({', '.join(KEY)}) DO UPDATE SET {changes}"
            )
            connection.execute(said)  # pyright: ignore[reportArgumentType]

    return write


def core_postgresql(url: str, dataset: str) -> Write:
    import sqlalchemy as sa
    from sqlalchemy.dialects.postgresql import insert

    engine = sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    schema, _, name = dataset.partition(".")
    table = sa.Table(name, sa.MetaData(), schema=schema, autoload_with=engine)

    def write(frame: pl.DataFrame, number: int, there: bool) -> None:
        said = insert(table)
        if there:
            said = said.on_conflict_do_update(index_elements=KEY, set_={name: said.excluded[name] for name in VALUES})
        with engine.begin() as connection:
            connection.execute(said, frame.to_dicts())

    return write


# MariaDB, MySQL


def raw_mysql(url: str, dataset: str) -> Write:
    import pymysql

    parts = urlsplit(url)
    connection = pymysql.connect(
        host=parts.hostname,
        port=parts.port or 3306,
        user=unquote(parts.username or ""),
        password=unquote(parts.password or ""),
        database=parts.path[1:],
        local_infile=True,
        charset="utf8mb4",
    )
    listed = ", ".join(NAMES)
    changes = ", ".join(f"{name} = s.{name}" for name in VALUES)
    plain = pl.col("ts", "_ingested_at").dt.strftime("%Y-%m-%d %H:%M:%S.%6f")

    def load(cursor: Any, into: str, frame: pl.DataFrame) -> None:
        with tempfile.NamedTemporaryFile() as file:
            frame.with_columns(plain).write_csv(file, include_header=False)
            file.flush()
            cursor.execute(
                f"LOAD DATA LOCAL INFILE '{file.name}' INTO TABLE {into} CHARACTER SET utf8mb4 "
                f"FIELDS TERMINATED BY ',' OPTIONALLY ENCLOSED BY '\"' ({listed})"
            )

    def write(frame: pl.DataFrame, number: int, there: bool) -> None:
        with connection.cursor() as cursor:
            if there:
                cursor.execute(f"CREATE TEMPORARY TABLE stage LIKE `{dataset}`")
                load(cursor, "stage", frame)
                cursor.execute(
                    f"INSERT INTO `{dataset}` ({listed}) SELECT {listed} FROM stage s ON DUPLICATE KEY UPDATE {changes}"
                )
                cursor.execute("DROP TEMPORARY TABLE stage")
            else:
                load(cursor, f"`{dataset}`", frame)
        connection.commit()

    return write


def polars_mysql(url: str, dataset: str) -> Write:
    import sqlalchemy as sa

    engine = sa.create_engine(url.replace("mysql://", "mysql+pymysql://"))
    listed = ", ".join(NAMES)
    changes = ", ".join(f"{name} = s.{name}" for name in VALUES)
    naive = pl.col("ts", "_ingested_at").dt.replace_time_zone(None)

    def write(frame: pl.DataFrame, number: int, there: bool) -> None:
        rows = frame.with_columns(naive)
        if not there:
            rows.write_database(f'"{dataset}"', engine, if_table_exists="append", engine="sqlalchemy")
            return
        rows.write_database("stage", engine, if_table_exists="replace", engine="sqlalchemy")
        with engine.begin() as connection:
            connection.execute(
                sa.text(
                    f"INSERT INTO `{dataset}` ({listed}) SELECT {listed} FROM stage s ON DUPLICATE KEY UPDATE {changes}"
                )
            )

    return write


def core_mysql(url: str, dataset: str) -> Write:
    import sqlalchemy as sa
    from sqlalchemy.dialects.mysql import insert

    engine = sa.create_engine(url.replace("mysql://", "mysql+pymysql://"))
    table = sa.Table(dataset, sa.MetaData(), autoload_with=engine)
    naive = pl.col("ts", "_ingested_at").dt.replace_time_zone(None)

    def write(frame: pl.DataFrame, number: int, there: bool) -> None:
        said = insert(table)
        if there:
            said = said.on_duplicate_key_update({name: said.inserted[name] for name in VALUES})
        with engine.begin() as connection:
            connection.execute(said, frame.with_columns(naive).to_dicts())

    return write


# MongoDB


def raw_mongodb(url: str, dataset: str) -> Write:
    import pymongo

    collection = pymongo.MongoClient(url).get_database()[dataset]

    def write(frame: pl.DataFrame, number: int, there: bool) -> None:
        for part in frame.iter_slices(10_000):
            rows = part.with_columns(_id=pl.col("symbol") + " " + pl.col("ts").cast(pl.String)).to_dicts()
            if there:
                collection.bulk_write([pymongo.ReplaceOne({"_id": r["_id"]}, r, upsert=True) for r in rows], False)
            else:
                collection.insert_many(rows, ordered=False)

    return write


def _quoted(dataset: str) -> str:
    return ".".join(f'"{part}"' for part in dataset.split("."))


ENGINES = ("delta", "parquet", "csv", "excel", "chdb", "clickhouse", "postgresql", "mysql", "mongodb")
WAYS: dict[tuple[str, str], Callable[[str, str], Write]] = {
    **{("store", engine): store for engine in ENGINES},
    ("raw", "delta"): raw_delta,
    ("raw", "parquet"): raw_parquet,
    ("raw", "csv"): raw_csv,
    ("raw", "excel"): raw_excel,
    ("raw", "chdb"): raw_clickhouse,
    ("raw", "clickhouse"): raw_clickhouse,
    ("raw", "postgresql"): raw_postgresql,
    ("polars", "postgresql"): polars_postgresql,
    ("core", "postgresql"): core_postgresql,
    ("raw", "mysql"): raw_mysql,
    ("polars", "mysql"): polars_mysql,
    ("core", "mysql"): core_mysql,
    ("raw", "mongodb"): raw_mongodb,
}

if __name__ == "__main__":
    way, engine, url, dataset, step, data, limit = sys.argv[1:]
    sys.stdout.write(json.dumps(main(way, engine, url, dataset, step, Path(data), int(limit))))
    sys.stdout.flush()
    os._exit(0)  # an engine inside the process may take its time to end, which is no part of the work
