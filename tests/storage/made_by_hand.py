"""Tables as a user makes them, by plain SQL, pymongo, deltalake or polars, in any engine that can adopt one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date, datetime
from pathlib import Path
from typing import Any

import polars as pl

Rows = Sequence[Sequence[Any]]

POLARS = {
    "text": pl.String(),
    "int": pl.Int32(),
    "long": pl.Int64(),
    "single": pl.Float32(),
    "double": pl.Float64(),
    "decimal": pl.Decimal(10, 2),
    "naive": pl.Datetime("ms"),
    "instant": pl.Datetime("us", "UTC"),
    "date": pl.Date(),
}
SQL = {
    "postgresql": {
        "text": "varchar(20)",
        "int": "integer",
        "long": "bigint",
        "single": "real",
        "double": "double precision",
        "decimal": "numeric(10, 2)",
        "naive": "timestamp(0)",
        "instant": "timestamp(3) with time zone",
        "date": "date",
    },
    "mysql": {
        "text": "varchar(20)",
        "int": "int",
        "long": "bigint",
        "single": "float",
        "double": "double",
        "decimal": "decimal(10, 2)",
        "naive": "datetime",
        "instant": "timestamp(3) NULL",
        "date": "date",
    },
    "clickhouse": {
        "text": "LowCardinality(Nullable(String))",
        "int": "Nullable(Int32)",
        "long": "Nullable(Int64)",
        "single": "Nullable(Float32)",
        "double": "Nullable(Float64)",
        "decimal": "Nullable(Decimal(10, 2))",
        "naive": "Nullable(DateTime('Asia/Shanghai'))",  # an instant here, however it is shown
        "instant": "Nullable(DateTime64(3, 'UTC'))",
        "date": "Nullable(Date)",
    },
}


def statement(scheme: str, table: str, types: Mapping[str, str], rows: Rows) -> list[str]:
    """CREATE and INSERT, as a person would type them; a type that is none of those above is the engine's own."""
    known = SQL["clickhouse" if scheme == "chdb" else scheme]
    quote = '"' if scheme == "postgresql" else "`"
    names = ", ".join(f"{quote}{name}{quote}" for name in types)
    columns = ", ".join(f"{quote}{name}{quote} {known.get(type_, type_)}" for name, type_ in types.items())
    engine = " ENGINE = MergeTree ORDER BY tuple()" if known is SQL["clickhouse"] else ""
    said = [f"CREATE TABLE {table} ({columns}){engine}"]
    if rows:
        lines = [", ".join(_literal(value, known) for value in row) for row in rows]
        # over HTTP a statement that ends with VALUES would be taken for one whose rows follow
        put = f"SELECT {' UNION ALL SELECT '.join(lines)}" if engine else f"VALUES ({'), ('.join(lines)})"
        said.append(f"INSERT INTO {table} ({names}) {put}")
    return said


def _literal(value: Any, known: Mapping[str, str]) -> str:
    if isinstance(value, datetime) and known is SQL["clickhouse"]:
        return f"toDateTime64('{value:%Y-%m-%d %H:%M:%S}', 6, 'UTC')"
    if value is None:
        return "NULL"
    if isinstance(value, str | date):
        return f"'{value}'"
    return repr(value)


def run(place: Any, statements: Sequence[str]) -> None:
    """Run statements in an SQL engine with its own client."""
    if place.scheme == "postgresql":
        import psycopg

        with psycopg.connect(place.url, autocommit=True) as connection:
            for one in statements:
                connection.execute(one)  # pyright: ignore[reportArgumentType, reportCallIssue]
    elif place.scheme == "mysql":
        from private_mariadb import asked

        for one in statements:
            asked(place.url, one)
    else:
        import clickhouse_connect
        from private_clickhouse import clickhouse_client

        if place.scheme == "clickhouse":
            client = clickhouse_client(place.url)
        else:
            client = clickhouse_connect.get_client(interface="chdb", path=str(place.folder))  # pyright: ignore
        for one in statements:
            client.command(one)
        client.close()


def make(place: Any, dataset: str, types: Mapping[str, str], rows: Rows, name: str | None = None) -> None:
    """Make the table `name` (None: that of the dataset) with these columns and rows."""
    if place.scheme in SQL or place.scheme == "chdb":
        space, _, table = dataset.partition(".")
        first = []
        quote = '"' if place.scheme == "postgresql" else "`"
        whole = f"{quote}{space}{quote}.{quote}{table}{quote}"
        if place.scheme == "postgresql":
            first = [f'CREATE SCHEMA IF NOT EXISTS "{space}"']
        elif place.scheme == "mysql":
            whole = f"`{dataset}`"
        else:
            first = [f"CREATE DATABASE IF NOT EXISTS `{space}`"]
        run(place, [*first, *statement(place.scheme, name or whole, types, rows)])
        return
    if place.scheme == "mongodb":
        import pymongo

        with pymongo.MongoClient(place.url) as client:
            documents = [
                {n: as_bson(value) for n, value in zip(types, row, strict=True) if value is not None} for row in rows
            ]
            client.get_database()[name or dataset].insert_many(documents)
        return
    frame = pl.DataFrame(
        list(rows), schema={n: POLARS[type_] for n, type_ in types.items()}, orient="row", strict=False
    )
    folder = Path(place.folder, *(dataset.split(".") if name is None else [name]))
    if place.scheme == "delta":
        frame.write_delta(str(folder))
        return
    folder.mkdir(parents=True)
    if place.scheme == "parquet":
        frame.write_parquet(folder / "mine.parquet")
    else:
        frame.write_csv(folder / "mine.csv", datetime_format="%Y-%m-%d %H:%M:%S")


def as_bson(value: Any) -> Any:
    return datetime(value.year, value.month, value.day) if type(value) is date else value  # noqa: DTZ001
