"""Writes the table "Stores at a glance" of docs/operations.md from what the stores declare of themselves.

    python scripts/stores_table.py            writes it
    python scripts/stores_table.py --check    says whether it is as it would be written

A store that is added needs an address in `ADDRESSES`, and a phrase in `REFUSES` for a capability that it alone lacks.
"""

import sys
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from storage.protocol import Capabilities, Writers  # noqa: E402
from storage.registry import ENGINES  # noqa: E402

PAGE = ROOT / "docs" / "operations.md"
BEGIN, END = "<!-- stores: made by scripts/stores_table.py -->\n", "<!-- end of stores -->\n"
SAME = {"marketstores": "marketstore", "mongodb+srv": "mongodb", "rediss": "redis"}  # other spellings of one store
FORMS = {  # scheme: what else a store of its URL can be, by an option; the module that declares it
    "mongodb": ("MongoDB, time series", "mongodb://user@host:27017/database?timeSeries=true", "storage.mongodb_series"),
}
ADDRESSES = {
    "chdb": ("ClickHouse in the process", "chdb://./folder"),
    "clickhouse": ("ClickHouse", "clickhouse://user@host:8123/"),
    "csv": ("CSV files", "csv://./folder"),
    "delta": ("Delta Lake", "delta://./folder"),
    "dolphindb": ("DolphinDB", "dolphindb://user@host:8848/name"),
    "excel": ("Excel workbooks", "excel://./folder"),
    "marketstore": ("MarketStore", "marketstore://host:5993"),
    "mongodb": ("MongoDB", "mongodb://user@host:27017/database"),
    "mysql": ("MariaDB, MySQL", "mysql://user@host:3306/database"),
    "nats": ("NATS, a log", "nats://user@host:4222/STREAM"),
    "parquet": ("Parquet files", "parquet://./folder"),
    "postgresql": ("PostgreSQL", "postgresql://user@host:5432/database"),
    "redis": ("Redis or Valkey, a log", "redis://user@host:6379/0"),
}
REFUSES = {
    "nanoseconds": "times finer than a microsecond",
    "nan": "NaN and infinities",
    "unsigned_64": "whole numbers beyond 2^63 - 1",
    "nul": "NUL in a text",
    "empty_text": "empty texts",
    "final_return": "a carriage return at the end of a text",
    "least": "the least number of a type",
    "any_key": "keys without a time",
    "new_year": "days of 1 January",
    "evolve": "columns that are added",
    "table": "to be read as a table: it is followed",
}


def refused(able: Capabilities) -> str:
    """Returns what a store does not take, and what it changes, in words."""
    found = [words for flag, words in REFUSES.items() if getattr(able, flag, True) is False]
    if able.subjects is not None:
        found.append("symbols that cannot name a folder")
    if able.longest_key is not None:
        found.append(f"texts of more than {able.longest_key} characters in the key")
    if (longest := getattr(able, "longest_text", None)) is not None:
        found.append(f"texts of more than {longest:,} characters")
    if able.days is not None:
        found.append(f"times before {able.days[0].year} and after {able.days[1].year}")
    if (earliest := getattr(able, "earliest", None)) is not None:
        found.append(f"times before {earliest.year}")
    if not able.negative_zero:
        found.append("-0.0 becomes 0.0")
    return "; ".join(found) or "nothing"


def table() -> str:
    """Returns the table, the stores in folders first."""
    heads = ("store", "URL", "installed by", "a batch is seen whole", "writers", "refuses, or changes")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for scheme, (module, _, extra) in sorted(
        ENGINES.items(), key=lambda one: ("host" in str(ADDRESSES.get(one[0])), one)
    ):
        if scheme in SAME:
            continue
        forms = [(*ADDRESSES.get(scheme, (scheme, f"{scheme}://host")), module)]
        for name, address, module in forms + ([FORMS[scheme]] if scheme in FORMS else []):
            able: Capabilities = import_module(module).CAPABILITIES
            by = f"`pip install -e '.{extra}'`" if extra else "itself"
            seen, many = (
                "yes" if able.atomic else "no",
                "many" if able.writers is Writers.MANY_PROCESSES else "one process",
            )
            lines.append(f"| {name} | `{address}` | {by} | {seen} | {many} | {refused(able)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        sys.exit(f"{PAGE} has no place for the table: {BEGIN}{END}")
    wanted = f"{before}{BEGIN}\n{table()}\n{END}{after}"
    if "--check" not in sys.argv:
        PAGE.write_text(wanted, encoding="utf-8")
    elif text != wanted:
        sys.exit(f"{PAGE.name} is not as the stores declare; run: python scripts/stores_table.py")


if __name__ == "__main__":
    main()
