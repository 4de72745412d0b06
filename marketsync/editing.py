"""Adding to a user's upstream.yml without touching the rest of it: comments, order, quotes and spaces stay as they are.

The new part is put in as text at the end of its block; the result is read back, must hold exactly what was wanted, and
must pass the same checks as any configuration before it replaces the file in one step.
"""

from __future__ import annotations

import io
import json
import os
import re
import stat
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from yaml.nodes import MappingNode, Node, ScalarNode

from marketsync.configuration import problems_of
from marketsync.document import Document, parse_document, read_document
from marketsync.errors import ConfigurationError, Problem

_WIDTH = 110


def add_plan(path: Path | str, name: str, plan: Mapping[str, Any], *, replace: bool = False) -> None:
    """Add a plan (fields as in upstream.yml) to the file.

    Raises `ConfigurationError`, and leaves the file as it is, when there is a plan of this name (and not `replace`)
    or when the file would not be valid with it.
    """
    _add(Path(path), [("plans", name, dict(plan))], replace=replace)


def add_universe(path: Path | str, name: str, universe: Any, *, replace: bool = False) -> None:
    """Add a universe: a list of symbols, or {file: ...} or {rows: ...}. Raises as `add_plan` does."""
    _add(Path(path), [("universes", name, universe)], replace=replace)


def add_store(path: Path | str, name: str, url: str, *, replace: bool = False) -> None:
    """Add a store by its URL. Raises as `add_plan` does."""
    _add(Path(path), [("stores", name, url)], replace=replace)


def add_upstream(
    path: Path | str, name: str, upstream: Mapping[str, Any] | None = None, *, replace: bool = False
) -> None:
    """Add an upstream; None for one that has no settings of its own. Raises as `add_plan` does."""
    _add(Path(path), [("upstreams", name, dict(upstream) if upstream else None)], replace=replace)


def add_parts(path: Path | str, parts: Sequence[tuple[str, str, Any]], *, replace: bool = False) -> None:
    """Add several (block, name, value) at once: a plan together with the universe it needs. Raises as `add_plan`."""
    _add(Path(path), parts, replace=replace)


def _add(path: Path, parts: Sequence[tuple[str, str, Any]], *, replace: bool) -> None:
    before = read_document(path)
    original = path.read_bytes()
    text = original.decode("utf-8-sig")
    for block, name, value in parts:
        document = parse_document(text, str(path))
        if not isinstance(document.value, dict):
            raise ConfigurationError([Problem(before.name, 1, "", "the file holds no fields", "marketsync check")])
        present = document.value.get(block)
        if isinstance(present, dict) and name in present and not replace:
            raise ConfigurationError(
                [
                    Problem(
                        before.name,
                        document.line((block, name)),
                        f"{block}.{name}",
                        "is there already",
                        f"choose another name, or replace it with --replace; {block}: {', '.join(present)}",
                    )
                ]
            )
        text = _with(document, text, block, name, value)
    problems = problems_of(path, text)
    if problems:
        raise ConfigurationError(problems)
    _replace(path.resolve(), original, text)


def _with(document: Document, text: str, block: str, name: str, value: Any) -> str:
    wanted = dict(document.value)
    wanted[block] = {**(wanted.get(block) or {}), name: _as_read(value)}
    for edit in (_inserted, _rewritten):
        changed = edit(document, text, block, name, value)
        if changed is not None and _holds(changed, wanted):
            return changed
    raise ConfigurationError(
        f"{document.name}: {block}.{name} cannot be added by itself; write it into the file by hand:\n"
        + "\n".join(_written(name, value, 2))
    )


def _holds(text: str, wanted: Any) -> bool:
    try:
        return parse_document(text, "").value == wanted
    except ConfigurationError:
        return False


def _as_read(value: Any) -> Any:
    return parse_document("\n".join(_written("value", value, 0)), "").value["value"]


# ------------------------------------------------------------ as text


def _inserted(document: Document, text: str, block: str, name: str, value: Any) -> str | None:
    """Put the part in as lines; None where the block is not written line by line."""
    ending = "\r\n" if "\r\n" in text else "\n"
    lines = text.splitlines()
    found = _entry(document.root, block)
    if found is None:
        if lines and lines[-1].strip():
            lines.append("")
        lines += [f"{block}:", *_written(name, value, 2)]
        return ending.join(lines) + ending
    key, node = found
    if (isinstance(node, ScalarNode) and node.value in ("", "~", "null")) or _is_empty(node):
        at = key.start_mark.line
        bare = re.match(rf"^{re.escape(block)}:\s*(?:\{{\s*\}}|~|null)?\s*(#.*)?$", lines[at])
        if bare is None:
            return None
        lines[at : at + 1] = [f"{block}:" + (f"  {bare[1]}" if bare[1] else ""), *_written(name, value, 2)]
        return ending.join(lines) + ending
    if not isinstance(node, MappingNode) or node.flow_style:
        return None
    indent = node.value[0][0].start_mark.column
    present = _entry(node, name)
    if present is not None:
        first, last = present[0].start_mark.line, _last_line(present[1], present[0])
        lines[first : last + 1] = _written(name, value, indent)
    else:
        last = max(_last_line(item, key) for key, item in node.value)
        while last + 1 < len(lines) and _belongs(lines[last + 1], indent):
            last += 1
        between = _spacing(lines, node)
        lines[last + 1 : last + 1] = [*between, *_written(name, value, indent)]
    return ending.join(lines) + ending


def _entry(node: Node | None, name: str) -> tuple[ScalarNode, Node] | None:
    if isinstance(node, MappingNode):
        for key, value in node.value:
            if isinstance(key, ScalarNode) and key.value == name:
                return key, value
    return None


def _is_empty(node: Node) -> bool:
    return isinstance(node, MappingNode) and not node.value


def _last_line(node: Node, key: Node) -> int:
    """Return the last line (from 0) with something of the node; block nodes end where the next one begins."""
    if isinstance(node, ScalarNode):
        end = node.end_mark
        if node.style in ("|", ">"):
            return max(end.line - 1, node.start_mark.line)
        return max(end.line, key.start_mark.line)
    if getattr(node, "flow_style", False):
        return node.end_mark.line
    if isinstance(node, MappingNode):
        return max((_last_line(value, name) for name, value in node.value), default=key.start_mark.line)
    return max((_last_line(item, key) for item in node.value), default=key.start_mark.line)


def _belongs(line: str, indent: int) -> bool:
    """Whether a line after the last entry is a comment about it."""
    return line.lstrip().startswith("#") and len(line) - len(line.lstrip()) >= indent


def _spacing(lines: list[str], node: MappingNode) -> list[str]:
    """An empty line before the new entry where the entries are set apart by one."""
    if len(node.value) < 2:
        return []
    second = node.value[1][0].start_mark.line
    while second > 0 and lines[second - 1].lstrip().startswith("#"):
        second -= 1
    return [""] if second > 0 and not lines[second - 1].strip() else []


def _written(name: str, value: Any, indent: int) -> list[str]:
    """Write a field as lines of YAML: blocks for fields, brackets for lists."""
    space = " " * indent
    label = f"{space}{_scalar(name)}:"
    if value is None:
        return [label]
    if isinstance(value, Mapping):
        if not value:
            return [f"{label} {{}}"]
        return [label, *(line for key, item in value.items() for line in _written(str(key), item, indent + 2))]
    if isinstance(value, list | tuple):
        if any(isinstance(item, Mapping | list | tuple) for item in value):
            return [label, *(f"{space}  - {json.dumps(item, ensure_ascii=False)}" for item in value)]
        return _bracketed(label, [_scalar(item, flow=True) for item in value], indent)
    return [f"{label} {_scalar(value)}"]


def _bracketed(label: str, items: list[str], indent: int) -> list[str]:
    whole = f"{label} [{', '.join(items)}]"
    if len(whole) <= _WIDTH:
        return [whole]
    lines, space = [f"{label} ["], " " * (indent + 2)
    row = space
    for item in items:
        if len(row) + len(item) > _WIDTH and row.strip():
            lines.append(row.rstrip())
            row = space
        row += f"{item}, "
    return [*lines, row.rstrip(), " " * indent + "]"]


def _scalar(value: Any, *, flow: bool = False) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return str(value)
    text = str(value)
    if re.fullmatch(r"[A-Za-z0-9_./:$*+-][A-Za-z0-9_./:$*+ -]*" if not flow else r"[A-Za-z0-9_./$*+-]+", text):
        try:
            plain = parse_document(f"a: [{text}]" if flow else f"a: {text}", "").value["a"]
        except ConfigurationError:
            plain = None
        if plain == ([text] if flow else text):
            return text
    return json.dumps(text, ensure_ascii=False)


# ------------------------------------------------------------ written anew


def _rewritten(document: Document, text: str, block: str, name: str, value: Any) -> str | None:
    """Write the whole file anew, comments and quotes kept; for blocks in braces, where no line can be put in."""
    from ruamel.yaml import YAML, YAMLError
    from ruamel.yaml.util import load_yaml_guess_indent

    try:
        _, sequence, offset = load_yaml_guess_indent(text)
        yaml = YAML()
        yaml.preserve_quotes = True
        yaml.width = 4096
        if sequence is not None:
            yaml.indent(mapping=2, sequence=sequence, offset=offset or 0)
        content = yaml.load(text)
        part = yaml.load("\n".join(_written("value", value, 0)))["value"]
        if content.get(block) is None:
            content[block] = {}
        content[block][name] = part
        stream = io.StringIO()
        yaml.dump(content, stream)
    except (YAMLError, AttributeError, TypeError):
        return None
    return stream.getvalue()


def _replace(path: Path, original: bytes, text: str) -> None:
    """Put the new text in the file's place in one step, unless somebody else has changed the file meanwhile."""
    data = (b"\xef\xbb\xbf" if original.startswith(b"\xef\xbb\xbf") else b"") + text.encode()
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, stat.S_IMODE(path.stat().st_mode))
        if path.read_bytes() != original:
            raise ConfigurationError(f"{path} was changed by somebody else meanwhile; look at it, and try again")
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)
