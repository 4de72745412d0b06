"""dlt's destination for one engine, fed with the same rows: as the Arrow tables of the files (`arrow`), its fastest
source, since it infers nothing; or as its REST sources feed it (`rows`), pages of a thousand dicts as JSON has them,
of a source's own columns, whose types are declared.

    python dlt_stores.py arrow|rows ENGINE URL FOLDER DATASET append|upsert DATA LIMIT

It runs in an environment of its own (requirements-dlt.txt). Prints, as JSON, what the run itself cost this process;
the pages are made before.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path

PAGE_ROWS = 1_000
COLUMNS = {
    "symbol": {"data_type": "text"},
    "ts": {"data_type": "timestamp"},
    "open": {"data_type": "double"},
    "high": {"data_type": "double"},
    "low": {"data_type": "double"},
    "close": {"data_type": "double"},
    "volume": {"data_type": "bigint"},
}


def main(
    fed: str, engine: str, url: str, folder: Path, dataset: str, step: str, data: Path, limit: int
) -> dict[str, float]:
    os.environ["RUNTIME__DLTHUB_TELEMETRY"] = "false"
    os.environ["DLT_DATA_DIR"] = str(folder / "dlt")
    import dlt  # pyright: ignore[reportMissingImports]
    import pyarrow.ipc

    def tables():
        left = limit
        for file in sorted((data / step).glob("*.arrow")):
            table = pyarrow.ipc.open_file(file).read_all().slice(0, left)
            left -= table.num_rows
            if table.num_rows:
                yield table

    def paged():
        for table in tables():
            for start in range(0, table.num_rows, PAGE_ROWS):
                rows = table.slice(start, PAGE_ROWS).select(list(COLUMNS)).to_pylist()
                yield [{**row, "ts": row["ts"].isoformat()} for row in rows]

    pages = list(paged()) if fed == "rows" else []
    made = {
        "delta": lambda: dlt.destinations.filesystem(str(folder / "out")),
        "parquet": lambda: dlt.destinations.filesystem(str(folder / "out")),
        "csv": lambda: dlt.destinations.filesystem(str(folder / "out")),
        "postgresql": lambda: dlt.destinations.postgres(with_password(url)),
        "mysql": lambda: dlt.destinations.sqlalchemy(url.replace("mysql://", "mysql+pymysql://")),
    }
    written: object = "append"
    if step == "upsert":
        written = {"disposition": "merge", "strategy": "delete-insert" if engine == "mysql" else "upsert"}
    bars = dlt.resource(
        tables if fed == "arrow" else lambda: iter(pages),
        name="bars",
        write_disposition=written,
        primary_key=["symbol", "ts"],
        **({"columns": COLUMNS} if fed == "rows" else {}),
        **({"table_format": "delta"} if engine == "delta" else {}),
    )
    pipeline = dlt.pipeline(
        pipeline_name="bench",
        pipelines_dir=str(folder / "state"),
        destination=made[engine](),
        dataset_name=dataset,
    )
    kind = {"csv": "csv", "postgresql": "csv"}.get(engine, "parquet")
    began, spent = time.perf_counter(), cpu()
    pipeline.run(bars, loader_file_format=kind)
    return {"seconds": time.perf_counter() - began, "cpu": cpu() - spent, "rows": limit}


def with_password(url: str) -> str:
    """Return the URL with a password, without which dlt asks for one, though the server may not."""
    scheme, _, rest = url.partition("://")
    user, _, place = rest.partition("@")
    return url if ":" in user else f"{scheme}://{user}:none@{place}"


def cpu() -> float:
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(used.ru_utime + used.ru_stime for used in both)


if __name__ == "__main__":
    fed, engine, url, folder, dataset, step, data, limit = sys.argv[1:]
    print(json.dumps(main(fed, engine, url, Path(folder), dataset, step, Path(data), int(limit))))
