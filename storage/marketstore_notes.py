"""What a MarketStore has no table for: a dataset's marker and schema, its lanes, and the hours in which it has rows.

Three buckets of ours a dataset, under the symbol that is its attribute group, so that no glob over data meets them:

- `G/1H/_marketsync`, ticks of one instant: a log of JSON texts, each appended by one request. The first text is the
  table: two processes that make it at once both append, and both then take the one that came first; the server keeps
  ticks of one instant in the order they came. The last text holds the newest schema.
- `G/1Min/_marketsync-lanes`, bars: lane and seq, in a place that follows from the hash of the lane (or the next free
  one). A lane's place is overwritten, so it never grows. Rows name the segment that brought them by that hash and a
  number, because a bucket's text has no room for it.
- `G/1H/_marketsync-hours`, bars: an hour is noted before the first row of it is sent and never taken out. Nothing is
  asked of the server outside of these hours: without a range it would read a whole year's file for each symbol.

Bytes of text are packed into i8 columns. Everything here can be written again without a change.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from marketsync.errors import SchemaError, StoreError
from storage.marketstore_rpc import EPOCH, NANOSECONDS, Client, Columns, Found, Range

GROUP = "_marketsync"
LOG_TIMEFRAME = "1H"  # its file has a place for each: an hour has the fewest
_LANES, _HOURS = f"{GROUP}-lanes", f"{GROUP}-hours"
_LOG_SECOND = 959_817_600  # 2000-06-01: in the year's middle, whatever the server's time zone
_LANES_SECOND = 946_771_200  # 2000-01-02
_PLACES = 500_000  # minutes of that year
_PROBES = 32
_WORDS = 16
_TEXT_BYTES = 8 * _WORDS
_FIRST_SECOND, _LAST_SECOND = 1, 9_214_646_399
_TEXT = [f"b{number}" for number in range(_WORDS)]
_SEGMENT = re.compile(r"(.*):(0|[1-9]\d{0,17})", re.DOTALL)
_RANGES_AT_ONCE = 64


@dataclass(frozen=True)
class Place:
    """Where a lane is noted, or would be: `seq` is None as long as it is not."""

    second: int
    seq: int | None


@dataclass
class Notes:
    """The notes on one dataset, whose rows are in buckets of the attribute group `group`."""

    client: Client
    group: str
    known: dict[int, str] = field(default_factory=dict)  # lanes' texts by their hash; a text never changes
    hours: set[int] = field(default_factory=set)  # that are noted for sure

    @property
    def log_key(self) -> str:
        return f"{self.group}/{LOG_TIMEFRAME}/{GROUP}"

    @property
    def keys(self) -> list[str]:
        return [self.log_key, self._lanes_key, self._hours_key]

    @property
    def _lanes_key(self) -> str:
        return f"{self.group}/1Min/{_LANES}"

    @property
    def _hours_key(self) -> str:
        return f"{self.group}/1H/{_HOURS}"

    # the log

    def texts(self) -> tuple[list[dict[str, Any]], str | None]:
        """Return the log's texts in the order they came, and the server's time zone (None: there is no log)."""
        found = self.client.query([Range(self.log_key, _LOG_SECOND - 86400, _LOG_SECOND + 86400)])
        rows = found.rows[0]
        if rows is None or not len(rows.get(EPOCH, ())):
            return [], found.timezone
        texts: list[dict[str, Any]] = []
        gathered = b""
        left = 0
        for part, parts, packed in zip(rows["part"].tolist(), rows["parts"].tolist(), _packed(rows), strict=True):
            if part == 0:
                gathered, left = b"", parts
            gathered, left = gathered + packed, left - 1
            if left == 0:
                texts.append(json.loads(gathered))
        return texts, found.timezone

    def append(self, text: dict[str, Any]) -> None:
        """Append a text to the log, whole or not at all."""
        import numpy as np

        whole = json.dumps(text, ensure_ascii=False).encode()
        pieces = [whole[at : at + _TEXT_BYTES] for at in range(0, len(whole), _TEXT_BYTES)]
        count = len(pieces)
        columns = {
            EPOCH: np.full(count, _LOG_SECOND, "<i8"),
            "part": np.arange(count, dtype="<i8"),
            "parts": np.full(count, count, "<i8"),
            **_words(pieces),
            NANOSECONDS: np.zeros(count, "<i4"),
        }
        self.client.write({self.log_key: columns}, variable=True)

    # lanes

    def seq(self, lane: str) -> int:
        """Return the number that is noted beside the text; 0 when it is not there."""
        return self._places([lane])[0].seq or 0

    def note(self, lane: str, seq: int) -> None:
        """Note the number beside the text."""
        import numpy as np

        place = self._places([lane])[0]
        if place.seq == seq:
            return
        columns = {
            EPOCH: np.array([place.second], "<i8"),
            "id": np.array([_hash(lane)], "<i8"),
            "seq": np.array([seq], "<i8"),
            **_words([lane.encode()]),
        }
        self.client.write({self._lanes_key: columns}, variable=False)
        self.known[_hash(lane)] = lane

    def segments(self, texts: Iterable[str]) -> dict[str, tuple[int, int]]:
        """Return hash and number of each `_segment`, after its text is noted."""
        split = {text: _split(text) for text in texts}
        unknown = sorted({lane for lane, _ in split.values() if _hash(lane) not in self.known})
        for lane, place in zip(unknown, self._places(unknown), strict=True):
            if place.seq is None:
                self.note(lane, 0)
            self.known[_hash(lane)] = lane
        return {text: (_hash(lane), number) for text, (lane, number) in split.items()}

    def named(self, pairs: Collection[tuple[int, int]]) -> dict[tuple[int, int], str]:
        """Return the `_segment` of each hash and number."""
        unknown = sorted({each for each, _ in pairs if each not in self.known})
        for each, rows in zip(unknown, self._windows(unknown), strict=True):
            for one, lane in _lanes(rows):
                if one == each:
                    self.known[each] = lane
        lost = sorted({each for each, _ in pairs if each not in self.known})
        if lost:
            raise StoreError(
                f"rows of {self.group} in {self.client.endpoint} come from segments that {self._lanes_key} does not "
                f"name ({len(lost)} lanes): was that bucket removed? Read them without the system columns"
            )
        return {(each, number): _joined(self.known[each], number) for each, number in pairs}

    # hours

    def note_hours(self, hours: Iterable[int]) -> None:
        """Note hours since 1970; to be called before rows of them are sent."""
        import numpy as np

        fresh = sorted(set(hours) - self.hours)
        if not fresh:
            return
        columns = {EPOCH: np.array(fresh, "<i8") * 3600, "rows": np.ones(len(fresh), "<i8")}
        self.client.write({self._hours_key: columns}, variable=False)
        self.hours.update(fresh)

    def noted_hours(self, start: int, end: int) -> list[int]:
        """Return the hours since 1970 that are noted, of those that meet the seconds from `start` to `end`."""
        start, end = max(start, _FIRST_SECOND), min(end, _LAST_SECOND)
        if start > end:
            return []
        rows = self.client.query([Range(self._hours_key, start - start % 3600, end)]).rows[0]
        if rows is None or not len(rows.get(EPOCH, ())):
            return []
        return sorted({int(second) // 3600 for second in rows[EPOCH]})

    # how it is done

    def _places(self, lanes: Sequence[str]) -> list[Place]:
        places = []
        for lane, rows in zip(lanes, self._windows([_hash(lane) for lane in lanes]), strict=True):
            if len(lane.encode()) > _TEXT_BYTES:
                raise SchemaError(f"{lane!r} is longer than {_TEXT_BYTES} bytes and cannot be noted in MarketStore")
            first = _second(_hash(lane))
            taken = {}
            if rows is not None:
                named = [text for _, text in _lanes(rows)]
                taken = dict(zip(rows[EPOCH].tolist(), zip(rows["seq"].tolist(), named, strict=True), strict=True))
            same = [Place(second, seq) for second, (seq, text) in taken.items() if text == lane]
            free = [second for second in range(first, first + 60 * _PROBES, 60) if second not in taken]
            if not same and not free:
                raise StoreError(f"{self._lanes_key} in {self.client.endpoint} is full around {lane!r}")
            places.append(same[0] if same else Place(free[0], None))
        return places

    def _windows(self, ids: Sequence[int]) -> list[Columns | None]:
        """Return what is noted in each place that a lane of these hashes could have."""
        rows: list[Columns | None] = []
        for at in range(0, len(ids), _RANGES_AT_ONCE):
            starts = [_second(each) for each in ids[at : at + _RANGES_AT_ONCE]]
            ranges = [Range(self._lanes_key, start, start + 60 * (_PROBES - 1)) for start in starts]
            found: Found = self.client.query(ranges)
            rows += [each if each is not None and len(each.get(EPOCH, ())) else None for each in found.rows]
        return rows


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)


def _second(number: int) -> int:
    return _LANES_SECOND + 60 * (number % _PLACES)


def _split(segment: str) -> tuple[str, int]:
    """Return the lane and the number of `lane:number`; a text of another form is a lane, with the number -1."""
    found = _SEGMENT.fullmatch(segment)
    return (found[1], int(found[2])) if found else (segment, -1)


def _joined(lane: str, number: int) -> str:
    return lane if number < 0 else f"{lane}:{number}"


def _words(texts: Sequence[bytes]) -> Columns:
    """Return texts as columns of their length and of 64-bit words."""
    import numpy as np

    whole = b"".join(text.ljust(_TEXT_BYTES, b"\0") for text in texts)
    table = np.frombuffer(whole, "<i8").reshape(len(texts), _WORDS)
    sizes = np.array([len(text) for text in texts], "<i8")
    return {"size": sizes, **{name: np.ascontiguousarray(table[:, place]) for place, name in enumerate(_TEXT)}}


def _packed(rows: Columns) -> list[bytes]:
    import numpy as np

    table = np.stack([rows[name] for name in _TEXT], axis=1).astype("<i8")
    return [line.tobytes()[:size] for line, size in zip(table, rows["size"].tolist(), strict=True)]


def _lanes(rows: Columns | None) -> list[tuple[int, str]]:
    if rows is None:
        return []
    return [(each, text.decode()) for each, text in zip(rows["id"].tolist(), _packed(rows), strict=True)]
