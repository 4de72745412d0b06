"""What every store is to the rest of MarketSync: one protocol, the values that pass through it, declared capabilities.

An engine is one module beside this file with one class that follows `Store`, registered in `storage/registry.py`.
Nothing here knows a provider, a plan or the ledger.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

from marketsync.schema import Schema

if TYPE_CHECKING:
    import polars as pl
    import pyarrow as pa

    from storage.fingerprints import Recipe


class Mode(StrEnum):
    """What a delivery may assume about the rows that are in the table already."""

    APPEND = "append"  # the caller knows that no key of the batch is in the table
    UPSERT = "upsert"  # keys may be there: insert what is new, update what changed, leave what is equal


class Writers(StrEnum):
    """Who may write at the same time."""

    ONE_PROCESS = "one_process"
    MANY_PROCESSES = "many_processes"


@dataclass(frozen=True)
class Capabilities:
    """What the engine can promise; a missing ability is a declared flag, never an `if engine ==` elsewhere."""

    atomic: bool  # a reader never sees half a batch
    transactions: bool  # several statements succeed or fail together
    nanoseconds: bool  # keeps DATETIME_NS exactly
    nan: bool  # keeps NaN and infinities apart from null
    unsigned_64: bool  # keeps the whole range of U64
    nul: bool  # keeps a NUL character in text
    evolve: bool  # columns can be added to a table that has rows
    writers: Writers
    negative_zero: bool = True  # keeps -0.0 apart from 0.0, which compare as equal; False: both become 0.0
    empty_text: bool = True  # keeps an empty text apart from null
    final_return: bool = True  # keeps a carriage return at the end of a text
    least: bool = True  # keeps the least number of each type, which is null elsewhere
    longest_key: int | None = None  # characters of a text in the key; None: as many as elsewhere
    longest_text: int | None = None  # characters, as the engine counts, of a text that is no subject; None: any
    subjects: str | None = None  # the regular expression of a subject; None: it may be any text
    any_key: bool = True  # rows may be identified by anything; False: by their time, and what else there is
    earliest: datetime | None = None  # rows of an earlier time are refused
    new_year: bool = True  # keeps a row of a 1 January in a table of days
    days: tuple[date, date] | None = None  # the first and the last that a time can be on; None: of the years 1 to 9999
    table: bool = True  # rows can be read; False: a log, which is followed: no scan, arrow, watermarks, count, query
    why: str = ""  # for each `False`: one sentence that says why and what to do instead


@dataclass(frozen=True)
class Batch:
    """Rows of one dataset on their way into one store.

    `frame` has the schema's columns in order, then `_segment` (str) and `_ingested_at` (datetime us UTC); keys are
    unique within it. A lane is a sequence of batches from one spool writer; `seq` is that of the last segment in the
    batch and only ever grows within a lane. A store remembers the greatest `seq` of each lane together with the rows.
    """

    dataset: str
    schema: Schema
    lane: str
    seq: int
    frame: pl.DataFrame
    mode: Mode


@dataclass(frozen=True)
class Written:
    """What a write did, in rows; `already` is True when the lane was at or past `seq` and nothing was done.

    `deleted` is only ever more than 0 for `replace`: rows of the span whose key is not in the frame. `refused` is
    counted by who delivers: rows set aside because the store would not give them back (`RowsRefused`).
    """

    inserted: int = 0
    updated: int = 0
    unchanged: int = 0
    already: bool = False
    deleted: int = 0
    refused: int = 0

    def __add__(self, other: Written) -> Written:
        return Written(
            self.inserted + other.inserted,
            self.updated + other.updated,
            self.unchanged + other.unchanged,
            self.already and other.already,
            self.deleted + other.deleted,
            self.refused + other.refused,
        )


@dataclass(frozen=True)
class Filter:
    """Which rows: of these subjects (None: all), from `since` up to and excluding `until` by the time column.

    `columns` (None: all of the schema's) projects; `system` adds `_segment` and `_ingested_at`.
    """

    subjects: Sequence[str] | None = None
    since: datetime | date | None = None
    until: datetime | date | None = None
    columns: Sequence[str] | None = None
    system: bool = False


@dataclass(frozen=True)
class TableInfo:
    """One table as it stands: rows, bytes on disk, files or parts, and commits (versions) where the engine has them."""

    dataset: str
    rows: int
    bytes: int
    files: int
    commits: int | None
    location: str


class Store(Protocol):
    """A place rows live. Methods raise `StoreError` (unreachable, refused), `SchemaError` (would lose a value)."""

    name: str
    url: str  # without credentials
    capabilities: Capabilities

    def ensure(self, dataset: str, schema: Schema) -> str:
        """Create the table when it is not there, add columns that are new in `schema`; return the table's marker.

        The marker is a random identity written into the destination when the table is created: a table that was
        dropped, swapped or made anew has another one, which voids what the ledger believes to be in it.
        A narrowing change (a column's type, the key) raises `SchemaError` with the remedy.
        """
        ...

    def marker(self, dataset: str) -> str | None:
        """Return the table's marker; None when there is no table."""
        ...

    def schema(self, dataset: str) -> Schema | None:
        """Return the schema the table was created and evolved with; None when there is no table."""
        ...

    def committed(self, dataset: str, lane: str) -> int:
        """Return the greatest `seq` of the lane whose rows are in the table; 0 when none is."""
        ...

    def write(self, batch: Batch) -> Written:
        """Put the batch in, once: a batch at or below `committed` is skipped. Rows and `seq` become durable together
        or, where the engine cannot do that, in an order in which repeating the batch changes nothing.

        Rows that are equal in all but the system columns stay as they are, with the `_segment` that brought them. A
        batch made before a column was added leaves that column alone. Raises `SchemaError`, and writes nothing, for a
        frame that `admission.admit` refuses (`RowsRefused` where only some of its rows are at fault) or a schema that
        the table has not been given by `ensure`.
        """
        ...

    def replace(self, dataset: str, schema: Schema, frame: pl.DataFrame, span: Filter) -> Written:
        """Make the rows of `span` exactly those of `frame` (columns as in a batch): in one commit where `atomic`.

        Raises `SchemaError` for rows outside of the span.
        """
        ...

    def scan(self, dataset: str, filter: Filter = Filter()) -> pl.LazyFrame:
        """Return the rows as a lazy frame with the schema's types; filters and projection are pushed down."""
        ...

    def arrow(self, dataset: str, filter: Filter = Filter()) -> Iterator[pa.RecordBatch]:
        """Yield the rows as Arrow record batches, in bounded memory."""
        ...

    def watermarks(self, dataset: str) -> dict[str, datetime | date]:
        """Return the newest time of each subject, by the engine (`*` where the schema has no subject column)."""
        ...

    def count(self, dataset: str, filter: Filter = Filter()) -> int:
        """Return the number of rows, by the engine."""
        ...

    def fingerprints(self, dataset: str, recipe: Recipe, filter: Filter = Filter()) -> pl.DataFrame:
        """Return the fingerprints of the filter's rows, one for each subject and period: the columns are told in
        `fingerprints.names`, what they mean in `storage/fingerprints.py`.

        Equal rows have the same fingerprints in every store. Raises `SchemaError` for a column that is not there.
        """
        ...

    def delete(self, dataset: str, filter: Filter) -> int:
        """Delete the rows of the filter and return how many they were."""
        ...

    def datasets(self) -> list[str]:
        """Return the datasets that have a table here, sorted."""
        ...

    def info(self, dataset: str) -> TableInfo:
        """Return the table's size."""
        ...

    def version(self) -> str:
        """Return engine and version in two words, as `PostgreSQL 18.6`: the server's, or the library's in a process."""
        ...

    def query(self, sql: str) -> pl.DataFrame:
        """Run a SELECT over the tables, each named `provider.dataset` as it is everywhere else.

        The dialect is the engine's (polars for stores made of files); `*` may show system columns. Raises `StoreError`.
        """
        ...

    def maintain(self, dataset: str) -> str:
        """Compact and vacuum as the engine needs it; return a sentence that says what was done."""
        ...

    def close(self) -> None:
        """Let go of files, locks and connections; the store is not used after."""
        ...
