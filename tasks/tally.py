"""What a run has done so far, counted where it happens; the progress display and the report read it."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

from marketsync.ledger import Segment
from storage.protocol import Written


@dataclass
class Counts:
    """The figures of a run or of a part of it; they add up."""

    units: int = 0
    done: int = 0
    empty: int = 0
    not_yet: int = 0
    waiting: int = 0
    dropped: int = 0
    failed: int = 0
    cancelled: int = 0
    sent: int = 0
    retried: int = 0
    cool_downs: int = 0
    fetched: int = 0
    duplicates: int = 0
    quarantined: int = 0
    bytes: int = 0
    segments: int = 0
    copied: int = 0

    def plus(self, other: Counts) -> Counts:
        """Return the sum."""
        mine, theirs = asdict(self), asdict(other)
        return Counts(**{name: mine[name] + theirs[name] for name in mine})


@dataclass(frozen=True)
class Note:
    """Something the report must tell: a unit that was dropped, failed or waits, a store that was down, and why."""

    kind: str  # dropped, failed, waiting, not_yet, stopped, store, quarantined, cool_down
    dataset: str
    subject: str
    message: str
    request: str = ""
    resume_at: datetime | None = None


@dataclass
class Tally:
    """Counts and notes of one step, shared by its threads."""

    counts: Counts = field(default_factory=Counts)
    notes: list[Note] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    total_units: int = 0
    stores: dict[str, Written] = field(default_factory=dict)  # what each store made of the rows it was given
    _lock: threading.Lock = field(default_factory=threading.Lock)

    NOTES = 200  # of each kind; the rest is counted in `left_out`

    def add(self, **counts: int) -> None:
        """Add to figures by name."""
        with self._lock:
            for name, count in counts.items():
                setattr(self.counts, name, getattr(self.counts, name) + count)

    def sealed(self, segment: Segment) -> None:
        """Count a sealed segment."""
        self.add(
            segments=1,
            fetched=segment.fetched,
            duplicates=segment.duplicates,
            quarantined=segment.quarantined,
        )

    def wrote(self, store_id: str, written: Written) -> None:
        """Count a delivery."""
        with self._lock:
            self.stores[store_id] = self.stores.get(store_id, Written()) + written

    def note(self, note: Note) -> None:
        """Keep a note for the report."""
        with self._lock:
            if sum(1 for known in self.notes if known.kind == note.kind) >= self.NOTES:
                self.left_out[note.kind] += 1
            else:
                self.notes.append(note)

    def as_dict(self) -> dict[str, Any]:
        """Return the figures by name."""
        with self._lock:
            return asdict(self.counts)
