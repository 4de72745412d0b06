"""One YAML file as plain values, with the line of every field.

YAML is read strictly: text stays text (dates, `no`, `12:30` and numbers with leading zeros such as the symbol 000001
are not reinterpreted), a name given twice is an error, and every error is a sentence with a line. What the values
mean is not known here; comments are kept by `editing.py`, which has its own reader.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from marketsync.errors import ConfigurationError, Problem

FieldPath = tuple[str | int, ...]

_ParserBase: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_NULL, _BOOL, _INT, _FLOAT, _STR = (f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str"))
_MERGE = "tag:yaml.org,2002:merge"
_DEEPEST = 40


class _Loader(_ParserBase):
    """The C parser with the few implicit types of JSON, instead of YAML 1.1's many."""

    yaml_implicit_resolvers: dict[Any, Any] = {}


for _tag, _pattern, _first in (
    (_NULL, r"~|null|Null|NULL|", "~nN\0"),
    (_BOOL, r"true|True|TRUE|false|False|FALSE", "tTfF"),
    (_INT, r"[-+]?(?:0|[1-9][0-9_]*)", "-+0123456789"),
    (_FLOAT, r"[-+]?(?:(?:0|[1-9][0-9_]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
    (_MERGE, r"<<", "<"),
):
    _Loader.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), [*_first.replace("\0", ""), ""])


@dataclass(frozen=True)
class Document:
    """A file's values, and where each stands.

    `renamed` tells fields that are looked at under another name than the file gives them: path to the file's name.
    """

    name: str
    value: Any
    root: Node | None
    renamed: dict[FieldPath, str] = field(default_factory=dict)

    def line(self, path: FieldPath) -> int | None:
        """Return the line (from 1) of the field, or of the nearest enclosing field that is there."""
        node, line = self.root, None
        for depth, step in enumerate(path, start=1):
            found = _child(node, self.renamed.get(path[:depth], step))
            if found is None:
                break
            line, node = found
        return line if line is not None else (1 if node is not None else None)

    def written(self, path: FieldPath) -> str | None:
        """Return the text of a value as it stands in the file; None where no single value stands."""
        node = self.root
        for step in path:
            found = _child(node, step)
            if found is None:
                return None
            node = found[1]
        return node.value if isinstance(node, ScalarNode) else None


def _child(node: Node | None, step: str | int) -> tuple[int, Node] | None:
    if isinstance(node, MappingNode):
        for key, value in node.value:
            if key.value == str(step):
                return key.start_mark.line + 1, value
        for key, value in node.value:
            if key.tag == _MERGE:
                for merged in value.value if isinstance(value, SequenceNode) else [value]:
                    found = _child(merged, step)
                    if found is not None:
                        return found
    elif isinstance(node, SequenceNode) and isinstance(step, int) and step < len(node.value):
        item = node.value[step]
        return item.start_mark.line + 1, item
    return None


def read_document(path: Path, name: str | None = None) -> Document:
    """Read one YAML file; `name` is what errors call it (default: the path).

    Raises `ConfigurationError` with every problem of the file's form: absent, a folder, unreadable, not UTF-8, empty,
    not YAML, the same name twice.
    """
    shown = name or str(path)
    return parse_document(_text(path, shown), shown)


def parse_document(text: str, name: str) -> Document:
    """Read YAML text; see `read_document`."""
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
    except yaml.YAMLError as error:
        raise ConfigurationError([_syntax_problem(error, text, name)]) from None
    finally:
        loader.dispose()
    reader = _Reader(name)
    value = reader.value(root, ()) if root is not None else None
    if reader.problems:
        raise ConfigurationError(reader.problems)
    if value is None:
        raise ConfigurationError([Problem(name, None, "", "the file is empty", "marketsync init writes a first one")])
    return Document(name, value, root)


def _text(path: Path, name: str) -> str:
    def refuse(message: str, remedy: str, line: int | None = None) -> ConfigurationError:
        return ConfigurationError([Problem(name, line, "", message, remedy)])

    try:
        data = path.read_bytes()
    except FileNotFoundError:
        near = closest(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else None
        folder = path.parent.resolve()
        raise refuse(
            "there is no such file", f"did you mean {near}?" if near else f"looked in {folder}; name another with -c"
        ) from None
    except IsADirectoryError:
        raise refuse("this is a folder, not a file", f"name the file in it, such as {path / 'upstream.yml'}") from None
    except OSError as error:
        raise refuse(f"the file cannot be read: {error.strerror}", "check who owns it and its permissions") from None
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise refuse("the file is encoded in UTF-16", "save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise refuse(f"byte 0x{data[error.start]:02x} is not UTF-8", "save the file as UTF-8", line) from None


class _Reader:
    """Turns nodes into values, gathering problems instead of stopping at the first."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.problems: list[Problem] = []
        self._done: dict[int, Any] = {}
        self._open: set[int] = set()

    def value(self, node: Node, path: FieldPath) -> Any:
        if isinstance(node, ScalarNode):
            return self._scalar(node, path)
        if id(node) in self._done:
            return self._done[id(node)]
        if id(node) in self._open or len(path) > _DEEPEST:
            self._complain(node, path, "this alias holds itself", "write the value out")
            return None
        self._open.add(id(node))
        if isinstance(node, SequenceNode):
            made: Any = [self.value(item, (*path, index)) for index, item in enumerate(node.value)]
        else:
            made = self._mapping(node, path)
        self._open.discard(id(node))
        self._done[id(node)] = made
        return made

    def _mapping(self, node: Node, path: FieldPath) -> dict[str, Any]:
        made: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key, value in node.value:
            if key.tag == _MERGE:
                for part in value.value if isinstance(value, SequenceNode) else [value]:
                    given = self.value(part, path)
                    if not isinstance(given, dict):
                        self._complain(part, path, "<< takes the fields of another block, and this is none")
                        continue
                    merged = {**given, **merged}
                continue
            if not isinstance(key, ScalarNode):
                self._complain(key, path, "a name must be plain text", "has a value with $ or { lost its quotes?")
                continue
            name = key.value
            if name in lines:
                self._complain(
                    key,
                    (*path, name),
                    f"'{name}' is given twice; the first is in line {lines[name]}",
                    "keep one of them",
                )
                continue
            lines[name] = key.start_mark.line + 1
            made[name] = self.value(value, (*path, name))
        return {**merged, **made} if merged else made

    def _scalar(self, node: ScalarNode, path: FieldPath) -> Any:
        tag, text = node.tag, node.value
        if tag == _STR:
            return text
        try:
            if tag == _NULL:
                return None
            if tag == _BOOL:
                return text.lower() == "true"
            if tag == _INT:
                return int(text.replace("_", ""))
            if tag == _FLOAT:
                return float(text.replace("_", ""))
        except ValueError:
            self._complain(node, path, f"'{text}' does not fit its tag !!{tag.rpartition(':')[2]}", "drop the tag")
            return None
        self._complain(node, path, f"the tag {tag} means nothing here", "drop it, or quote a text that begins with !")
        return None

    def _complain(self, node: Node, path: FieldPath, message: str, remedy: str = "") -> None:
        self.problems.append(Problem(self.name, node.start_mark.line + 1, dotted(path), message, remedy))


_SYNTAX = (
    ("mapping values are not allowed", "a colon stands where none can", "quote a text that holds ': '; check indents"),
    ("could not find expected ':'", "a line without a colon stands among fields", "write name: value; check indents"),
    ("did not find expected key", "this line does not line up with the ones above it", "give one level one indent"),
    (
        "did not find expected ',' or ']'",
        "a list that begins with [ is not closed before this line",
        "close it with ], and separate its items with commas",
    ),
    (
        "did not find expected ',' or '}'",
        "a block that begins with { is not closed before this line",
        "close it with }, and separate its fields with commas",
    ),
    ("did not find expected '-' indicator", "a list and fields are mixed", "begin every item with '- ', in one column"),
    ("found unexpected end of stream", "a quote that is opened is never closed", "close it"),
    ("found undefined alias", "*name refers to an anchor that is not above", "write &name at the first place"),
    ("unknown escape character", "a backslash in double quotes begins no known escape", "use single quotes"),
    ("found character that cannot start any token", "@, ` and % cannot begin a value", "put the value in quotes"),
    ("another document", "the file holds more than one document (---)", "keep one"),
    ("block sequence entries are not allowed", "'- ' cannot begin a list here", "begin the list on its own line"),
    ("special characters are not allowed", "the file holds a control character", "remove it"),
    ("control characters are not allowed", "the file holds a control character", "remove it"),
    ("did not find expected alphabetic", "a * or & without a name stands here", "put the value in quotes"),
)


def _syntax_problem(error: yaml.YAMLError, text: str, name: str) -> Problem:
    mark = getattr(error, "problem_mark", None)
    line = mark.line + 1 if mark is not None else None
    said = str(getattr(error, "problem", None) or getattr(error, "reason", None) or error)
    lines = text.splitlines()
    position = getattr(error, "position", None)
    if line is None and isinstance(position, int):
        line = text.count("\n", 0, position) + 1
    if line is not None:
        for number in (line, line - 1):
            around = lines[number - 1] if 0 < number <= len(lines) else ""
            if "\t" in around[: len(around) - len(around.lstrip())]:
                return Problem(name, number, "", "a tab stands in the indent", "YAML indents with spaces only")
    context = getattr(error, "context_mark", None)
    opened = f" (it begins in line {context.line + 1})" if context is not None and context.line + 1 != line else ""
    if line is not None and line <= len(lines) and "${" in lines[line - 1]:
        return Problem(name, line, "", "${...} means nothing here", "a secret is written $secret.NAME")
    for known, message, remedy in _SYNTAX:
        if known in said:
            return Problem(name, line, "", message + opened, remedy)
    return Problem(name, line, "", f"this is not YAML: {said}{opened}", "check indents, quotes and brackets")


def dotted(path: FieldPath) -> str:
    """Return a field's path as people write it: plans.nightly.datasets.0."""
    return ".".join(str(step) for step in path)


def closest(word: str, known: list[str]) -> str | None:
    """Return the known word that is most like this one, or None when none is."""
    from difflib import get_close_matches

    by_lower = {item.lower(): item for item in known}
    found = get_close_matches(str(word).lower(), list(by_lower), n=1, cutoff=0.6)
    return by_lower[found[0]] if found else None
