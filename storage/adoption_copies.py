"""Adopting by copying, where an engine's tables cannot be changed into ours in place: the rows are read, looked at, and
written as a table of ours beside the original, which then gives its name away and stays.

Memory is bounded by a batch and 8 bytes a row (the hashes that show keys that are there twice).
"""

from __future__ import annotations

import itertools
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from marketsync.errors import AdoptionRefused, NoTable, SchemaError
from marketsync.schema import Schema
from storage import admission, adoption, evolution, location, locks
from storage.adoption import Adoption, Conversion, Wish
from storage.files import sync
from storage.protocol import Batch, Capabilities, Filter, Mode, Store

if TYPE_CHECKING:
    import polars as pl

BATCH_ROWS = 500_000
LANE = "adoption"
ASIDE = "_adopted"  # where originals go that stood in the way, in a store's folder
_SCRATCH = "_adopting"


@dataclass(frozen=True)
class Source:
    """A table that somebody else made: its name for messages, its columns, and its rows with just some of them."""

    table: str
    columns: Sequence[str]
    frames: Callable[[Sequence[str]], Iterator[pl.DataFrame]]


def copied(
    dataset: str,
    schema: Schema,
    wish: Wish,
    source: Source,
    capabilities: Capabilities,
    put: Callable[[Iterable[pl.DataFrame]], tuple[str, str]],
) -> Adoption:
    """Look at all rows of the source; refuse, or have them `put`, which returns the new marker and where they were."""
    evolution.check(dataset, schema)
    reasons: list[str] = []
    names = adoption.matched(schema, source.columns, wish, reasons)
    adoption.refuse(source.table, reasons)
    conversion = Conversion(schema, names, wish)
    read = list(dict.fromkeys(names.theirs.values()))

    def looked() -> Iterator[pl.DataFrame]:
        yield from source.frames(read)

    reasons = conversion.look(looked()) or conversion.twins(looked())
    adoption.refuse(source.table, reasons)
    counts = conversion.counted()
    rows = int(counts["n"].sum())
    notes = [*adoption.sentences(names, adoption.LEFT), *conversion.notes]
    done = [f"{rows:,} rows are copied into a table of ours; the original is kept"]
    if wish.dry:
        _admissible(dataset, schema, conversion, looked(), capabilities, source.table)
        return Adoption(source.table, None, counts, done, notes, names.extra)
    try:
        marker, kept = put(conversion.stamped(looked()))
    except SchemaError as error:
        raise AdoptionRefused(source.table, [str(error)]) from error
    return Adoption(source.table, marker, counts, done, notes, names.extra, kept)


def _admissible(
    dataset: str,
    schema: Schema,
    conversion: Conversion,
    frames: Iterable[pl.DataFrame],
    capabilities: Capabilities,
    table: str,
) -> None:
    """Refuse in a dry run what the engine would not keep when the rows are written."""
    for frame in conversion.stamped(frames):
        try:
            admission.admit(dataset, frame, schema, capabilities)
        except SchemaError as error:
            raise AdoptionRefused(table, [str(error)]) from error


def already(store: Store, dataset: str, schema: Schema, wish: Wish, table: str) -> Adoption:
    """Return what is in a table of ours, counted by the time of its rows."""
    stored = store.schema(dataset) or schema
    evolution.added(dataset, stored, schema)
    columns = [name for name in (stored.subject, stored.time) if name is not None] or list(stored.key)
    counts = adoption.counted(store.scan(dataset, Filter(columns=columns)), stored, wish.every)
    return Adoption(table, store.marker(dataset), counts, already=True)


# ---------------------------------------------------------------- stores that are folders


def found(root: Path, dataset: str, wish: Wish, suffix: str) -> tuple[Path, list[Path]]:
    """Return where the table stands and its files; raises `NoTable`."""
    provider, name = location.split(dataset)
    if wish.table is not None:
        places = [root / Path(wish.table).expanduser()]
    else:
        places = [root / provider / name, root / provider / f"{name}{suffix}", root / f"{name}{suffix}"]
    for place in places:
        files = [place] if place.is_file() else sorted(place.rglob(f"*{suffix}")) if place.is_dir() else []
        files = [file for file in files if not file.name.startswith((".", "_"))]
        if files:
            return place, files
    raise none_there(root, dataset, places, f"no *{suffix} file")


def none_there(root: Path, dataset: str, places: Sequence[Path], what: str) -> NoTable:
    """Return the error for a dataset of which none of the places has a table."""
    provider, name = location.split(dataset)
    aside = root / ASIDE / provider / name
    told = f"; {aside} is the original of an adoption that was cut short: --table {aside}" if aside.exists() else ""
    return NoTable(
        f"there is {what} in {' or '.join(map(str, places))}, so there is no table of {dataset} to adopt; name the one "
        f"that is meant by --table, from {root}{told}"
    )


@contextmanager
def reading(place: Path, *others: type[Exception]) -> Iterator[None]:
    """Turn what is said of files that cannot be read into a refusal: they are the user's, and stay as they are."""
    import polars as pl

    try:
        yield
    except (pl.exceptions.PolarsError, *others) as error:
        why = " ".join(str(error).split("Resolved plan until failure")[0].split())
        raise AdoptionRefused(str(place), [f"it cannot be read: {why}"]) from error


def files_source(table: str, *groups: pl.LazyFrame) -> Source:
    """Return the rows of files as a source; files that have not the same columns and types are in different groups."""
    import polars as pl

    held = [rows.collect_schema().names() for rows in groups]

    def frames(names: Sequence[str]) -> Iterator[pl.DataFrame]:
        for rows, there in zip(groups, held, strict=True):
            lacking = [pl.lit(None).alias(name) for name in names if name not in there]
            yield from rows.with_columns(lacking).select(names).collect_batches(chunk_size=BATCH_ROWS)

    return Source(table, list(dict.fromkeys(itertools.chain(*held))), frames)


def stem(path: str) -> pl.Expr:
    """Return the expression for a file's name without its ending, of the column that has its path."""
    import polars as pl

    return pl.col(path).str.replace_all("\\", "/", literal=True).str.split("/").list.last().str.replace(r"\.[^.]+$", "")


def exchanged(
    root: Path,
    dataset: str,
    schema: Schema,
    place: Path,
    fresh: Callable[[Path], Store],
    parts: Sequence[str],
    frames: Iterable[pl.DataFrame],
) -> tuple[str, str]:
    """Write the rows as a table of ours in a folder of its own, then move it to where the dataset's table belongs: an
    original that stands there goes to `_adopted`, any other stays. `parts` are what makes a table, below the root: it
    is one when the last of them is there, and until then adopting begins anew."""
    provider, name = location.split(dataset)
    target = root / provider / name
    with locks.exclusive(root / f"{_SCRATCH}.lock", f"adopting in {root}"):
        scratch = root / _SCRATCH
        shutil.rmtree(scratch, ignore_errors=True)
        store = fresh(scratch)
        try:
            marker = store.ensure(dataset, schema)
            for seq, frame in enumerate(frames, 1):
                store.write(Batch(dataset, schema, LANE, seq, frame, Mode.APPEND))
            store.maintain(dataset)
        except BaseException:
            store.close()
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        store.close()
        kept = place
        if target.exists():
            inside = place == target or target in place.parents
            if not inside and any(target.iterdir()):
                shutil.rmtree(scratch)
                raise AdoptionRefused(
                    str(place), [f"{target} is not empty, and the dataset's table belongs there: move it elsewhere"]
                )
            aside = root / ASIDE / provider / name
            if aside.exists():
                aside = aside.with_name(f"{name}-{uuid.uuid4().hex[:8]}")
            aside.parent.mkdir(parents=True, exist_ok=True)
            if inside:
                kept = aside / place.relative_to(target)
                os.replace(target, aside)
            else:
                target.rmdir()
        for part in parts:
            (root / part).parent.mkdir(parents=True, exist_ok=True)
            if (root / part).exists():  # what an attempt to make the table has left
                shutil.rmtree(root / part)
            os.replace(scratch / part, root / part)
            sync((root / part).parent)
        shutil.rmtree(scratch)
    return marker, str(kept)
