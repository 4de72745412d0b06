"""The documentation does what it says: every command, YAML file and Python snippet of the README and the tutorial is
run, in order, in an empty folder, and what they print is compared with what the page shows.

Blocks are fenced as `sh`, `python`, `yaml` (with a title: the file it is) or `text` (what the blocks before printed).
A comment in front of a block says what a reader does not have to see:

    <!-- not run: reason -->        the block is not run
    <!-- runs: command -->          the command that stands in for the block (`make quickstart` would build a .venv)
    <!-- exit: 75 -->               the exit code of its last command; 0 where nothing is said
    <!-- part -->                   the YAML is laid over the file of the title, key by key
    <!-- test: command -->          a command of the test alone: what the reader does by hand, as the text says

Times, run ids, durations and paths in what is printed may differ; a line of `...` stands for lines left out. The other
pages are not run, but the commands, options, files and tests that they name exist.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from io import StringIO
from pathlib import Path

import polars as pl
import pytest
from ruamel.yaml import YAML

from marketsync.calendars import load_calendar
from marketsync.configuration import inspect_file
from providers.replica import Replica

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
PORTS = ("8740", "8741")  # as the pages have them; free ones take their place here
BLOCK_SECONDS = 120
START_SECONDS = 60

_FENCE = re.compile(r"^(```+)(\w*)(.*)$")
_COMMENT = re.compile(r"^<!-- (not run|runs|exit|part|test)(?:: (.*?))? -->$")
_TITLE = re.compile(r'title="([^"]+)"')


# ---------------------------------------------------------------- pages


@dataclass(frozen=True)
class Block:
    """One fenced block (or a `test` comment) of a page, with what the comments in front of it say."""

    line: int
    language: str
    text: str
    title: str | None = None
    said: dict[str, str] = field(default_factory=dict)


def blocks(page: Path) -> list[Block]:
    found: list[Block] = []
    said: dict[str, str] = {}
    lines = iter(enumerate(page.read_text(encoding="utf-8").splitlines(), 1))
    for number, line in lines:
        if comment := _COMMENT.match(line.strip()):
            word, rest = comment[1], comment[2] or ""
            if word == "test":
                found.append(Block(number, "test", rest))
            else:
                said[word] = rest
        elif fence := _FENCE.match(line):
            text: list[str] = []
            for _, inner in lines:
                if inner.strip() == fence[1]:
                    break
                text.append(inner)
            title = _TITLE.search(fence[3])
            found.append(Block(number, fence[2], "\n".join(text) + "\n", title[1] if title else None, said))
            said = {}
        elif line.strip():
            said = {}
    return found


# ---------------------------------------------------------------- running a page

_MASKS = [
    (re.compile(r"\d{8}T\d{6}-[0-9a-f]{6}"), "RUN"),
    (re.compile(r"-[0-9a-f]{12}\b"), "-LANE"),
    (re.compile(r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d(:\d\d(\.\d+)?)?( UTC|\+00:00|Z)?"), "TIME"),
    (re.compile(r"\b\d+(\.\d+)? (ms|s|min|h|days)\b"), "LONG"),
    (re.compile(r"127\.0\.0\.1:\d+"), "LOOPBACK"),
    (re.compile(r"[─━-]{3,}"), "---"),
    (re.compile(r"\s+"), " "),
]


# a run of more than some seconds says how far it is, so on a busy machine there are such lines in between
_PROGRESS = re.compile(r"^[\w-]+: [\d,]+ rows?, [\d,]+( of about [\d,]+)? requests?, [\d.]+ [KMGT]?B(, .*)?$")


def masked(text: str) -> list[str]:
    """What must be the same each time, a line each."""
    result = []
    for line in text.splitlines():
        if _PROGRESS.match(line):
            continue
        for pattern, name in _MASKS:
            line = pattern.sub(name, line)
        if line.strip():
            result.append(line.strip())
    return result


def differences(shown: str, printed: str) -> list[str]:
    """Lines of the page that were not printed in that order; nothing else may be printed between two shown lines."""
    wanted, got = masked(shown), masked(printed)
    missing: list[str] = []
    at, free = 0, True  # lines before the first and after the last may be left out, others only at "..."
    for line in wanted:
        if line == "...":
            free = True
            continue
        place = next((n for n in range(at, len(got)) if got[n] == line), None) if free else at
        if place is None or place >= len(got) or got[place] != line:
            missing.append(line)
            continue
        at, free = place + 1, False
    return missing


class Reader:
    """Somebody who types what a page says, in a folder of their own, into one shell."""

    def __init__(self, folder: Path, environment: dict[str, str], ports: dict[str, int]):
        self.folder, self._ports = folder, ports
        self.environment = environment
        self._state = folder.parent / "shell"
        self._count = 0
        self._groups: list[int] = []
        self.printed = ""

    def words(self, text: str) -> str:
        for written, port in self._ports.items():
            text = text.replace(written, str(port))
        return text

    def type(self, command: str, expected: int = 0) -> None:
        """Run shell commands where the last ones left off; AssertionError with what was printed when they fail."""
        self._count += 1
        command = self.words(command)
        script = self._state.with_name(f"block-{self._count}.sh")
        state = shlex.quote(str(self._state))
        script.write_text(
            f"set -e\nif [ -f {state} ]; then . {state}; fi\n{command}\n"
            f'{{ export -p; printf "cd %q\\n" "$PWD"; }} > {state}\n'
        )
        out = script.with_suffix(".out")
        with out.open("wb") as sink:
            shell = subprocess.Popen(
                ["bash", str(script)],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._groups.append(shell.pid)
        code = shell.wait(timeout=BLOCK_SECONDS)
        self._wait_for_servers(command)
        self.printed = out.read_text(encoding="utf-8")
        assert code == expected, f"$ {command}\nexit code {code}, expected {expected}; it printed:\n{self.printed}"

    @property
    def here(self) -> Path:
        """The folder that the shell is in."""
        if not self._state.exists():
            return self.folder
        return Path(shlex.split(self._state.read_text().splitlines()[-1])[1])

    def save(self, title: str, text: str, *, part: bool) -> None:
        path = self.here / title
        if not part:
            path.write_text(self.words(text), encoding="utf-8")
            return
        yaml = YAML()
        whole = yaml.load(path)
        _lay_over(whole, yaml.load(StringIO(self.words(text))))
        yaml.dump(whole, path)

    def _wait_for_servers(self, command: str) -> None:
        if not re.search(r"&\s*(#.*)?$", command, re.MULTILINE):
            return
        until = time.monotonic() + START_SECONDS
        for port in [port for port in self._ports.values() if str(port) in command]:
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), timeout=1).close()
                    break
                except OSError:
                    assert time.monotonic() < until, f"nothing listens on {port} after: {command}"
                    time.sleep(0.05)

    def leave(self) -> None:
        """End what still runs in the background."""
        for group in self._groups:
            try:
                os.killpg(group, signal.SIGKILL)
            except ProcessLookupError:
                continue


def _lay_over(whole, part) -> None:
    for key, value in part.items():
        if isinstance(value, dict) and isinstance(whole.get(key), dict):
            _lay_over(whole[key], value)
        else:
            whole[key] = value


def _free_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


@pytest.fixture
def reader(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / ".venv").symlink_to(sys.prefix)  # what `make quickstart` leaves in the clone
    kept = {name: os.environ[name] for name in ("LANG", "TMPDIR", "PYTHONDONTWRITEBYTECODE") if name in os.environ}
    environment = {
        **kept,
        "HOME": str(tmp_path),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONUNBUFFERED": "1",
        "COLUMNS": "80",
    }
    one = Reader(home, environment, dict(zip(PORTS, _free_ports(len(PORTS)), strict=True)))
    yield one
    one.leave()


def follow(page: Path, reader: Reader) -> int:
    """Do what the page says; return how many blocks were run."""
    done = 0
    for block in blocks(page):
        place = f"{page.name}:{block.line}"
        if "not run" in block.said:
            assert block.said["not run"], f"{place}: say why it is not run"
            continue
        try:
            if block.language == "test":
                reader.type(block.text)
            elif block.language == "sh":
                reader.type(block.said.get("runs", block.text), int(block.said.get("exit", "0")))
            elif block.language == "python":
                code = reader.here / "snippet.py"
                code.write_text(reader.words(block.text), encoding="utf-8")
                reader.type("python snippet.py", int(block.said.get("exit", "0")))
                code.unlink()
            elif block.language == "yaml":
                assert block.title, f"{place}: give the YAML a title, the file that it is"
                reader.save(block.title, block.text, part="part" in block.said)
            elif block.language == "text":
                gone = differences(reader.words(block.text), reader.printed)
                assert not gone, f"not printed as shown: {gone}\nprinted:\n" + "\n".join(masked(reader.printed))
            else:
                raise AssertionError(f"{place}: a block of {block.language or 'no language'} cannot be run")
        except AssertionError as error:
            raise AssertionError(f"{place}: {error}") from error
        done += 1
    return done


def _recent_bars(symbols: tuple[str, ...]) -> pl.DataFrame:
    """Daily bars of every session of New York from 2020 to now, for a plan that has no end."""
    calendar = load_calendar("XNYS")
    today = datetime.now(UTC).date()
    days = calendar.sessions(datetime(2020, 1, 1).date(), today + timedelta(days=1))  # noqa: DTZ001 - a date
    return pl.concat(
        pl.DataFrame({"date": days}).with_row_index("n").select(
            pl.lit(symbol).alias("symbol"),
            "date",
            (100 + pl.col("n") % 7).cast(pl.Float64).alias("open"),
            (108 + pl.col("n") % 7).cast(pl.Float64).alias("high"),
            (99 + pl.col("n") % 7).cast(pl.Float64).alias("low"),
            (101 + pl.col("n") % 7).cast(pl.Float64).alias("close"),
            (1_000_000 + pl.col("n")).cast(pl.Int64).alias("volume"),
        )
        for symbol in symbols
    )  # fmt: skip


def test_the_readme_does_what_it_says(reader):
    bars = _recent_bars(("GS", "JPM", "MS"))
    with Replica(data=bars, until="clock") as replica:
        reader.environment.update(replica.credentials, REPLICA=replica.url)
        assert follow(ROOT / "README.md", reader) >= 5
        reader.type("marketsync query 'SELECT count(DISTINCT symbol) AS n FROM alpaca.daily_bars' --json")
        assert '"n": 3' in reader.printed


@pytest.mark.slow
def test_the_tutorial_does_what_it_says(reader):
    assert follow(DOCS / "tutorial.md", reader) >= 20


# ---------------------------------------------------------------- what every page names


def _commands() -> dict[str, set[str]]:
    """Every command of the command line with its options, as Typer knows them."""
    import typer.main

    from cli.main import build

    found: dict[str, set[str]] = {}

    def walk(group, names: list[str]) -> None:
        for name, command in group.commands.items():
            path = [*names, name]
            if hasattr(command, "commands"):
                walk(command, path)
            else:
                options = {o for p in command.params for o in (*p.opts, *p.secondary_opts) if o.startswith("-")}
                found[" ".join(path)] = options | {"--help"}

    walk(typer.main.get_command(build()), [])
    return found


_TYPED = re.compile(r"(?:^|`|[;|&(] ?)(?:\.venv/bin/)?marketsync ([a-z][^`|;&#)\n]*)", re.MULTILINE)


def _typed(page: Path) -> list[str]:
    text = re.sub(r'"[^"\n]*"', "TEXT", page.read_text(encoding="utf-8"))
    return [found[1].strip() for found in _TYPED.finditer(text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_and_option_that_a_page_names_exists(page):
    known = _commands()
    for typed in _typed(page):
        words = typed.split()
        name = next((n for n in (" ".join(words[:2]), words[0]) if n in known), None)
        if name is None and words[0] not in {one.split()[0] for one in known}:
            raise AssertionError(f"{page.name}: there is no command `marketsync {typed}`")
        for option in re.findall(r"(?<!\S)--?[a-z][a-z-]*", typed):
            options = known[name] if name else set()
            assert option in options, f"{page.name}: `marketsync {typed}`: {name} has no option {option}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_and_test_that_a_page_names_exists(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
    folders = "marketsync|providers|storage|tasks|flows|cli|tests|benchmarks|examples|scripts|docs|requirements"
    for file, name in re.findall(rf"`((?:{folders})/[\w./-]+)(?:::(\w+))?`", text):
        if file.startswith("benchmarks/out/"):
            continue  # `make bench` writes it
        assert (ROOT / file).exists(), f"{page.name} names {file}"
        if name:
            assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{page.name} names {file}::{name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_configuration_that_a_page_shows_is_valid(page, tmp_path):
    for block in blocks(page):
        if block.language != "yaml" or "not run" in block.said:
            continue
        assert block.title, f"{page.name}:{block.line}: give the YAML a title, the file that it is"
        if page.name in ("README.md", "tutorial.md") or block.title == "prefect.yaml":
            continue  # their files are used, with the others beside them; Prefect reads its own
        path = tmp_path / block.title
        path.write_text(block.text)
        problems = [str(problem) for problem in inspect_file(path).problems]
        assert not problems, f"{page.name}:{block.line}: {problems}"


def test_the_pages_name_no_address_of_a_registry_and_need_none():
    for page in PAGES:
        hosts = set(re.findall(r"https?://([^/\s)`\"']+)", page.read_text(encoding="utf-8")))
        others = {
            host for host in hosts if not re.fullmatch(r"(127\.0\.0\.1|localhost|.*\.example|HOST|SERVER)(:\w+)?", host)
        }
        assert not others, f"{page.name} links to {others}"


# ---------------------------------------------------------------- the machinery itself


def test_a_line_that_was_not_printed_is_told():
    shown = "a 1.5 s\n...\nlast\n"
    assert differences(shown, "before\na   2.0 s\nbetween\nlast\nafter\n") == []
    assert differences("a\nlast\n", "a\nbetween\nlast\n") == ["last"]
    assert differences("12 rows\n", "13 rows\n") == ["12 rows"]
    slow = "a\nquickstart: 0 rows, 2 of about 3 requests, 938.2 KB, 197 of 200 per 1 minute left, 5.1 s to go\nlast\n"
    assert differences("a\nlast\n", slow) == []


def test_a_block_that_fails_is_told_with_what_it_printed(reader, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("Text.\n\n```sh\necho fine\nmarketsync check nothing.yml\necho never\n```\n")
    with pytest.raises(
        AssertionError, match=r"(?s)page\.md:3: .*exit code 2, expected 0; it printed:\s+fine\s+nothing\.yml"
    ):
        follow(page, reader)


def test_comments_say_how_a_block_is_run(reader, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- not run: it is an example -->\n\n```sh\nexit 1\n```\n\n"
        "<!-- runs: mkdir inner; cd inner; export SEEN=yes -->\n```sh\nfalse\n```\n\n"
        '```yaml title="a.yml"\none: {two: 2}\nthree: 3\n```\n\n'
        '<!-- part -->\n```yaml title="a.yml"\none: {four: 4}\n```\n\n'
        "<!-- exit: 7 -->\n```sh\ncat a.yml; echo $SEEN $PWD\nexit 7\n```\n\n"
        "```text\none: {two: 2, four: 4}\nthree: 3\n```\n"
    )
    assert follow(page, reader) == 5
    assert reader.here == reader.folder / "inner"
    assert f"yes {reader.folder / 'inner'}" in reader.printed
