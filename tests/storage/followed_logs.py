"""Logs for the tests: an empty place for one, and a log read as the table that a follower makes of it, so that what
holds for every store can be asked of a log as well."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any

import polars as pl

from storage import filters, lazyframes
from storage.following import Followed, follow
from storage.log import LogStore
from storage.protocol import Filter
from storage.registry import open_store


class Folded:
    """A log, with the reading side of a store made of its batches."""

    def __init__(self, address: str):
        self.address = address
        self.log = open_store(address)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.log, name)

    def _table(self, dataset: str) -> pl.DataFrame:
        schema = self.log.schema(dataset)
        assert schema is not None
        rows = pl.DataFrame(schema=schema.polars(system=True))
        for each in batches(self.address, dataset, system=True):
            rows = each.applied(rows)
        return rows.select(list(schema.polars(system=True)))

    def scan(self, dataset: str, filter: Filter = Filter()) -> pl.LazyFrame:
        schema = self.log.schema(dataset)
        assert schema is not None
        rows = self._table(dataset).lazy()
        inside = filters.expression(dataset, filter, schema)
        names = filters.columns(dataset, filter, schema)
        return (rows if inside is None else rows.filter(inside)).select(names)

    def count(self, dataset: str, filter: Filter = Filter()) -> int:
        return lazyframes.count(self.scan(dataset, filter))

    def watermarks(self, dataset: str) -> dict[str, datetime | date]:
        schema = self.log.schema(dataset)
        assert schema is not None
        return lazyframes.watermarks(self.scan(dataset), dataset, schema)


@dataclass(frozen=True)
class LogPlace:
    """One empty place for a log; `address` is its whole URL."""

    address: str

    @property
    def url(self) -> str:
        return self.address

    @property
    def scheme(self) -> str:
        return self.address.partition(":")[0]

    def open(self) -> Any:
        return Folded(self.address)

    def log(self, more: str = "") -> LogStore:
        store = open_store(self.address + more)
        assert isinstance(store, LogStore)
        return store

    def empty(self, dataset: str) -> None:
        """Take the log away behind the store's back."""
        if self.scheme == "nats":
            from private_nats import delete_stream

            server, _, stream = self.address.partition("?")[0].rpartition("/")
            asyncio.run(delete_stream(server, stream))
        else:
            from private_redis import delete_keys

            server, _, options = self.address.partition("?")
            prefix = options.partition("prefix=")[2].partition("&")[0]
            delete_keys(server, f"{prefix}:{{{dataset}}}")

    def beside(self, number: int) -> LogPlace:
        """The same place, where datasets of other names are others."""
        return self


def batches(url: str, dataset: str, **options: Any) -> Iterator[Followed]:
    """Yield the batches that are in a log now, each acknowledged when the next one is asked for."""
    with follow(url, dataset, **{"idle_seconds": 0, **options}) as following:
        for each in following:
            yield each
            each.ack()
