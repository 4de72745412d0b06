"""What a log of batches is made of: a batch as messages, and messages as the batch again. Asks no server.

A message is a set of short texts (NATS: headers, Redis: fields) and rows: an Arrow IPC stream or JSON lines, whole by
itself. A batch that is larger than a server takes at once is several such messages, parts 1 to n of one lane and seq.
The last one makes the batch: until it is there nobody is given any of it, and by `previous` it names the part before
it, which names the one before, so that what a killed publisher left behind belongs to no batch.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Literal
from urllib.parse import quote, unquote

from marketsync.errors import StoreError
from marketsync.schema import Schema
from storage.protocol import Filter

if TYPE_CHECKING:
    import polars as pl


class Format(StrEnum):
    """How the rows of a message are written."""

    ARROW = "arrow"
    JSON = "json"


Compression = Literal["uncompressed", "lz4", "zstd"]
REPLACE, DELETE = "replace", "delete"  # what a message can be beside the modes of a write


@dataclass(frozen=True)
class Message:
    """What a server keeps: texts and bytes."""

    headers: Mapping[str, str]
    data: bytes


@dataclass(frozen=True)
class Envelope:
    """What the texts of a message say.

    `rows` are those of the whole batch; `before` is the seq of the lane's batch before it, `previous` where the part
    before it is (nothing for the first one). `span` is what a replacement or a deletion is about.
    """

    dataset: str
    schema: str  # its hash
    lane: str
    seq: int
    mode: str
    rows: int
    format: Format
    span: Filter | None = None
    part: int = 1
    parts: int = 1
    before: int = 0
    previous: str = ""

    @property
    def id(self) -> str:
        """What tells the batch from every other: no two of a log have the same."""
        return f"{self.lane}:{self.seq}"

    @property
    def last(self) -> bool:
        """Whether the batch is whole with this part."""
        return self.part == self.parts


def headers(envelope: Envelope, parts: int) -> list[dict[str, str]]:
    """Return the texts of each part, but for those that are known when it is published: `before`, `previous`, and
    `after`, where the dataset's last message was then, of whatever lane. Who was not given that one has lost it.

    They are ASCII: a lane is written as in a URL.
    """
    said = {
        "dataset": envelope.dataset,
        "schema": envelope.schema,
        "lane": quote(envelope.lane),
        "seq": str(envelope.seq),
        "mode": envelope.mode,
        "rows": str(envelope.rows),
        "format": str(envelope.format),
    }
    found = [{**said, "part": str(part), "parts": str(parts)} for part in range(1, parts + 1)]
    if envelope.span is not None:
        found[-1]["span"] = _span_text(envelope.span)
    return found


def envelope(message: Message) -> Envelope:
    """Return what `headers` wrote; raises `StoreError` for a message that is none of ours."""
    said = message.headers
    try:
        return Envelope(
            dataset=said["dataset"],
            schema=said["schema"],
            lane=unquote(said["lane"]),
            seq=int(said["seq"]),
            mode=said["mode"],
            rows=int(said["rows"]),
            format=Format(said["format"]),
            span=_span(said["span"]) if "span" in said else None,
            part=int(said["part"]),
            parts=int(said["parts"]),
            before=int(said["before"]),
            previous=said.get("previous", ""),
        )
    except (KeyError, ValueError) as error:
        raise StoreError(
            f"a message with the headers {dict(said)!r} is none that MarketSync has published ({error!r}); let nobody "
            "else publish under the names of a store"
        ) from error


def payloads(frame: pl.DataFrame, format: Format, most: int, compression: Compression) -> Iterator[bytes]:
    """Yield the rows as messages of at most `most` bytes, in order; raises `StoreError` for one row that is longer."""
    data = _encoded(frame, format, compression)
    if len(data) <= most:
        yield data
        return
    if frame.height <= 1:
        raise StoreError(
            f"a row of {len(data):,} bytes is longer than a message of this server may be ({most:,}); raise the "
            "server's greatest payload, or leave the longest column out of the definition"
        )
    pieces = min(frame.height, math.ceil(1.1 * len(data) / most))
    for piece in frame.iter_slices(math.ceil(frame.height / pieces)):
        yield from payloads(piece, format, most, compression)


def rows(data: Sequence[bytes], format: Format, schema: Schema) -> pl.DataFrame:
    """Return the rows of a batch's parts with the schema's types, system columns included."""
    import polars as pl

    types = schema.polars(system=True)
    try:
        if format is Format.ARROW:
            frame = pl.concat([pl.read_ipc_stream(io.BytesIO(part)) for part in data])
        else:
            frame = _from_json([line for part in data for line in part.split(b"\n") if line], schema)
    except (pl.exceptions.PolarsError, ValueError, TypeError, KeyError) as error:
        why = " ".join(str(error).split())
        raise StoreError(f"the rows of a message cannot be read as {format}: {why}") from error
    if dict(frame.schema) != types:
        raise StoreError(f"the rows of a message are {dict(frame.schema)}, and its schema says {types}")
    return frame


def _encoded(frame: pl.DataFrame, format: Format, compression: Compression) -> bytes:
    import polars as pl

    if format is Format.JSON:
        return frame.write_ndjson().encode()
    target = io.BytesIO()
    # readers in other languages do not all know the newer layout of texts
    oldest = pl.CompatLevel.oldest()
    frame.rechunk().write_ipc_stream(target, compression=compression, compat_level=oldest)
    return target.getvalue()


def _from_json(lines: Sequence[bytes], schema: Schema) -> pl.DataFrame:
    # Python's reader and not polars': it keeps every digit, and no type is guessed
    import polars as pl

    rows = [json.loads(line) for line in lines]
    columns: dict[str, pl.Series] = {}
    for name, type_ in schema.polars(system=True).items():
        values = [row[name] for row in rows]
        if type_ == pl.Date:
            columns[name] = pl.Series(values, dtype=pl.String).str.to_date("%Y-%m-%d")
        elif isinstance(type_, pl.Datetime):
            texts = pl.Series(values, dtype=pl.String)
            # as many digits as there are: polars writes three of a whole millisecond
            read = texts.str.to_datetime("%Y-%m-%dT%H:%M:%S%.f%:z", time_unit=type_.time_unit)
            columns[name] = read.dt.convert_time_zone("UTC")
        elif type_ == pl.Float32:
            columns[name] = pl.Series(values, dtype=pl.Float64).cast(pl.Float32)
        else:
            columns[name] = pl.Series(values, dtype=type_)
    return pl.DataFrame(columns)


def _span_text(span: Filter) -> str:
    bounds = [None if bound is None else bound.isoformat() for bound in (span.since, span.until)]
    subjects = None if span.subjects is None else list(span.subjects)
    return json.dumps({"subjects": subjects, "since": bounds[0], "until": bounds[1]})


def _span(text: str) -> Filter:
    said = json.loads(text)
    return Filter(said["subjects"], _bound(said["since"]), _bound(said["until"]))


def _bound(text: str | None) -> date | datetime | None:
    if text is None:
        return None
    return datetime.fromisoformat(text) if "T" in text else date.fromisoformat(text)
