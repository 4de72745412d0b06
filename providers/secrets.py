"""Where the value of a `$secret.NAME` comes from, and how it is kept out of every text once it is known.

Looked up, first found: the environment variable NAME; the file that the variable NAME_FILE names; /run/secrets/NAME;
.secrets/NAME beside the configuration. Nothing is ever written.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from urllib.parse import quote

from marketsync.errors import SecretMissing
from providers.redaction import hide, redact

SECRET = re.compile(r"\$secret\.([A-Za-z_][A-Za-z0-9_]*)")
MOUNTED = Path("/run/secrets")


class Secrets:
    """The secrets of one configuration folder. Thread-safe; a value that was found is kept for the process."""

    def __init__(
        self,
        base: Path | str = ".",
        *,
        environment: Mapping[str, str] | None = None,
        mounted: Path = MOUNTED,
        place: Callable[[str], str] = lambda _: "",
    ):
        self._folder = Path(base) / ".secrets"
        self._environment = os.environ if environment is None else environment
        self._mounted = mounted
        self._place = place  # where a secret is asked for: the file, line and field, for a person
        self._values: dict[str, str] = {}
        self._origins: dict[str, str] = {}
        self._lock = threading.Lock()

    def get(self, name: str) -> str:
        """Return the value; `SecretMissing` says where to put it."""
        with self._lock:
            if name not in self._values:
                try:
                    value = self._find(name)
                    if not value:
                        raise SecretMissing(
                            f"the secret {name} has no value: set the environment variable {name}, or write it to "
                            f"{self._folder / name} (or name a file in {name}_FILE)"
                        )
                except SecretMissing as error:
                    place = self._place(name)
                    raise SecretMissing(f"{place}: {error}" if place else str(error)) from error.__cause__
                self._values[name] = value
                hide([value])
            return self._values[name]

    def origin(self, name: str) -> str:
        """Return where the value of a secret was found (empty: it was not looked up yet); never the value."""
        with self._lock:
            return self._origins.get(name, "")

    def _find(self, name: str) -> str | None:
        if value := self._environment.get(name):
            self._origins[name] = f"the environment variable {name}"
            return value
        pointed = self._environment.get(f"{name}_FILE")
        if pointed:
            try:
                self._origins[name] = f"{pointed}, which {name}_FILE names"
                return _read(name, Path(pointed), f", which {name}_FILE names")
            except OSError as error:
                raise SecretMissing(
                    f"the secret {name} cannot be read from {pointed}, which {name}_FILE names: {error.strerror}"
                ) from error
        for folder in (self._mounted, self._folder):
            path = folder / name
            try:
                value = _read(name, path)
                self._origins[name] = str(path)
                return value
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                raise SecretMissing(f"the secret {name} cannot be read from {path}: {error.strerror}") from error
        return None

    def fill(self, text: str) -> str:
        """Return the text with every `$secret.NAME` replaced by its value."""
        return SECRET.sub(lambda found: self.get(found[1]), text)

    def fill_url(self, url: str) -> str:
        """The same for the parts of a URL: what has a meaning in URLs (@ / : # %) is percent-encoded in the values. One
        `$secret.NAME` that is all of it is a URL already."""
        if SECRET.fullmatch(url):
            return self.fill(url)
        return SECRET.sub(lambda found: quote(self.get(found[1]), safe=""), url)

    def missing(self, names: Iterable[str]) -> dict[str, str]:
        """Return the names without a value, each with the sentence that says where to put it."""
        found = {}
        for name in names:
            try:
                self.get(name)
            except SecretMissing as error:
                found[name] = str(error)
        return found

    def redact(self, text: str) -> str:
        """Return the text without any secret that was looked up, nor anything that looks like one."""
        with self._lock:
            known = list(self._values.values())
        return redact(text, known)

    def __repr__(self) -> str:
        return f"Secrets({str(self._folder)!r})"


def _read(name: str, path: Path, whose: str = "") -> str:
    """Return what the file holds; SecretMissing when that cannot be sent."""

    def refuse(what: str, remedy: str) -> SecretMissing:
        return SecretMissing(f"the secret {name} has no value: {path}{whose} {what}; {remedy}")

    try:
        # an editor's last line break is no part of a secret, and a header cannot hold one
        value = path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError:
        raise refuse("is not UTF-8 text", "write the key to it again") from None
    if not value:
        raise refuse("is empty", "write the key to it")
    if any(ord(character) < 32 for character in value):
        raise refuse("holds more than one line, or a control character", "leave only the key in it")
    return value
