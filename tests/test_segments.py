"""Gathering pages into segments: who waits for what."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl

from marketsync.clock import SystemClock
from marketsync.gate import REJECTED, Gated
from marketsync.ledger import Ledger, Segment, Work, WorkState
from marketsync.planning import Unit
from marketsync.schema import Column, ColumnType, Schema
from marketsync.upstream import Segmenting
from storage.spool import Spool
from tasks.segments import PageRows, SegmentWriter
from tasks.tally import Tally
from tasks.watch import Watch

DATASET, OWNER = "x.bars", "host:1:1:a"
FIRST = datetime(2024, 1, 1, tzinfo=UTC)
BARS = Schema(
    (Column("symbol", ColumnType.STR, False), Column("date", ColumnType.DATE, False)),
    ("symbol", "date"),
    "date",
    "symbol",
)


def unit(subject: str) -> Unit:
    end = FIRST + timedelta(days=9)
    return Unit(DATASET, (subject,), (("symbol", (subject,)),), FIRST, end, FIRST, end)


def gathering(
    ledger: Ledger, folder: Path, sealed: Callable[[Segment, pl.DataFrame | None], None]
) -> tuple[SegmentWriter, list[Work]]:
    """Return a writer that seals nothing by itself, and two units that are leased to it."""
    clock = SystemClock()
    leased = ledger.claim(
        run_id="run",
        plan="plan",
        dataset=DATASET,
        request_hash="hash",
        candidates=[unit("A"), unit("B")],
        owner=OWNER,
        still_owed=lambda of, covered: True,
        store_ids=["s"],
    )
    writer = SegmentWriter(
        ledger=ledger,
        spool=Spool(folder),
        schema=BARS,
        gate=lambda batches: Gated(pl.DataFrame(schema=BARS.polars()), pl.DataFrame(schema=REJECTED), 0, 0),
        segmenting=Segmenting(seconds=3600),
        dataset=DATASET,
        run_id="run",
        owner=OWNER,
        host="host",
        stores=["s"],
        watch=Watch(ledger, "plan", OWNER, clock),
        clock=clock,
        tally=Tally(),
        final_until=lambda end: end,
        sealed=sealed,
        threads=2,
    )
    return writer, leased.work


def dropped(work: Work) -> PageRows:
    return PageRows(work, WorkState.DROPPED, None, FIRST, requests=1)


def test_who_wants_its_pages_durable_does_not_wait_for_those_that_others_bring_meanwhile(tmp_path):
    seen = []

    def sealed(segment: Segment, frame: pl.DataFrame | None) -> None:
        if not seen:
            writer.add(dropped(other))
        seen.append(segment.seq)

    with closing(Ledger(f"sqlite:///{tmp_path}/ledger.db", SystemClock())) as ledger:
        writer, (mine, other) = gathering(ledger, tmp_path, sealed)
        with writer:
            writer.add(dropped(mine))
            waiting = threading.Thread(target=writer.flush, daemon=True)
            waiting.start()
            waiting.join(20)
            assert (waiting.is_alive(), seen) == (False, [1])
            writer.flush()
            assert seen == [1, 2]
            writer.flush()
        assert seen == [1, 2]
