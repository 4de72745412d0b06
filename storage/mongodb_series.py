"""Time-series collections of MongoDB: how they are made, and how rows get into one once and come out of it once.

Such a collection has no unique `_id`, no upsert, no transaction and no update of what was measured: there are inserts,
deletes and questions. So a write reads back what is there of its subjects and times. New rows are put in; of a changed
row the new document is put in before the old one is deleted; a row twice, which a death in between leaves, is a pair of
twins, of which the one with the greatest `_id` counts. A document is deleted for being outranked and by nobody but who
has seen the greater one, so that several processes may do all of this at once and none takes a row away.

Before a write touches rows it notes in `_marketsync`, an ordinary collection, between which times and of which
subjects, and afterwards takes the note back. Where there is a note, twins may be; else there are none. Nothing here
knows of URLs, lanes' numbers or how a dataset's collection is told from another of its name: `mongodb.py` does.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from itertools import groupby, islice
from operator import itemgetter
from typing import TYPE_CHECKING, Any, TypeVar

from marketsync.errors import ForeignTable, SchemaConflict, StoreError
from marketsync.schema import ColumnType, Period, Schema
from storage import admission, classify, documents, filters, lazyframes
from storage.documents import FINE, Document
from storage.protocol import Capabilities, Filter, Writers, Written

if TYPE_CHECKING:
    import polars as pl
    from pymongo.client_session import ClientSession
    from pymongo.collection import Collection

CAPABILITIES = Capabilities(
    atomic=False,
    transactions=False,
    nanoseconds=True,
    nan=True,
    unsigned_64=True,
    nul=True,
    evolve=True,
    negative_zero=False,
    writers=Writers.MANY_PROCESSES,
    any_key=False,
    why="atomic, transactions: no transaction can write to a time-series collection; the lane moves after its rows, a "
    "reader may see a part of a batch, and other programs see a row that is being corrected twice for a moment. Where "
    "the server is no replica set, a row that is corrected just while it is read may be missed. any_key: without a "
    "unique _id a row is found by its time and its subject; leave timeSeries=true out of the store's URL. "
    "negative_zero: what packs the numbers of a bucket has not kept it in every version.",
)

_NOTES = "writing"  # the field of a table's description
_BEGAN = "began"
_SPANS = {Period.DAY: 86_400, Period.MONTH: 31 * 86_400, Period.YEAR: 365 * 86_400}  # seconds, of a bucket at most
OLDEST = (7, 0)  # older servers delete by the subject alone
_ROWS_AT_ONCE = 10_000
_IDS_AT_ONCE = 1_000
_FOR_OTHERS = timedelta(hours=1)  # after which a note was left by somebody who has died
# a server may still be busy with what a killed process has sent
_FOR_OWN = timedelta(minutes=1)
_TOO_OLD = 239
_GONE = (43, _TOO_OLD, 246)  # CursorNotFound, SnapshotTooOld, SnapshotUnavailable
_TRIES = 5
_PAUSE_SECONDS = 0.2
_PLACE, _RANK = "__place", "__rank"
_Result = TypeVar("_Result")


def check(dataset: str, schema: Schema, version: Sequence[int]) -> None:
    """Raise `SchemaConflict` for rows that a time-series collection cannot hold once, `StoreError` for a server that
    cannot take one out of it."""
    lacks = "time" if schema.time not in schema.key else "subject" if schema.subject not in (None, *schema.key) else ""
    if lacks:
        raise SchemaConflict(
            f"{dataset} cannot become a time-series collection in MongoDB: its {lacks} is not in its key "
            f"({', '.join(schema.key)}), by which a row is found there; leave timeSeries=true out of its store's URL"
        )
    if tuple(version[:2]) < OLDEST:
        told = ".".join(map(str, version[:2]))
        raise StoreError(
            f"{dataset} cannot become a time-series collection: the server is MongoDB {told}, and before 7.0 no single "
            "row can be taken out of one, so that no correction could be delivered; update the server, or leave "
            "timeSeries=true out of the store's URL"
        )


def options(schema: Schema) -> dict[str, Any]:
    """Return what a dataset's collection is made with: a bucket lasts a period, unless it is full before."""
    seconds = _SPANS.get(schema.period)
    if seconds is None:
        seconds = _SPANS[Period.YEAR if schema[schema.time or ""].type is ColumnType.DATE else Period.MONTH]
    meta = {} if schema.subject is None else {"metaField": schema.subject}
    return {"timeField": schema.time, **meta, "bucketMaxSpanSeconds": seconds, "bucketRoundingSeconds": seconds}


def refuse_other(dataset: str, schema: Schema, there: Mapping[str, Any] | None) -> None:
    """Raise `ForeignTable` for an empty collection, which somebody else has made, that is no such one."""
    wanted = options(schema)
    if there is None or any(there.get(name) != wanted.get(name) for name in ("timeField", "metaField")):
        raise ForeignTable(
            f"the collection {dataset} was not made by MarketSync: it is no time-series collection by "
            f"{' and '.join(name for name in (schema.subject, schema.time) if name)}; drop it, and it will be made"
        )


@dataclass(frozen=True)
class Series:
    """One dataset's collection; `tables` holds its description under `identity`."""

    rows: Collection[Document]
    tables: Collection[Document]
    identity: Any
    schema: Schema

    # writing

    def put(self, frame: pl.DataFrame, absent: Sequence[str], who: str) -> Written:
        """Put in what is new or differs; rows that are equal stay. `who` never writes twice at the same time."""
        written = Written()
        frame = admission.without_signs(frame)
        for part in frame.sort(self._by).iter_slices(_ROWS_AT_ONCE):
            written += self._put(part, absent, who)
        return written

    def delete(self, queries: Sequence[Document]) -> int:
        self._settle()
        return sum(self.rows.delete_many(query).deleted_count for query in queries)

    def delete_others(self, frame: pl.DataFrame, queries: Sequence[Document]) -> int:
        """Delete the rows of the queries that have no key of the frame."""
        self._settle()
        kept = set(documents.ids(frame, self.schema))
        deleted = 0
        for query in queries:
            with self.rows.find(query, self._keys(), batch_size=_ROWS_AT_ONCE) as cursor:
                while part := list(islice(cursor, _ROWS_AT_ONCE)):
                    there = documents.ids(self._frame(part, self.schema.key), self.schema)
                    deleted += self._take_out([row for row, key in zip(part, there, strict=True) if key not in kept])
        return deleted

    def settle(self) -> int:
        """Delete the twins that writers have left who died an hour ago or longer; return how many those were."""
        return len(self._forget(self._notes(None), None))

    # reading

    def queries(self, dataset: str, filter: Filter) -> list[Document]:
        """Return queries whose results together are the filter's rows, none of them twice."""
        return documents.by_fields(dataset, filter, self.schema)

    def found(self, queries: Sequence[Document], asked: Document) -> Iterator[list[Document]]:
        """Yield the documents of the queries, some thousands at a time, each row once: in the order of subject and
        time, which is that of an index, twins follow one another. They are of one instant on a replica set, unless
        reading lasts longer than the server remembers that."""
        for query in queries:
            yield from self._singles(query, asked | self._keys())

    def settled(self, act: Callable[[Document, ClientSession | None], _Result]) -> _Result:
        """Return what is computed from the rows of the condition that is given to `act`, which leaves out every twin
        that does not count. They are of one instant like those that `found` yields."""

        from pymongo.errors import OperationFailure

        def of_one_instant(session: ClientSession | None) -> _Result:
            outranked = [one["_id"] for note in self._notes(session) for one in self._twins(note, session)]
            return act({"_id": {"$nin": outranked}} if outranked else {}, session)

        for _ in range(_TRIES):
            try:
                with self._instant() as session:
                    return of_one_instant(session)
            except OperationFailure as error:
                if error.code not in _GONE:
                    raise
                if error.code == _TOO_OLD:  # what lasts longer than the server remembers an instant will again
                    break
                time.sleep(_PAUSE_SECONDS)
        return of_one_instant(None)

    def newest(self) -> dict[str, datetime | date]:
        """Return the newest time of each subject. The greatest date of a bucket is known without its rows; what its
        time has beyond the millisecond is asked of the rows of that date."""
        name, subject = self.schema.time or "", self.schema.subject
        by = f"${subject}" if subject else None
        stages: list[Document] = [{"$group": {"_id": by, "newest": {"$max": f"${name}"}}}]
        last = {each["_id"]: {name: each["newest"]} for each in self.rows.aggregate(stages, allowDiskUse=True)}
        if self.schema[name].type is not ColumnType.DATE:
            either = [{name: row[name], **({subject: each} if subject else {})} for each, row in last.items()]
            for some in filters.groups(either, documents.SUBJECTS_A_QUERY):
                finer = {"$and": [{"$or": some}, {name + FINE: {"$exists": True}}]}
                for row in self.rows.find(finer, {"_id": 0, name + FINE: 1, **({subject: 1} if subject else {})}):
                    there = last[row[subject] if subject else None]
                    there[name + FINE] = max(there.get(name + FINE, 0), row[name + FINE])
        return {
            lazyframes.EVERY_SUBJECT if subject is None else each: documents.instant(row, name, self.schema)
            for each, row in last.items()
        }

    # how it is done: writing

    @property
    def _by(self) -> list[str]:
        return [name for name in (self.schema.subject, self.schema.time) if name is not None]

    @property
    def _order(self) -> list[tuple[str, int]]:
        return [(name, 1) for name in self._by]

    def _keys(self) -> Document:
        return documents.projection(self.schema.key, self.schema)

    def _frame(self, found: Sequence[Document], names: Sequence[str]) -> pl.DataFrame:
        return documents.from_documents(found, names, self.schema)

    def _put(self, part: pl.DataFrame, absent: Sequence[str], who: str) -> Written:
        note, number, alone = self._begin(part, who)
        found = self._near(part, documents.projection(self.schema.names, self.schema))
        there = self._ranked(found, self.schema.names)
        counts = self._counts(there)
        split = classify.split(part, there.filter(counts), self.schema, absent=absent, tag=_PLACE)
        self._insert(split.new, [])
        self._insert(split.changed, found)
        gone = [*there.filter(~counts)[_PLACE], *split.tags]
        self._take_out([found[place] for place in gone])
        if not alone or self._joined(number):
            # of two who have put in one key, who comes here last sees both
            found = self._near(part, self._keys())
            there = self._ranked(found, self.schema.key)
            twins = there.filter(~self._counts(there))
            self._take_out([found[place] for place in twins.get_column(_PLACE)])
        self.tables.update_one({"_id": self.identity}, {"$pull": {_NOTES: {"id": note}}})
        return split.written()

    def _ranked(self, found: Sequence[Document], names: Sequence[str]) -> pl.DataFrame:
        import polars as pl

        ranks = pl.Series(_RANK, [_rank(each["_id"]) for each in found], pl.String)
        return self._frame(found, names).with_columns(ranks, pl.int_range(pl.len()).alias(_PLACE))

    def _counts(self, there: pl.DataFrame) -> pl.Series:
        """Tell of each document whether it is its key's greatest. One that is there twice under one `_id`, as only
        another program can have put it in, counts twice: the key is then written anew."""
        import polars as pl

        return there.select(pl.col(_RANK) == pl.col(_RANK).max().over(list(self.schema.key))).to_series()

    def _insert(self, frame: pl.DataFrame, instead: Sequence[Document]) -> None:
        """Put in rows that count instead of any of these documents."""
        if not frame.height:
            return
        rows = documents.to_documents(frame, self.schema)
        for row, each in zip(rows, _ids(len(rows), instead), strict=True):
            row["_id"] = each
        self.rows.insert_many(rows, ordered=False)

    def _take_out(self, found: Sequence[Document]) -> int:
        """Delete these documents; `found` need have the fields of the index only."""
        deleted = 0
        for some in filters.groups(sorted(found, key=lambda row: [row[name] for name in self._by]), _IDS_AT_ONCE):
            times = [row[self.schema.time or ""] for row in some]
            where: Document = {self.schema.time or "": {"$gte": min(times), "$lte": max(times)}}
            if self.schema.subject is not None:
                where[self.schema.subject] = {"$in": sorted({row[self.schema.subject] for row in some})}
            deleted += self.rows.delete_many(where | {"_id": {"$in": [row["_id"] for row in some]}}).deleted_count
        return deleted

    def _near(self, part: pl.DataFrame, asked: Document) -> list[Document]:
        """Return at least the documents that have a key of the rows: those between the first and the last time of each
        subject, unless that is many more."""
        import polars as pl

        subject = pl.lit("") if self.schema.subject is None else pl.col(self.schema.subject)
        rows = part.select(subject.alias("by"), documents.times(part, self.schema).alias("at"))
        ends = rows.group_by("by", maintain_order=True).agg(
            pl.col("at").min().alias("low"), pl.col("at").max().alias("high"), pl.len().alias("rows")
        )
        found: list[Document] = []
        for (low, high), alike in ends.group_by("low", "high", maintain_order=True):
            for some in alike.iter_slices(documents.SUBJECTS_A_QUERY):
                whole = self._within(some["by"].to_list(), {"$gte": low, "$lte": high})
                enough = 2 * int(some["rows"].sum()) + 100
                near = list(self.rows.find(whole, asked, limit=enough))
                if len(near) < enough:
                    found += near
                    continue
                for (one,), run in rows.join(some, on="by", how="semi").group_by("by", maintain_order=True):
                    instants = run["at"].unique(maintain_order=True).to_list()
                    for times in filters.groups(instants, documents.SUBJECTS_A_QUERY):
                        near_by = {"$gte": min(times), "$lte": max(times), "$in": list(times)}
                        found += self.rows.find(self._within([one], near_by), asked)
        return found

    def _within(self, subjects: Sequence[Any] | None, times: Document) -> Document:
        where: Document = {self.schema.time or "": times}
        if self.schema.subject is None or subjects is None:
            return where
        return {self.schema.subject: subjects[0] if len(subjects) == 1 else {"$in": list(subjects)}, **where}

    # how it is done: notes of what is being written, and twins

    def _begin(self, part: pl.DataFrame, who: str) -> tuple[str, int, bool]:
        """Note what will be written; return the note, its number, and whether there was no other one."""
        times = documents.times(part, self.schema)
        subjects = None if self.schema.subject is None else part[self.schema.subject].unique().to_list()
        note = {
            "id": uuid.uuid4().hex,
            "who": who,
            "at": _now(),
            "low": times.min(),
            "high": times.max(),
            "subjects": subjects if subjects and len(subjects) <= documents.SUBJECTS_A_QUERY else None,
        }
        added = {"$push": {_NOTES: note}, "$inc": {_BEGAN: 1}}
        before = self.tables.find_one_and_update({"_id": self.identity}, added, {_NOTES: 1, _BEGAN: 1})
        if before is None:
            raise StoreError(f"the collection {self.rows.name} was dropped meanwhile; run it again")
        notes = before.get(_NOTES, [])
        self._forget(notes, who)
        return note["id"], before.get(_BEGAN, 0) + 1, not notes

    def _joined(self, number: int) -> bool:
        """Tell whether anybody has begun to write since the note of that number."""
        found = self.tables.find_one({"_id": self.identity}, {_BEGAN: 1})
        return found is None or found.get(_BEGAN, 0) != number

    def _notes(self, session: ClientSession | None) -> list[Document]:
        found = self.tables.find_one({"_id": self.identity}, {_NOTES: 1}, session=session)
        return [] if found is None else found.get(_NOTES, [])

    def _forget(self, notes: Iterable[Document], who: str | None) -> list[Document]:
        """End what this one left when it died, and all who died long ago; return the twins that there were."""
        now = _now()
        left = [note for note in notes if note["who"] == who or now - note["at"] > _FOR_OTHERS]
        twins = [one for note in left for one in self._twins(note, None)]
        self._take_out(twins)
        if done := [note["id"] for note in left if now - note["at"] > _FOR_OWN]:
            self.tables.update_one({"_id": self.identity}, {"$pull": {_NOTES: {"id": {"$in": done}}}})
        return twins

    def _settle(self) -> None:
        """Delete all twins, so that none is left when the other is deleted."""
        self._take_out([one for note in self._notes(None) for one in self._twins(note, None)])

    def _twins(self, note: Document, session: ClientSession | None) -> list[Document]:
        """Return the documents of the note's span that do not count, with the fields of the index."""
        key: Document = {}
        for name in self.schema.key:
            key[f"k{len(key)}"] = f"${name}"
            if self.schema[name].type in (ColumnType.DATETIME, ColumnType.DATETIME_NS):
                key[f"k{len(key)}"] = {"$ifNull": [f"${name}{FINE}", 0]}
        of_index = {name: {"$first": f"${name}"} for name in self._by}
        stages: list[Document] = [
            {"$match": self._within(note["subjects"], {"$gte": note["low"], "$lte": note["high"]})},
            {"$group": {"_id": key, "ids": {"$push": "$_id"}, **of_index}},
            {"$match": {"ids.1": {"$exists": True}}},
        ]
        found = []
        for each in self.rows.aggregate(stages, allowDiskUse=True, session=session):
            most = max(map(_rank, each["ids"]))
            place = {name: each[name] for name in self._by}
            found += [place | {"_id": one} for one in each["ids"] if _rank(one) < most]
        return found

    # how it is done: reading

    def _singles(self, query: Document, asked: Document) -> Iterator[list[Document]]:
        from pymongo.errors import OperationFailure

        last: Document | None = None
        tries = 0
        while True:
            try:
                with self._instant() as session:
                    where = query if last is None else {"$and": [query, self._after(last)]}
                    ordered = self.rows.find(where, asked, batch_size=_ROWS_AT_ONCE, session=session)
                    ordered = ordered.sort(self._order).hint(self._order).allow_disk_use(True)
                    with ordered as cursor:
                        part: list[Document] = []
                        for group in self._groups(cursor):
                            part += group
                            if len(part) >= _ROWS_AT_ONCE:
                                yield part
                                last, tries, part = part[-1], 0, []
                        if part:
                            yield part
                return
            except OperationFailure as error:
                tries += 1
                if error.code not in _GONE or tries == _TRIES:
                    raise
                time.sleep(_PAUSE_SECONDS)

    def _after(self, last: Document) -> Document:
        """Return the condition on rows that come after all of this one's subject and time."""
        name, subject = self.schema.time or "", self.schema.subject
        later = {name: {"$gt": last[name]}}
        if subject is None:
            return later
        return {"$or": [{subject: {"$gt": last[subject]}}, {subject: last[subject], **later}]}

    def _groups(self, ordered: Iterable[Document]) -> Iterator[list[Document]]:
        """Yield the documents of each subject and time, without the twins that do not count."""
        for _, each in groupby(ordered, itemgetter(*self._by)):
            group = list(each)
            yield group if len(group) == 1 else self._greatest(group)

    def _greatest(self, group: Sequence[Document]) -> list[Document]:
        """Return the documents of one subject and time that count."""
        keys = documents.ids(self._frame(group, self.schema.key), self.schema)
        greatest: dict[str, Document] = {}
        for key, row in zip(keys, group, strict=True):
            if key not in greatest or _rank(row["_id"]) > _rank(greatest[key]["_id"]):
                greatest[key] = row
        return list(greatest.values())

    @contextmanager
    def _instant(self) -> Iterator[ClientSession | None]:
        """Give a session that sees all rows as they are now, where the server has such."""
        client = self.rows.database.client
        said = client.admin.command("hello")
        if "setName" not in said and said.get("msg") != "isdbgrid":
            yield None
            return
        with client.start_session(snapshot=True) as session:
            yield session


def _rank(identity: Any) -> str:
    """Return a text that is greater for the `_id` of the two that counts; those that others have made count least."""
    from bson import ObjectId

    return f"{int(isinstance(identity, ObjectId))}{identity}"


def _ids(count: int, instead: Sequence[Document]) -> Iterator[Any]:
    """Yield identities that are greater than those of the documents, whatever the clocks of their makers said."""
    from bson import ObjectId

    made = [each["_id"].binary for each in instead if isinstance(each["_id"], ObjectId)]
    # an ObjectId begins with its second
    second = max([int(time.time()), *(int.from_bytes(each[:4], "big") + 1 for each in made)])
    for _ in range(count):
        yield ObjectId(min(second, 2**32 - 1).to_bytes(4, "big") + ObjectId().binary[4:])


def _now() -> datetime:
    """As BSON dates are read: without a zone."""
    return datetime.now(UTC).replace(tzinfo=None)
