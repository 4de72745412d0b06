"""A stand-in for MarketStore v4 of the tests' own: its HTTP RPC on a loopback port, with its traps.

It keeps what the real one keeps and loses what that loses: bars in numbered places of a year, at which an unaligned
time is floored and place 0 (a day bar of 1 January) is a hole; ticks as 32-bit parts of their bucket; columns checked
by name and stored by position; errors under HTTP 200; failures listed alone; several buckets written in any order until
the first that fails. SQL, functions, triggers, the WebSocket, gRPC and replication are not here. Every change is
appended to a journal before it is acknowledged, so that a double that was killed goes on where it was.

Usage: marketstore_double.py FOLDER PORT [TIMEZONE] [replica]. Says `ready` when it listens.
"""

from __future__ import annotations

import math
import os
import random
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import msgpack
import numpy as np

VERSION = "00758656"
SUFFIX = ":Symbol/Timeframe/AttributeGroup"
TYPES = {"f4": 0, "i4": 1, "f8": 2, "i8": 3, "i1": 5, "i2": 9, "u1": 10, "u2": 11, "u4": 12, "u8": 13, "U16": 14}
NAMES = {number: name for name, number in TYPES.items()}
UNITS = {"Sec": 1, "Min": 60, "H": 3600, "D": 86400, "W": 604800}
QUERYABLE = ("1Sec", "10Sec", "30Sec", "1Min", "5Min", "15Min", "30Min", "1H", "4H", "2H", "1D")
TICKS_PER_DAY_SECOND = 49710.269629629629629629629629629  # 2**32 / 86400
DAY = 86400
STARTS_SECONDS = 30


class RpcError(Exception):
    """What the server answers as the error of a whole call."""


class Bucket:
    """The rows of one key: packed bytes by (year, place), with their part of the bucket where they are ticks."""

    def __init__(self, types: dict[str, str], variable: bool, seconds: int):
        self.types = types  # Epoch first
        self.variable = variable
        self.seconds = seconds
        self.years: set[int] = set()
        self.bars: dict[tuple[int, int], bytes] = {}
        self.ticks: dict[tuple[int, int], list[tuple[int, bytes]]] = {}


class Engine:
    """Everything that is kept, and the methods of the RPC. One call at a time, as each bucket's file is written."""

    def __init__(self, folder: Path, timezone: str, replica: bool):
        self.zone = ZoneInfo(timezone)
        self.timezone = timezone
        self.replica = replica
        self.buckets: dict[str, Bucket] = {}
        self._lock = threading.Lock()
        self._random = random.Random()
        self._journal = folder / "journal"
        self._replayed = False
        if self._journal.exists():
            whole = self._journal.read_bytes()
            at = 0
            while at + 8 <= len(whole):
                (size,) = struct.unpack_from("<q", whole, at)
                if at + 8 + size > len(whole):
                    break  # cut short by a kill: never acknowledged
                self._apply(msgpack.unpackb(whole[at + 8 : at + 8 + size], strict_map_key=False))
                at += 8 + size
            os.truncate(self._journal, at)
        self._file = self._journal.open("ab", buffering=0)

    def call(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        known = {
            "DataService.Query": self._query,
            "DataService.Write": self._write,
            "DataService.Create": self._create,
            "DataService.Destroy": self._destroy,
            "DataService.GetInfo": self._info,
            "DataService.ListSymbols": self._list,
        }
        if method not in known:
            raise RpcError(f"rpc: can't find method {method}")
        with self._lock:
            return known[method](params)

    # writing

    def _write(self, params: dict[str, Any]) -> dict[str, Any]:
        failed = []
        for request in params["requests"]:
            try:
                self._write_dataset(request["dataset"], bool(request.get("is_variable_length")))
            except RpcError as error:
                failed.append({"error": str(error), "version": VERSION})
        return {"responses": failed or None}

    def _write_dataset(self, dataset: dict[str, Any], variable: bool) -> None:
        for type_ in dataset["types"]:
            if type_ not in TYPES:
                raise RpcError(f"unsupported type string {type_}")
        columns = {
            name: np.frombuffer(data, f"<{type_}")
            for name, type_, data in zip(dataset["names"], dataset["types"], dataset["data"], strict=True)
        }
        if self.replica:
            raise RpcError("write is not allowed on replica")
        keys = list(dataset["startindex"])
        self._random.shuffle(keys)  # a Go map
        for name in keys:
            start, length = dataset["startindex"][name], dataset["lengths"][name]
            rows = {column: values[start : start + length] for column, values in columns.items()}
            self._write_key(name.partition(":")[0], rows, variable)

    def _write_key(self, key: str, columns: dict[str, np.ndarray], variable: bool) -> None:
        seconds = _seconds(key)
        if not len(columns["Epoch"]):
            return
        nanos = columns.get("Nanoseconds", np.zeros(len(columns["Epoch"]), "<i4"))
        if variable:
            columns = {name: values for name, values in columns.items() if name != "Nanoseconds"}
        bucket = self.buckets.get(key)
        types = {name: values.dtype.str.lstrip("<|") for name, values in columns.items()}
        if bucket is None:
            change = {"key": key, "types": types, "variable": variable, "seconds": seconds}
            self._record({"create": change})
            bucket = self.buckets[key]
        if set(bucket.types) != set(types):
            raise RpcError(f"unable to match data columns ({types}) to bucket columns ({bucket.types})")
        # by name: each column takes the type of its namesake
        cast = {name: values.astype(f"<{bucket.types[name]}") for name, values in columns.items()}
        # by position: the bytes go as they come
        packed = [values for name, values in cast.items() if name != "Epoch"]
        row = np.dtype([(str(place), values.dtype) for place, values in enumerate(packed)])
        table = np.empty(len(nanos), row)
        for place, values in enumerate(packed):
            table[str(place)] = values
        self._record(
            {
                "write": {
                    "key": key,
                    "epochs": columns["Epoch"].astype("<i8").tobytes(),
                    "nanos": nanos.astype("<i8").tobytes(),
                    "rows": table.tobytes(),
                }
            }
        )

    def _create(self, params: dict[str, Any]) -> dict[str, Any]:
        answers = []
        for request in params["requests"]:
            key, colon, _ = request["key"].partition(":")
            why = ""
            if not colon:
                why = f'key "{key}" is not in proper format, should be like: TSLA/1Min/OHLCV{SUFFIX}'
            elif key in self.buckets:
                why = "creation of new catalog entry failed: Can not overwrite file"
            else:
                types = dict(zip(request["column_names"], request["column_types"], strict=True))
                types = {"Epoch": "i8", **{name: type_ for name, type_ in types.items() if name != "Epoch"}}
                variable = bool(request.get("is_variable_length"))
                self._record({"create": {"key": key, "types": types, "variable": variable, "seconds": _seconds(key)}})
            answers.append({"error": why, "version": VERSION})
        return {"responses": answers}

    def _destroy(self, params: dict[str, Any]) -> dict[str, Any]:
        answers = []
        for request in params["requests"]:
            key = request["key"].partition(":")[0]
            why = ""
            if key in self.buckets:
                self._record({"destroy": key})
            else:
                level = key.partition("/")[0]
                why = f"removal of catalog entry failed: unable to find level item: {level} in directory"
            answers.append({"error": why, "version": VERSION})
        return {"responses": answers}

    def _record(self, change: dict[str, Any]) -> None:
        packed = msgpack.packb(change)
        self._file.write(struct.pack("<q", len(packed)) + packed)
        self._apply(change)

    def _apply(self, change: dict[str, Any]) -> None:
        if made := change.get("create"):
            self.buckets[made["key"]] = Bucket(made["types"], made["variable"], made["seconds"])
        elif key := change.get("destroy"):
            del self.buckets[key]
        else:
            written = change["write"]
            bucket = self.buckets[written["key"]]
            epochs = np.frombuffer(written["epochs"], "<i8").tolist()
            nanos = np.frombuffer(written["nanos"], "<i8").tolist()
            size = len(written["rows"]) // len(epochs)
            for number, (epoch, nano) in enumerate(zip(epochs, nanos, strict=True)):
                self._put(bucket, epoch, nano, written["rows"][number * size : (number + 1) * size])

    def _put(self, bucket: Bucket, epoch: int, nano: int, row: bytes) -> None:
        if epoch <= 0:
            return  # no file of that year is ever read
        year, place, base = self._place(bucket, epoch)
        bucket.years.add(year)
        if place == 0:
            return  # taken for a hole
        if not bucket.variable:
            bucket.bars[year, place] = row
            return
        parts = (DAY / bucket.seconds) * TICKS_PER_DAY_SECOND
        tick = int(parts * ((epoch - base) + nano / 1e9)) & 0xFFFFFFFF
        there = bucket.ticks.setdefault((year, place), [])
        there.append((tick, row))
        there.sort(key=lambda one: one[0])  # stable: equal ones stay as they came

    def _place(self, bucket: Bucket, epoch: int) -> tuple[int, int, int]:
        """Return the year, the place in it, and the second at which that place begins."""
        local = datetime.fromtimestamp(epoch, self.zone)
        year = local.year
        if bucket.seconds == DAY:
            place = local.timetuple().tm_yday - 1
        else:
            place = 1 + (epoch - self._year(year)) // bucket.seconds
        return year, place, self._begin(bucket, year, place)

    def _year(self, year: int) -> int:
        return int(datetime(year, 1, 1, tzinfo=self.zone).timestamp())

    def _begin(self, bucket: Bucket, year: int, place: int) -> int:
        if bucket.seconds == DAY:
            return int((datetime(year, 1, 1, tzinfo=self.zone) + timedelta(days=place)).timestamp())
        return self._year(year) + (place - 1) * bucket.seconds

    # reading

    def _query(self, params: dict[str, Any]) -> dict[str, Any]:
        answers = [{"result": self._answer(request)} for request in params["requests"]]
        return {"responses": answers, "version": VERSION, "timezone": self.timezone}

    def _answer(self, request: dict[str, Any]) -> dict[str, Any] | None:
        destination = request["destination"].partition(":")[0]
        parts = destination.split("/")
        if len(parts) != 3:
            raise RpcError(f"destinations must have a Symbol, Timeframe and AttributeGroup, have: {destination}")
        symbols, timeframe, group = parts
        if timeframe != _queryable(timeframe):
            timeframe = _queryable(timeframe)
        chosen = [key.partition("/")[0] for key in self.buckets] if symbols == "*" else symbols.split(",")
        keys = [f"{each}/{timeframe}/{group}" for each in dict.fromkeys(chosen)]
        keys = [key for key in keys if key in self.buckets]
        if not keys:
            raise RpcError("no files returned from query parse")
        self._random.shuffle(keys)
        found = {key: self._rows(self.buckets[key], request) for key in keys}
        shapes = {tuple((name, column.dtype.str) for name, column in rows.items()) for rows in found.values()}
        # what is asked for comes between the two that always come: some then come twice
        wanted = request.get("columns") or []
        names = ["Epoch", *wanted, "Nanoseconds"] if wanted else list(found[keys[0]])
        if len(shapes) > 1:
            raise RpcError(
                "symbols in a query must have the same data type or be filtered by common columns. "
                f"symbols={[key.partition('/')[0] for key in keys]}"
            )
        first = found[keys[0]]
        lengths = {key + SUFFIX: len(rows["Epoch"]) for key, rows in found.items()}
        starts, at = {}, 0
        for key, length in lengths.items():
            starts[key], at = at, at + length
        return {
            "types": [_said(first[name]) for name in names if name in first],
            "names": [name for name in names if name in first],
            "data": [b"".join(rows[name].tobytes() for rows in found.values()) for name in names if name in first],
            "length": at,
            "startindex": starts,
            "lengths": lengths,
        }

    def _rows(self, bucket: Bucket, request: dict[str, Any]) -> dict[str, np.ndarray]:
        start = request.get("epoch_start") or 0
        end = request.get("epoch_end")
        end = end if end is not None else 2**62
        low = (start, request.get("epoch_start_nanos") or 0)
        high = (end, request.get("epoch_end_nanos") or 0 if request.get("epoch_end") is not None else 999_999_999)
        rows: list[tuple[int, int, bytes]] = []
        for year, place in sorted(bucket.ticks if bucket.variable else bucket.bars):
            begin = self._begin(bucket, year, place)
            # a range is rounded to whole places first
            if begin + bucket.seconds <= start or begin > end:
                continue
            if not bucket.variable:
                rows.append((begin, 0, bucket.bars[year, place]))
                continue
            for tick, row in bucket.ticks[year, place]:
                second, nano = _time_of(begin, DAY / bucket.seconds, tick)
                if low <= (second, nano) <= high:
                    rows.append((second, nano, row))
        if limit := request.get("limit_record_count"):
            rows = rows[:limit] if request.get("limit_from_start") else rows[-limit:]
        values = [(name, f"<{type_}") for name, type_ in bucket.types.items() if name != "Epoch"]
        table = np.frombuffer(b"".join(row for _, _, row in rows), np.dtype(values)) if values else np.empty(len(rows))
        columns = {"Epoch": np.array([second for second, _, _ in rows], "<i8")}
        columns |= {name: table[name] for name, _ in values}
        if bucket.variable:
            columns["Nanoseconds"] = np.array([nano for _, nano, _ in rows], "<i4")
        if wanted := request.get("columns"):
            columns = {name: each for name, each in columns.items() if name in ("Epoch", "Nanoseconds", *wanted)}
        return columns

    def _info(self, params: dict[str, Any]) -> dict[str, Any]:
        answers = []
        for request in params["requests"]:
            key = request["key"].partition(":")[0]
            bucket = self.buckets.get(key)
            if bucket is None:
                why = f"unable to get info about key {key}: path not found in catalog"
                answer = {"LatestYear": 0, "TimeFrame": 0, "DSV": None, "RecordType": 0}
            else:
                why = ""
                answer = {
                    "LatestYear": max(bucket.years, default=datetime.now(UTC).year),
                    "TimeFrame": bucket.seconds * 1_000_000_000,
                    "DSV": [{"Name": name, "Type": TYPES[type_]} for name, type_ in bucket.types.items()],
                    "RecordType": int(bucket.variable),
                }
            answers.append({**answer, "ServerResp": {"error": why, "version": VERSION}})
        return {"responses": answers}

    def _list(self, params: dict[str, Any]) -> dict[str, Any]:
        keys = list(self.buckets)
        if params.get("format") != "tbk":
            keys = list({key.partition("/")[0] for key in keys})
        self._random.shuffle(keys)
        return {"Results": keys or None}


def _seconds(key: str) -> int:
    timeframe = key.split("/")[1] if key.count("/") == 2 else ""
    number = timeframe.rstrip("SecMinHDW")
    unit = timeframe[len(number) :]
    if not number.isdigit() or unit not in UNITS:
        raise RpcError(f"timeframe not found in TimeBucketKey={key}")
    return int(number) * UNITS[unit]


def _queryable(timeframe: str) -> str:
    """Return what is looked up instead: the first of the list, from its end, that divides the timeframe."""
    whole = _seconds(f"x/{timeframe}/x")
    return next(each for each in reversed(QUERYABLE) if whole % _seconds(f"x/{each}/x") == 0)


def _time_of(begin: int, per_day: float, tick: int) -> tuple[int, int]:
    """Return second and nanosecond of a tick, with the rounding that moves the last 5 ns of a second to the next."""
    fraction = tick / (per_day * TICKS_PER_DAY_SECOND)
    below = 1e9 * (fraction - math.floor(fraction))
    return begin + int(math.floor(fraction * 1e8 + 0.5) / 1e8), int(below + 0.5)


def _said(column: np.ndarray) -> str:
    return column.dtype.str.lstrip("<|")


class Handler(BaseHTTPRequestHandler):
    """POST and HEAD /rpc."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    engine: Engine

    def do_HEAD(self) -> None:
        self._answer(b"", 405)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path != "/rpc":
            self.send_error(404)
            return
        if self.headers.get("Content-Type") != "application/x-msgpack":
            self.send_error(415, "rpc: unrecognized Content-Type")
            return
        request = msgpack.unpackb(body, strict_map_key=False)
        reply: dict[str, Any] = {"jsonrpc": "2.0"}
        try:
            reply["result"] = self.engine.call(request["method"], request.get("params") or {})
        except RpcError as error:
            reply["error"] = {"code": -32000, "message": str(error), "data": None}
        if request.get("id") is None:
            self._answer(b"")
            return
        reply["id"] = request["id"]
        self._answer(msgpack.packb(reply))  # pyright: ignore[reportArgumentType]

    def _answer(self, body: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/x-msgpack")
        self.send_header("Marketstore-Version", VERSION)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64


@contextmanager
def private_marketstore(
    timezone: str = "UTC", *, replica: bool = False, folder: Path | None = None, port: int | None = None
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Start a double and yield its URL and process; it ends with the block. What is in the folder is there again."""
    if port is None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="marketstore-") as made:
        arguments = [str(folder or made), str(port), timezone, *(["replica"] if replica else [])]
        process = subprocess.Popen([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            assert process.stdout.readline().strip() == "ready"
            yield f"marketstore://127.0.0.1:{port}/", process
        finally:
            process.kill()
            process.wait(STARTS_SECONDS)


def main(folder: str, port: str, timezone: str = "UTC", replica: str = "") -> None:
    Handler.engine = Engine(Path(folder), timezone, replica == "replica")
    with Server(("127.0.0.1", int(port)), Handler) as server:
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
