"""The loop anybody would write first: requests, one page after another, a polars frame of all rows, one write.

    python naive.py BASE_URL SYMBOLS PAGE_ROWS FOLDER parquet|delta

No limits, no resuming, no checks: the bound that a careful program should still stay below.
"""

import sys
from pathlib import Path

import polars as pl
import requests


def main(base_url: str, symbols: int, page_rows: int, folder: Path, kind: str) -> None:
    session = requests.Session()
    frames = []
    for number in range(symbols):
        params = {"symbol": f"SYM{number:05d}", "limit": page_rows}
        while True:
            answer = session.get(f"{base_url}/bars", params=params, timeout=30)
            answer.raise_for_status()
            page = answer.json()
            frames.append(pl.DataFrame(page["data"]))
            if page["next_page_token"] is None:
                break
            params["page_token"] = page["next_page_token"]
    bars = pl.concat(frames).with_columns(pl.col("ts").str.to_datetime(time_zone="UTC"))
    if kind == "delta":
        bars.write_delta(folder)
    else:
        folder.mkdir(parents=True)
        bars.write_parquet(folder / "bars.parquet")


if __name__ == "__main__":
    base_url, symbols, page_rows, folder, kind = sys.argv[1:]
    main(base_url, int(symbols), int(page_rows), Path(folder), kind)
