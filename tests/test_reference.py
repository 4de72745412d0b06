"""The generated reference: it is up to date, complete, and its examples do what it says they do."""

from __future__ import annotations

import copy
import gzip
import json
import re
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import jsonschema
import polars as pl
import pytest
import yaml

from marketsync import reference
from marketsync.configuration import check_file, load_configuration, load_definition, shipped_definitions
from marketsync.definition import Definition, Verdict
from marketsync.explaining import fields_of
from marketsync.gate import seal
from marketsync.maintenance import Maintenance
from marketsync.upstream import Configuration
from providers.decode import Decoder
from providers.faults import Rules
from providers.paging import next_step
from providers.request import Ask, build
from providers.secrets import Secrets
from providers.transport import Answer

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
DEFINITIONS = sorted((EXAMPLES / "definitions").glob("*.yml"))
NOW = datetime(2026, 3, 2, tzinfo=UTC)


def test_the_committed_pages_and_schemas_are_what_the_models_say():
    assert reference.differing(ROOT / "docs") == []


def test_check_ends_with_1_for_a_page_that_is_not_current_and_write_mends_it(tmp_path, capsys):
    assert reference.main(["--check", str(tmp_path)]) == 1
    assert reference.main(["--write", str(tmp_path)]) == 0
    assert reference.main(["--check", str(tmp_path)]) == 0
    (tmp_path / "reference" / "upstream.md").write_text("edited")
    capsys.readouterr()
    assert reference.main(["--check", str(tmp_path)]) == 1
    assert "upstream.md is not up to date" in capsys.readouterr().err


def models_of(model: Any, found: set[Any]) -> set[Any]:
    from marketsync.explaining import alternatives

    def walk(annotation: Any) -> None:
        for plain in alternatives(annotation):
            if isinstance(plain, type) and hasattr(plain, "model_fields"):
                models_of(plain, found)
            for part in getattr(plain, "__args__", ()):
                walk(part)

    if model not in found:
        found.add(model)
        for info in model.model_fields.values():
            walk(info.annotation)
    return found


@pytest.mark.parametrize(
    ("model", "pages"),
    [(Definition, ["definition"]), (Configuration, ["upstream", "definition"]), (Maintenance, ["maintenance"])],
)
def test_every_field_of_every_model_has_a_sentence_and_stands_on_its_page(model, pages):
    text = "".join((ROOT / "docs" / "reference" / f"{page}.md").read_text() for page in pages)
    for one in models_of(model, set()):
        for name, info in fields_of(one).items():
            assert (info.description or "").endswith("."), f"{one.__name__}.{name} has no sentence"
            assert f"| `{name}` | " in text


def test_every_link_of_a_page_leads_to_a_heading_of_it():
    for page in reference.PAGES:
        text = reference.page_text(page)
        headings = {reference._anchor(title) for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}
        assert set(re.findall(r"\]\(#([^)]*)\)", text)) <= headings


def test_every_value_of_a_closed_vocabulary_is_explained():
    for enum in (section.model for page in reference.PAGES for section in page.sections):
        if not hasattr(enum, "model_fields"):
            told = reference.sentences_of(enum)
            assert list(told) == [member.value for member in enum]
            assert all(told.values())


def test_every_yaml_snippet_of_a_page_can_be_read():
    for page in reference.PAGES:
        snippets = re.findall(r"```yaml\n(.*?)```", reference.page_text(page), re.DOTALL)
        assert snippets
        for snippet in snippets:
            for line in snippet.splitlines() if snippet.startswith(("over", "request")) else [snippet]:
                yaml.safe_load(line)


# ------------------------------------------------------------ schemas


def schema(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "docs" / "schema" / f"{name}.json").read_text())


VALID = [
    *[("definition", path) for path in [*shipped_definitions().values(), *DEFINITIONS]],
    ("upstream", EXAMPLES / "upstream.yml"),
    ("maintenance", EXAMPLES / "maintenance.yml"),
]


@pytest.mark.parametrize(("kind", "path"), VALID, ids=lambda value: getattr(value, "name", value))
def test_an_editor_finds_nothing_wrong_with_a_file_that_is_right(kind, path):
    jsonschema.validate(read(path), schema(kind))


def read(path: Path) -> Any:
    from marketsync.document import read_document

    return read_document(path).value


@pytest.mark.parametrize(
    ("kind", "path", "change"),
    [
        ("definition", DEFINITIONS[1], lambda value: value["datasets"]["daily"]["page"].update(tokn="x")),
        ("definition", DEFINITIONS[1], lambda value: value["datasets"]["daily"]["schema"].update(close="f46")),
        ("definition", DEFINITIONS[1], lambda value: value["faults"][0].update(then="cooldown")),
        ("definition", DEFINITIONS[1], lambda value: value.pop("base_url")),
        ("definition", DEFINITIONS[1], lambda value: value["datasets"]["daily"]["over"].update(x={"univers": "y"})),
        ("upstream", EXAMPLES / "upstream.yml", lambda value: value["upstreams"]["alpaca"].update(teir="basic")),
        ("upstream", EXAMPLES / "upstream.yml", lambda value: value["plans"]["bars"].pop("datasets")),
        ("maintenance", EXAMPLES / "maintenance.yml", lambda value: value["links"]["bars"].update(stores=["a"])),
    ],
)
def test_an_editor_marks_what_check_refuses(kind, path, change, tmp_path):
    value = copy.deepcopy(read(path))
    change(value)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(value, schema(kind))
    (tmp_path / "file.yml").write_text(json.dumps(value))
    assert check_file(tmp_path / "file.yml") != []


# ------------------------------------------------------------ the examples


def test_every_example_passes_check():
    assert [check_file(path) for path in [*DEFINITIONS, EXAMPLES / "upstream.yml", EXAMPLES / "maintenance.yml"]] == [
        []
    ] * (len(DEFINITIONS) + 2)
    assert list(load_configuration(EXAMPLES / "upstream.yml").definitions) == ["alpaca", "tushare", "nasdaq_data_link"]


def test_a_provider_is_described_in_less_than_forty_lines():
    assert len(DEFINITIONS) == 3
    assert all(len(path.read_text().splitlines()) < 40 for path in DEFINITIONS)


class Server:
    """Answers what the comments of an example say its provider answers, and keeps what it was asked."""

    def __init__(self, *answers: tuple[int, bytes]) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[str, dict[str, str], dict[str, str]]] = []

    def fetch(self, name: str, ask: Ask) -> tuple[pl.DataFrame, list[Verdict]]:
        definition = load_definition(EXAMPLES / "definitions" / f"{name}.yml")
        spec = definition.datasets[ask.dataset]
        decoder, rules = Decoder(spec), Rules(definition, ask.dataset)
        secrets = Secrets(EXAMPLES, environment={"ACME_KEY": "k1", "BEACON_KEY": "k2"})
        cursor: dict[str, Any] | None = None
        batches, verdicts = [], []
        while True:
            request = build(definition, ask, cursor, secrets)
            parts = urlsplit(request.url)
            self.asked.append((parts.path, dict(parse_qsl(parts.query)), dict(request.headers)))
            status, body = self.answers.pop(0)
            answer = Answer(status, {}, body, NOW, NOW)
            opened = decoder.open(body)
            verdicts.append(rules.judge(answer, opened).verdict)
            if verdicts[-1] is not Verdict.ROWS:
                break
            batches.append(decoder.rows(opened, {"symbol": ask.values["symbol"][0]} if "value" in str(spec) else None))
            step = next_step(spec, cursor, opened.document, {}, batches[-1], definition.base_url, request.url)
            cursor = step.cursor
            if cursor is None:
                break
        gated = seal(spec, batches)
        assert gated.rejected.height == 0, gated.rejected
        return gated.frame, verdicts


YEAR = (datetime(2024, 1, 1, tzinfo=UTC), datetime(2025, 1, 1, tzinfo=UTC))


def test_the_cursor_example_reads_two_pages():
    def page(day: str, cursor: str | None) -> bytes:
        row = {"ticker": "AAPL", "date": day, "close": 185.64, "volume": 82488700}
        return json.dumps({"data": [row], "meta": {"cursor": cursor}}).encode()

    server = Server((200, page("2024-01-02", "Mg==")), (200, page("2024-01-03", None)))
    rows, _ = server.fetch("cursor", Ask("daily", {"symbol": ("AAPL", "IBM")}, *YEAR, *YEAR))
    assert rows["date"].to_list() == [date(2024, 1, 2), date(2024, 1, 3)]
    (path, query, headers), (_, second, _) = server.asked
    assert path == "/v1/prices"
    assert query == {"symbols": "AAPL,IBM", "from": "2024-01-01", "to": "2024-12-31", "page_size": "1000"}
    assert second == {**query, "cursor": "Mg=="}
    assert headers["Authorization"] == "Bearer k1"


def test_the_next_url_example_sends_its_key_with_every_page_and_takes_an_empty_answer():
    def page(t: int, more: str | None) -> bytes:
        body: dict[str, Any] = {"count": 1, "results": [{"t": t, "o": 187.1, "c": 187.2, "v": 12345}]}
        return json.dumps({**body, "next_url": more} if more else body).encode()

    further = "https://api.beacon.example/v2/bars/AAPL/1/2?cursor=Y2I"
    server = Server((200, page(1704205800000, further)), (200, page(1704205860000, None)))
    month = (YEAR[0], datetime(2024, 2, 1, tzinfo=UTC))
    rows, _ = server.fetch("next_url", Ask("minutes", {"symbol": ("AAPL",)}, *month, *month))
    assert rows["symbol"].to_list() == ["AAPL", "AAPL"]
    assert rows["ts"][0] == datetime(2024, 1, 2, 14, 30, tzinfo=UTC)
    assert server.asked[0][0] == "/v2/bars/AAPL/1704067200000/1706745599999"
    assert server.asked[1][1] == {"cursor": "Y2I", "apiKey": "k2"}
    nothing = Server((200, b'{"count": 0, "status": "OK"}'))
    _, verdicts = nothing.fetch("next_url", Ask("minutes", {"symbol": ("AAPL",)}, *month, *month))
    assert verdicts == [Verdict.EMPTY]


def test_the_csv_example_reads_a_packed_file_for_the_whole_year():
    text = "Date;Open;High;Low;Close;Volume\n02.01.2024;139.12;140.00;-;139.94;1432510\n"
    server = Server((200, gzip.compress(text.encode("latin-1"))))
    part = (datetime(2024, 6, 1, tzinfo=UTC), datetime(2024, 7, 1, tzinfo=UTC))
    rows, _ = server.fetch("csv_by_year", Ask("daily", {"symbol": ("SAP",)}, *part, *YEAR))
    assert server.asked[0][0] == "/history/2024/SAP.csv.gz"
    assert rows.row(0) == ("SAP", date(2024, 1, 2), 139.12, 140.0, None, 139.94, 1432510)
