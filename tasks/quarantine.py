"""What was set aside: why, and what of it nobody has asked for again since.

Rows are set aside elsewhere, where segments are sealed and where stores refuse them; here their files are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from marketsync.report import Remark
from tasks.workspace import Scope

_SHOWN = 3


def remark(scope: Scope, rows: int, store_id: str = "") -> Remark:
    """Return what is said of rows that this run set aside, for one store alone where it is named."""
    alone = f" for store {store_id} alone, which cannot keep them" if store_id else ""
    files = list(scope.spool.quarantined(scope.dataset, store_id).values())
    folder = scope.spool.quarantine(scope.dataset, store_id)
    return _remark(
        scope,
        store_id,
        f"{_were(rows)} set aside{alone} ({_reasons(files)}): each is in {folder} with its reason; "
        f"when the cause is mended, `marketsync sync {scope.plan_name} --refetch` asks for them again",
    )


def standing(scope: Scope, store_id: str = "") -> Remark | None:
    """Return what is said of rows that earlier runs set aside and that were not asked for again; None for none.

    A file that is deleted is dealt with. Those of a store alone where it is named, else those that no store has.
    """
    files = list(_not_asked_again(scope, store_id))
    if not files:
        return None
    alone = f" for store {store_id} alone" if store_id else ""
    folder = scope.spool.quarantine(scope.dataset, store_id)
    return _remark(
        scope,
        store_id,
        f"{_were(_rows_in(files))} set aside{alone} by earlier runs and not asked for again since ({_reasons(files)}): "
        f"each is in {folder} with its reason; mend the cause, and "
        f"`marketsync sync {scope.plan_name} --refetch` asks for them again; or delete the files of what is not missed",
        kind="still_set_aside",
    )


def rows_standing(scope: Scope, store_id: str) -> int:
    """Return how many rows were set aside and not asked for again since: of every store, and of this one alone."""
    return _rows_in([*_not_asked_again(scope, ""), *_not_asked_again(scope, store_id)])


def _rows_in(files: Iterable[Path]) -> int:
    return sum(file.read_bytes().count(b"\n") for file in files)


def _not_asked_again(scope: Scope, store_id: str) -> Iterator[Path]:
    files = scope.spool.quarantined(scope.dataset, store_id)
    if not files:
        return
    asked_in = store_id or scope.workspace.loaded.with_tables(scope.store_ids)[0]
    known = scope.ledger.coverage([asked_in], scope.dataset, scope.request_hash)[asked_in]
    origins = scope.ledger.origins(files)
    for segment_id, file in files.items():
        origin = origins.get(segment_id)
        if origin is None:
            yield file  # so long ago that the ledger has forgotten it
        elif origin.run_id != scope.run_id and any(
            piece.asked_at <= origin.sealed_at and piece.start < span.end and span.start < piece.end
            for subject, span in origin.asked
            for piece in known.get(subject, ())
        ):
            yield file


def _were(rows: int) -> str:
    return "1 row was" if rows == 1 else f"{rows:,} rows were"


def _remark(scope: Scope, store_id: str, message: str, kind: str = "quarantined") -> Remark:
    return Remark(kind=kind, dataset=scope.dataset, subject=store_id, message=message)


def _reasons(files: list[Path]) -> str:
    """Return why rows were set aside, by the newest of them: the columns, with an example each."""
    import polars as pl

    if not files:
        return "the files are gone"
    rows = pl.read_ndjson(files[-1])
    found = rows.group_by("column", maintain_order=True).agg(pl.col("reason").first(), pl.len())
    shown = [f"{column or 'the row'}: {reason}" for column, reason, _ in found.sort("len", descending=True).iter_rows()]
    return "; ".join(shown[:_SHOWN]) + (f"; and {len(shown) - _SHOWN} more columns" if len(shown) > _SHOWN else "")
