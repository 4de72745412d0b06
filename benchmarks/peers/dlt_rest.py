"""dlt's rest_api source for the same pages: a parent resource of symbols, a child that follows the page token.

    python dlt_rest.py BASE_URL SYMBOLS PAGE_ROWS FOLDER parquet|delta

It runs in an environment of its own (requirements-dlt.txt) and declares the columns' types, so that dlt does not spend
time on inferring them; the rest is as dlt's documentation has it.
"""

import os
import sys
from pathlib import Path


def main(base_url: str, symbols: int, page_rows: int, folder: Path, kind: str) -> None:
    os.environ["RUNTIME__DLTHUB_TELEMETRY"] = "false"
    os.environ["DLT_DATA_DIR"] = str(folder / "dlt")
    import dlt  # pyright: ignore[reportMissingImports]
    from dlt.sources.rest_api import rest_api_resources  # pyright: ignore[reportMissingImports]

    @dlt.resource(name="symbols", selected=False)
    def names():
        yield [{"symbol": f"SYM{number:05d}"} for number in range(symbols)]

    @dlt.source
    def market():
        yield from rest_api_resources(
            {
                "client": {
                    "base_url": base_url,
                    "paginator": {
                        "type": "cursor",
                        "cursor_path": "next_page_token",
                        "cursor_param": "page_token",
                    },
                },
                "resources": [
                    names(),
                    {
                        "name": "bars",
                        "endpoint": {
                            "path": "bars",
                            "data_selector": "data",
                            "params": {"symbol": "{resources.symbols.symbol}", "limit": page_rows},
                        },
                        "write_disposition": "append",
                        "columns": {
                            "symbol": {"data_type": "text"},
                            "ts": {"data_type": "timestamp"},
                            "open": {"data_type": "double"},
                            "high": {"data_type": "double"},
                            "low": {"data_type": "double"},
                            "close": {"data_type": "double"},
                            "volume": {"data_type": "bigint"},
                        },
                        **({"table_format": "delta"} if kind == "delta" else {}),
                    },
                ],
            }
        )

    pipeline = dlt.pipeline(
        pipeline_name="bench",
        pipelines_dir=str(folder / "state"),
        destination=dlt.destinations.filesystem(str(folder / "out")),
        dataset_name="market",
    )
    pipeline.run(market(), loader_file_format="parquet")


if __name__ == "__main__":
    base_url, symbols, page_rows, folder, kind = sys.argv[1:]
    main(base_url, int(symbols), int(page_rows), Path(folder), kind)
