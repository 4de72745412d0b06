"""The spool's files, while others take some of them away."""

from __future__ import annotations

import threading
from pathlib import Path

import polars as pl

from storage.spool import Spool


def test_a_segment_is_written_while_the_last_one_of_its_lane_is_removed(tmp_path: Path):
    spool, over = Spool(tmp_path), threading.Event()
    frame = pl.DataFrame({"close": [1.0]})

    def deliver() -> None:
        while not over.is_set():
            spool.remove(["spool/lane/00000000.arrow"])  # and the folder, whenever it is empty

    delivering = threading.Thread(target=deliver)
    delivering.start()
    try:
        for seq in range(1, 100):
            path, _ = spool.write("lane", seq, frame)
            assert spool.read(path).equals(frame)
            spool.remove([path])
    finally:
        over.set()
        delivering.join()
