"""A store as a notebook wants it: rows by dataset, symbols and dates written in any usual way, never written to.

`from marketsync import open_store` leads here. The protocol the pipeline itself uses is `protocol.Store`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, date, datetime
from types import TracebackType
from typing import TYPE_CHECKING

from marketsync.errors import ConfigurationError
from marketsync.schema import Period, Schema
from storage.fingerprints import Recipe
from storage.protocol import Filter, Store
from storage.registry import open_store

if TYPE_CHECKING:
    import polars as pl
    import pyarrow as pa


class Reader:
    """Reads one store; closes it at the end of a `with` block, or with `close()`."""

    def __init__(self, store: Store):
        self.store = store

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Reader({self.store.url!r})"

    def datasets(self) -> list[str]:
        """Return the names of the datasets that have a table here."""
        return self.store.datasets()

    def schema(self, dataset: str) -> Schema | None:
        """Return the dataset's schema; None when there is no table."""
        return self.store.schema(dataset)

    def scan(
        self,
        dataset: str,
        *,
        symbols: str | Sequence[str] | None = None,
        since: datetime | date | str | None = None,
        until: datetime | date | str | None = None,
        columns: Sequence[str] | None = None,
        system: bool = False,
    ) -> pl.LazyFrame:
        """Return the rows of these symbols (None: all) from `since` up to and excluding `until`, as a lazy frame.

        A bound is a date, a datetime, or either as ISO 8601 text; a date stands for its midnight and a time without a
        zone is taken as UTC. `system` adds `_segment` and `_ingested_at`.
        """
        return self.store.scan(dataset, _filter(symbols, since, until, columns, system))

    def arrow(
        self,
        dataset: str,
        *,
        symbols: str | Sequence[str] | None = None,
        since: datetime | date | str | None = None,
        until: datetime | date | str | None = None,
        columns: Sequence[str] | None = None,
        system: bool = False,
    ) -> Iterator[pa.RecordBatch]:
        """Yield the same rows as `scan` as Arrow record batches, in bounded memory."""
        return self.store.arrow(dataset, _filter(symbols, since, until, columns, system))

    def query(self, sql: str) -> pl.DataFrame:
        """Run a SELECT; a table is written `provider.dataset`."""
        return self.store.query(sql)

    def watermarks(self, dataset: str) -> dict[str, datetime | date]:
        """Return the newest time of each symbol."""
        return self.store.watermarks(dataset)

    def fingerprints(
        self,
        dataset: str,
        *,
        seed: bytes,
        period: Period | str = Period.DAY,
        symbols: str | Sequence[str] | None = None,
        since: datetime | date | str | None = None,
        until: datetime | date | str | None = None,
        columns: Sequence[str] | None = None,
        scales: Mapping[str, float] | None = None,
    ) -> pl.DataFrame:
        """Return the fingerprint of each symbol's rows in each `period` (day, month, year or none), by the engine.

        Equal rows have equal fingerprints in every store, whatever its engine: ask two stores with one `seed`, bytes
        drawn anew for each comparison. The columns are `subject`, `segment` (the period's first day), `rows`, `hash`
        and a `sum(...)` for each column that is compared. A float counts as `floor(x * scale + 0.5)`, with a scale of
        1e8 where `scales` gives no other; more is told in `storage/fingerprints.py`.
        """
        try:
            recipe = Recipe(seed, Period(period), columns, scales or {})
        except ValueError as error:
            raise ConfigurationError(f"period={period!r} is none of {', '.join(Period)}") from error
        return self.store.fingerprints(dataset, recipe, _filter(symbols, since, until, None, False))

    def close(self) -> None:
        """Let go of the store's files, locks and connections."""
        self.store.close()


def open_reader(url: str, name: str | None = None) -> Reader:
    """Return a reader of the store of the URL; raises what `registry.open_store` raises."""
    return Reader(open_store(url, name))


def _filter(
    symbols: str | Sequence[str] | None,
    since: datetime | date | str | None,
    until: datetime | date | str | None,
    columns: Sequence[str] | None,
    system: bool,
) -> Filter:
    chosen = [symbols] if isinstance(symbols, str) else symbols
    return Filter(chosen, _bound("since", since), _bound("until", until), columns, system)


def _bound(role: str, value: datetime | date | str | None) -> datetime | date | None:
    if isinstance(value, str):
        try:
            value = date.fromisoformat(value) if len(value) <= len("2001-03-05") else datetime.fromisoformat(value)
        except ValueError as error:
            raise ConfigurationError(
                f"{role}={value!r} is neither a date nor a time; write it like 2001-03-05 or 2001-03-05T09:30:00Z"
            ) from error
    if isinstance(value, datetime) and value.tzinfo is None:
        return value.replace(tzinfo=UTC)
    return value
