"""Loading and checking the three kinds of file: definitions, upstream.yml, maintenance.yml.

A loaded configuration is ready to run: every definition is found, merged with what its upstream overrides, and
known to fit the plans. Every problem of every file is gathered and raised at once. What needs more than the files'
own words (calendars, universe files, secrets) is looked up by `inspect_file` only, for `marketsync check`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError

from marketsync.calendars import instead_of
from marketsync.definition import Dataset, Definition, Limit, Subjects
from marketsync.document import Document, FieldPath, closest, dotted, parse_document, read_document
from marketsync.durations import parse_span
from marketsync.errors import ConfigurationError, Problem
from marketsync.names import braced, choice, known_names, request_names, texts_in, wrong_names
from marketsync.upstream import FOLDER_SCHEMES, LOG_SCHEMES, STORE_SCHEMES, Configuration, Plan, Universe, Upstream

if TYPE_CHECKING:
    from marketsync.explaining import Located
    from marketsync.maintenance import Maintenance

SHIPPED = Path(__file__).resolve().parent.parent / "providers" / "definitions"
DEFAULT_FILE = "upstream.yml"
_LONGEST_WINDOW_SECONDS = 501 * 366 * 86_400
SECRET = re.compile(r"\$secret\.([A-Za-z_][A-Za-z0-9_]*)")
_Model = TypeVar("_Model", bound=BaseModel)


class Kind(StrEnum):
    """Which of the three a file is."""

    UPSTREAM = "upstream"
    DEFINITION = "definition"
    MAINTENANCE = "maintenance"


# What only one kind of file has at its top; the more of them, the surer.
_MARKS = {
    Kind.DEFINITION: {"provider", "base_url", "datasets", "auth", "faults", "request", "response", "page", "limits"},
    Kind.MAINTENANCE: {"links", "policies", "reporting", "tuning"},
    Kind.UPSTREAM: {"upstreams", "plans", "universes", "market_hours", "state", "ledger", "maintenance"},
}


@dataclass(frozen=True)
class Loaded:
    """A configuration and what belongs to it.

    `definitions` maps each upstream to its definition with the upstream's overrides in it: base_url, attempts,
    limits (those of its tier only, and no longer marked by it), calendars, and `rows` in terms of upstreams.
    """

    path: Path
    configuration: Configuration
    definitions: Mapping[str, Definition]
    warnings: tuple[Problem, ...] = ()
    _universes: dict[str, tuple[str, ...]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def base(self) -> Path:
        """The folder of the file; what is relative in it is relative to this."""
        return self.path.parent

    @property
    def state(self) -> Path:
        """The folder of ledger, spool and limits."""
        return self.base / self.configuration.state

    def upstream(self, name: str) -> Upstream:
        """Return an upstream's own settings (defaults where the file gives none)."""
        return self.configuration.upstreams[name] or Upstream()

    def account(self, name: str) -> str:
        """Return the name that an upstream's limits are counted by."""
        return self.upstream(name).account or name

    def dataset(self, name: str) -> Dataset:
        """Return a dataset by upstream.dataset; `ConfigurationError` lists what there is."""
        upstream, _, dataset = name.partition(".")
        definition = self.definitions.get(upstream)
        if definition is not None and dataset in definition.datasets:
            return definition.datasets[dataset]
        known = [f"{up}.{one}" for up, spec in self.definitions.items() for one in spec.datasets]
        near = closest(name, known)
        hint = f"did you mean {near}? " if near else ""
        raise ConfigurationError(f"there is no dataset '{name}'; {hint}datasets: {', '.join(known) or 'none'}")

    def plan(self, name: str) -> Plan:
        """Return a plan by name; `ConfigurationError` lists what there is."""
        plans = self.configuration.plans
        if name in plans:
            return plans[name]
        near = closest(name, list(plans))
        hint = f"did you mean {near}? " if near else ""
        known = ", ".join(plans) or "none yet (marketsync plan add)"
        raise ConfigurationError(f"{self.path}: there is no plan '{name}'; {hint}plans: {known}")

    def store_url(self, name: str) -> str:
        """Return a store's URL with a relative folder made absolute: it is relative to the file, not to the shell."""
        url = self.configuration.stores[name].url
        scheme, _, place = url.partition("://")
        if scheme in FOLDER_SCHEMES and place and not place.startswith(("/", "~", "$")):
            return f"{scheme}://{(self.base / place).resolve()}"
        return url

    def with_tables(self, names: Iterable[str] | None = None) -> list[str]:
        """Return which of these stores (None: of all) have tables; the others are logs, which are followed."""
        stores = self.configuration.stores
        return [name for name in (stores if names is None else names) if not _is_log(stores[name].url)]

    def universe(self, name: str) -> tuple[str, ...]:
        """Return the symbols of a universe that is a list or a file, without repetitions, in order.

        Raises `ConfigurationError` for an unknown name, a missing or an empty file, and for a universe of another
        dataset's rows: reading those takes a store.
        """
        if name in self._universes:
            return self._universes[name]
        universes = self.configuration.universes
        if name not in universes:
            near = closest(name, list(universes))
            hint = f"did you mean {near}? " if near else ""
            raise ConfigurationError(
                f"{self.path}: there is no universe '{name}'; {hint}universes: {', '.join(universes) or 'none yet'}"
            )
        spec = universes[name]
        if spec.rows is not None:
            raise ConfigurationError(f"universe '{name}' is the rows of {spec.rows}: they are read from a store")
        symbols = _symbols_of(spec, self.base) if spec.file is not None else tuple(dict.fromkeys(spec.list or ()))
        self._universes[name] = symbols
        return symbols

    def place(self, upstream: str, path: FieldPath) -> str:
        """Return where a field of an upstream's definition stands, as people are told: file:line: field."""
        file = self._definition_file(upstream)
        try:
            line = read_document(file).line(path)
        except ConfigurationError:  # changed since it was loaded
            line = None
        return f"{file}:{line}: {dotted(path)}" if line else f"{file}: {dotted(path)}"

    def secret_place(self, name: str) -> str:
        """Return where a secret is asked for, as `place` does: in a definition, or here. Empty where nothing asks."""
        for file in [*map(self._definition_file, self.definitions), self.path]:
            try:
                document = read_document(file)
            except ConfigurationError:
                continue
            for path, text in texts_in(document.value):
                if name in SECRET.findall(text):
                    return f"{file}:{document.line(path)}: {dotted(path)}"
        return ""

    def _definition_file(self, upstream: str) -> Path:
        source = self.upstream(upstream).definition or upstream
        return SHIPPED / f"{source}.yml" if _is_shipped_name(source) else self.base / Path(source).expanduser()

    @cached_property
    def secrets(self) -> tuple[str, ...]:
        """The names of the secrets that the upstreams, the ledger and the stores mention."""
        texts = [definition.auth.model_dump_json() for definition in self.definitions.values()]
        texts += [
            definition.model_dump_json(include={"request", "datasets"}) for definition in self.definitions.values()
        ]
        texts += [store.url for store in self.configuration.stores.values()] + [self.configuration.ledger or ""]
        return tuple(dict.fromkeys(name for text in texts for name in SECRET.findall(text)))


def secrets_in(definition: Definition) -> tuple[str, ...]:
    """Return the names of the secrets that a definition's requests need."""
    text = definition.model_dump_json(include={"auth", "request", "datasets"})
    return tuple(dict.fromkeys(SECRET.findall(text)))


@dataclass(frozen=True)
class Inspection:
    """What `marketsync check` found in a file: what it is, what is wrong, what to think of, what it holds."""

    kind: Kind | None
    problems: tuple[Problem, ...] = ()
    warnings: tuple[Problem, ...] = ()
    summary: str = ""


# ------------------------------------------------------------ loading


def load_configuration(path: Path | str = DEFAULT_FILE) -> Loaded:
    """Load upstream.yml with the definitions that it names.

    Raises `ConfigurationError` with every problem of the file, of the definitions and between them.
    """
    path = Path(path)
    loaded, problems = _loaded(path, read_document(path))
    if problems or loaded is None:
        raise ConfigurationError(problems)
    return loaded


def load_definition(source: Path | str) -> Definition:
    """Load one definition: a file, or the name of one that is shipped (`alpaca`).

    Raises `ConfigurationError` with every problem.
    """
    path = Path(source)
    if isinstance(source, str) and _is_shipped_name(source):
        path = SHIPPED / f"{source}.yml"
        if not path.exists():
            raise ConfigurationError(_no_definition(source))
    definition, problems = _definition(read_document(path))
    if problems or definition is None:
        raise ConfigurationError(problems)
    return definition


def load_maintenance(path: Path | str) -> Maintenance:
    """Load maintenance.yml. Raises `ConfigurationError` with every problem."""
    maintenance, problems = _maintenance(read_document(Path(path)))
    if problems or maintenance is None:
        raise ConfigurationError(problems)
    return maintenance


def shipped_definitions() -> dict[str, Path]:
    """Return the definitions that come with MarketSync, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yml"))}


def check_file(path: Path | str) -> list[Problem]:
    """Return every problem of a definition, an upstream.yml or a maintenance.yml; see `inspect_file`."""
    return list(inspect_file(path).problems)


def problems_of(path: Path, text: str) -> list[Problem]:
    """Return every problem that an upstream.yml at `path` would have with this text; see `load_configuration`."""
    try:
        return _loaded(path, parse_document(text, str(path)))[1]
    except ConfigurationError as error:
        return error.problems


def inspect_file(path: Path | str, *, secrets_required: bool = False) -> Inspection:
    """Check a file of any of the three kinds, recognised by what is in it; nothing is raised.

    Looks further than loading does: calendars must exist, universe files must hold symbols, secrets should have
    values (warnings, or problems with `secrets_required`).
    """
    path = Path(path)
    kind: Kind | None = None
    try:
        document = read_document(path)
        kind = kind_of(document)
        if kind is Kind.DEFINITION:
            return _inspected_definition(document)
        if kind is Kind.MAINTENANCE:
            return _inspected_maintenance(document)
        return _inspected_configuration(path, document, secrets_required)
    except ConfigurationError as error:
        return Inspection(kind, tuple(error.problems))


def kind_of(document: Document) -> Kind:
    """Tell which kind of file this is by its top-level fields; `ConfigurationError` when there is no telling."""
    value = document.value
    if not isinstance(value, dict):
        is_what = "a list" if isinstance(value, list) else "a text"
        raise ConfigurationError(
            [
                Problem(
                    document.name,
                    1,
                    "",
                    f"the file holds {is_what}, not fields",
                    "begin with upstreams: (upstream.yml), provider: (a definition) or links: (maintenance.yml)",
                )
            ]
        )
    score = {kind: len(marks & value.keys()) for kind, marks in _MARKS.items()}
    best = max(score, key=lambda kind: score[kind])
    if score[best] == 0:
        for kind, marks in _MARKS.items():
            if any(closest(name, list(marks)) for name in value):
                return kind
        if "stores" in value:
            return Kind.UPSTREAM
        raise ConfigurationError(
            [
                Problem(
                    document.name,
                    1,
                    "",
                    "this is neither an upstream.yml, a definition nor a maintenance.yml: "
                    f"none of its fields ({', '.join(map(str, value))}) belongs to one",
                    "begin with upstreams:, provider: or links:",
                )
            ]
        )
    return best


# ------------------------------------------------------------ one file's models


def _definition(document: Document) -> tuple[Definition | None, list[Problem]]:
    """Return the definition (what of it can be understood) and everything that is wrong with it."""
    definition, problems = _modelled(document, Definition)
    if definition is not None:
        problems += _Definition(document, definition).problems()
    return definition, _in_order(problems)


def _maintenance(document: Document) -> tuple[Maintenance | None, list[Problem]]:
    from marketsync.maintenance import Maintenance

    maintenance, problems = _modelled(document, Maintenance)
    if maintenance is not None:
        for name, store in maintenance.stores.items():
            problems += _scheme_problems(document, ("stores", name), store.url)
    return maintenance, _in_order(problems)


# Where a part of a file is wrong, the rest is still checked: without that part, or with one of these in its place.
_STAND_INS: dict[tuple[str, ...], Any] = {
    ("provider",): "unknown",
    ("base_url",): "https://unknown.invalid",
    ("datasets",): {"unknown": {"schema": {"unknown": "str"}, "key": ["unknown"]}},
    ("upstreams", "*"): None,
    ("universes", "*"): ["_"],
    ("stores", "*"): "delta://./unknown",
    ("policies", "*"): {},
    ("plans", "*", "since"): "1900-01-01",
    ("plans", "*", "universe"): ["_"],
    ("limits", "*"): {"concurrent": 1},
    ("faults", "*"): {"when": {"status": 599}, "then": "fail"},
    ("datasets", "*", "limits", "*"): {"concurrent": 1},
    ("datasets", "*", "faults", "*"): {"when": {"status": 599}, "then": "fail"},
}
# Parts that can be left out without making another part look wrong.
_LOOSE = {
    "datasets": {"page", "response", "title", "published", "settles", "restates", "grace", "period"},
    "plans": {"schedule", "zone", "fresh_by", "segment", "budget", "judge", "tuning", "priority", "until"},
    "upstreams": {"base_url", "account", "tier", "limits", "calendars", "tuning", "definition"},
}
_NAMED_PARTS = {"datasets", "plans", "links", "upstreams", "universes", "stores", "policies", "market_hours"}


def _modelled(
    document: Document, model: type[_Model], broken: set[FieldPath] | None = None
) -> tuple[_Model | None, list[Problem]]:
    """Validate; where that fails, validate again without the `broken` parts, to find what else is wrong."""
    if not isinstance(document.value, dict):
        kind_of(document)
    value = document.value
    problems: list[Problem] = []
    for _ in range(6):
        try:
            return model.model_validate(value), problems
        except ValidationError as error:
            from marketsync.explaining import located

            known = {(problem.field, problem.message) for problem in problems}
            fresh = located(error, replace(document, value=value), model)
            problems += [one.problem for one in fresh if (one.problem.field, one.problem.message) not in known]
            for one in fresh:
                if broken is not None:
                    broken.add(one.path)
                if one.meant_name is not None:
                    document.renamed[(*one.path[:-1], one.meant_name)] = str(one.path[-1])
                value = _mended(value, one)
    return None, problems


def _mended(value: dict[str, Any], one: Located) -> dict[str, Any]:
    """Return `value` with the wrong part as it was probably meant, or without the smallest part that can be spared."""
    path, name, meant = one.path, one.meant_name, one.meant_value
    if not path:
        return value
    if name is not None:
        return _changed(value, path, lambda part, old: _renamed(part, old, name))
    if meant is not None:
        return _changed(value, path, lambda part, name: _put(part, name, meant))
    for length in range(len(path), 0, -1):
        front = path[:length]
        pattern = tuple("*" if index % 2 else str(step) for index, step in enumerate(front))
        stand_in = _STAND_INS.get(pattern)
        sparing = length == 3 and str(front[2]) in _LOOSE.get(str(front[0]), ())
        if pattern in _STAND_INS and _nameable(front):
            return _changed(value, front, lambda part, name, put=stand_in: _put(part, name, put))
        if sparing or (length == 2 and front[0] in _NAMED_PARTS) or length == 1:
            left = _changed(value, front, lambda part, name: {key: part[key] for key in part if key != name})
            if front[0] == "datasets" and not left.get("datasets"):
                return _put(left, "datasets", _STAND_INS[("datasets",)])
            return left
    return value


def _renamed(part: Any, old: Any, new: str) -> Any:
    return {new if key == old else key: value for key, value in part.items()} if isinstance(part, dict) else part


def _nameable(path: FieldPath) -> bool:
    return all(isinstance(step, int) or re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", step) for step in path)


def _put(part: Any, name: Any, value: Any) -> Any:
    if isinstance(part, list):
        return [value if index == name else item for index, item in enumerate(part)]
    return {**part, name: value}


def _changed(value: Any, path: FieldPath, change: Callable[[Any, Any], Any]) -> Any:
    """Return a copy of a nested value in which `change(part, last step)` replaces the part that the path ends in."""
    if len(path) == 1:
        return change(value, path[0]) if isinstance(value, dict | list) else value
    try:
        inner = value[path[0]]
    except (KeyError, IndexError, TypeError):
        return value
    return _put(value, path[0], _changed(inner, path[1:], change))


def _in_order(problems: Iterable[Problem]) -> list[Problem]:
    return sorted(dict.fromkeys(problems), key=lambda problem: (problem.file, problem.line or 0))


# ------------------------------------------------------------ definitions


class _Definition:
    """What a definition's models cannot tell by themselves: names used and not given, given and not used."""

    def __init__(self, document: Document, definition: Definition) -> None:
        self.document = document
        self.definition = definition
        self.given = document.value.get("datasets")
        self.found: list[Problem] = []

    def problems(self) -> list[Problem]:
        own = [name for name in self.definition.datasets if isinstance(self.given, dict) and name in self.given]
        for path, message, remedy in wrong_names(self.definition, own):
            if path[2:3] == ("request",):
                path = self._inherited(str(path[1]), path[2:])
            self._say(path, message, remedy)
        for name in own:
            dataset = self.definition.datasets[name]
            self._unused(name, dataset)
            self._over(name, dataset)
            self._listed(name, dataset)
            self._faults(("datasets", name, "faults"), dataset.faults)
        self._faults(("faults",), self.definition.faults)
        self._rows()
        return self.found

    def _say(self, path: FieldPath, message: str, remedy: str = "") -> None:
        self.found.append(Problem(self.document.name, self.document.line(path), dotted(path), message, remedy))

    def _listed(self, name: str, dataset: Dataset) -> None:
        for subject, spec in dataset.over.subjects.items():
            place = ("datasets", name, "over", subject)
            if spec.batch > 1 and not spec.join:
                self._say((*place, "join"), "is empty, so the values of one request run into one another", "join: ','")
            elif wrong := refused_symbol(spec, len(dataset.over.subjects), spec.list or ()):
                self._say((*place, "list"), *wrong)

    def _unused(self, name: str, dataset: Dataset) -> None:
        known = known_names(dataset)
        used: set[str] = set()  # and what was probably meant by a name that there is not
        for _, text in request_names(dataset):
            used.add(text.partition(".")[0])
            used.add((closest(text, known) or "").partition(".")[0])
        over = ("datasets", name, "over")
        for subject, spec in dataset.over.subjects.items():
            if subject in used:
                continue
            meant = closest(subject, ["window", "session"])
            if meant and spec.universe and getattr(dataset.over, meant) is None:
                self._say((*over, subject), f"there is no field '{subject}' here", f"did you mean {meant}?")
            else:
                self._say(
                    (*over, subject),
                    f"every request would be the same: the request does not use ${subject}",
                    f"put ${subject} into its path, query or json",
                )
        for cut in ("window", "session"):
            if getattr(dataset.over, cut) is not None and cut not in used:
                use = "$session" if cut == "session" else "$window.start and $window.end, or $window.year"
                self._say(
                    (*over, cut), f"every {cut} would be asked the same: the request does not use ${cut}", f"use {use}"
                )

    def _over(self, name: str, dataset: Dataset) -> None:
        subjects = dataset.over.subjects
        window = dataset.over.window
        if window is not None and parse_span(window.every).approximate_seconds > _LONGEST_WINDOW_SECONDS:
            place = ("datasets", name, "over", "window")
            self._say(place, f"a window of {window.every} is longer than any market", "at most 500 years")
        if subjects and dataset.subject_column is None:
            first = next(iter(subjects))
            self._say(
                ("datasets", name, "schema"),
                f"no column says which {first} a row is about",
                f"name a column {first} (`as: {first}`), or add {first}: {{type: str, value: ${first}}}",
            )

    def _inherited(self, name: str, path: FieldPath) -> FieldPath:
        """Where a dataset's field stands: at the dataset, or at the definition that it comes from."""
        own = _depth(self.document.value, ("datasets", name, *path)) - 2
        return path if _depth(self.document.value, path) > own else ("datasets", name, *path)

    def _faults(self, place: FieldPath, faults: Iterable[Any]) -> None:
        for index, fault in enumerate(faults):
            patterns = [fault.when.body or "", *fault.when.header.values()]
            patterns += [v for v in fault.when.path.values() if isinstance(v, str) and re.fullmatch(r"/.*/", v)]
            groups = max(re.compile(pattern.strip("/")).groups for pattern in patterns)
            for what in ("wait", "limit"):
                text = getattr(fault, what)
                if text is None:
                    continue
                path = (*place, index, what)
                match = re.fullmatch(r"\$match\.(\d+)", text)
                if match:
                    if not 1 <= int(match[1]) <= groups:
                        has = f"has {groups} group{'s' if groups != 1 else ''} ( )" if groups else "has no group ( )"
                        self._say(path, f"{text} is empty: the rule's regular expression {has}", "add a group (\\d+)")
                elif what == "limit":
                    self._say(path, f"'{text}' is not a group of the rule", "write $match.1")
                elif text.startswith("$") and not re.fullmatch(r"\$header\.[A-Za-z0-9-]+", text):
                    near = "$header.Retry-After, $match.1 or a span such as 60 seconds"
                    self._say(path, f"'{text}' does not say how long", f"write {near}")

    def _rows(self) -> None:
        """References to another dataset's rows: it must be there, hold the column, and not come back to its child."""
        definition = self.definition
        parents: dict[str, list[str]] = {}
        known = list(self.given) if isinstance(self.given, dict) else list(definition.datasets)
        for name, dataset in definition.datasets.items():
            for subject, spec in dataset.over.subjects.items():
                if spec.rows is None:
                    continue
                path = ("datasets", name, "over", subject, "rows")
                provider, dot, parent = spec.rows.rpartition(".")
                if dot and provider != definition.provider:
                    continue  # another upstream's; the configuration that has both can tell
                if parent not in known:
                    self._say(path, f"there is no dataset '{parent}'", choice(parent, known, sign=""))
                    continue
                parents.setdefault(name, []).append(parent)
                column = spec.column or subject
                if parent in definition.datasets and column not in definition.datasets[parent].columns:
                    columns = list(definition.datasets[parent].columns)
                    self._say(path, f"{parent} has no column '{column}'", f"name it with column: {', '.join(columns)}")
        for name in parents:
            chain = _cycle(name, parents)
            if chain:
                subject = next(s for s, spec in definition.datasets[name].over.subjects.items() if spec.rows)
                self._say(
                    ("datasets", name, "over", subject, "rows"),
                    f"datasets wait for one another's rows: {' -> '.join(chain)}",
                    "let one of them have a universe or a list",
                )


def _cycle(name: str, parents: Mapping[str, list[str]]) -> list[str] | None:
    """Return the way from a dataset over its parents back to itself, when it is the first name of that circle."""
    stack = [[name]]
    while stack:
        chain = stack.pop()
        for parent in parents.get(chain[-1], []):
            if parent == name:
                return [*chain, name] if name == min(chain) else None
            if parent not in chain:
                stack.append([*chain, parent])
    return None


def _depth(value: Any, path: FieldPath) -> int:
    """Return how many steps of the path there are in a nested value."""
    for depth, step in enumerate(path):
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            return depth
    return len(path)


# ------------------------------------------------------------ upstream.yml with its definitions


def _loaded(path: Path, document: Document) -> tuple[Loaded | None, list[Problem]]:
    broken: set[FieldPath] = set()
    configuration, problems = _modelled(document, Configuration, broken)
    if configuration is None:
        return None, problems
    whole = _Whole(path, document, configuration)
    whole.unreadable |= {
        str(part[1])
        for part in broken
        if part[:1] == ("upstreams",) and part[2:3] in ((), ("definition",)) and part[1:]
    }
    problems += whole.problems()
    loaded = Loaded(path, configuration, whole.merged(), tuple(whole.warnings))
    return loaded, _in_order(problems)


class _Whole:
    """An upstream.yml together with the definitions that it names."""

    def __init__(self, path: Path, document: Document, configuration: Configuration) -> None:
        self.path = path
        self.document = document
        self.configuration = configuration
        self.found: list[Problem] = []
        self.warnings: list[Problem] = []
        self.read: dict[Path, Definition | None] = {}
        self.named: dict[Path, list[str]] = {}  # the datasets as a file names them, those with mistakes too
        self.given: dict[str, list[str]] = {}  # the same by upstream
        self.definitions: dict[str, Definition] = {}
        self.unreadable: set[str] = set()

    def problems(self) -> list[Problem]:
        for name, upstream in self.configuration.upstreams.items():
            if name in self.unreadable:
                continue
            definition = self._definition_of(name, upstream or Upstream())
            if definition is None:
                self.unreadable.add(name)
            else:
                self.definitions[name] = definition
                self._overrides(name, upstream or Upstream(), definition)
        for name, store in self.configuration.stores.items():
            self.found += _scheme_problems(self.document, ("stores", name), store.url)
        for name, universe in self.configuration.universes.items():
            if universe.rows is not None:
                self._rows_universe(name, universe)
            elif universe.list is not None and not universe.list:
                self._say(("universes", name), "the universe is empty", "list at least one symbol")
        for name, plan in self.configuration.plans.items():
            self._plan(name, plan)
        return self.found

    def merged(self) -> dict[str, Definition]:
        """Return each upstream's definition with what the upstream overrides."""
        return {
            name: merged_definition(name, definition, self.configuration.upstreams[name] or Upstream())
            for name, definition in self.definitions.items()
        }

    def _say(self, path: FieldPath, message: str, remedy: str = "") -> None:
        self.found.append(self._problem(path, message, remedy))

    def _problem(self, path: FieldPath, message: str, remedy: str = "") -> Problem:
        return Problem(self.document.name, self.document.line(path), dotted(path), message, remedy)

    def _definition_of(self, name: str, upstream: Upstream) -> Definition | None:
        source = upstream.definition or name
        place = ("upstreams", name, "definition") if upstream.definition else ("upstreams", name)
        if _is_shipped_name(source):
            path = SHIPPED / f"{source}.yml"
            if not path.exists():
                self._say(place, *_no_definition(source).split("; ", 1))
                return None
        else:
            path = self.path.parent / Path(source).expanduser()
            if not path.is_file():
                near = closest(path.name, [p.name for p in path.parent.glob("*.y*ml")])
                hint = f"did you mean {path.parent / near}?" if near else "the path is relative to this file"
                self._say(place, f"there is no definition file {path}", hint)
                return None
        if path not in self.read:
            try:
                document = read_document(path)
                definition, problems = _definition(document)
                self.named[path] = list(document.value.get("datasets") or ())
            except ConfigurationError as error:
                definition, problems = None, error.problems
            self.found += problems
            self.read[path] = definition
        self.given[name] = self.named.get(path, [])
        return self.read[path]

    def _overrides(self, name: str, upstream: Upstream, definition: Definition) -> None:
        tiers = tiers_of(definition)
        if upstream.tier is not None and upstream.limits is None and upstream.tier not in tiers:
            near = closest(upstream.tier, tiers)
            hint = f"did you mean {near}? " if near else ""
            known = f"{hint}tiers: {', '.join(tiers)}" if tiers else "this definition has no tiers; leave it out"
            self._say(("upstreams", name, "tier"), f"there is no tier '{upstream.tier}'", known)
        elif upstream.tier is None and len(tiers) > 1 and upstream.limits is None:
            self.warnings.append(
                self._problem(
                    ("upstreams", name),
                    f"no tier is given, so the limits of '{tiers[0]}' hold",
                    f"choose with tier: {', '.join(tiers)}",
                )
            )
        for dataset in upstream.calendars:
            if dataset not in self.given[name]:
                self._say(
                    ("upstreams", name, "calendars", dataset),
                    f"there is no dataset '{dataset}'",
                    choice(dataset, self.given[name], sign=""),
                )

    def _rows_universe(self, name: str, universe: Universe) -> None:
        place = ("universes", name, "rows")
        dataset = self._dataset(place, str(universe.rows))
        if dataset is None:
            return
        for column in (universe.column or "symbol", *universe.where):
            if column not in dataset.columns:
                where = ("universes", name, "where", column) if column in universe.where else place
                self._say(
                    where,
                    f"{universe.rows} has no column '{column}'",
                    f"columns: {', '.join(dataset.columns)}",
                )

    def _dataset(self, place: FieldPath, name: str) -> Dataset | None:
        upstream, dot, dataset = name.partition(".")
        if upstream in self.unreadable or (not dot and place[0] == "plans"):
            return None  # told already
        if upstream not in self.definitions:
            if place[0] != "plans":
                self._say(place, f"there is no upstream '{upstream}'", f"upstreams: {', '.join(self.definitions)}")
            return None
        known = self.definitions[upstream].datasets
        if dataset not in known:
            given = self.given[upstream]
            if dataset not in given:  # a mistake of its own was told where it stands
                self._say(place, f"{upstream} has no dataset '{dataset}'", choice(dataset, given, sign=""))
            return None
        return known[dataset]

    def _plan(self, name: str, plan: Plan) -> None:
        for index, full in enumerate(plan.datasets):
            given = self.document.value.get("plans")  # absent where the file spells it otherwise
            listed = isinstance(given, dict) and isinstance((given.get(name) or {}).get("datasets"), list)
            place: FieldPath = ("plans", name, "datasets", *((index,) if listed else ()))
            dataset = self._dataset(place, full)
            if dataset is None:
                continue
            over = dataset.over
            if plan.since is None and dataset.time_column is not None:
                self._say(
                    ("plans", name, "since"),
                    f"is missing: {full} has rows over time, so it must be known where to begin",
                    "since: 2020-01-01",
                )
            for subject, spec in over.subjects.items():
                if spec.universe == "$plan" and plan.universe is None:
                    known = ", ".join(self.configuration.universes) or "none yet; a list will do: [AAPL, MSFT]"
                    self._say(
                        ("plans", name, "universe"),
                        f"is missing: {full} is asked {subject} by {subject}",
                        f"universes: {known}",
                    )
                elif spec.universe not in (None, "$plan") and spec.universe not in self.configuration.universes:
                    plans = closest(str(spec.universe), ["plan"]) is not None
                    self._say(
                        place,
                        f"{full} is asked over the universe '{spec.universe}', which this file does not have",
                        f"{'did you mean $plan in the definition? Else ' if plans else ''}"
                        f"add universes: {{{spec.universe}: [...]}}",
                    )
                elif wrong := self._refused(name, plan, spec, len(over.subjects)):
                    self._say(*wrong)
                elif spec.rows is not None and "." in spec.rows:
                    provider = spec.rows.partition(".")[0]
                    if provider != self.definitions[full.partition(".")[0]].provider:
                        self._dataset(("upstreams",), spec.rows)
        stores = self.configuration.stores
        if all(store in stores and _is_log(stores[store].url) for store in plan.stores):
            others = [store for store, spec in stores.items() if not _is_log(spec.url)]
            self._say(
                ("plans", name, "stores"),
                f"nothing of the plan could be read: {', '.join(plan.stores)} is a log of batches, whose rows can be "
                "neither judged nor looked up, and from which no other store can be filled",
                f"name one with tables as well: stores: [{', '.join([*others[:1], *plan.stores])}]"
                if others
                else "add one with tables to this file's stores (tables: delta://./data), and name it here too",
            )
        if plan.universe is not None and not isinstance(plan.universe, str) and not plan.universe:
            self._say(("plans", name, "universe"), "the list is empty", "list at least one symbol")

    def _refused(self, name: str, plan: Plan, spec: Subjects, names: int) -> tuple[FieldPath, str, str] | None:
        """Return where a plan's list, or the one of the universe it names, holds what cannot be asked for, and why."""
        universe = plan.universe if spec.universe == "$plan" else spec.universe
        if isinstance(universe, tuple):
            place, symbols = ("plans", name, "universe"), universe
        else:
            named = self.configuration.universes.get(str(universe))
            place, symbols = ("universes", str(universe)), (named and named.list) or ()
        for index, symbol in enumerate(symbols):
            if wrong := refused_symbol(spec, names, [symbol]):
                return (*place, index), *wrong
        return None


def refused_symbol(spec: Subjects, names: int, symbols: Iterable[str]) -> tuple[str, str] | None:
    """Return what is wrong with the first symbol that cannot be asked for as itself, and the remedy; None for none.

    `spec` says how symbols go into a request, `names` how many names the dataset is asked over. A symbol that holds
    the text which joins several would be taken for others by the provider, even when it is asked alone.
    """
    for symbol in symbols:
        if not symbol.strip() or any(ord(character) < 32 or ord(character) == 127 for character in symbol):
            return f"{symbol!r} is not a symbol: it is empty, or holds a line break or another control character", (
                "write one symbol an item, or a line"
            )
        if spec.batch > 1 and spec.join in symbol:
            parts = ", ".join(f"'{part}'" for part in symbol.split(spec.join))
            return (
                f"the symbol '{symbol}' holds '{spec.join}', which stands between the symbols of one request here: the "
                f"provider would answer for {parts}",
                "if those are meant, write them as symbols of their own; else ask with another `join`, or with "
                "`batch: 1`, in a definition of your own",
            )
        if "|" in symbol and (names > 1 or spec.batch > 1):
            return f"the symbol '{symbol}' holds '|', which joins the names of a subject here", (
                "ask for it in a definition of your own that is asked over one name, with `batch: 1`"
            )
    return None


def tiers_of(definition: Definition) -> list[str]:
    """Return the tiers that a definition's limits name, in the order of the file."""
    limits = [*definition.limits, *(limit for dataset in definition.datasets.values() for limit in dataset.limits)]
    return list(dict.fromkeys(limit.tier for limit in limits if limit.tier is not None))


def merged_definition(name: str, definition: Definition, upstream: Upstream) -> Definition:
    """Return the definition as the upstream called `name` uses it: its URL, its tier's limits, its calendars."""
    tiers = tiers_of(definition)
    tier = upstream.tier or (tiers[0] if tiers else None)

    def of_tier(limits: tuple[Limit, ...]) -> tuple[Limit, ...]:
        chosen = (limit for limit in limits if limit.tier is None or limit.tier == tier)
        return tuple(limit.model_copy(update={"tier": None}) for limit in chosen)

    datasets: dict[str, Dataset] = {}
    for dataset_name, dataset in definition.datasets.items():
        change: dict[str, Any] = {}
        if dataset.limits:
            change["limits"] = () if upstream.limits is not None else of_tier(dataset.limits)
        if dataset_name in upstream.calendars:
            calendar = upstream.calendars[dataset_name]
            change["calendar"] = calendar
            if dataset.over.session is not None:
                change["over"] = dataset.over.model_copy(update={"session": calendar})
        rows = {
            subject: spec.model_copy(update={"rows": _of_upstream(spec, definition.provider, name)})
            for subject, spec in dataset.over.subjects.items()
            if spec.rows is not None
        }
        if rows:
            over = change.get("over", dataset.over)
            change["over"] = over.model_copy(update={**over.subjects, **rows})
        datasets[dataset_name] = dataset.model_copy(update=change) if change else dataset
    return definition.model_copy(
        update={
            "base_url": upstream.base_url or definition.base_url,
            "attempts": upstream.tuning.attempts or definition.attempts,
            "limits": of_tier(definition.limits) if upstream.limits is None else of_tier(upstream.limits),
            "datasets": datasets,
        }
    )


def _of_upstream(spec: Subjects, provider: str, upstream: str) -> str:
    owner, dot, dataset = str(spec.rows).rpartition(".")
    return f"{upstream}.{dataset}" if not dot or owner == provider else str(spec.rows)


def _is_shipped_name(source: str) -> bool:
    return not source.endswith((".yml", ".yaml")) and "/" not in source and os.sep not in source


def _no_definition(name: str) -> str:
    known = list(shipped_definitions())
    near = closest(name, known)
    hint = f"did you mean {near}? " if near else ""
    return (
        f"there is no shipped definition '{name}'; {hint}shipped: {', '.join(known)}; "
        "a definition of your own is named by its path, ./my_provider.yml"
    )


def _scheme_problems(document: Document, place: FieldPath, url: str) -> Iterator[Problem]:
    scheme, separator, rest = url.partition("://")
    line = document.line(place)
    if wrong := braced(url):
        yield Problem(document.name, line, dotted(place), *wrong)
    elif not separator:
        yield Problem(document.name, line, dotted(place), f"'{url}' is not a store's URL", "write delta://./data")
    elif scheme not in STORE_SCHEMES:
        near = closest(scheme, list(STORE_SCHEMES))
        hint = f"did you mean {near}://? " if near else ""
        known = ", ".join(f"{one}://" for one in STORE_SCHEMES)
        yield Problem(document.name, line, dotted(place), f"there is no store {scheme}://", f"{hint}stores: {known}")
    elif not rest:
        named = "./data" if scheme in FOLDER_SCHEMES else "user:$secret.PASSWORD@host/database"
        yield Problem(document.name, line, dotted(place), f"'{url}' names no place", f"write {scheme}://{named}")


def _is_log(url: str) -> bool:
    return url.partition("://")[0] in LOG_SCHEMES


def _symbols_of(universe: Universe, base: Path) -> tuple[str, ...]:
    """Read the symbols of a file: one a line, or the column of a CSV (with a header, the column named or `symbol`)."""
    path = base / Path(str(universe.file)).expanduser()

    def refuse(message: str, remedy: str) -> ConfigurationError:
        return ConfigurationError([Problem(str(path), None, "", message, remedy)])

    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise refuse("there is no such universe file", "the path is relative to upstream.yml") from None
    except (OSError, UnicodeDecodeError) as error:
        raise refuse(f"the universe file cannot be read: {error}", "it is a text file in UTF-8") from None
    if path.suffix.lower() == ".csv" or universe.column is not None:
        import csv

        rows = csv.reader(line for line in lines if line.strip() and not line.lstrip().startswith("#"))
        header = [name.strip() for name in next(rows, [])]
        column = universe.column or "symbol"
        if column not in header:
            near = closest(column, header)
            hint = f"did you mean {near}? " if near else ""
            raise refuse(f"the file has no column '{column}'", f"{hint}columns: {', '.join(header) or 'none'}")
        index = header.index(column)
        values: Iterable[str] = (row[index] for row in rows if len(row) > index)
    else:
        values = [line.partition("#")[0].strip() for line in lines]
        for number, value in enumerate(values, start=1):
            if re.search(r"[,;\s]", value):
                raise refuse(
                    f"line {number} is '{value}', and one symbol a line is wanted",
                    "name the file .csv or give `column:` if it is a table with a header; a symbol that has a comma "
                    "or a space in it can stand in a `list:`",
                )
    symbols = tuple(dict.fromkeys(symbol for value in values if (symbol := value.strip())))
    if not symbols:
        raise refuse("the universe file holds no symbol", "write one symbol a line")
    return symbols


# ------------------------------------------------------------ marketsync check


def _inspected_definition(document: Document) -> Inspection:
    definition, problems = _definition(document)
    if definition is not None:
        problems += _calendar_problems(document, _calendars_of(definition))
    summary = ""
    if definition is not None:
        summary = f"the definition of {definition.provider}: {_counted(len(definition.datasets), 'dataset')}"
    return Inspection(Kind.DEFINITION, tuple(_in_order(problems)), (), summary)


def _inspected_maintenance(document: Document) -> Inspection:
    maintenance, problems = _maintenance(document)
    summary = ""
    if maintenance is not None:
        summary = f"{_counted(len(maintenance.stores), 'store')}, {_counted(len(maintenance.links), 'link')}"
    return Inspection(Kind.MAINTENANCE, tuple(problems), (), summary)


def _inspected_configuration(path: Path, document: Document, secrets_required: bool) -> Inspection:
    loaded, problems = _loaded(path, document)
    if loaded is None:
        return Inspection(Kind.UPSTREAM, tuple(problems))
    configuration = loaded.configuration
    for name, universe in configuration.universes.items():
        if universe.file is not None:
            try:
                loaded.universe(name)
            except ConfigurationError as error:
                place = ("universes", name, "file")
                problems += [
                    Problem(
                        document.name, document.line(place), dotted(place), f"{one.message}: {one.file}", one.remedy
                    )
                    for one in error.problems
                ]
    for name, plan in configuration.plans.items():
        problems += _refused_in_files(document, loaded, name, plan)
        holes = plan.judge.known_holes
        if holes is not None and not (path.parent / Path(holes).expanduser()).is_file():
            place = ("plans", name, "judge", "known_holes")
            message = f"there is no file {path.parent / holes}"
            remedy = "the path is relative to this file"
            problems.append(Problem(document.name, document.line(place), dotted(place), message, remedy))
    places: list[tuple[FieldPath, str]] = [(("market_hours", name), name) for name in configuration.market_hours]
    for name, upstream in configuration.upstreams.items():
        for dataset, calendar in (upstream.calendars if upstream else {}).items():
            places.append((("upstreams", name, "calendars", dataset), calendar))
    problems += _calendar_problems(document, places)
    for source in {(upstream and upstream.definition) or name for name, upstream in configuration.upstreams.items()}:
        file = SHIPPED / f"{source}.yml" if _is_shipped_name(source) else path.parent / Path(source).expanduser()
        try:
            own = read_document(file)
            definition, _ = _definition(own)
        except ConfigurationError:
            continue  # told already
        if definition is not None:
            problems += _calendar_problems(own, _calendars_of(definition))
    missing = [problem for name in loaded.secrets if (problem := _secret_problem(document, loaded, name))]
    warnings = list(loaded.warnings)
    (problems if secrets_required else warnings).extend(missing)
    parts = (
        (configuration.upstreams, "upstream"),
        (configuration.universes, "universe"),
        (configuration.stores, "store"),
        (configuration.plans, "plan"),
    )
    summary = ", ".join(_counted(len(part), noun) for part, noun in parts)
    return Inspection(Kind.UPSTREAM, tuple(_in_order(problems)), tuple(_in_order(warnings)), summary)


def _refused_in_files(document: Document, loaded: Loaded, name: str, plan: Plan) -> Iterator[Problem]:
    """Yield what a plan's datasets cannot ask for in the files that its universes are kept in."""
    for full in plan.datasets:
        upstream, _, dataset = full.partition(".")
        definition = loaded.definitions.get(upstream)
        over = definition.datasets[dataset].over.subjects if definition and dataset in definition.datasets else {}
        for spec in over.values():
            universe = plan.universe if spec.universe == "$plan" else spec.universe
            named = loaded.configuration.universes.get(universe) if isinstance(universe, str) else None
            if named is None or named.file is None:
                continue
            try:
                wrong = refused_symbol(spec, len(over), loaded.universe(str(universe)))
            except ConfigurationError:
                continue  # told already
            if wrong:
                place = ("universes", str(universe), "file")
                message = f"{named.file}: {wrong[0]} (plan {name}, {full})"
                yield Problem(document.name, document.line(place), dotted(place), message, wrong[1])


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _calendars_of(definition: Definition) -> list[tuple[FieldPath, str]]:
    places: list[tuple[FieldPath, str]] = []
    for name, dataset in definition.datasets.items():
        if dataset.calendar is not None:
            places.append((("datasets", name, "calendar"), dataset.calendar))
        if dataset.over.session is not None:
            places.append((("datasets", name, "over", "session"), dataset.over.session))
    return places


def _calendar_problems(document: Document, places: Iterable[tuple[FieldPath, str]]) -> list[Problem]:
    return [
        Problem(document.name, document.line(place), dotted(place), f"there is no calendar '{name}'", remedy)
        for place, name in places
        if (remedy := instead_of(name)) is not None
    ]


def _secret_problem(document: Document, loaded: Loaded, name: str) -> Problem | None:
    """Return why a secret has no value that can be used, looked up as `providers.secrets` does; None when it has."""
    if os.environ.get(name):
        return None
    pointed = os.environ.get(f"{name}_FILE")
    own = loaded.base / ".secrets" / name
    for file in [Path(pointed)] if pointed else [Path("/run/secrets") / name, own]:
        try:
            text = file.read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            if not pointed:
                continue
            return _about_secret(
                document, loaded, name, f"{name}_FILE names {file}, which is not there", "write it, or unset it"
            )
        except OSError as error:
            return _about_secret(
                document, loaded, name, f"{file} cannot be read: {error.strerror}", "check who owns it"
            )
        except UnicodeDecodeError:
            return _about_secret(document, loaded, name, f"{file} is not UTF-8 text", "write the key to it again")
        if not (value := text.strip()):
            return _about_secret(document, loaded, name, f"{file} is empty", "write the key to it")
        if any(ord(character) < 32 for character in value):
            return _about_secret(
                document,
                loaded,
                name,
                f"{file} holds more than one line, or a control character",
                "leave only the key in it",
            )
        return None
    remedy = f"set the environment variable {name}, or write it to {own}"
    return _about_secret(document, loaded, name, "", remedy)


def _about_secret(document: Document, loaded: Loaded, name: str, why: str, remedy: str) -> Problem:
    users = [up for up, spec in loaded.definitions.items() if name in SECRET.findall(spec.auth.model_dump_json())]
    place: FieldPath = ("upstreams", users[0]) if users else ()
    message = f"the secret {name} has no value" + (f": {why}" if why else "")
    return Problem(document.name, document.line(place), dotted(place), message, remedy)
