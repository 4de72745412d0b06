"""From what is wanted and what is covered to work units: which requests, over which subjects and windows. Pure.

No request is sent and no ledger read here; the engine hands in coverage and gets units back, newest window first.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, time, timedelta
from itertools import product

from marketsync.coverage import Interval, merged
from marketsync.definition import Dataset
from marketsync.durations import parse_span, window_after, window_floor

EVERYTHING = "*"
ALL_TIME = (datetime(1678, 1, 1, tzinfo=UTC), datetime(2262, 1, 1, tzinfo=UTC))  # what 64 bits of nanoseconds can say


def day_start(day: date) -> datetime:
    """Return midnight UTC of a day: the position of a session date."""
    return datetime.combine(day, time(), UTC)


def instant(value: date | datetime) -> datetime:
    """Return the position of a date (its midnight UTC) or of a datetime (naive ones are taken as UTC)."""
    if isinstance(value, datetime):
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
    return day_start(value)


def end_with(until: date | datetime) -> datetime:
    """Return where a span ends that goes up to an instant, or to a day, which is part of it."""
    return instant(until if isinstance(until, datetime) else until + timedelta(days=1))


@dataclass(frozen=True)
class Unit:
    """One chain of requests: these subjects, these values of `over`, this interval.

    `start`/`end` is what is owed (and will be covered); `window_start`/`window_end` the bounds of rows that an answer
    may hold (wider where a request answers for its whole window).
    """

    dataset: str
    subjects: tuple[str, ...]
    values: tuple[tuple[str, tuple[str, ...]], ...]
    start: datetime
    end: datetime
    window_start: datetime
    window_end: datetime
    session: date | None = None

    @property
    def span(self) -> Interval:
        """What is owed, as an interval."""
        return Interval(self.start, self.end)

    def work_id(self, request_hash: str) -> str:
        """Return the identity of this piece of work: the same unit of the same request has the same."""
        text = "\n".join([self.dataset, request_hash, self.start.isoformat(), self.end.isoformat(), *self.subjects])
        return hashlib.sha256(text.encode()).hexdigest()[:20]


@dataclass(frozen=True)
class Subject:
    """A subject and the values of `over` that make it up, in the order of the names."""

    name: str
    values: tuple[str, ...]


def subjects_of(dataset: Dataset, values: Mapping[str, Sequence[str]]) -> list[Subject]:
    """Return the product of the values of each name of `over`; the one subject `*` when there is no name."""
    names = list(dataset.over.subjects)
    if not names:
        return [Subject(EVERYTHING, ())]
    lists = [list(dict.fromkeys(values[name])) for name in names]
    return [Subject("|".join(combination), combination) for combination in product(*lists)]


def units(
    name: str,
    dataset: Dataset,
    subjects: Sequence[Subject],
    owed_of: Callable[[str], Sequence[Interval]],
    *,
    sessions: Callable[[datetime, datetime], Iterable[date]] | None = None,
) -> Iterator[Unit]:
    """Yield the units that ask for what each subject owes: those that reach the newest rows, then the others in the
    order of time.

    `owed_of` maps a subject to its owed intervals; `sessions` lists the sessions whose midnight is in [start, end).
    Subjects that owe the same piece of a window share requests, up to the batch; a laggard never widens another's.
    """
    pieces: dict[tuple[datetime, datetime], dict[Interval, list[Subject]]] = defaultdict(lambda: defaultdict(list))
    cut_memory: dict[tuple[Interval, ...], list[tuple[tuple[datetime, datetime], Interval]]] = {}
    for subject in subjects:
        intervals = tuple(merged(owed_of(subject.name)))
        if intervals not in cut_memory:
            cut_memory[intervals] = list(_cut(dataset, intervals, sessions))
        for window, piece in cut_memory[intervals]:
            pieces[window][piece].append(subject)
    if not pieces:
        return
    newest = max(end for _, end in pieces)
    # False sorts first: every window that reaches the newest rows, whoever else is behind and by how much
    for window in sorted(pieces, key=lambda window: (window[1] != newest, window)):
        for piece, owing in pieces[window].items():
            for group in _grouped(dataset, owing):
                yield Unit(
                    dataset=name,
                    subjects=tuple(subject.name for subject in group),
                    values=_values(dataset, group),
                    start=piece.start,
                    end=piece.end,
                    window_start=window[0],
                    window_end=window[1],
                    session=piece.start.date() if dataset.over.session else None,
                )


def _cut(
    dataset: Dataset,
    intervals: Sequence[Interval],
    sessions: Callable[[datetime, datetime], Iterable[date]] | None,
) -> Iterator[tuple[tuple[datetime, datetime], Interval]]:
    if dataset.over.session:
        if sessions is None:
            raise ValueError(f"{dataset.over.session}: sessions are needed to ask session by session")
        for start, end in intervals:
            for session in sessions(start, end):
                piece = Interval(day_start(session), day_start(session + timedelta(days=1)))
                yield (piece.start, piece.end), piece
        return
    window = dataset.over.window
    if window is None:
        # The whole history (or the list as it is now) comes with one answer, however little of it is owed.
        if intervals:
            piece = Interval(intervals[0].start, intervals[-1].end)
            yield (piece.start, piece.end) if dataset.time_column is None else ALL_TIME, piece
        return
    every = parse_span(window.every)
    whole = dataset.whole_windows
    for start, end in intervals:
        at = window_floor(start, every)
        while at < end:
            after = window_after(at, every)
            piece = Interval(max(at, start), min(after, end))
            if whole:
                yield (at, after), piece
            else:
                yield (piece.start, piece.end), piece
            at = after


def _grouped(dataset: Dataset, owing: Sequence[Subject]) -> Iterator[list[Subject]]:
    specs = list(dataset.over.subjects.values())
    batched = next((index for index, spec in enumerate(specs) if spec.batch > 1), None)
    if batched is None:
        for subject in owing:
            yield [subject]
        return
    alike: dict[tuple[str, ...], list[Subject]] = defaultdict(list)
    for subject in owing:
        alike[subject.values[:batched] + subject.values[batched + 1 :]].append(subject)
    size = specs[batched].batch
    for group in alike.values():
        for first in range(0, len(group), size):
            yield group[first : first + size]


def _values(dataset: Dataset, group: Sequence[Subject]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    return tuple(
        (name, tuple(dict.fromkeys(subject.values[index] for subject in group)))
        for index, name in enumerate(dataset.over.subjects)
    )


def halves(dataset: Dataset, unit: Unit, *, smallest: timedelta) -> tuple[Unit, Unit] | None:
    """Return the unit cut in two at about its middle (at midnight when it is longer than two days), or, when it has
    several subjects and cannot be cut in time, its subjects in two; None when neither can be."""
    length = unit.end - unit.start
    # Only a window that the request names can be made smaller.
    by_time = dataset.over.window is not None and not dataset.whole_windows and unit.session is None
    if by_time and length >= 2 * smallest:
        middle = unit.start + length / 2
        grain = timedelta(days=1) if length > timedelta(days=2) else smallest
        middle = unit.start + max(grain, (middle - unit.start) // grain * grain)
        return (
            replace(unit, end=middle, window_end=middle),
            replace(unit, start=middle, window_start=middle),
        )
    return subjects_in_two(unit)


def subjects_in_two(unit: Unit) -> tuple[Unit, Unit] | None:
    """Return the unit as two with half of its subjects each; None when it has but one."""
    for index, (name, values) in enumerate(unit.values):
        if len(values) > 1:
            half = len(values) // 2
            parts = []
            for chosen in (values[:half], values[half:]):
                subjects = tuple(s for s in unit.subjects if s.split("|")[index] in chosen)
                parts.append(
                    replace(
                        unit,
                        subjects=subjects,
                        values=(*unit.values[:index], (name, chosen), *unit.values[index + 1 :]),
                    )
                )
            return parts[0], parts[1]
    return None
