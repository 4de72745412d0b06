"""A table that came back from a backup has the marker that the ledger knows, and not all the rows: what it acknowledged
last is not in it, and so it is filled again instead of being believed."""

from __future__ import annotations

import json
import shutil
from datetime import date

import pytest

SYMBOLS = ["AAPL", "IBM"]
PLAN = {"datasets": ["alpaca.daily_bars"], "universe": SYMBOLS, "since": "2012-01-01"}
FIRST, LAST = date(2012, 1, 1), date(2013, 2, 28)


def restored(here, scheme: str, stores: dict[str, str] | None = None) -> None:
    """Sync until the end of 2012, back the store up, sync on, and put back what was there at the end of 2012."""
    known = {"default": f"{scheme}://./data", **(stores or {})}
    here.write({**PLAN, "until": "2012-12-31", "stores": list(known)}, stores=known)
    here.sync_here()
    shutil.copytree(here.folder / "data", here.folder / "backup")
    here.write({**PLAN, "until": str(LAST), "stores": list(known)}, stores=known)
    assert here.sync_here().state == "completed"
    assert here.bars().equals(here.source(SYMBOLS, FIRST, LAST))
    shutil.rmtree(here.folder / "data")
    shutil.move(here.folder / "backup", here.folder / "data")


@pytest.mark.parametrize("scheme", ["delta", "parquet", "csv", "excel"])
def test_a_restored_table_is_filled_again_and_the_report_says_why(place, scheme):
    here = place()
    restored(here, scheme)
    ended = here.sync_here()
    assert ended.sent > 0
    assert "lacks what it had acknowledged (restored from a backup)" in ended.words
    assert here.bars().equals(here.source(SYMBOLS, FIRST, LAST))
    again = here.sync_here()
    assert (again.sent, "restored" in again.words) == (0, False)


def test_a_restored_table_is_filled_from_its_sibling_without_a_request(place):
    here = place()
    restored(here, "delta", {"second": "parquet://./second"})
    ended = here.sync_here()
    assert (ended.sent, ended.state) == (0, "completed")
    assert here.bars().equals(here.source(SYMBOLS, FIRST, LAST))


def test_what_a_restored_table_still_has_need_not_be_asked_again_when_it_is_adopted(place):
    here = place()
    restored(here, "delta")
    before = here.requests
    adopted = here.typed("adopt", "p", "--json")
    assert adopted.returncode == 0, adopted.stderr
    assert here.requests == before
    here.sync_here()
    days = {(one["request"]["params"]["start"][:10]) for one in here.log[before:]}
    assert days == {"2013-01-01"}, json.dumps(here.log[before:])
    assert here.bars().equals(here.source(SYMBOLS, FIRST, LAST))


def test_a_copy_of_a_restored_table_takes_over_its_rows_and_not_what_was_believed_of_it(place):
    here = place()
    restored(here, "delta")
    stores = {"default": "delta://./data", "target": "parquet://./target"}
    here.write({**PLAN, "until": str(LAST), "stores": ["default"]}, stores=stores)
    copied = here.typed("copy", "--from", "default", "--to", "target")
    assert copied.returncode == 0, copied.stderr
    here.write({**PLAN, "until": str(LAST), "stores": ["target"]}, stores=stores)
    assert here.sync_here().sent > 0
    assert here.bars("target").equals(here.source(SYMBOLS, FIRST, LAST))
