"""The $names of a definition: which there are, where they stand, and which of them have no meaning there.

The one place that knows the closed list: `marketsync check` and the client that sends requests both ask here. What a
name stands for in one request is `providers/request.py`'s.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from marketsync.definition import Dataset, Definition
from marketsync.document import FieldPath, closest

WINDOW_NAMES = ("start", "end", "last", "year", "month", "day")
# A name ends where it can: $session.zip is $session and the text .zip, $window.year-$window.month are two names.
# `$$` is a plain $ and no name. Group 2 is the name.
NAME = re.compile(r"\$(?:(\$)|((?:window|secret|match)\.[A-Za-z0-9_]+|header\.[A-Za-z0-9_-]+|[A-Za-z_][A-Za-z0-9_]*))")


# As shells and other tools write a name; nothing here is replaced by its value.
BRACED = re.compile(r"(?<!\$)\$\{(\w*)[^}]*\}?")


def names_in(value: Any) -> Iterator[tuple[FieldPath, str]]:
    """Yield every $name in a text or in the texts of a nested value, with where it stands ($$ is a plain $)."""
    for path, text in texts_in(value):
        for found in NAME.finditer(text):
            if found[2]:
                yield path, found[2]


def texts_in(value: Any) -> Iterator[tuple[FieldPath, str]]:
    """Yield every text of a nested value, with where it stands."""
    if isinstance(value, str):
        yield (), value
    elif isinstance(value, dict):
        for name, item in value.items():
            for path, text in texts_in(item):
                yield (str(name), *path), text
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            for path, text in texts_in(item):
                yield (index, *path), text


def braced(text: str) -> tuple[str, str] | None:
    """Return what is wrong with a text that holds ${NAME}, and what would be right; None when it holds none."""
    found = BRACED.search(text)
    return found and (f"{found[0]} means nothing here", f"a secret is written $secret.{found[1] or 'NAME'}")


def known_names(dataset: Dataset) -> list[str]:
    """Return the $names that a request of this dataset can use (`secret.NAME` stands for any secret)."""
    names = list(dataset.over.subjects)
    if dataset.over.session is None:
        names += [f"window.{part}" for part in WINDOW_NAMES]
    else:
        names.append("session")
    return [*names, "fields", "dataset", "secret.NAME"]


def request_names(dataset: Dataset) -> Iterator[tuple[FieldPath, str]]:
    """Yield every $name of a dataset's request, with the path of the field below `request`."""
    yield from names_in(dataset.request.model_dump(by_alias=True, include={"path", "query", "headers", "json_body"}))


def wrong_names(definition: Definition, datasets: Iterable[str] | None = None) -> Iterator[tuple[FieldPath, str, str]]:
    """Yield every $name that has no meaning where it stands: the field's path, what is wrong, what would be right.

    `datasets` are those to look at (None: all of the definition's).
    """
    for name in definition.datasets if datasets is None else datasets:
        dataset = definition.datasets[name]
        known = known_names(dataset)
        for part, text in request_names(dataset):
            if not text.startswith("secret.") and text not in known:
                yield ("datasets", name, "request", *part), *_wrong(text, dataset, known)
        for raw, column in dataset.schema_.items():
            place = ("datasets", name, "schema", raw, "value")
            for _, text in names_in(column.value or ""):
                subject = dataset.over.subjects.get(text)
                if text not in known:
                    yield place, f"there is no ${text}", choice(text, known)
                elif subject is not None and subject.batch > 1:
                    message = f"a request asks for {subject.batch} of ${text}, and their rows could not be told apart"
                    yield place, message, "leave batch out, or read the column from the answer"
        request = dataset.request.model_dump(by_alias=True, include={"path", "query", "headers", "json_body"})
        for path, text in texts_in(request):
            if wrong := braced(text):
                yield ("datasets", name, "request", *path), *wrong
    for path, text in texts_in(definition.auth.model_dump()):
        if wrong := braced(text):
            yield ("auth", *path), *wrong
    for path, text in names_in(definition.auth.model_dump()):
        if not text.startswith("secret."):
            yield ("auth", *path), f"${text} has no value here", "only $secret.NAME can stand in auth"


def _wrong(text: str, dataset: Dataset, known: list[str]) -> tuple[str, str]:
    if text.startswith(("header.", "match.")):
        return f"${text} is known in faults only", f"names: {', '.join(f'${one}' for one in known)}"
    if text == "session" or (text.partition(".")[0] == "window" and dataset.over.session is not None):
        wants = "session: XNYS" if text == "session" else "window: 1 month"
        return f"${text} has no value, since `over` is not cut that way", f"give over: {{{wants}}}"
    return f"there is no ${text}", choice(text, known)


def choice(name: str, known: list[str], sign: str = "$") -> str:
    """Return the remedy for an unknown name: what was probably meant, and all that there are."""
    meant = closest(name, known)
    hint = f"did you mean {sign}{meant}? " if meant else ""
    return f"{hint}{'names' if sign else 'datasets'}: {', '.join(sign + one for one in known)}"
