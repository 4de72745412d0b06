"""MongoDB collections: `mongodb://user:password@host:27017/database` and `mongodb+srv://`, written by replacement.

A dataset is a collection of that name, a row a document whose `_id` follows from its key (`documents.py`). Rows that
are new or differ are put in whole under their `_id`, so that putting them in again changes nothing; the lane's `seq`
follows them. It does so on servers with transactions too: one that a killed process leaves open keeps its rows locked
for a minute, for everybody. `replace` is one transaction where there are any. Marker, schema and lanes are in the
collections `_marketsync` and `_marketsync_lanes`, by the identity that the server gave the dataset's collection.
Options of the URL are the driver's (tls, authSource, replicaSet, ...), but for `timeSeries=true`: collections that are
made from then on are time-series collections (`mongodb_series.py`). A table that is there is used as it was made.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import date, datetime
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit, urlunsplit

from marketsync.errors import AdoptionRefused, ConfigurationError, ForeignTable, NoTable, SchemaError, StoreError
from marketsync.schema import Schema
from storage import (
    admission,
    adoption,
    classify,
    documents,
    evolution,
    filters,
    fingerprint_documents,
    fingerprints,
    lazyframes,
    location,
    mongodb_series,
)
from storage.adoption import Adoption, Wish
from storage.documents import Document
from storage.mongodb_series import Series
from storage.protocol import Batch, Capabilities, Filter, Mode, TableInfo, Writers, Written

if TYPE_CHECKING:
    import polars as pl
    import pyarrow as pa
    from pymongo import MongoClient
    from pymongo.client_session import ClientSession
    from pymongo.collection import Collection
    from pymongo.database import Database
    from pymongo.errors import BulkWriteError

CAPABILITIES = Capabilities(
    atomic=False,
    transactions=False,
    nanoseconds=True,
    nan=True,
    unsigned_64=True,
    nul=True,
    evolve=True,
    writers=Writers.MANY_PROCESSES,
    why="atomic, transactions: a server by itself has none, and elsewhere one that a killed process left open locks "
    "its rows for a minute; so the lane moves after its rows, a reader may see a part of a batch, and a batch that was "
    "cut short is put in again. Use postgresql:// or delta:// where a reader must never see that.",
)

_TABLES = "_marketsync"
_LANES = "_marketsync_lanes"
_ROWS_AT_ONCE = 10_000  # in memory as documents, in one question and in one transaction
_RUN_ROWS = 8  # from as many rows of one subject on, what is there is read as a range and not row by row
_DUPLICATE_KEY = 11000
_BUCKETS = "system.buckets."  # what holds the rows of a time-series collection, before there were such without views
_SERIES = "timeseries"  # of a collection's options, and of the URL's, where capitals are as good
_Computed = TypeVar("_Computed")
_OPTIONS = {
    "appName": "marketsync",
    "serverSelectionTimeoutMS": "10000",
    "connectTimeoutMS": "10000",
    # what was acknowledged is dropped from the spool: it must survive the server's end, and that of the primary
    "w": "majority",
    "journal": "true",
    "wTimeoutMS": "60000",
}
_REMEDIES = {
    13: "the user needs the role readWrite on the database",
    18: "are user and password right, and is the user one of this database (else add ?authSource=admin)?",
}


@dataclass(frozen=True)
class _Table:
    """A collection of ours: its identity, its marker, its schema as text."""

    uuid: Any
    marker: str
    text: str
    series: bool  # a time-series collection

    @property
    def schema(self) -> Schema:
        return evolution.from_text(self.text)


class MongoStore:
    """Collections of one database. Safe for several threads and several processes."""

    def __init__(self, url: str, name: str, address: str, series: bool):
        self.url = url
        self.name = name
        self.capabilities = mongodb_series.CAPABILITIES if series else CAPABILITIES
        self._address = address
        self._series = series
        self._lock = threading.Lock()
        self._client: MongoClient[Document] | None = None
        self._closed = False

    # the table: creation, identity, shape

    def ensure(self, dataset: str, schema: Schema) -> str:
        evolution.check(dataset, schema)
        documents.check(dataset, schema)
        with self._told(f"making the collection of {dataset}"):
            table = self._described(dataset) or self._create(dataset, schema)
            if table.series:
                self._index(self._collection(dataset), schema, series=True)  # nothing is read without it
            while table.schema != schema:
                evolution.added(dataset, table.schema, schema)
                # compared: another process may give it another schema at the same time
                self._tables.update_one(
                    {"_id": table.uuid, "schema": table.text}, {"$set": {"schema": evolution.to_text(schema)}}
                )
                table = self._table(dataset)
            return table.marker

    def marker(self, dataset: str) -> str | None:
        with self._told(f"looking for {dataset}"):
            table = self._described(dataset)
        return None if table is None else table.marker

    def schema(self, dataset: str) -> Schema | None:
        with self._told(f"looking for {dataset}"):
            table = self._described(dataset)
        return None if table is None else table.schema

    def unkept(self, dataset: str, schema: Schema) -> list[admission.Unkept]:
        documents.check(dataset, schema)
        with self._told(f"looking for {dataset}"):
            if self._series and self._described(dataset) is None:
                self._check_series(dataset, schema)
        return []

    # writing

    def committed(self, dataset: str, lane: str) -> int:
        with self._told(f"reading the lanes of {dataset}"):
            table = self._described(dataset)
            return 0 if table is None else self._seq(table, lane)

    def write(self, batch: Batch) -> Written:
        dataset = batch.dataset
        with self._told(f"writing to {dataset}"):
            table = self._table(dataset)
            if self._seq(table, batch.lane) >= batch.seq:
                return Written(already=True)
            frame, absent = self._admitted(dataset, batch.frame, batch.schema, table.schema)
            if table.series:
                written = self._series_of(dataset, table).put(frame, absent, f"lane {batch.lane}")
            elif batch.mode is Mode.APPEND:
                written = self._append(dataset, table.schema, frame, absent)
            else:
                written = self._upsert(dataset, table.schema, frame, absent)
            self._lanes.update_one({"_id": _lane(table, batch.lane)}, {"$max": {"seq": batch.seq}}, upsert=True)
            return written

    def replace(self, dataset: str, schema: Schema, frame: pl.DataFrame, span: Filter) -> Written:
        with self._told(f"replacing rows of {dataset}"):
            table = self._table(dataset)
            stored = table.schema
            put, absent = self._admitted(dataset, frame, schema, stored)
            filters.refuse_outside(dataset, put, span, stored)
            if table.series:
                series = self._series_of(dataset, table)
                written = series.put(put, absent, "replace")
                return written + Written(deleted=series.delete_others(put, series.queries(dataset, span)))
            kept = set(documents.ids(put, stored))
            queries = documents.queries(dataset, span, stored)
            collection = self._collection(dataset)

            def act(session: ClientSession | None) -> Written:
                # first in, then out: without a transaction a reader may find a row too many, but never one too few
                written = self._upsert(dataset, stored, put, absent, session)
                deleted = 0
                for part in self._found(dataset, queries, {"_id": 1}, session):
                    gone = [document["_id"] for document in part if document["_id"] not in kept]
                    if gone:
                        deleted += collection.delete_many({"_id": {"$in": gone}}, session=session).deleted_count
                return written + Written(deleted=deleted)

            there = sum(collection.count_documents(query) for query in queries)
            return self._together(put.height + there, act)

    def delete(self, dataset: str, filter: Filter) -> int:
        with self._told(f"deleting rows of {dataset}"):
            table = self._table(dataset)
            if table.series:
                series = self._series_of(dataset, table)
                return series.delete(series.queries(dataset, filter))
            collection = self._collection(dataset)
            return sum(
                collection.delete_many(query).deleted_count
                for query in documents.queries(dataset, filter, table.schema)
            )

    # reading

    def scan(self, dataset: str, filter: Filter = Filter()) -> pl.LazyFrame:
        import polars as pl
        from polars.io.plugins import register_io_source

        with self._told(f"reading {dataset}"):
            table = self._table(dataset)
        schema = table.schema
        types = schema.polars(system=True)
        names = filters.columns(dataset, filter, schema)
        if table.series:
            series = self._series_of(dataset, table)
            found = partial(series.found, series.queries(dataset, filter))
        else:
            found = partial(self._found, dataset, documents.queries(dataset, filter, schema))

        def rows(
            columns: list[str] | None, predicate: pl.Expr | None, limit: int | None, _: int | None
        ) -> Iterator[pl.DataFrame]:
            given = names if columns is None else columns
            asked = given if predicate is None else list(dict.fromkeys([*given, *predicate.meta.root_names()]))
            # polars wants to hear of the columns at least once
            yield pl.DataFrame(schema={name: types[name] for name in given})
            left = limit
            with self._told(f"reading {dataset}"):
                for part in found(documents.projection(asked, schema)):
                    # polars counts rows by any column
                    frame = documents.from_documents(part, asked or names[:1], schema)
                    if predicate is not None:
                        frame = frame.filter(predicate)
                    if left is not None:
                        frame = frame.head(left)
                        left -= frame.height
                    yield frame.select(given) if given else frame
                    if left == 0:
                        return

        return register_io_source(rows, schema=pl.Schema({name: types[name] for name in names}))

    def arrow(self, dataset: str, filter: Filter = Filter()) -> Iterator[pa.RecordBatch]:
        return lazyframes.arrow(self.scan(dataset, filter))

    def watermarks(self, dataset: str) -> dict[str, datetime | date]:
        with self._told(f"reading the watermarks of {dataset}"):
            table = self._table(dataset)
            schema = table.schema
            if schema.time is None:
                raise SchemaError(f"{dataset} has no time column, so it has no watermarks")
            if table.series:
                return self._series_of(dataset, table).newest()
            if documents.identity(schema)[:2] == (schema.subject, schema.time):
                return self._newest_by_id(dataset, schema)
            return self._newest_by_group(dataset, schema)

    def count(self, dataset: str, filter: Filter = Filter()) -> int:
        with self._told(f"counting the rows of {dataset}"):
            return self._computed(
                dataset,
                self._table(dataset),
                filter,
                lambda queries, session: sum(
                    self._collection(dataset).count_documents(query, session=session) for query in queries
                ),
            )

    def fingerprints(self, dataset: str, recipe: fingerprints.Recipe, filter: Filter = Filter()) -> pl.DataFrame:
        with self._told(f"computing fingerprints of {dataset}"):
            table = self._table(dataset)
            plan = fingerprints.plan(dataset, recipe, table.schema)
            if not fingerprint_documents.possible(plan):
                return fingerprints.by_scan(self, dataset, recipe, filter)

            def found(queries: Sequence[Document], session: ClientSession | None) -> list[Document]:
                rows: list[Document] = []
                for query in queries:
                    stages = fingerprint_documents.pipeline(plan, query)
                    rows += self._collection(dataset).aggregate(
                        stages, session=session, allowDiskUse=True, batchSize=_ROWS_AT_ONCE
                    )
                return rows

            return fingerprint_documents.frame(plan, self._computed(dataset, table, filter, found))

    # the rest

    def datasets(self) -> list[str]:
        with self._told("listing the collections"):
            there = self._names()
            ours = self._tables.find({}, {"dataset": 1})
            return sorted(table["dataset"] for table in ours if there.get(table["_id"]) == table["dataset"])

    def info(self, dataset: str) -> TableInfo:
        rows = self.count(dataset)
        with self._told(f"measuring {dataset}"):
            stats = self._database.command("collStats", dataset)
            form = " (time series)" if self._table(dataset).series else ""
        return TableInfo(
            dataset,
            rows=rows,
            bytes=int(stats["storageSize"] + stats["totalIndexSize"]),
            files=1,
            commits=None,
            location=f"{self.url}: {dataset}{form}",
        )

    def version(self) -> str:
        with self._told("asking for the version"):
            return f"MongoDB {self._database.client.server_info()['version']}"

    def query(self, sql: str) -> pl.DataFrame:
        return lazyframes.query(sql, self.datasets(), self.scan)

    def adopt(self, dataset: str, schema: Schema, wish: Wish) -> Adoption:
        """Copy a collection into one of ours (see `storage/adoption.py`), since its documents have another `_id`."""
        from storage import adoption_copies as copies

        documents.check(dataset, schema)
        with self._told(f"adopting the collection of {dataset}"):
            own = self._listed(dataset)
            with suppress(ForeignTable):
                if self._described(dataset) is not None:
                    return copies.already(self, dataset, schema, wish, dataset)
            name = wish.table or dataset
            listed = self._listed(name)
            if listed is None or self._collection(name).find_one({}, {"_id": 1}) is None:
                raise NoTable(
                    f"there is no collection {name} with documents, so there is none of {dataset} to adopt; name the "
                    "one that is meant by --table"
                )
            if self._series or (name == dataset and _SERIES in listed["options"]):
                why = "a time-series collection is not renamed by the server; "
                why += "leave timeSeries=true out of the store's URL" if self._series else "rename it by a copy"
                raise AdoptionRefused(name, [why])
            if name != dataset and own is not None:
                raise AdoptionRefused(
                    name, [f"there is a collection {dataset} already, which has the name it must get"]
                )

            def frames(names: Sequence[str]) -> Iterator[pl.DataFrame]:
                fine = [each + documents.FINE for each in names]
                for part in self._found(name, [{}], dict.fromkeys([*names, *fine, "_id"], 1)):
                    yield documents.foreign(part, names)

            fields = self._collection(name).aggregate(
                [
                    {"$project": {"field": {"$objectToArray": "$$ROOT"}}},
                    {"$unwind": "$field"},
                    {"$group": {"_id": "$field.k"}},
                ]
            )
            every = {each["_id"] for each in fields} - {"_id"}
            named = sorted(each for each in every if each.removesuffix(documents.FINE) not in every - {each})
            put = partial(self._exchanged, dataset, schema, wish, name)
            source = copies.Source(name, named, frames)
            return copies.copied(dataset, schema, wish, source, self.capabilities, put)

    def _exchanged(
        self, dataset: str, schema: Schema, wish: Wish, name: str, frames: Iterable[pl.DataFrame]
    ) -> tuple[str, str]:
        """Put the rows into a collection of their own, and give it the name of the dataset's; return its marker and
        what the original is called."""
        new = self._collection(f"{dataset}__adopting")
        new.drop()
        for frame in frames:
            for part in admission.admit(dataset, frame, schema, self.capabilities).iter_slices(_ROWS_AT_ONCE):
                new.insert_many(documents.to_documents(part, schema), ordered=False)
        self._index(new, schema, series=False)
        kept = name
        if name == dataset:
            kept = f"{dataset}_before_{wish.at:%Y%m%d_%H%M%S}"
            self._collection(name).rename(kept)
        new.rename(dataset)
        listed = self._listed(dataset)
        assert listed is not None
        marker = uuid.uuid4().hex
        known = {"dataset": dataset, "marker": marker, "schema": evolution.to_text(schema)}
        self._tables.update_one({"_id": listed["info"]["uuid"]}, {"$set": known}, upsert=True)
        return marker, kept

    def maintain(self, dataset: str) -> str:
        with self._told(f"looking after {dataset}"):
            table = self._table(dataset)
            twins = self._series_of(dataset, table).settle() if table.series else 0
            ours = list(self._tables.find({}, {"marker": 1}))
            # listed after: a collection is there before it is ours
            there = self._names()
            gone = [table for table in ours if table["_id"] not in there]
            if gone:
                self._lanes.delete_many({"_id.marker": {"$in": [table["marker"] for table in gone]}})
                self._tables.delete_many({"_id": {"$in": [table["_id"] for table in gone]}})
        forgotten = f"; forgot {len(gone)} collections that were dropped" if gone else ""
        ended = f"; took out {twins} rows that dead writers had left twice" if twins else ""
        return f"{dataset}: the server itself uses the space of deleted documents again{ended}{forgotten}"

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self._client is not None:
                self._client.close()
                self._client = None

    # how it is done: the connection

    @property
    def _database(self) -> Database[Document]:
        from bson import CodecOptions
        from pymongo import MongoClient, ReadPreference

        with self._lock:
            if self._closed:
                raise StoreError(f"the store {self.url} was closed; open it again")
            if self._client is None:
                self._client = MongoClient(self._address)
            # another option of the URL would give other values, or rows that the primary has no more
            return self._client.get_database(codec_options=CodecOptions(), read_preference=ReadPreference.PRIMARY)

    @property
    def _tables(self) -> Collection[Document]:
        return self._database[_TABLES]

    @property
    def _lanes(self) -> Collection[Document]:
        return self._database[_LANES]

    def _collection(self, dataset: str) -> Collection[Document]:
        return self._database[dataset]

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """Turn what the driver raises into a `StoreError` that says what was being done, and where."""
        from bson.errors import BSONError
        from pymongo.errors import PyMongoError

        try:
            yield
        except (PyMongoError, BSONError) as error:
            raise StoreError(f"MongoDB {self.url}, {what}: {_why(error)}") from error

    def _together(self, rows: int, act: Callable[[ClientSession | None], Written]) -> Written:
        """Do it in one transaction where the server has those and the rows are few enough; else one after the other."""
        from pymongo import ReadPreference
        from pymongo.read_concern import ReadConcern

        if rows > _ROWS_AT_ONCE or not self._has_transactions():
            return act(None)
        database = self._database
        with database.client.start_session() as session:
            return session.with_transaction(
                act,
                read_concern=ReadConcern("snapshot"),
                write_concern=database.write_concern,
                read_preference=ReadPreference.PRIMARY,
            )

    def _has_transactions(self) -> bool:
        said = self._database.client.admin.command("hello")
        return "setName" in said or said.get("msg") == "isdbgrid"

    # how it is done: the table

    def _described(self, dataset: str) -> _Table | None:
        """Return the table; None when there is no collection, or an empty one that may become it."""
        location.split(dataset)
        listed = self._listed(dataset)
        if listed is None:
            return None
        identity = listed["info"].get("uuid")  # a view has none
        found = self._tables.find_one({"_id": identity})
        if found is None:
            odd = {"capped", "collation"} & listed["options"].keys()
            if (
                listed["type"] != "view"
                and self._series == (_SERIES in listed["options"])
                and not odd
                and self._collection(dataset).find_one({}, {"_id": 1}) is None
            ):
                return None
            # whoever made it a moment ago may have filled it by now
            found = self._tables.find_one({"_id": identity})
        if found is None or found["dataset"] != dataset:
            raise ForeignTable(
                f"the collection {dataset} in {self.url} was not made by MarketSync, or was restored from elsewhere; "
                f"{adoption.remedy(dataset)}; or "
                f'rename it (db.getCollection("{dataset}").renameCollection("...")) or drop it, and {dataset} will be '
                "made and filled"
            )
        return _Table(identity, found["marker"], found["schema"], _SERIES in listed["options"])

    def _listed(self, dataset: str) -> Mapping[str, Any] | None:
        """Return what the server says of the collection; None when there is none."""
        names = {"$in": [dataset, _BUCKETS + dataset]}
        found = {each["name"]: each for each in self._database.list_collections(filter={"name": names})}
        listed = found.get(dataset)
        if listed is not None and "uuid" not in listed["info"] and _BUCKETS + dataset in found:
            listed = {**listed, "info": found[_BUCKETS + dataset]["info"]}
        if listed is not None and listed["type"] != "view" and "uuid" not in listed["info"]:
            raise StoreError(
                f"the server at {self.url} does not tell a collection from another one of the same name (it gives no "
                "uuid), so it cannot be believed what was in it; use MongoDB 4.4 or newer"
            )
        return listed

    def _table(self, dataset: str) -> _Table:
        table = self._described(dataset)
        if table is None:
            raise location.absent("collection", dataset, self.url)
        return table

    def _names(self) -> dict[Any, str]:
        """Return the names of the collections that rows may be in, by identity."""
        listed = self._database.list_collections()
        return {each["info"].get("uuid"): each["name"].removeprefix(_BUCKETS) for each in listed}

    def _create(self, dataset: str, schema: Schema) -> _Table:
        from pymongo.errors import CollectionInvalid, DuplicateKeyError, OperationFailure

        form: dict[str, Any] = {}
        if self._series:
            self._check_series(dataset, schema)
            form = {_SERIES: mongodb_series.options(schema)}
        while True:
            try:
                self._database.create_collection(dataset, **form)
            except (CollectionInvalid, OperationFailure) as error:
                if isinstance(error, OperationFailure) and error.code != 48:  # it is there
                    raise
            listed = self._listed(dataset)
            if listed is None:
                continue  # dropped again
            if self._series:
                mongodb_series.refuse_other(dataset, schema, listed["options"].get(_SERIES))
            self._index(self._collection(dataset), schema, series=self._series)
            new = {"dataset": dataset, "marker": uuid.uuid4().hex, "schema": evolution.to_text(schema)}
            try:
                # of several processes that come here at once, the first one's is kept
                self._tables.update_one({"_id": listed["info"]["uuid"]}, {"$setOnInsert": new}, upsert=True)
            except DuplicateKeyError:
                continue
            if (table := self._described(dataset)) is not None:
                return table

    def _check_series(self, dataset: str, schema: Schema) -> None:
        mongodb_series.check(dataset, schema, self._database.client.server_info()["versionArray"])

    def _index(self, collection: Collection[Document], schema: Schema, *, series: bool) -> None:
        """Make the index that finds rows by subject and time, where the `_id` does not."""
        if series or not {schema.subject, schema.time} - {None} <= set(documents.identity(schema)):
            collection.create_index([(name, 1) for name in (schema.subject, schema.time) if name is not None])

    def _admitted(
        self, dataset: str, frame: pl.DataFrame, sent: Schema, stored: Schema
    ) -> tuple[pl.DataFrame, list[str]]:
        return evolution.fit(dataset, admission.admit(dataset, frame, sent, self.capabilities), sent, stored)

    def _seq(self, table: _Table, lane: str) -> int:
        found = self._lanes.find_one({"_id": _lane(table, lane)})
        return 0 if found is None else int(found["seq"])

    # how it is done: rows

    def _series_of(self, dataset: str, table: _Table) -> Series:
        return Series(self._collection(dataset), self._tables, table.uuid, table.schema)

    def _computed(
        self,
        dataset: str,
        table: _Table,
        filter: Filter,
        compute: Callable[[Sequence[Document], ClientSession | None], _Computed],
    ) -> _Computed:
        """Return what is computed from the results of queries for the filter's rows."""
        if not table.series:
            return compute(documents.queries(dataset, filter, table.schema), None)
        series = self._series_of(dataset, table)
        queries = series.queries(dataset, filter)
        return series.settled(
            lambda counts, session: compute([{"$and": [query, counts]} for query in queries], session)
        )

    def _append(self, dataset: str, schema: Schema, frame: pl.DataFrame, absent: Sequence[str]) -> Written:
        """Put in rows that are thought to be new; those that are not are compared with what is there."""
        from pymongo.errors import BulkWriteError

        written = Written()
        for part in frame.iter_slices(_ROWS_AT_ONCE):
            try:
                self._collection(dataset).insert_many(documents.to_documents(part, schema), ordered=False)
            except BulkWriteError as error:
                # the first try of a batch that was cut short has brought them, or another process just now
                there = part[_duplicates(error)]
                written += Written(inserted=part.height - there.height)
                written += self._upsert(dataset, schema, there, absent)
            else:
                written += Written(inserted=part.height)
        return written

    def _upsert(
        self,
        dataset: str,
        schema: Schema,
        frame: pl.DataFrame,
        absent: Sequence[str],
        session: ClientSession | None = None,
    ) -> Written:
        """Put in what is new or differs; rows that are equal stay as they are."""
        from pymongo import ReplaceOne

        written = Written()
        for part in frame.iter_slices(_ROWS_AT_ONCE):
            part = documents.identified(part, schema)
            there = self._there(dataset, schema, part, session)
            split = classify.split(part, there, schema, absent=absent, by=["_id"])
            put = split.changed
            if session is None:
                written += self._append(dataset, schema, split.new, absent)
            else:
                # a key that is there after all would end the transaction
                written += Written(inserted=split.new.height)
                put = put.vstack(split.new)
            if put.height:
                rows = documents.to_documents(put, schema)
                self._collection(dataset).bulk_write(
                    [ReplaceOne({"_id": row["_id"]}, row, upsert=True) for row in rows], ordered=False, session=session
                )
            written += Written(updated=split.changed.height, unchanged=split.equal)
        return written

    def _there(self, dataset: str, schema: Schema, frame: pl.DataFrame, session: ClientSession | None) -> pl.DataFrame:
        """Return at least the rows that have an `_id` of the frame, which stands for their key."""
        import bson
        import polars as pl

        by = frame[schema.subject] if schema.subject in schema.key else pl.repeat("", frame.height, eager=True)
        single: list[str] = []
        found: list[Document] = []
        names = ["_id", *(name for name in schema.names if name not in schema.key)]

        def find(query: Document, limit: int = 0) -> list[Document]:
            asked = documents.projection(names, schema)
            parts = self._collection(dataset).find_raw_batches(query, asked, session=session, limit=limit)
            # each part is the bytes of many documents, whatever the driver's types say
            return [row for part in parts for row in bson.decode_all(part)]  # pyright: ignore[reportArgumentType]

        for (_,), run in pl.DataFrame({"id": frame["_id"], "by": by}).group_by("by", maintain_order=True):
            rows = run["id"]
            if run.height >= _RUN_ROWS:
                # most runs have no gaps: a range is one search where single rows are one each
                enough = 2 * run.height + 100
                near = find({"_id": {"$gte": rows.min(), "$lte": rows.max()}}, enough)
                if len(near) < enough:
                    found += near
                    continue
            single += rows.to_list()
        if single:
            found += find({"_id": {"$in": single}})
        return documents.from_documents(found, names, schema)

    def _found(
        self, dataset: str, queries: Sequence[Document], asked: Document, session: ClientSession | None = None
    ) -> Iterator[list[Document]]:
        """Yield the documents of the queries, some thousands at a time."""
        for query in queries:
            cursor = self._collection(dataset).find(query, asked, batch_size=_ROWS_AT_ONCE, session=session)
            with cursor:
                while part := list(islice(cursor, _ROWS_AT_ONCE)):
                    yield part

    def _newest_by_id(self, dataset: str, schema: Schema) -> dict[str, datetime | date]:
        """Look from the last `_id` to the last one before that subject's, and so on: one search for each subject."""
        subject, time = schema.subject or "", schema.time or ""
        asked = documents.projection([subject, time], schema)
        newest: dict[str, datetime | date] = {}
        query: Document = {}
        while (last := self._collection(dataset).find_one(query, asked, sort=[("_id", -1)])) is not None:
            newest[last[subject]] = documents.instant(last, time, schema)
            query = {"_id": {"$lt": documents.before(last[subject])}}
        return newest

    def _newest_by_group(self, dataset: str, schema: Schema) -> dict[str, datetime | date]:
        time = schema.time or ""
        fine = time + documents.FINE
        newest = {"$max": {time: f"${time}", fine: {"$ifNull": [f"${fine}", 0]}}}
        stages: list[Document] = [
            {"$match": {time: {"$type": "date"}}},
            {"$group": {"_id": f"${schema.subject}" if schema.subject else None, "newest": newest}},
        ]
        return {
            lazyframes.EVERY_SUBJECT if schema.subject is None else each["_id"]: documents.instant(
                each["newest"], time, schema
            )
            for each in self._collection(dataset).aggregate(stages)
            if schema.subject is None or each["_id"] is not None
        }


def open_url(url: str, name: str) -> MongoStore:
    """Open `mongodb://user:password@host:port/database`; raises `ConfigurationError` for a URL that names none, or that
    the driver does not understand."""
    from pymongo.errors import PyMongoError
    from pymongo.uri_parser import parse_uri

    parts = urlsplit(url)
    shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    if not parts.path.strip("/"):
        raise ConfigurationError(f"the store {name} names no database: write {parts.scheme}://user@host/database")
    options = parse_qsl(parts.query, keep_blank_values=True)
    given = {option.lower(): value for option, value in options}
    series = given.get(_SERIES, "false")
    if series not in ("true", "false"):
        raise ConfigurationError(f"the store {name}: timeSeries={series!r} is neither true nor false")
    options = [(option, value) for option, value in options if option.lower() != _SERIES]
    if given.get("w") == "0":
        raise ConfigurationError(f"the store {name}: with w=0 nobody would know what was stored; leave w out")
    options += [(option, value) for option, value in _OPTIONS.items() if option.lower() not in given]
    address = urlunsplit((parts.scheme, parts.netloc, parts.path, urlencode(options, quote_via=quote), ""))
    try:
        if parts.scheme == "mongodb":  # of the other one, the server of names has a part
            parse_uri(address)
    except (PyMongoError, ValueError) as error:
        why = str(error)
        for secret in filter(None, {parts.password, unquote(parts.password or "")}):
            why = why.replace(secret, "***")
        raise ConfigurationError(f"the store {name}, {shown}, is no URL of MongoDB: {why}") from None
    return MongoStore(shown, name, address, series == "true")


def _lane(table: _Table, lane: str) -> Document:
    return {"marker": table.marker, "lane": lane}


def _duplicates(error: BulkWriteError) -> list[int]:
    """Return the places of the rows whose `_id` was there; raises the error again when it has another reason."""
    said = error.details or {}
    refused = said.get("writeErrors", [])
    if not refused or any(each["code"] != _DUPLICATE_KEY for each in refused) or said.get("writeConcernErrors"):
        raise error
    return sorted(each["index"] for each in refused)


def _why(error: Exception) -> str:
    """Return what went wrong, with what to look at, in one line."""
    from pymongo.errors import BulkWriteError, NetworkTimeout, OperationFailure, ServerSelectionTimeoutError

    why = str(error)
    remedy = ""
    if isinstance(error, BulkWriteError):
        said = error.details or {}
        if refused := said.get("writeErrors"):
            why = f"{len(refused)} rows were refused, the first with: {refused[0]['errmsg']}"
        elif unsure := said.get("writeConcernErrors"):
            why = f"too few members of the replica set have the rows: {unsure[0]['errmsg']}"
    elif isinstance(error, OperationFailure):
        why = (error.details or {}).get("errmsg", why)
        remedy = _REMEDIES.get(error.code or 0, "")
    elif isinstance(error, ServerSelectionTimeoutError):
        # a server that lets a user in no more is looked for as if it were down
        refused = "AuthenticationFailed" in why
        why = why.partition(", full error:" if refused else ", Timeout:")[0]
        remedy = "is the server up, and does the URL name its hosts, its replica set and whether it speaks TLS?"
        remedy = _REMEDIES[18] if refused else remedy
    elif isinstance(error, NetworkTimeout):
        remedy = "is the server busy, or the network slow? Add ?socketTimeoutMS=... for longer"
    return " ".join(why.split()) + (f"; {remedy}" if remedy else "")
