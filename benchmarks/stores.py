"""The stores' benchmark: `make bench-stores`, or python -m benchmarks.stores [--only postgresql,mysql] [--quick].

Each engine takes bars (append), then half of them changed beside as many new ones (upsert), in batches of the size that
the engine delivers: through our store, and in the same round through the engine's bulk path written by hand, polars,
SQLAlchemy and dlt. `dlt-arrow` is given the Arrow tables of the batches, its best case; `dlt-rows` pages of a thousand
dicts, as its REST sources yield them. Each is a process of its own; its start is not counted, the processor time of its
server is counted apart. Then small updates, 10,000 rows of the newest period of which half are changed, go into a table
of those bars and one with three times as many older ones besides: what they cost must not grow with the history.
An engine that merges in the background is first let end what filled the tables, which is no part of an update.
Writes benchmarks/out/stores.md and stores.json. Exit code 0: all targets met (a quick run asks for none); 1: a run
failed or stored wrong rows; 3: a target was missed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from urllib.parse import urlsplit

from benchmarks import report, systems
from benchmarks.measure import ROOT, run

ENGINES = ("delta", "parquet", "csv", "excel", "chdb", "clickhouse", "postgresql", "mysql", "mongodb")
STEPS = ("append", "upsert")
SYMBOLS = 200
BARS = 5_000
RAW_RATIO, DLT_RATIO, CLIENT_MB, GROWTH = 1.25, 5.0, 600, 1.3
LONGER = 4
TABLES = {"short": ("append",), "long": ("history", "append")}  # that small updates go into, and what fills them
# ways beside ours, with the most rows that they are given: slow ones are compared by the row
BESIDE = {
    "delta": {"raw": None, "dlt-arrow": None, "dlt-rows": 200_000},
    "parquet": {"raw": None, "dlt-arrow": None, "dlt-rows": 200_000},
    "csv": {"raw": None, "dlt-arrow": None, "dlt-rows": 200_000},
    "excel": {"raw": None},
    "chdb": {"raw": None},
    "clickhouse": {"raw": None},
    "postgresql": {"raw": None, "polars": None, "core": 100_000, "dlt-arrow": 200_000, "dlt-rows": 200_000},
    "mysql": {"raw": None, "polars": 50_000, "core": 50_000, "dlt-arrow": 2_000, "dlt-rows": 2_000},
    "mongodb": {"raw": None},
}
OTHERS = ("polars", "core", "dlt-arrow", "dlt-rows")
CLICKHOUSE = "MARKETSYNC_TEST_CLICKHOUSE"
MOST_ROWS = {"excel": 50_000, "mongodb": 10_000, **({} if CLICKHOUSE in os.environ else {"clickhouse": 200_000})}
MERGES_LATER = {"chdb", "clickhouse"}  # whose engine would go on with what filled a table while it is measured
APPEND_ONLY = {"parquet", "csv"}  # for dlt, whose filesystem destination merges tables of delta only
STAND_INS = {
    "mongodb": "mongodb: a stand-in, so that only our side's processor time counts, and few rows.",
    **(
        {}
        if CLICKHOUSE in os.environ
        else {
            "clickhouse": "clickhouse: chDB behind an HTTP stand-in, so that only our side's processor time counts, of "
            f"which the bulk path has next to none; {CLICKHOUSE} names a server to measure instead."
        }
    ),
}
NOT_MEASURED = (
    "Ways with few rows are slow ones; what they spend once a run, as dlt does, weighs more there. dlt-arrow is dlt's "
    "best case: it passes Arrow tables on. dlt-rows is fed as its REST sources feed it, pages of dicts made before "
    "the clock starts; it includes making rows of them, which we do before a batch and `make bench` measures. "
    "dlt has no destination for chDB, MongoDB or Excel, and that for ClickHouse asks for the native port of a server. "
    "MarketStore and DolphinDB have doubles here, whose speed says nothing."
)


Wanted = dict[str, dict[str, dict[str, float]]]  # step: number of rows, or the table: what a right one holds


@dataclass(frozen=True)
class Figures:
    """What one step of one way cost; seconds of the writing itself, megabytes of the whole process."""

    engine: str
    way: str
    step: str
    round: int
    rows: int
    wall: float
    client_cpu: float
    server_cpu: float | None
    peak_mb: float
    right: bool
    note: str = ""

    @property
    def cpu_us(self) -> float:
        """Client and server together, since work that is moved from one to the other is not saved."""
        return (self.client_cpu + (self.server_cpu or 0.0)) / self.rows * 1e6

    @property
    def wall_us(self) -> float:
        return self.wall / self.rows * 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure our stores beside each engine's own bulk path and others.")
    parser.add_argument("--only", default=",".join(ENGINES), help=f"engines: {', '.join(ENGINES)}")
    parser.add_argument("--quick", action="store_true", help="a twentieth of the rows, one round: does it run at all?")
    parser.add_argument("--rounds", type=int, default=3, help="how often each way runs (default 3)")
    parser.add_argument("--small", action="store_true", help="small updates only")
    options = parser.parse_args()
    chosen = [name.strip() for name in options.only.split(",")]
    if unknown := [name for name in chosen if name not in ENGINES]:
        parser.error(f"no engine {', '.join(unknown)}; there are {', '.join(ENGINES)}")
    out = ROOT / "benchmarks" / "out"
    scratch = out / "stores"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    symbols = SYMBOLS // 20 if options.quick else SYMBOLS
    wanted = _prepared(scratch / "data", symbols)
    with contextlib.suppress(OSError, RuntimeError):  # without it, every run of dlt is told as failed
        systems.prepare_dlt()
    found: list[Figures] = []
    for engine in chosen:
        with _server(engine, scratch) as (url, server):
            if engine not in MOST_ROWS:
                for figures in _small(engine, url, server, scratch, symbols * BARS, wanted):
                    found.append(figures)
                    _say(figures)
            rounds = 0 if options.small else 1 if options.quick else options.rounds
            for number in range(1, rounds + 1):
                ways = ["store", *BESIDE[engine]]
                # whoever is first finds the machine in another state
                for way in ways if number % 2 else ways[::-1]:
                    most = (BESIDE[engine].get(way) or SYMBOLS * BARS) if way != "store" else SYMBOLS * BARS
                    most = min(most, MOST_ROWS.get(engine, SYMBOLS * BARS), symbols * BARS)
                    for figures in _measured(engine, way, url, server, number, scratch, most, wanted):
                        found.append(figures)
                        _say(figures)
        _write(found, out, options.quick, chosen)
    wrong = [figures for figures in found if not figures.right]
    for figures in wrong:
        print(f"{figures.engine} {figures.way} {figures.step}: {figures.note}", file=sys.stderr)
    missed = [line for line in _targets(found) if line.endswith("**missed** |")]
    print("benchmarks/out/stores.md and stores.json hold every figure.")
    return 1 if wrong else 3 if missed and not options.quick else 0


def _prepared(folder: Path, symbols: int) -> Wanted:
    """Write the batches of both steps in a process of its own; return running totals for any number of rows."""
    command = [sys.executable, "-m", "benchmarks.store_rows", str(folder), str(symbols), str(BARS), str(LONGER)]
    cost = run(command, ROOT, folder.with_name("prepare.log"))
    if cost.exit_code:
        raise SystemExit(folder.with_name("prepare.log").read_text())
    return json.loads(cost.output)


def _measured(
    engine: str,
    way: str,
    url: str,
    server: int | None,
    number: int,
    scratch: Path,
    most: int,
    wanted: Wanted,
) -> Iterator[Figures]:
    dataset = f"{way.replace('-', '_')}{number}.bars"
    dlt = way.startswith("dlt-")
    folder = scratch / f"{engine}-{way}-{number}"
    place = url or f"{engine}://{folder}"
    log = scratch / f"{engine}-{way}-{number}.log"

    def ask(step: str, of: str = way) -> list[str | Path]:
        return [sys.executable, "-m", "benchmarks.store_ways", of, engine, place, dataset, step, data, str(most)]

    data = scratch / "data"
    ours = engine not in ("delta", "parquet", "csv", "excel", "mongodb")
    if way != "store" and not dlt and ours and run(ask("make"), ROOT, log).exit_code:
        yield Figures(engine, way, "append", number, most, 0, 0, None, 0, False, _last(log))
        return
    for step in STEPS:
        if dlt and engine in APPEND_ONLY and step == "upsert":
            break
        before = _spent(server)
        if dlt:
            python = ROOT / ".venvs" / "dlt" / "bin" / "python"
            script = ROOT / "benchmarks" / "peers" / "dlt_stores.py"
            name, _, _ = dataset.partition(".")
            fed = way.removeprefix("dlt-")
            cost = run([python, script, fed, engine, place, folder, name, step, data, str(most)], ROOT, log)
        else:
            cost = run(ask(step), ROOT, log)
        after = _spent(server)
        if cost.exit_code:
            yield Figures(engine, way, step, number, most, 0, 0, None, cost.peak_mb, False, _last(log))
            return
        said = json.loads(cost.output.splitlines()[-1])
        where = dataset if url or not dlt else f"out/{dataset.replace('.', '/')}"
        checked = run([*ask("check")[:6], where, *ask("check")[7:]], ROOT, log)
        stored = json.loads(checked.output) if checked.exit_code == 0 else {}
        right = stored == wanted[step][str(most)]
        yield Figures(
            engine,
            way,
            step,
            number,
            int(said["rows"]),
            said["seconds"],
            said["cpu"],
            None if before is None or after is None else after - before,
            cost.peak_mb,
            right,
            "" if right else f"{stored or _last(log)} instead of {wanted[step][str(most)]}",
        )
    shutil.rmtree(folder, ignore_errors=True)


def _small(engine: str, url: str, server: int | None, scratch: Path, rows: int, wanted: Wanted) -> Iterator[Figures]:
    """Fill a short and a long table through our store, and tell what a small update of each costs."""
    data = scratch / "data"
    for table, filled in TABLES.items():
        place = url or f"{engine}://{scratch / f'{engine}-{table}'}"
        log = scratch / f"{engine}-{table}.log"

        def ask(step: str, place: str = place, table: str = table) -> list[str | Path]:
            named = ("store", engine, place, f"small.{table}", step, data, str(LONGER * rows))
            return [sys.executable, "-m", "benchmarks.store_ways", *named]

        costs = [run(ask(step), ROOT, log) for step in (*filled, *(["settle"] if engine in MERGES_LATER else []))]
        before = _spent(server)
        cost = run(ask("small"), ROOT, log)
        after = _spent(server)
        if any(each.exit_code for each in (*costs, cost)):
            yield Figures(engine, table, "small", 1, rows, 0, 0, None, cost.peak_mb, False, _last(log))
            return
        said = json.loads(cost.output.splitlines()[-1])
        checked = run(ask("check"), ROOT, log)
        stored = json.loads(checked.output) if checked.exit_code == 0 else {}
        spent = None if before is None or after is None else (after - before) / said["batches"]
        note = "" if stored == wanted["small"][table] else f"{stored or _last(log)} instead of {wanted['small'][table]}"
        yield Figures(
            *(engine, table, "small", 1, int(said["rows"])),
            *(said["seconds"], said["cpu"], spent, cost.peak_mb, not note, note),
        )
        if not url:
            shutil.rmtree(scratch / f"{engine}-{table}", ignore_errors=True)


@contextmanager
def _server(engine: str, scratch: Path) -> Iterator[tuple[str, int | None]]:
    """Yield the URL of the engine's server and its process: no URL for an engine that has no server, no process where
    its time says nothing."""
    sys.path.append(str(ROOT / "tests"))
    if engine == "postgresql":
        from private_postgres import private_postgres as started
    elif engine == "mysql":
        from private_mariadb import private_mariadb as started
    elif engine == "clickhouse":
        if given := os.environ.get(CLICKHOUSE):
            yield given, _listening(urlsplit(given).port or 8123)
            return
        from private_clickhouse import private_clickhouse as started
    elif engine == "mongodb":
        from private_mongodb import private_mongodb as started
    else:
        yield "", None
        return
    with started() as url:
        if engine == "mysql":
            from private_mariadb import asked

            asked(url, "CREATE DATABASE bench")
            url = f"{url.rstrip('/')}/bench"
        elif engine == "mongodb":
            url += "bench"
        yield url, None if engine in STAND_INS else _listening(urlsplit(url).port or 0)


def _listening(port: int) -> int | None:
    """Return the process that listens on a loopback port."""
    sockets = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                sockets.add(f"socket:[{fields[9]}]")
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if any(os.readlink(file) in sockets for file in (process / "fd").iterdir()):
                return int(process.name)
    return None


def _spent(process: int | None) -> float | None:
    """Return the processor time of a server: its own, of its children, and of those that have ended."""
    if not process:
        return None
    ticks = 0
    for each in [process, *_children(process)]:
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{each}/stat").read_text().rpartition(") ")[2].split()
            ticks += sum(map(int, fields[11:15] if each == process else fields[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


def _children(process: int) -> list[int]:
    found = Path(f"/proc/{process}/task").glob("*/children")
    return [int(child) for file in found for child in file.read_text().split()]


def _last(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1][:300] if lines else "no word"


def _say(figures: Figures) -> None:
    server = "" if figures.server_cpu is None else f" + {figures.server_cpu / figures.rows * 1e6:.2f} of the server"
    client = figures.client_cpu / figures.rows * 1e6
    print(
        f"{figures.engine:10} {figures.way:9} {figures.step:6} {figures.rows:>9,} rows: {figures.wall_us:7.2f} us, "
        f"{client:.2f}{server} CPU, {figures.peak_mb:.0f} MB{'' if figures.right else ' WRONG ' + figures.note}",
        flush=True,
    )


def _ratios(found: list[Figures], engine: str, step: str, way: str, of: str) -> list[float]:
    """Return what `way` costs, as a multiple of ours, in each round in which both were right."""
    ours = {f.round: f for f in found if (f.engine, f.way, f.step, f.right) == (engine, "store", step, True)}
    rivals = [f for f in found if (f.engine, f.way, f.step, f.right) == (engine, way, step, True)]
    return [getattr(f, of) / getattr(ours[f.round], of) for f in rivals if f.round in ours and getattr(f, of)]


def _targets(found: list[Figures]) -> list[str]:
    lines = []

    def add(engine: str, step: str, claim: str, measured: float, asked: str, met: bool) -> None:
        verdict = "" if not asked else "met" if met else "**missed**"
        lines.append(f"| {engine} | {step} | {claim} | {measured:.2f} | {asked} | {verdict} |")

    for engine, step in dict.fromkeys((figures.engine, figures.step) for figures in found):
        tables = {f.way: f for f in found if (f.engine, f.step, f.right) == (engine, "small", True)}
        if step == "small" and len(tables) == len(TABLES):
            short, long = (tables[table] for table in TABLES)
            for claim, of, asked in (("CPU", "cpu_us", f"<= {GROWTH}"), ("time", "wall_us", "")):
                growth = getattr(long, of) / getattr(short, of)
                add(engine, step, f"{claim} with {LONGER} times the rows", growth, asked, growth <= GROWTH)
        if raw := _ratios(found, engine, step, "raw", "cpu_us"):
            ratio = median(1 / each for each in raw)
            add(
                engine,
                step,
                "our CPU beside the raw bulk path",
                ratio,
                f"<= {RAW_RATIO}",
                ratio <= RAW_RATIO,
            )
        for way in OTHERS:
            if beside := _ratios(found, engine, step, way, "cpu_us"):
                ratio = median(beside)
                asked = f">= {DLT_RATIO:.0f}" if way.startswith("dlt-") else ""
                add(engine, step, f"CPU of {way} beside ours", ratio, asked, ratio >= DLT_RATIO)
        ours = [f.peak_mb for f in found if (f.engine, f.way, f.step, f.right) == (engine, "store", step, True)]
        if ours:
            add(engine, step, "peak MB of our process", median(ours), f"< {CLIENT_MB}", median(ours) < CLIENT_MB)
    return lines


def _write(found: list[Figures], out: Path, quick: bool, chosen: list[str]) -> None:
    on = report.machine()
    (out / "stores.json").write_text(json.dumps({"machine": on, "runs": [asdict(each) for each in found]}, indent=1))
    lines = [
        "# Stores",
        "",
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC; the writing itself, without the start of the process; medians over "
        "rounds, ratios within a round.",
        "",
        f"{', '.join(f'{name} {value}' for name, value in on.items())}; load average {os.getloadavg()[2]:.1f}",
        "",
        *(["**A quick run: a twentieth of the rows. Its targets are not meant.**", ""] if quick else []),
        " ".join([*(why for engine, why in STAND_INS.items() if engine in chosen), NOT_MEASURED]),
        "",
        "## Targets",
        "",
        "| engine | step | figure | measured | asked | |",
        "|---|---|---|--:|--:|---|",
        *_targets(found),
        "",
        "## Medians",
        "",
        "| engine | step | way | rows | wall us/row | client CPU us/row | server CPU us/row | peak MB | right |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for engine, step, way in dict.fromkeys((f.engine, f.step, f.way) for f in found):
        every = [f for f in found if (f.engine, f.step, f.way) == (engine, step, way)]
        runs = [f for f in every if f.right] or every
        server = [f.server_cpu / f.rows * 1e6 for f in runs if f.server_cpu is not None]
        lines.append(
            f"| {engine} | {step} | {way} | {runs[0].rows:,} | {median(f.wall_us for f in runs):.2f} "
            f"| {median(f.client_cpu / f.rows * 1e6 for f in runs):.2f} | {f'{median(server):.2f}' if server else ''} "
            f"| {median(f.peak_mb for f in runs):.0f} | {sum(f.right for f in every)} of {len(every)} |"
        )
    (out / "stores.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
