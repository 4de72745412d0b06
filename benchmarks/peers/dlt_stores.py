"""dlt's destination for one engine, fed with the same Arrow files: its fastest source, since it infers nothing.

    python dlt_stores.py ENGINE URL FOLDER DATASET append|upsert DATA LIMIT

It runs in an environment of its own (requirements-dlt.txt). Prints, as JSON, what the run itself cost this process.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path

BATCH_ROWS = 131_072


def main(engine: str, url: str, folder: Path, dataset: str, step: str, data: Path, limit: int) -> dict[str, float]:
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
        tables,
        name="bars",
        write_disposition=written,
        primary_key=["symbol", "ts"],
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
    engine, url, folder, dataset, step, data, limit = sys.argv[1:]
    print(json.dumps(main(engine, url, Path(folder), dataset, step, Path(data), int(limit))))
