"""What is wrong with a configuration, in a person's words: pydantic's errors as problems with file, line and remedy.

Imported only when something is wrong. The models are the single source: allowed values, the fields of a place and the
sentence about a missing field are read from them.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from marketsync.document import Document, FieldPath, closest, dotted
from marketsync.errors import Problem

_INHERITED = ("request", "page", "response")
_SECRET_FIELDS = {"auth", "password", "client_secret", "client_id", "basic", "oauth2", "Authorization"}
HIDDEN = "(hidden)"
_PATTERNS = {
    r"^[a-z][a-z0-9_]*$": "lower-case letters, digits and _, beginning with a letter",
    r"^[A-Za-z][A-Za-z0-9_-]*$": "letters, digits, _ and -, beginning with a letter",
    r"^https?://[^\s]+$": "a URL that begins with https:// or http://",
}
_WANTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "a text",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a block of fields (name: value)",
    "model_type": "a block of fields (name: value)",
    "model_attributes_type": "a block of fields (name: value)",
    "date_type": "a date such as 2020-01-31",
    "date_parsing": "a date such as 2020-01-31",
    "date_from_datetime_parsing": "a date such as 2020-01-31",
    "date_from_datetime_inexact": "a date such as 2020-01-31",
    "datetime_type": "a date such as 2020-01-31",
    "datetime_parsing": "a date such as 2020-01-31",
    "datetime_from_date_parsing": "a date such as 2020-01-31",
}
_BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("more than", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("less than", "lt"),
}


def explain(error: ValidationError, document: Document, model: type[BaseModel]) -> list[Problem]:
    """Return one problem for each thing that is wrong, in the order of the file's lines."""
    return [one.problem for one in located(error, document, model)]


@dataclass(frozen=True)
class Located:
    """A problem, the path of the field that it is about, and what was probably meant: another name of the field, or
    another value."""

    path: FieldPath
    problem: Problem
    meant_name: str | None = None
    meant_value: str | None = None


def located(error: ValidationError, document: Document, model: type[BaseModel]) -> list[Located]:
    """Return each problem with the path of the field that it is about, in the order of the file's lines."""
    grouped: dict[FieldPath, list[ErrorDetails]] = {}
    for details in error.errors(include_url=False):
        grouped.setdefault(_path(details, document.value), []).append(details)
    found: list[Located] = []
    for path, several in grouped.items():
        if all(one["type"] in _WANTED for one in several) and any(
            other != path and other[: len(path)] == path for other in grouped
        ):
            continue  # another reading of the same value came further, and says more
        several = [one for one in several if one["type"] not in _WANTED] or several
        for where, message, remedy in dict.fromkeys(_sentences(path, several, document, model)):
            problem = Problem(document.name, document.line(where), dotted(where), message, remedy)
            name, meant = _meant(path, several[0], document, model)
            found.append(Located(where, problem, name, meant))
    return sorted(found, key=lambda one: one.problem.line or 0)


def _meant(
    path: FieldPath, one: ErrorDetails, document: Document, model: type[BaseModel]
) -> tuple[str | None, str | None]:
    if one["type"] == "extra_forbidden":
        near = closest(str(path[-1]), _fields_at(model, path[:-1]))
        siblings = _at(document.value, path[:-1])
        return (near if isinstance(siblings, dict) and near not in siblings else None), None
    if one["type"] in ("literal_error", "enum") and _at(document.value, path) == one["input"]:
        return None, closest(str(one["input"]), _expected(one))
    return None, None


def _expected(one: ErrorDetails) -> list[str]:
    return re.findall(r"'([^']*)'", str(one.get("ctx", {}).get("expected", "")))


def _path(details: ErrorDetails, value: Any) -> FieldPath:
    """Where in the file it is: pydantic's location without the parts that are only in its head."""
    location = details["loc"]
    direct, depth = _walked(location, value, details["type"])
    if len(location) > 2 and location[0] == "datasets" and location[2] in _INHERITED:
        shared, shared_depth = _walked(location[2:], value, details["type"])
        if shared and shared_depth > depth - 2:
            return shared
    return direct


def _walked(location: tuple[int | str, ...], value: Any, kind: str) -> tuple[FieldPath, int]:
    path: list[str | int] = []
    for index, step in enumerate(location):
        if isinstance(value, dict) and str(step) in value:
            value = value[str(step)]
            path.append(str(step))
        elif isinstance(value, list) and isinstance(step, int) and step < len(value):
            value = value[step]
            path.append(step)
        elif isinstance(value, dict) and kind == "missing" and index == len(location) - 1:
            return (*path, str(step)), len(path)
    return tuple(path), len(path)


def _sentences(
    path: FieldPath, several: list[ErrorDetails], document: Document, model: type[BaseModel]
) -> Iterator[tuple[FieldPath, str, str]]:
    wanted = list(dict.fromkeys(_WANTED[one["type"]] for one in several if one["type"] in _WANTED))
    if wanted:
        given = several[0]["input"]
        if given is None:
            yield path, f"has no value; it takes {' or '.join(wanted)}", "give one, or delete the line"
            return
        remedy = ""
        if "a text" in wanted and isinstance(given, bool | int | float):
            shown = document.written(path) or _shown(given, path)
            hidden = _shown(given, path) == HIDDEN
            about = _field_at(model, path)
            if hidden:
                remedy = "put it in quotes"
            elif about is None or _accepts(about, shown):
                remedy = f"put it in quotes: '{shown}'"
            elif _accepts(about, f"{shown} seconds"):
                remedy = f"write {shown} seconds, or with another unit"
        elif isinstance(given, str) and any("block" in w for w in wanted):
            fields = _fields_at(model, path)
            remedy = f"fields: {', '.join(fields)}" if fields else ""
        yield path, f"must be {' or '.join(wanted)}, and is {_kind(given, path)}", remedy
        return
    for one in several:
        yield from _sentence(path, one, document, model)


def _sentence(
    path: FieldPath, one: ErrorDetails, document: Document, model: type[BaseModel]
) -> Iterator[tuple[FieldPath, str, str]]:
    kind, context, given = one["type"], one.get("ctx", {}), one["input"]
    if kind == "missing":
        name = str(path[-1])
        about = _field_at(model, path)
        yield path, "is missing", about.description if about and about.description else f"add {name}: ..."
    elif kind == "extra_forbidden":
        fields = _fields_at(model, path[:-1])
        near = closest(str(path[-1]), fields)
        hint = f"did you mean {near}? " if near else ""
        yield path, f"there is no field '{path[-1]}' here", f"{hint}fields: {', '.join(fields)}"
    elif kind in ("literal_error", "enum"):
        allowed = _expected(one)
        near = closest(str(given), allowed)
        hint = f"did you mean {near}?" if near else ""
        yield path, f"{_shown(given, path)!r} is not one of {', '.join(allowed)}", hint
    elif kind in _BOUNDS:
        words, name = _BOUNDS[kind]
        yield path, f"must be {words} {context[name]}, and is {_shown(given, path)}", ""
    elif kind == "string_pattern_mismatch":
        wanted = _PATTERNS.get(context["pattern"], f"text that matches {context['pattern']}")
        yield path, f"'{_shown(given, path)}' cannot stand here", f"use {wanted}"
    elif kind in ("too_short", "string_too_short"):
        least = context["min_length"]
        about = _field_at(model, path)
        has = len(given) if hasattr(given, "__len__") else 0
        yield path, f"needs at least {least}, and has {has}", about.description or "" if about else ""
    elif kind in ("too_long", "string_too_long"):
        yield path, f"may have at most {context['max_length']}, and has {len(given)}", ""
    elif kind in ("value_error", "assertion_error"):
        for line in str(context.get("error", one["msg"])).split("\n"):
            where, message = _refined(path, line, document.value)
            if (written := document.written(where)) is not None:
                message = message.replace(f"quotes: '{_at(document.value, where)}'", f"quotes: '{written}'")
            message, remedy = _halves(message)
            yield where, message, remedy
    else:
        yield path, one["msg"][:1].lower() + one["msg"][1:], ""


def _refined(path: FieldPath, line: str, value: Any) -> tuple[FieldPath, str]:
    """Follow the field that a sentence of a model begins with, when it is in the file."""
    named = re.match(r"([\w-]+(?:\.[\w-]+)*)(: )?", line)
    if not named:
        return path, line
    steps: list[str | int] = []
    at = _at(value, path)
    for step in named[1].split("."):
        if isinstance(at, dict) and step in at:
            at = at[step]
            steps.append(step)
        elif isinstance(at, list) and step.isdigit() and int(step) < len(at):
            at = at[int(step)]
            steps.append(int(step))
        else:
            break
    if not steps or (named[2] is None and len(steps) < len(named[1].split("."))):
        return path, line
    return (*path, *steps), line[named.end() :] if named[2] else line


def _halves(message: str) -> tuple[str, str]:
    """Cut a model's sentence at its semicolon: what is wrong; what would be right."""
    first, cut, rest = message.partition("; ")
    return (first, rest) if cut else (message, "")


def _at(value: Any, path: FieldPath) -> Any:
    for step in path:
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def _shown(value: Any, path: FieldPath) -> str:
    if _SECRET_FIELDS & {str(step) for step in path}:
        return HIDDEN
    text = "true" if value is True else "false" if value is False else str(value)
    text = re.sub(r"(://[^:/@\s]*:)[^@/\s]+@", r"\1***@", text)
    return text if len(text) <= 60 else text[:57] + "..."


def _kind(value: Any, path: FieldPath) -> str:
    if isinstance(value, Mapping):
        return "a block of fields"
    if isinstance(value, list | tuple):
        return "a list"
    return f"'{_shown(value, path)}'"


# ------------------------------------------------------------ what the models say


def alternatives(annotation: Any) -> list[Any]:
    """Return the plain types of an annotation: Annotated and unions unwrapped, None left out."""
    if get_origin(annotation) is typing.Annotated:
        return alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [plain for part in get_args(annotation) for plain in alternatives(part) if plain is not type(None)]
    return [annotation]


def fields_of(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """Return the fields of a model by the names that a file uses."""
    return {info.alias or name: info for name, info in model.model_fields.items()}


def _models_at(annotation: Any, path: FieldPath) -> list[Any]:
    """Return the annotations that a path below an annotation can have."""
    if not path:
        return alternatives(annotation)
    found: list[Any] = []
    for plain in alternatives(annotation):
        step, rest = path[0], path[1:]
        if isinstance(plain, type) and issubclass(plain, BaseModel):
            info = fields_of(plain).get(str(step))
            if info is not None:
                found += _models_at(info.annotation, rest)
            elif (extra := typing.get_type_hints(plain, include_extras=True).get("__pydantic_extra__")) is not None:
                found += _models_at(get_args(extra)[1], rest)
        elif get_origin(plain) is dict:
            found += _models_at(get_args(plain)[1], rest)
        elif get_origin(plain) in (tuple, list) and isinstance(step, int):
            found += _models_at(get_args(plain)[0], rest)
    return found


def _fields_at(model: type[BaseModel], path: FieldPath) -> list[str]:
    return [
        name
        for plain in _models_at(model, path)
        if isinstance(plain, type) and issubclass(plain, BaseModel)
        for name in fields_of(plain)
    ]


def _field_at(model: type[BaseModel], path: FieldPath) -> FieldInfo | None:
    for plain in _models_at(model, path[:-1]):
        if isinstance(plain, type) and issubclass(plain, BaseModel):
            return fields_of(plain).get(str(path[-1]))
    return None


def _accepts(info: FieldInfo, text: str) -> bool:
    """Return whether a text passes what the models ask of this field's texts."""
    asked: Any = info.annotation
    for more in info.metadata:
        asked = typing.Annotated[asked, more]
    try:
        TypeAdapter(asked).validate_python(text)
    except ValidationError:
        return False
    return True


def allowed_values(annotation: Any) -> list[str]:
    """Return the values of a closed vocabulary (an enum, a Literal), or nothing."""
    found: list[str] = []
    for plain in alternatives(annotation):
        if get_origin(plain) is Literal:
            found += [str(value) for value in get_args(plain)]
        elif isinstance(plain, type) and issubclass(plain, Enum):
            found += [str(member.value) for member in plain]
    return found
